"""What docs/security.md promises, each promise attacked."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed.checkpoint as dcp
from report_folders import Page, evaluated, training, write_lines
from report_folders import summary as quickstart_summary

from prefopt.cli import main
from prefopt.data.sources import read_rows
from prefopt.data.template import check_tokenizer
from prefopt.errors import PrefoptError
from prefopt.eval.answers import folder_name
from prefopt.eval.report import write_report
from prefopt.generate import Generator
from prefopt.launch import launch_command, launch_environment, strategy_of
from prefopt.models.load import load_config, load_policy, load_reward_model, load_tokenizer
from prefopt.recipe import load_recipe
from prefopt.reward_models import load_judge
from prefopt.train import known_keys, make_config, read_recipe, train
from prefopt.trainers.unpickling import check_pickles, watched
from prefopt.world import WorldPaths, build_world

pytestmark = pytest.mark.usefixtures("frozen_heap")

SECRET = "sk-5ecret5ecret5ecret5ecret"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldPaths:
    folder = tmp_path_factory.mktemp("world") / "world"
    return build_world(folder, sft_rows=8, preference_rows=16, prompt_rows=4)


@pytest.fixture
def base(world: WorldPaths, tmp_path: Path) -> Path:
    """A copy of a model's folder, to be tampered with."""
    return Path(shutil.copytree(world.base, tmp_path / "model"))


@pytest.fixture
def ran(tmp_path: Path) -> Iterator[Path]:
    """What the programs planted by a test would write, and never must have written."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists()


class Program:
    """Runs a command when it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.ran}'",)


def zipped(program: Program, path: Path) -> None:
    """Writes it as torch.save does."""
    torch.save(program, path)


def bare(program: Program, path: Path) -> None:
    """Writes it as pickle does."""
    path.write_bytes(pickle.dumps(program))


def named(path: Path, content: bytes) -> None:
    """Writes a file of torch.save around a pickle made by hand."""
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("data.pkl", content, len(content))
    writer.write_end_of_file()


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def one_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says to a mistake."""
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


def recipe_of(world: WorldPaths, tmp_path: Path, algorithm: str, **trainer: Any) -> list[str]:
    """A recipe's path with overrides: a step a round of two, each with a checkpoint."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
        model: {{path: {world.base}}}
        data: {{path: {world.preferences}}}
        judge: {{kind: preference_model, path: {world.base}}}
        rollout: {{samples_per_prompt: 2, max_new_tokens: 4, batch_size: 32}}
        run_dir: {tmp_path}/run
        trainer:
          algorithm: {algorithm}
          rounds: 2
          per_device_train_batch_size: 4
          logging_steps: 1
          save_strategy: steps
          save_steps: 1
        """
    )
    return [str(path), *(f"trainer.{key}={value}" for key, value in trainer.items())]


# --- pickles of models ---------------------------------------------------------------------------


@pytest.mark.parametrize("write", [zipped, bare])
@pytest.mark.parametrize("of", ["policy", "reward model"])
def test_weights_in_a_pickle_are_refused(
    of: str, write: Callable[[Program, Path], None], base: Path, ran: Path
) -> None:
    (base / "model.safetensors").unlink()
    write(Program(ran), base / "pytorch_model.bin")
    with pytest.raises(PrefoptError, match=r"pytorch_model\.bin, a pickle.*convert the weights"):
        if of == "policy":
            load_policy(str(base))
        else:
            load_reward_model(str(base), load_tokenizer(str(base)), new_head=True)


def test_a_pickle_beside_safetensors_is_not_touched(base: Path, ran: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "tokenizer.pkl", "optimizer.pt"):
        zipped(Program(ran), base / name)
    load_policy(str(base))
    load_tokenizer(str(base))


def test_a_configuration_cannot_point_at_a_pickle(base: Path, ran: Path) -> None:
    zipped(Program(ran), base / "other.bin")
    edit(base / "config.json", transformers_weights="other.bin")
    with pytest.raises(PrefoptError, match=r"neither a safetensors file"):
        load_policy(str(base))


def test_an_adapter_in_a_pickle_is_refused(
    world: WorldPaths, tmp_path: Path, ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    zipped(Program(ran), folder / "adapter_model.bin")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(world.base), "r": 2}
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"lora_alpha": 2, "target_modules": ["q_proj"]})
    )
    with pytest.raises(PrefoptError, match=r"adapter_model\.bin, a pickle"):
        load_policy(str(folder))


def test_attention_of_the_hub_is_not_fetched(base: Path) -> None:
    edit(base / "config.json", attn_implementation="somebody/kernel")
    with pytest.raises(PrefoptError, match="kernel"):
        load_policy(str(base))


# --- pickles of checkpoints ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(world: WorldPaths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in rounds that was killed before it was complete."""
    folder = tmp_path_factory.mktemp("stopped")
    train(read_recipe(*_split(recipe_of(world, folder, "nash_mp"))))
    (folder / "run/summary.json").unlink()
    shutil.rmtree(folder / "run/checkpoints/checkpoint-2")
    return folder


