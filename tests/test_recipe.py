from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from prefopt.errors import PrefoptError
from prefopt.recipe import Recipe, load_recipe, validate_trainer_keys
from prefopt.run_folder import check_run

DOCS = Path(__file__).parents[1] / "docs" / "recipes.md"
MINIMAL = """\
model: {path: a/model}
data: {path: rows.jsonl}
trainer: {algorithm: dpo, beta: 0.1}
"""
KNOWN = {
    "sft": {"learning_rate", "packing"},
    "reward_model": {"learning_rate", "center_rewards_coefficient"},
    "dpo": {"learning_rate", "beta", "loss_type"},
}


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A minimal recipe at recipes/x.yaml, seen from the current directory."""
    monkeypatch.chdir(tmp_path)
    path = Path("recipes/x.yaml")
    path.parent.mkdir()
    path.write_text(MINIMAL)
    return path


def message(path: Path, *overrides: str, text: str | None = None, known: Any = KNOWN) -> str:
    """The one line with which a recipe is refused."""
    if text is not None:
        path.write_text(text)
    with pytest.raises(PrefoptError) as caught:
        load_recipe(path, overrides, known)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# --- what a recipe says --------------------------------------------------------------------------


def test_minimal_recipe_has_every_default(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert (recipe.name, recipe.run_dir, recipe.seed) == ("x", "runs/x", 0)
    assert recipe.model.path == "a/model"
    assert recipe.model.dtype == "float32"
    assert recipe.model.lora is None
    assert recipe.data.split == "train"
    assert (recipe.data.max_prompt_length, recipe.data.max_length) == (1024, 2048)
    assert recipe.judge is None
    assert recipe.eval is None
    assert recipe.rollout.engine == "transformers"
    assert recipe.trainer.algorithm == "dpo"
    assert recipe.trainer.options == {"beta": 0.1}


def test_run_dir_follows_the_name_unless_given(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["name=other"]).run_dir == "runs/other"
    assert load_recipe(recipe_file, ["name=other", "run_dir=/d"]).run_dir == "/d"


def test_empty_lora_is_an_adapter_with_defaults(recipe_file: Path) -> None:
    lora = load_recipe(recipe_file, ["model.lora={}"]).model.lora
    assert lora is not None
    assert (lora.r, lora.alpha, lora.dropout, lora.target_modules) == (16, 32, 0, "all-linear")
    lora = load_recipe(recipe_file, ["model.lora.target_modules=[q_proj, v_proj]"]).model.lora
    assert lora is not None
    assert lora.target_modules == ["q_proj", "v_proj"]


def test_quantised_weights_need_an_adapter(recipe_file: Path) -> None:
    model = load_recipe(recipe_file, ["model.quantization=nf4", "model.lora={}"]).model
    assert model.quantization == "nf4"
    assert "expected 'model.lora' beside it" in message(recipe_file, "model.quantization=nf4")
    refused = message(recipe_file, "model.quantization=nf5", "model.lora={}")
    assert "'model.quantization': expected 'nf4' or 'int8', found 'nf5'" in refused


def test_sources_keep_order_and_weights(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file, ["data.path=null", "data.sources=[{path: b, weight: 2}, {path: a}]"]
    )
    assert recipe.data.sources is not None
    assert [(s.path, s.weight, s.split) for s in recipe.data.sources] == [
        ("b", 2.0, "train"),
        ("a", 1.0, "train"),
    ]


def test_rollout_without_keys_is_the_default(recipe_file: Path) -> None:
    default = load_recipe(recipe_file).rollout
    recipe_file.write_text(MINIMAL + "rollout:\n  # temperature: 0.7\n")
    assert load_recipe(recipe_file).rollout == default


def test_a_recipe_does_not_change(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        recipe.trainer.algorithm = "sft"


# --- overrides -----------------------------------------------------------------------------------


def test_overrides_are_yaml_and_the_last_wins(recipe_file: Path) -> None:
    overrides = ["trainer.beta=0.2", "trainer.beta=5e-2", "data.max_length=null", "seed=7"]
    overrides += ["trainer.loss_type=[ipo, sft]", "model.lora.r=8", "judge.kind=reward_model"]
    overrides += ["judge.path=a=b"]
    recipe = load_recipe(recipe_file, overrides, KNOWN)
    assert recipe.trainer.options == {"beta": 0.05, "loss_type": ["ipo", "sft"]}
    assert recipe.data.max_length is None
    assert recipe.seed == 7
    assert recipe.model.lora is not None
    assert recipe.model.lora.r == 8
    assert recipe.judge is not None
    assert recipe.judge.path == "a=b"


def test_an_override_can_supply_a_missing_section(recipe_file: Path) -> None:
    recipe_file.write_text("model: {path: m}\ntrainer: {algorithm: dpo}\n")
    assert load_recipe(recipe_file, ["data.path=d"]).data.path == "d"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.bta=1", "unknown key 'trainer.bta'; did you mean 'trainer.beta'?"),
        ("traner.beta=1", "unknown key 'traner'; did you mean 'trainer'?"),
        ("model.lora.alfa=1", "unknown key 'model.lora.alfa'; did you mean 'model.lora.alpha'?"),
        ("data.max_length=2k", "'data.max_length': expected a whole number, found '2k'"),
        ("judge.path=x", "missing key 'judge.kind'"),
        (
            "judge={kind: reward_model, path: x, gpu_memory: 30}",
            "'judge.gpu_memory': expected less than 1, found 30",
        ),
        ("trainer.algorithm=dpq", "unknown algorithm 'dpq'; did you mean 'dpo'? known: dpo, "),
        ("model.path.x=1", "'model.path' is 'a/model', which has no keys; set it as a whole"),
        (
            "data.sources.0.path=b",
            "'data.sources': expected a list, found {'0': {'path': 'b'}}",
        ),
        ("seed", "expected section.key=value"),
        ("=1", "expected section.key=value"),
        ("data..path=1", "expected section.key=value"),
        ("trainer.beta=[1", "line 1, column 3: expected ',' or ']'"),
    ],
)
def test_a_bad_override_is_named(recipe_file: Path, override: str, expected: str) -> None:
    """By its key: a password may stand in the value."""
    key = override.partition("=")[0]
    assert message(recipe_file, "seed=1", override).startswith(f"override {key!r}: {expected}")


def test_a_fault_of_the_file_is_not_blamed_on_an_override(recipe_file: Path) -> None:
    text = MINIMAL.replace("{path: rows.jsonl}", "{path: rows.jsonl, max_rows: 0}")
    assert message(recipe_file, "data.split=test", text=text) == (
        "recipes/x.yaml: 'data.max_rows': expected greater than or equal to 1, found 0"
    )


# --- refused recipes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("beta", "bta", "unknown key 'trainer.bta'; did you mean 'trainer.beta'?"),
        ("beta", "max_length", "unknown key 'trainer.max_length'; did you mean 'data.max_length'?"),
        (
            "beta",
            "qqq",
            "unknown key 'trainer.qqq'; "
            "expected a field of an algorithm's config, see docs/recipes.md",
        ),
        ("model:", "modle:", "unknown key 'modle'; did you mean 'model'?"),
        (
            "path: a",
            "name: a",
            "unknown key 'model.name'; "
            "known: chat_template, dtype, lora, path, quantization, revision, trust_remote_code",
        ),
        ("path: a/model", "", "missing key 'model.path'"),
        ("model: {path: a/model}", "", "missing section 'model'"),
        ("{path: a/model}", "", "'model': expected keys and values, found null"),
        ("algorithm: dpo", "algorithm: PPO", "unknown algorithm 'PPO'; did you mean 'dpo'? known:"),
        ("algorithm: dpo", "algorithm: zzz", "unknown algorithm 'zzz'; known: dpo, reward_model,"),
        ("a/model", "5", "'model.path': expected text (in quotes if it looks like something else)"),
        ("a/model", "''", "'model.path': expected some text, found ''"),
        (
            "a/model",
            "m, dtype: bf16",
            "'model.dtype': expected 'auto', 'float32', 'bfloat16' or 'float16', found 'bf16'",
        ),
        (
            "a/model",
            "m, trust_remote_code: 1",
            "'model.trust_remote_code': expected true or false, found 1",
        ),
        (
            "a/model",
            "m, lora: {target_modules: [1]}",
            "'model.lora.target_modules': expected all-linear or a list of module names, found [1]",
        ),
        (
            "rows.jsonl",
            "r, max_length: true",
            "'data.max_length': expected a whole number, found true",
        ),
        ("path: rows.jsonl", "", "'data': expected one of 'data.path' and 'data.sources', found n"),
        (
            "rows.jsonl",
            "r, sources: [{path: a}]",
            "'data': expected one of 'data.path' and 'data.sources', found both; set one of them",
        ),
        (
            "path: rows.jsonl",
            "sources: [{path: a}, {pth: b}]",
            "unknown key 'data.sources[1].pth'; did you mean 'data.sources[1].path'?",
        ),
        (
            "path: rows.jsonl",
            "sources: []",
            "'data.sources': expected at least one entry, found []",
        ),
        (
            "path: rows.jsonl",
            "sources: [{path: a, weight: 0}]",
            "'data.sources[0].weight': expected greater than 0, found 0",
        ),
        (
            "path: rows.jsonl",
            "sources: [{path: a}], split: test",
            "'data': with 'data.sources', give split, name and revision in each source",
        ),
        (
            "path: rows.jsonl",
            "sources: [{path: a}], eval_split: test",
            "'data': with 'data.sources', 'data.eval_split' needs 'data.eval_path' too",
        ),
        (
            "rows.jsonl",
            "r, eval_fraction: 0.1, eval_split: test",
            "'data': expected 'data.eval_fraction' or 'data.eval_path'/'data.eval_split' as the",
        ),
        ("rows.jsonl", "r, eval_fraction: 1", "'data.eval_fraction': expected less than 1, found"),
    ],
)
def test_a_bad_recipe_is_explained(recipe_file: Path, old: str, new: str, expected: str) -> None:
    text = MINIMAL.replace(old, new)
    assert message(recipe_file, text=text).startswith(f"recipes/x.yaml: {expected}")


def test_a_misspelt_required_key_is_reported_as_misspelt(recipe_file: Path) -> None:
    text = MINIMAL.replace("path: a/model", "pth: a/model")
    assert message(recipe_file, text=text) == (
        "recipes/x.yaml: unknown key 'model.pth'; did you mean 'model.path'?"
    )


def test_files_that_cannot_be_read(recipe_file: Path) -> None:
    assert message(Path("recipes/y.yaml")) == (
        "recipes/y.yaml: no such file; expected a recipe in YAML"
    )
    assert message(Path("recipes")) == "recipes: cannot be read: Is a directory"
    recipe_file.write_bytes(b"name: \xff\n")
    assert message(recipe_file) == "recipes/x.yaml: expected UTF-8 text: bad byte at 6"


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "null\n"])
def test_empty_files(recipe_file: Path, text: str) -> None:
    assert message(recipe_file, text=text) == (
        "recipes/x.yaml: the file is empty; a recipe has model, data and trainer"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model:\n  path: a: b\n", "line 2, column 10: mapping values are not allowed here"),
        (
            "name: 'x\n",
            "line 2, column 1: found unexpected end of stream (while scanning a quoted "
            "scalar from line 1)",
        ),
        ("name: x\x00\n", "line 1: '\\x00' is not allowed in YAML"),
        ("seed: 1\nname: x\nseed: 2\n", "line 3, column 1: key 'seed' is written twice"),
        ("model:\n  path: a\n  path: a\n", "line 3, column 3: key 'path' is written twice"),
        ("name: &n x\nrun_dir: *n\n", "line 2, column 10: aliases (*name) are not supported"),
        ("name: &n [*n]\n", "line 1, column 11: aliases (*name) are not supported"),
        ("name: !!python/object/new:os.system [ls]\n", "line 1, column 7: the tag "),
        ("1: 2\n", "line 1, column 1: expected text as a key, found 1"),
        ("[a]: 2\n", "line 1, column 1: expected text as a key, found ['a']"),
        ("name: " + "[" * 2000, "line 1, column 56: nested more than 50 levels deep"),
        ('name: "\\UFFFFFFFF"\n', "bad escape or directive: "),
        ("--- {}\n--- {}\n", "line 2, column 1: but found another document"),
        ("- model\n", "expected sections (model, data, ...), found ['model']"),
        ("seed: !!int x\n", "line 1, column 7: 'x': invalid literal for int()"),
        ("seed: .nan\n", "line 1, column 7: '.nan': expected a finite number"),
        ("seed: 1e999\n", "line 1, column 7: '1e999': expected a finite number"),
    ],
)
def test_yaml_that_is_refused(recipe_file: Path, text: str, expected: str) -> None:
    assert message(recipe_file, text=text).startswith(f"recipes/x.yaml: {expected}")


# --- YAML's traps --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-6", 1e-6),
        ("5E+3", 5000.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("-2", -2),
        ("20_000", 20000),
        ("010", 10),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("0x1F", "0x1F"),
        ("'1e-6'", "1e-6"),
        ('"no"', "no"),
        ("true", True),
        ("~", None),
        ("", None),
        ("{a: [1, {b: x}]}", {"a": [1, {"b": "x"}]}),
    ],
)
def test_scalars(recipe_file: Path, written: str, value: object) -> None:
    found = load_recipe(recipe_file, [f"trainer.beta={written}"]).trainer.options["beta"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("word", ["yes", "No", "on", "OFF", "None"])
def test_words_with_two_meanings_are_refused(recipe_file: Path, word: str) -> None:
    assert message(recipe_file, text=f"{MINIMAL}judge: {word}\n") == (
        f"recipes/x.yaml: line 4, column 8: {word!r}: ambiguous: "
        "write true, false or null, or quote it if the word is meant"
    )


def test_numbers_are_not_text_and_text_is_no_number(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["rollout.temperature=1", "rollout.top_p=9e-1"])
    assert (recipe.rollout.temperature, recipe.rollout.top_p) == (1.0, 0.9)
    assert "expected a number, found '1'" in message(recipe_file, "rollout.temperature='1'")
    assert "expected text" in message(recipe_file, "model.revision=1234567")
    assert "expected a whole number, found 1.5" in message(recipe_file, "rollout.top_k=1.5")


# --- trainer keys --------------------------------------------------------------------------------


def test_options_of_other_algorithms_are_ignored_and_named() -> None:
    keys = {"algorithm", "beta", "learning_rate", "packing"}
    assert validate_trainer_keys(keys, KNOWN, "dpo") == ["packing"]
    assert validate_trainer_keys(keys, KNOWN, "sft") == ["beta"]
    assert validate_trainer_keys(keys, KNOWN, "reward_model") == ["beta", "packing"]


@pytest.mark.parametrize("algorithm", sorted(KNOWN))
def test_switching_the_algorithm_needs_no_other_change(recipe_file: Path, algorithm: str) -> None:
    recipe = load_recipe(recipe_file, [f"trainer.algorithm={algorithm}"], KNOWN)
    assert recipe.trainer.algorithm == algorithm
    assert recipe.trainer.options == {"beta": 0.1}


def test_unknown_options_and_algorithms_are_errors() -> None:
    with pytest.raises(PrefoptError, match=r"^here: unknown key 'trainer\.bta'; .*'trainer\.beta'"):
        validate_trainer_keys(["bta"], KNOWN, "sft", "here")
    with pytest.raises(PrefoptError, match=r"unknown algorithm 'ipo'.*known: dpo, reward_model"):
        validate_trainer_keys([], KNOWN, "ipo")


def test_without_known_options_any_is_accepted(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["trainer.anything=1"]).trainer.options["anything"] == 1


# --- the resolved copy ---------------------------------------------------------------------------


def test_resolved_is_plain_complete_and_ordered(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["trainer.a=1", "model.lora={}"])
    resolved = recipe.resolved()
    assert list(resolved) == [
        "name", "run_dir", "seed", "model", "data", "judge", "rollout", "trainer", "eval",
        "guards",
    ]  # fmt: skip
    assert list(resolved["trainer"]) == ["algorithm", "a", "beta"]
    assert resolved["model"]["lora"]["alpha"] == 32.0
    assert resolved["rollout"]["top_p"] == 1.0
    assert resolved["data"]["sources"] is None


def test_write_resolved_replaces_the_file_and_leaves_nothing_else(recipe_file: Path) -> None:
    target = Path("runs/new/recipe.yaml")
    first = load_recipe(recipe_file)
    first.write_resolved(target)
    assert load_recipe(target) == first
    second = load_recipe(recipe_file, ["seed=3"])
    second.write_resolved(target)
    assert load_recipe(target) == second != first
    assert [path.name for path in target.parent.iterdir()] == ["recipe.yaml"]


def test_a_resolved_copy_resolves_to_itself(recipe_file: Path) -> None:
    load_recipe(recipe_file).write_resolved("a.yaml")
    load_recipe("a.yaml").write_resolved("b.yaml")
    assert Path("a.yaml").read_text() == Path("b.yaml").read_text()


def test_write_resolved_where_nothing_can_be_written(recipe_file: Path) -> None:
    with pytest.raises(PrefoptError, match=r"x\.yaml/recipe\.yaml: cannot be written: "):
        load_recipe(recipe_file).write_resolved(recipe_file / "recipe.yaml")


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
    | st.sampled_from(["no", "None", "1e-6", "010", "2024-01-01", "~", "=", "\x85", "\u2028"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None, database=None)
@given(
    options=st.dictionaries(st.text().filter(lambda key: key != "algorithm"), plain, max_size=4),
    text=st.text(min_size=1),
    lora=st.none() | st.fixed_dictionaries({"r": st.integers(1, 64)}),
    limit=st.none() | st.integers(1, 4096),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, options: Any, text: str, lora: Any, limit: int | None
) -> None:
    recipe = Recipe.model_validate(
        {
            "name": "run",
            "model": {"path": text, "lora": lora},
            "data": {"sources": [{"path": text, "weight": 0.5}], "max_length": limit},
            "trainer": {**options, "algorithm": "dpo"},
        }
    )
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    recipe.write_resolved(path)
    assert load_recipe(path) == recipe


# --- no text brings anything but PrefoptError ----------------------------------------------------

# the characters and words of YAML's grammar, and known weak spots of PyYAML
FRAGMENTS = [
    *"{}[]:,-?&*!|>'\"%@`#\n\t .~=_é\x00\x85\u2028\ufeff",
    *("model", "data", "trainer", "path", "algorithm: dpo", ": ", "\n  ", "- ", "<<", "&a ", "*a"),
    *("!!int ", "!!float ", "!!map ", "!!seq ", "!!null ", "!x ", "---\n", "...\n", "%YAML 1.1\n"),
    *("%TAG ! x\n", "0x", "1e5", "no", "true", "2020-01-01", "\\UFFFFFFFF", "\\ud800", "\\x"),
]
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=20).map("".join) | st.text(max_size=40)


@settings(max_examples=300, deadline=None, database=None)
@given(texts)
def test_random_files(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "random.yaml"
    path.write_text(text, encoding="utf-8")
    message(path)


@settings(max_examples=300, deadline=None, database=None)
@given(st.sampled_from(["trainer", "trainer.x", "model.lora", "data.sources", "x", ""]), texts)
def test_random_overrides(tmp_path_factory: pytest.TempPathFactory, key: str, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "overridden.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    refusal = ""
    try:
        load_recipe(path, [f"{key}={text}"])
    except PrefoptError as error:
        refusal = str(error)
    assert len(refusal.splitlines()) <= 1


# --- documentation and start-up ------------------------------------------------------------------


def flattened(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            flat |= flattened(inner, f"{prefix}{key}.")
        else:
            flat[prefix + key] = inner
    return flat


def test_the_documented_keys_and_defaults_are_those_of_the_code(recipe_file: Path) -> None:
    rows = re.findall(r"^\| `(\S+)` \| (.+?) \|", DOCS.read_text(encoding="utf-8"), flags=re.M)
    rows = [row for row in rows if "/" not in row[0]]  # recipes have a table too
    documented = dict(rows)
    assert len(documented) == len(rows)
    overrides = ["model.lora={}", "judge={kind: reward_model, path: j}", "eval.prompts=p"]
    overrides.append("eval.judge={kind: api, model: m}")
    actual = flattened(load_recipe(recipe_file, overrides).resolved())
    sources = ["data.path=null", "data.sources=[{path: a}]"]
    source = load_recipe(recipe_file, sources).resolved()["data"]["sources"][0]
    actual |= {f"data.sources[].{key}": value for key, value in source.items()}
    del actual["trainer.beta"]
    sections = {"model.lora", "eval.judge"}
    assert documented.keys() == actual.keys() | sections
    required = {"model.path", "data.sources[].path", "judge.kind", "judge.path", "eval.prompts"}
    required |= {"trainer.algorithm", "eval.judge.kind"}
    assert {key for key, default in documented.items() if default == "required"} == required
    assert {documented[section] for section in sections} == {"`null`"}
    given = {"name", "run_dir", "data.path", "eval.judge.model"}
    for key in actual.keys() - required - given:
        assert yaml.safe_load(documented[key].strip("`")) == actual[key], key


def test_the_documented_examples_are_recipes(recipe_file: Path) -> None:
    from prefopt.train import known_keys

    examples = re.findall(r"^```yaml\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.M | re.S)
    algorithms = []
    for example in examples:
        recipe_file.write_text(example, encoding="utf-8")
        trainer = load_recipe(recipe_file, known=known_keys()).trainer
        algorithms.append(trainer.algorithm)
        assert validate_trainer_keys(trainer.options, known_keys(), trainer.algorithm) == []
    assert sorted(algorithms) == ["dpo", "dpo", "reward_model", "sft"]


def test_importing_recipes_loads_no_heavy_library() -> None:
    code = "import sys, prefopt.recipe; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    heavy = {"torch", "transformers", "datasets", "numpy", "accelerate", "peft", "trl"}
    assert not heavy & set(loaded.stdout.split())


def test_servers_go_with_their_engine(recipe_file: Path) -> None:
    for overrides in (
        ["rollout.engine=vllm_server"],
        ["rollout.servers=[http://127.0.0.1:8000]"],
        ["rollout.engine=vllm", "rollout.servers=[http://127.0.0.1:8000]"],
    ):
        with pytest.raises(PrefoptError, match="go together"):
            load_recipe(recipe_file, overrides)
    both = ["rollout.engine=vllm_server", "rollout.servers=[http://127.0.0.1:8000]"]
    assert load_recipe(recipe_file, both).rollout.servers == ["http://127.0.0.1:8000"]


@pytest.mark.parametrize("name", ["vllm", "vllm_server", "auto", "transformers"])
def test_engines_that_there_are(recipe_file: Path, name: str) -> None:
    servers = ["rollout.servers=[http://a:1]"] if name == "vllm_server" else []
    recipe = load_recipe(recipe_file, [f"rollout.engine={name}", *servers])
    assert recipe.rollout.engine == name


def test_where_samples_are_drawn_may_change_between_two_starts(
    recipe_file: Path, tmp_path: Path
) -> None:
    def recipe(*overrides: str) -> Recipe:
        servers = "rollout.servers=[http://a:1]"
        common = [f"run_dir={tmp_path / 'run'}", "rollout.engine=vllm_server", servers]
        return load_recipe(recipe_file, [*common, *overrides])

    recipe().write_resolved(tmp_path / "run" / "recipe.yaml")
    (tmp_path / "run" / "summary.json").write_text("{}")
    check_run(recipe("rollout.servers=[http://b:2, http://c:3]", "rollout.transfer=nccl"))
    with pytest.raises(PrefoptError, match=r"other values of rollout\.temperature: \S+ -> \S+;"):
        check_run(recipe("rollout.servers=[http://b:2]", "rollout.temperature=0.5"))