def _split(words: list[str]) -> tuple[str, list[str]]:
    return words[0], words[1:]


@pytest.mark.parametrize("write", [zipped, bare])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"])
def test_a_program_in_a_checkpoint_is_not_run(
    name: str,
    write: Callable[[Program, Path], None],
    stopped: Path,
    tmp_path: Path,
    ran: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copytree(stopped / "run/checkpoints/checkpoint-1", checkpoint)
    check_pickles(checkpoint)
    write(Program(ran), checkpoint / name)
    with pytest.raises(PrefoptError, match=rf"{name}: found a pickle .* go on from the one before"):
        check_pickles(checkpoint)


def test_what_trains_looks_at_a_checkpoint_first(
    world: WorldPaths, stopped: Path, tmp_path: Path, ran: Path
) -> None:
    from prefopt.train import load_rows, make_trainer, recipe_tokenizer

    recipe = read_recipe(*_split(recipe_of(world, tmp_path, "dpo")))
    args, tokenizer = make_config(recipe), recipe_tokenizer(recipe)
    trainer = make_trainer(recipe, args, tokenizer, load_rows(recipe, tokenizer, args))
    checkpoint = tmp_path / "run/checkpoints/checkpoint-1"
    shutil.copytree(stopped / "run/checkpoints/checkpoint-1", checkpoint)
    zipped(Program(ran), checkpoint / "optimizer.pt")
    for given in (str(checkpoint), True):
        with pytest.raises(PrefoptError, match=r"optimizer\.pt"):
            trainer.train(resume_from_checkpoint=given)


def test_a_program_in_a_run_folder_is_not_run_by_the_command(
    stopped: Path, tmp_path: Path, ran: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its checkpoint is passed over, for its files are not those that were written."""
    caplog.set_level("WARNING", logger="prefopt")
    checkpoint = stopped / "run/checkpoints/checkpoint-1"
    shutil.copytree(checkpoint, tmp_path / "untouched")
    for name in ("optimizer.pt", "training_args.bin"):
        zipped(Program(ran), checkpoint / name)
    main(["train", str(stopped / "recipe.yaml")])
    assert "checkpoint-1/optimizer.pt" in caplog.text
    shutil.rmtree(checkpoint)
    shutil.copytree(tmp_path / "untouched", checkpoint)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("deepspeed.runtime.zero.config ZeroStageEnum", True),
        ("deepspeed.launcher.runner main", False),
        ("torch.distributed.checkpoint.metadata Metadata", False),  # sharded files have it only
        ("torch.storage _load_from_bytes", False),
        ("builtins eval", False),
        ("builtins getattr", False),
        ("posix system", False),
    ],
)
def test_deepspeed_may_name_a_few_classes_of_its_own(
    name: str, known: bool, tmp_path: Path
) -> None:
    module, attribute = name.split()
    (tmp_path / "global_step2").mkdir()
    path = tmp_path / "global_step2/mp_rank_00_model_states.pt"
    named(path, f"\x80\x02c{module}\n{attribute}\n.".encode("latin1"))
    if known:
        check_pickles(tmp_path)
    else:
        with pytest.raises(PrefoptError, match=re.escape(f"names {module}.{attribute}")):
            check_pickles(tmp_path)


def test_a_name_that_is_put_together_is_refused_too(tmp_path: Path) -> None:
    """Protocol 4 takes names from the stack, where they can be hidden."""
    named(tmp_path / "optimizer.pt", pickle.dumps(Program(tmp_path), protocol=4))
    with pytest.raises(PrefoptError, match=r"torch\.save does not write"):
        check_pickles(tmp_path)


def sharded(folder: Path) -> dict[str, Any]:
    """Writes a checkpoint as FSDP with SHARDED_STATE_DICT does; returns what to read it into."""
    state = {"weight": torch.ones(3), "step": 5}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return {"weight": torch.zeros(3), "step": 0}


def test_a_sharded_checkpoint_is_read(tmp_path: Path) -> None:
    state = sharded(tmp_path)
    with watched(tmp_path):
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert state["weight"].tolist() == [1, 1, 1]
    assert state["step"] == 5


def test_a_program_in_the_index_of_a_sharded_checkpoint_is_not_run(
    tmp_path: Path, ran: Path
) -> None:
    state = sharded(tmp_path)
    bare(Program(ran), tmp_path / ".metadata")
    with pytest.raises(PrefoptError, match=r"a pickle that names posix\.system"), watched(tmp_path):
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)


def test_a_program_in_a_shard_is_not_run(tmp_path: Path, ran: Path) -> None:
    dcp.save({"step": _Late(ran)}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(PrefoptError, match=r"a pickle that names posix\.system"), watched(tmp_path):
        dcp.load({"step": 0}, checkpoint_id=tmp_path, no_dist=True)
    pickle.loads(pickle.dumps(Path("watched no longer")))


class _Late(Program):
    """A value of a state dict, which PyTorch writes by torch.save."""


RECORDED = """
import json, os, pickle, shutil, sys
found, files = set(), []
sys.addaudithook(lambda e, a: found.add(".".join(a)) if e == "pickle.find_class" else None)
load = pickle.load
pickle.load = lambda file, **options: (files.append(str(file)), load(file, **options))[1]
os.umask(0o077)
from prefopt.cli import main
recipe, run, out = sys.argv[1:]
words = ["train", recipe, f"run_dir={run}", "model.lora={r: 2}"]
assert main(words) == 0
os.unlink(f"{run}/summary.json")
shutil.rmtree(f"{run}/checkpoints/checkpoint-2")
assert main(words) == 0
with open(out, "w") as file:
    json.dump([sorted(found), files], file)
"""


def test_a_run_and_its_resumption_unpickle_nothing_and_keep_their_files_private(
    world: WorldPaths, tmp_path: Path
) -> None:
    """A process of its own, since hooks on events stay: some ten seconds."""
    recipe, _ = _split(recipe_of(world, tmp_path, "nash_mp"))
    run, out = tmp_path / "run", tmp_path / "found.json"
    environment = os.environ | {
        "OPENAI_API_KEY": SECRET,
        "HF_TOKEN": SECRET,
        "WANDB_API_KEY": SECRET,
    }
    done = subprocess.run(
        [sys.executable, "-c", RECORDED, recipe, str(run), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    classes, files = json.loads(out.read_text())
    assert classes == []  # weights_only has an unpickler of its own, which looks nothing up
    assert files == []
    written = [path for path in run.rglob("*") if not path.is_symlink()]
    assert len(written) > 30
    for path in written:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in done.stdout + done.stderr


# --- code of others ------------------------------------------------------------------------------


@pytest.fixture
def with_code(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that comes with code, which writes the file `ran` when it is imported."""
    (base / "theirs.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class C(LlamaConfig):\n    model_type = 'theirs'\n"
        "class M(LlamaForCausalLM):\n    config_class = C\n"
        "class T(PreTrainedTokenizerFast):\n    pass\n"
    )
    classes = {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"}
    edit(base / "config.json", model_type="theirs", auto_map=classes)
    tokenizer = {"AutoTokenizer": ["theirs.T", "theirs.T"]}
    edit(base / "tokenizer_config.json", tokenizer_class="T", auto_map=tokenizer)

    def asked(*words: Any) -> str:
        raise AssertionError("nobody may be asked: no one is there to answer")

    monkeypatch.setattr("builtins.input", asked)
    return base


LOADERS: dict[str, Callable[[str], Any]] = {
    "policy": load_policy,
    "configuration": load_config,
    "tokenizer": load_tokenizer,
    "reward model": lambda path: load_judge("reward_model", path),
    "preference model": lambda path: load_judge("preference_model", path),
    "generate": lambda path: Generator(path),
}


@pytest.mark.parametrize("of", LOADERS)
def test_code_of_a_model_is_not_run(of: str, with_code: Path, ran: Path) -> None:
    with pytest.raises(PrefoptError, match=r"code of its own.*model\.trust_remote_code: true"):
        LOADERS[of](str(with_code))


def test_code_of_a_judge_or_a_policy_is_not_run_by_a_recipe(
    world: WorldPaths,
    with_code: Path,
    ran: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["train", *recipe_of(world, tmp_path, "online_dpo")]
    assert "code of its own" in one_line(capsys, *words, f"judge.path={with_code}")
    assert "code of its own" in one_line(capsys, *words, f"model.path={with_code}")
    trusted = [*words, "model.trust_remote_code=true"]
    assert "judge.path: " in one_line(capsys, *trusted, f"judge.path={with_code}")


def test_code_of_a_model_is_run_where_that_is_asked_for(with_code: Path, tmp_path: Path) -> None:
    load_policy(str(with_code), trust_remote_code=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch RAN') }}",
        "{{ lipsum.__globals__['os'].system('touch RAN') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ (messages | attr('append'))(1) }}{{ '{0.__class__.__mro__}'.format(1) }}",
    ],
)
def test_a_chat_template_stays_in_its_sandbox(
    template: str, world: WorldPaths, ran: Path, tmp_path: Path
) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(template.replace("RAN", str(ran)))
    tokenizer = load_tokenizer(str(world.base), chat_template=str(path))
    with pytest.raises(PrefoptError, match=r"the chat template of .*unsafe|leaves out"):
        check_tokenizer(tokenizer, conversational=True)


# --- data and recipes ----------------------------------------------------------------------------


def test_data_run_nothing(tmp_path: Path, ran: Path) -> None:
    import datasets

    program = pickle.dumps(Program(ran))
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    extension = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": program,
    }
    fields = [pa.field(name, pa.string(), metadata=extension) for name in row]
    table = pa.table([[value] for value in row.values()], names=list(row))
    table = table.cast(pa.schema(fields, metadata={"pandas": program}))
    pq.write_table(table, tmp_path / "rows.parquet")
    assert [found for _, found in read_rows(tmp_path / "rows.parquet")] == [row]
    saved = tmp_path / "saved"
    datasets.Dataset.from_list([row]).save_to_disk(saved)
    (saved / "saved.py").write_text(f"open({str(ran)!r}, 'w')")
    with pa.ipc.new_stream(saved / "e.arrow", table.schema) as writer:
        writer.write_table(table)
    edit(saved / "state.json", _data_files=[{"filename": "e.arrow"}])
    assert [found for _, found in read_rows(saved)] == [row]
    (tmp_path / "rows.pkl").write_bytes(program)
    with pytest.raises(PrefoptError, match="unsupported extension"):
        list(read_rows(tmp_path / "rows.pkl"))
    script = tmp_path / "script"
    script.mkdir()
    (script / "script.py").write_text(f"open({str(ran)!r}, 'w')")
    with pytest.raises(PrefoptError, match="no data file"):
        list(read_rows(script))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: !!python/object/apply:os.system ['touch RAN']", "tag .* is not supported"),
        ("model: !!python/name:os.system", "tag .* is not supported"),
        ("a: &a [x, x]\nb: [*a, *a]", "aliases .* are not supported"),
        ("a: &a {x: 1}\nb:\n  <<: *a", "aliases .* are not supported"),
        ("[" * 100_000, "nested more than 50 levels"),
    ],
)
def test_yaml_makes_plain_values_only(text: str, message: str, tmp_path: Path, ran: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text.replace("RAN", str(ran)))
    with pytest.raises(PrefoptError, match=message):
        load_recipe(path)


def test_an_accelerate_configuration_runs_nothing(tmp_path: Path, ran: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"distributed_type: !!python/object/apply:os.system ['touch {ran}']")
    with pytest.raises(PrefoptError, match="no accelerate configuration"):
        strategy_of(path)


# --- secrets -------------------------------------------------------------------------------------


def test_no_key_of_a_recipe_holds_a_token() -> None:
    words = {word for keys in known_keys().values() for key in keys for word in key.split("_")}
    assert not words & {"password", "secret", "apikey"}
    tokens = {key for keys in known_keys().values() for key in keys if key.endswith("_token")}
    assert tokens == {"eos_token", "pad_token"}


@pytest.mark.parametrize(
    "override",
    [
        "rollout.servers=[http://me:PASSWORD@127.0.0.1:8000]",
        "eval.judge={kind: api, model: m, base_url: 'http://me:PASSWORD@127.0.0.1:1/v1'}",
        "eval.judge={kind: api, model: m, base_url: 'http://127.0.0.1:1/v1?key=PASSWORD'}",
        "eval.judge={kind: api, model: m, key_variable: PASS-WORD}",
        "trainer.hub_token=PASSWORD",
        "eval.judge={kind: api, model: m, api_key: PASSWORD}",
    ],
)
def test_passwords_in_addresses_are_refused_before_anything_is_written(
    override: str, world: WorldPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = _split(recipe_of(world, tmp_path, "online_dpo"))
    engine = ["rollout.engine=vllm_server"] if "servers" in override else []
    options = [*engine, override, f"eval.prompts={world.prompts}"]
    assert "PASSWORD" not in one_line(capsys, "train", path, *options)
    assert not (tmp_path / "run").exists()
    main(["check", str(path), "--json", *options])
    assert "PASSWORD" not in capsys.readouterr().out


# --- the report ----------------------------------------------------------------------------------

PAYLOAD = " ".join(
    (
        '"><img src=x onerror=alert(1)>',
        "'></td><svg onload=alert(1)>",
        "</script><script>alert(1)</script>",
        "javascript:alert(1)",
        "<!-- --><iframe src=//evil.example></iframe>",
        "{{ 7*7 }}{% raw %}",
    )
)


class Tags(Page):
    """Also what a browser would run without a script."""

    def __init__(self, text: str) -> None:
        self.attributes: list[tuple[str, str]] = []
        super().__init__(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        super().handle_starttag(tag, attrs)
        self.attributes += [(key, value or "") for key, value in attrs]


def hostile(value: Any, payload: str) -> Any:
    """The same value with a payload in every text that is no number, keys included."""
    if isinstance(value, dict):
        return value | {
            f"{key}{payload}": hostile(inner, payload)
            for key, inner in value.items()
            if not isinstance(inner, dict)
        }
    if isinstance(value, list):
        return [hostile(inner, payload) for inner in value]
    return f"{value}{payload}" if isinstance(value, str) else value


def test_no_field_of_a_run_folder_becomes_markup(tmp_path: Path) -> None:
    runs, payload = tmp_path / "runs", PAYLOAD
    name = payload.replace("/", "\N{FULLWIDTH SOLIDUS}")[:60]
    for folder in (runs / f"a{name}", runs / f"b{name}"):
        evaluated(folder)
        tampered = [{**line, f"loss{payload}": 1.0, payload: 2.0} for line in training(3)]
        write_lines(folder / "metrics.jsonl", tampered)
        (folder / "recipe.yaml").write_text(f"name: {payload}\n")
        facts = {"command": [payload], "platform": payload, payload: payload}
        (folder / "environment.json").write_text(json.dumps(facts))
        for path in (folder / "evaluations").rglob("*.json"):
            path.write_text(json.dumps(hostile(json.loads(path.read_text()), payload)))
        for path in (folder / "evaluations").rglob("*.jsonl"):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            write_lines(path, [hostile(row, payload) for row in rows])
    (runs / "summary.json").write_text(
        json.dumps({**quickstart_summary(), "remark": payload, payload: {"accuracy": 0.5}})
    )
    sample = {"prompt": payload, "answers": {payload: payload, "b": payload}}
    write_lines(runs / "samples.jsonl", [sample, sample])
    for page in (write_report(runs), write_report(runs / f"a{name}")):
        seen = Tags(page.read_text(encoding="utf-8"))
        assert seen.tags.count("script") == 1
        assert not {"img", "iframe", "object", "embed", "link", "base", "form"} & {*seen.tags}
        assert not [key for key, _ in seen.attributes if key.startswith("on")]
        assert all(value.startswith("#") for value in seen.loads), seen.loads
        assert "{{ 7*7 }}" in seen.text
        for path in (page.parent / "plots").glob("*.svg"):
            tree = ElementTree.parse(path)
            assert not [e for e in tree.iter() if e.tag.endswith(("script", "foreignObject"))]


def test_a_table_of_a_plot_holds_no_formula(tmp_path: Path) -> None:
    name = "=HYPERLINK(1)"
    write_lines(tmp_path / name / "metrics.jsonl", [{"step": s, "loss": s} for s in (1, 2)])
    write_report(tmp_path)
    (table,) = (tmp_path / "plots").glob("*.csv")
    lines = table.read_text().splitlines()[1:]
    assert all(line.startswith(f"'{name},") for line in lines)


# --- paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a/b", "a\\b", "..", ".hidden", "nul\0", "x" * 300, "\x1b[2J"]
)
def test_a_name_of_a_run_leads_nowhere(name: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: {path: m}\ndata: {path: d}\ntrainer: {algorithm: dpo}\n")
    with pytest.raises(PrefoptError, match="expected a name"):
        load_recipe(path, [f"name={json.dumps(name)}"])


@pytest.mark.parametrize("name", ["..", "../../x", "/etc", "a\0b", "x" * 9999, "\\..\\x", "", "."])
def test_a_folder_named_after_a_model_stays_where_it_is(name: str, tmp_path: Path) -> None:
    folder = tmp_path / folder_name(name)
    folder.mkdir()
    assert folder.resolve().parent == tmp_path.resolve()


def test_a_link_in_a_run_folder_is_not_followed(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.html").write_text("my own words")
    write_lines(run / "metrics.jsonl", training())
    (run / "report.html").symlink_to(elsewhere / "mine.html")
    (run / "plots").symlink_to(elsewhere)
    (run / "recipe.yaml").symlink_to(elsewhere / "mine.html")
    (run / "environment.json").symlink_to(elsewhere / "mine.html")
    with pytest.raises(PrefoptError, match="plots: found a link"):
        write_report(run)
    (run / "plots").unlink()
    assert "my own words" not in write_report(run).read_text()
    assert [path.name for path in elsewhere.iterdir()] == ["mine.html"]
    assert (elsewhere / "mine.html").read_text() == "my own words"
    assert not (run / "report.html").is_symlink()


# --- the network ---------------------------------------------------------------------------------


def test_documented_servers_say_where_they_listen() -> None:
    root = Path(__file__).parents[1]
    pages = [root / "README.md", *root.glob("docs/*.md"), *root.glob("recipes/**/*.*")]
    pages = [page for page in pages if page.is_file()]
    commands = [
        line
        for page in pages
        for line in page.read_text().splitlines()
        if re.search(r"vllm serve (MODEL|\"\$MODEL)", line)
    ]
    assert commands
    for line in commands:
        assert re.search(r'--host (127\.0\.0\.1|"\$host")', line), line
    assert not [page for page in pages if "--host 0.0.0.0" in page.read_text()]


LISTENING = """
import json, os, sys
from pathlib import Path
import torch.distributed as dist

def listens(pid):
    addresses, found = {}, set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A":
                addresses[f"socket:[{words[9]}]"] = words[1].split(":")[0]
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.add(addresses.get(os.readlink(path)))
        except OSError:  # the handle that lists the folder
            pass
    return sorted(found - {None})

dist.init_process_group("gloo")
dist.all_gather_object([None, None], dist.get_rank())
if dist.get_rank() == 0:
    Path(sys.argv[1]).write_text(json.dumps([listens(os.getpid()), listens(os.getppid())]))
dist.barrier()
"""


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")
def test_processes_of_one_machine_listen_to_it_alone_but_for_their_launcher(tmp_path: Path) -> None:
    """torch's launcher listens everywhere and cannot be told not to; see docs/security.md."""
    script, out = tmp_path / "listening.py", tmp_path / "found.json"
    script.write_text(LISTENING)
    command = launch_command(["train"], "ddp", 2, devices=0)
    program = command[: command.index("prefopt") - 1]  # without -m
    environment = os.environ | launch_environment(devices=0) | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*program, script, out], env=environment, capture_output=True, check=True)
    of_process, of_launcher = json.loads(out.read_text())
    assert of_process == ["0100007F"]  # 127.0.0.1
    assert of_launcher == ["0" * 32]  # all addresses
