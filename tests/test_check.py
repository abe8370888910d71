"""``prefopt check`` beside bad rows: recipes, tokenizers, models, numbers, and what is printed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import save_file
from test_check_bad_files import GOOD, lines, pair, save_model, talk
from test_data_template import (
    CHATML,
    NO_END_TOKEN,
    NO_HEADER,
    THINKING,
    TWO_BOS,
    byte_tokenizer,
)
from transformers import GPT2Config

from prefopt.budget import NO_DEVICE, plan_of
from prefopt.check import check
from prefopt.check_print import duration, print_check, rendered
from prefopt.check_rows import length_bias
from prefopt.cli import main
from prefopt.data.findings import Findings, printable
from prefopt.data.row_findings import pile_of_cut_answers, survey_rows
from prefopt.data.rows import parse_demonstrations, parse_pair, parse_prompt_row
from prefopt.data.text_findings import TextChecks, repeats, role_prefix
from prefopt.eval.win_rate import wilson_interval
from prefopt.train import make_config, read_recipe, train
from prefopt.world import build_world

NO_SYSTEM = CHATML.replace("{{ '<|im_start|>' + m.role", "{% if m.role != 'system' %}{{ '<|im_start|>' + m.role").replace("{% endfor", "{% endif %}{% endfor")  # fmt: skip # noqa: E501


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    model = save_model(tmp_path / "model", byte_tokenizer())
    (tmp_path / "rows.jsonl").write_bytes(lines(GOOD))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{path: {model}}}\ndata: {{path: {tmp_path / 'rows.jsonl'}}}\n"
        f"run_dir: {tmp_path / 'run'}\ntrainer: {{algorithm: dpo}}\n"
    )
    return path


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory takes a second and has its own tests."""
    monkeypatch.setattr("prefopt.check.memory_report", lambda *_: {"problem": "left out"})


def kinds(result: dict[str, Any]) -> list[tuple[str, str]]:
    return [(finding["severity"], finding["kind"]) for finding in result["findings"]]


# --- what cannot be used -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "kind", "words"),
    [
        (["trainer.bta=0.2"], "recipe", "did you mean 'trainer.beta'"),
        (["trainer.loss_type=sigmod"], "settings", "did you mean 'sigmoid'"),
        (["model.path=./nowhere"], "tokenizer", "./nowhere"),
        (["model.chat_template=nowhere.jinja"], "tokenizer", "nowhere.jinja"),
        (["data.path=nowhere.jsonl"], "source", "no such file"),
        (["data.split=test"], "source", "no split"),
        (["data.eval_path=nowhere.jsonl"], "source", "no such file"),
        (["data.max_length=2"], "no rows left", "nothing is left"),
        (["trainer.algorithm=sft"], "missing column", "messages"),
        (["trainer.loss_type=sppo_soft"], "soft labels", "p_chosen"),
        (["eval={prompts: nowhere.jsonl, judge: {kind: api, model: m}}"], "evaluation", "nowhere"),
    ],
)
def test_what_cannot_be_used_is_one_error_and_json_stays_readable(
    overrides: list[str],
    kind: str,
    words: str,
    recipe: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    no_memory: None,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    assert main(["check", str(recipe), "--json", *overrides]) == 1
    result = json.loads(capsys.readouterr().out)
    [finding] = [f for f in result["findings"] if f["kind"] == kind]
    assert finding["severity"] == "error"
    assert words in finding["found"]
    print_check(result)
    assert f"error: {kind}" in capsys.readouterr().out
    assert not (recipe.parent / "run").exists(), "a check writes nothing there"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.lora={target_modules: [nosuch]}", "nosuch"),
        ("trainer.eval_strategy=steps", "no rows are held out"),
    ],
)
def test_settings_that_do_not_fit_the_model_or_the_rows(
    override: str, words: str, recipe: Path
) -> None:
    result = check(recipe, [override])
    assert kinds(result) == [("error", "settings")]
    assert words in result["findings"][0]["found"]


def test_a_run_folder_of_another_recipe(recipe: Path, no_memory: None) -> None:
    run = recipe.parent / "run"
    run.mkdir()
    (run / "summary.json").write_text("{}")
    read_recipe(recipe).write_resolved(run / "recipe.yaml")
    assert kinds(check(recipe)) == []
    assert kinds(check(recipe, ["trainer.beta=0.7"])) == [("error", "run folder")]


def test_quantised_weights_need_a_gpu_here_or_there(
    recipe: Path, no_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    options = ["model.quantization=nf4", "model.lora={}"]
    assert kinds(check(recipe, options)) == [("error", "machine")]
    assert kinds(check(recipe, options, device_memory=80.0)) == [("warning", "machine")]


# --- tokenizers and templates --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "special", "expected"),
    [
        (CHATML, {"eos_token": None}, ("error", "missing EOS")),
        (None, {}, ("error", "no chat template")),
        (NO_HEADER, {}, ("error", "no assistant header")),
        (THINKING, {}, ("error", "template changes the prompt")),
        (TWO_BOS, {"bos_token": "<s>"}, ("error", "double BOS")),
        ("{{ raise_exception('never') }}", {}, ("error", "template refuses")),
        ("{% if %}", {}, ("error", "template refuses")),
        (NO_END_TOKEN, {}, ("warning", "no end of turn")),
        (CHATML, {"pad_token": "<|im_end|>"}, ("note", "EOS is PAD")),
    ],
)
def test_tokenizers_and_templates(
    template: str | None,
    special: dict[str, str | None],
    expected: tuple[str, str],
    recipe: Path,
    no_memory: None,
) -> None:
    save_model(recipe.parent / "model", byte_tokenizer(template, **special))
    if template is None:
        (recipe.parent / "model" / "chat_template.jinja").unlink(missing_ok=True)
    result = check(recipe)
    assert kinds(result) == [expected]
    assert result["errors"] == (expected[0] == "error")


def test_a_template_that_drops_the_system_prompt(recipe: Path, no_memory: None) -> None:
    save_model(recipe.parent / "model", byte_tokenizer(NO_SYSTEM))
    assert kinds(check(recipe)) == [], "no row has a system message"
    system = {"role": "system", "content": "Be brief."}
    rows = [row | {"prompt": [system, *row["prompt"]]} for row in GOOD]
    (recipe.parent / "rows.jsonl").write_bytes(lines(rows))
    assert kinds(check(recipe)) == [("warning", "system prompt lost")]


# --- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 40}, [("warning", "context")]),
        ({"vocab_size": 310}, [("warning", "vocabulary")]),
        ({"vocab_size": 100}, [("error", "ids without embedding")]),
    ],
)
def test_policies_too_small_for_the_rows(
    config: dict[str, int], expected: list[tuple[str, str]], recipe: Path, no_memory: None
) -> None:
    plain = [{"prompt": f"{n} =", "chosen": f" {n}" * 30, "rejected": " 0"} for n in range(5)]
    (recipe.parent / "rows.jsonl").write_bytes(lines(plain))
    tokenizer = byte_tokenizer(eos_token="<s>")  # one of the first special tokens
    save_model(recipe.parent / "model", tokenizer, **config)
    assert len(tokenizer) > 310 > tokenizer.eos_token_id
    assert kinds(check(recipe)) == expected


def test_a_table_of_positions_ends(recipe: Path, no_memory: None) -> None:
    GPT2Config(n_positions=40, vocab_size=400).save_pretrained(recipe.parent / "model")
    assert kinds(check(recipe)) == [("error", "context exceeded")]


def test_a_model_without_weights(recipe: Path, no_memory: None) -> None:
    weights = recipe.parent / "model" / "model.safetensors"
    save_file({"a": torch.ones(9)}, weights)
    weights.write_bytes(weights.read_bytes()[:-4])  # as where a download ended
    assert kinds(check(recipe)) == [("error", "model")]
    weights.write_bytes(b"")
    assert kinds(check(recipe)) == [("error", "model")]
    weights.unlink()
    assert kinds(check(recipe)) == [("error", "model")]
    (weights.parent / "pytorch_model.bin").touch()
    [finding] = check(recipe)["findings"]
    assert "a pickle" in finding["found"]


def test_a_model_of_which_a_shard_is_missing(recipe: Path, no_memory: None) -> None:
    model = recipe.parent / "model"
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors").rename(model / names["a"])
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    [finding] = check(recipe)["findings"]
    assert (finding["severity"], finding["kind"]) == ("error", "model")
    assert names["b"] in finding["found"]
    index.write_text("[]")
    [finding] = check(recipe)["findings"]
    assert "no index" in finding["found"]


def test_a_model_without_a_configuration(recipe: Path, no_memory: None) -> None:
    (recipe.parent / "model" / "config.json").unlink()
    assert ("error", "model") in kinds(check(recipe))


def test_soft_labels_of_hypo_and_of_held_out_rows(recipe: Path, no_memory: None) -> None:
    soft = [pair(n, p_chosen=0.7) for n in range(11, 15)]
    held_out = recipe.parent / "held_out.jsonl"
    held_out.write_bytes(lines(soft))
    hard = "trainer.loss_type=aot"
    found = [("error", "soft labels")]
    assert kinds(check(recipe, [hard])) == []
    assert kinds(check(recipe, [hard, f"data.eval_path={held_out}"])) == found
    (recipe.parent / "rows.jsonl").write_bytes(lines(soft))
    assert kinds(check(recipe, [hard, "trainer.algorithm=hypo"])) == found


def test_judges(recipe: Path, no_memory: None) -> None:
    rollout = "rollout={max_new_tokens: 50}"
    judge = recipe.parent / "judge"
    options = ["trainer.algorithm=ppo", f"judge={{kind: reward_model, path: {judge}}}", rollout]
    assert kinds(check(recipe, options)) == [("error", "judge")]
    save_model(judge, byte_tokenizer(None), max_position_embeddings=60)
    (judge / "chat_template.jinja").unlink(missing_ok=True)
    expected = [("error", "judge template"), ("warning", "judge context")]
    assert kinds(check(recipe, options)) == expected
    other = byte_tokenizer()
    other.add_tokens(["another"])
    save_model(judge, other)
    assert kinds(check(recipe, options)) == [], "a reward model may have a pad token more"
    save_model(recipe.parent / "model", other)
    save_model(judge, byte_tokenizer())
    assert kinds(check(recipe, options)) == [("note", "judge tokenizer")]
    save_model(recipe.parent / "model", byte_tokenizer())
    save_model(judge, byte_tokenizer(), architectures=["LlamaForCausalLM"])
    assert kinds(check(recipe, options)) == [("error", "judge")], "it has no score"
    save_model(judge, byte_tokenizer())
    (judge / "model.safetensors").unlink()
    assert kinds(check(recipe, options)) == [("error", "judge")]


def test_the_judge_of_training_is_a_lenient_one(recipe: Path, no_memory: None) -> None:
    prompts = recipe.parent / "prompts.jsonl"
    prompts.write_bytes(lines([{"prompt": talk("New?")}]))
    judge = f"{{kind: reward_model, path: {recipe.parent / 'model'}}}"
    options = ["trainer.algorithm=ppo", f"judge={judge}", f"eval={{prompts: {prompts}}}"]
    assert kinds(check(recipe, options)) == [("warning", "same judge")]


# --- numbers -------------------------------------------------------------------------------------


def test_wilson_interval_by_hand() -> None:
    # n = 10, p = 0.8, z^2 = 3.8415: (0.8 + 0.1921 -+ sqrt(0.016 + 0.0096) 1.96) / 1.3841
    low, high = wilson_interval(0.8, 10)
    root = 1.959964 * math.sqrt(0.8 * 0.2 / 10 + 3.841459 / 400)
    assert low == pytest.approx((0.8 + 0.19207295 - root) / 1.3841459)
    assert high == pytest.approx((0.8 + 0.19207295 + root) / 1.3841459)


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=60))
def test_the_length_rule_has_no_side(differences: list[int]) -> None:
    findings, mirrored = Findings(), Findings()
    there = length_bias(np.array(differences), findings)
    back = length_bias(-np.array(differences), mirrored)
    assert there["accuracy"] == pytest.approx(1 - back["accuracy"])
    assert there["low"] == pytest.approx(1 - back["high"])
    assert there["mean"] == pytest.approx(-back["mean"])
    assert [f.kind for f in findings] == [f.kind for f in mirrored]
    assert there["low"] - 1e-9 <= there["accuracy"] <= there["high"] + 1e-9


def test_length_bias_by_hand() -> None:
    bias = length_bias(np.array([4, 2, 0, -2]), Findings())
    assert bias["mean"] == 1
    assert bias["standard_error"] == pytest.approx(math.sqrt(20 / 3 / 4))
    assert bias["accuracy"] == 2.5 / 4  # the tie counts half


def test_cut_answers_are_a_pile_and_nothing_else_is() -> None:
    source = np.random.default_rng(0)
    lengths = source.integers(20, 400, 2000)
    mid_sentence = source.random(2000) < 0.5  # such as lists and code
    assert pile_of_cut_answers(lengths, mid_sentence, shortest=64) == []
    cut = np.flatnonzero(lengths > 300)
    lengths[cut], mid_sentence[cut] = 300, True
    there = np.flatnonzero((lengths == 300) & mid_sentence).tolist()
    assert {*cut.tolist()} <= {*there}
    assert pile_of_cut_answers(lengths, mid_sentence, shortest=64) == there
    short = np.full(50, 3)  # "Yes", "No"
    assert pile_of_cut_answers(short, np.full(50, True), shortest=64) == []
    assert pile_of_cut_answers(np.array([], dtype=int), np.array([], dtype=bool), shortest=64) == []


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("naïve café, CAFÉ» and “É” and MANHÃ” and 5 °C €", None),
        ("Ünïcödé, Привет, 你好, emoji 🙂\u200d", None),
        ("tabs\tand\r\nlines", None),
        ("fiancÃ© ", "mojibake"),
        ("it â\x80\x94 was", "mojibake"),
        ("ÐŸÑ€Ð¸", "mojibake"),
        ("a\x00b", "control character"),
        ("\x93quoted\x94", "control character"),
        ("<s>struck out</s> in HTML", None),
        ("The end</s>", "special token in text"),
        ("array[i] and [INST]", "special token in text"),
    ],
)
def test_texts(text: str, kind: str | None) -> None:
    assert [kind for kind, _ in TextChecks(None).problems(text)] == ([kind] if kind else [])


@given(st.text(max_size=80))
def test_no_text_breaks_a_check(text: str) -> None:
    for _, found in TextChecks(None).problems(text):
        assert printable(found).isprintable()


@given(st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0xFFFF), min_size=1))
def test_text_garbled_once_is_found_if_it_has_latin_letters(text: str) -> None:
    garbled = ("é" + text).encode().decode("latin-1")
    assert "mojibake" in [kind for kind, _ in TextChecks(None).problems(garbled)]


def test_prefixes_and_repetitions() -> None:
    assert role_prefix("Human: hi") == "Human:"
    assert role_prefix("Yes.\n\nAssistant: no") == "Assistant:"
    assert role_prefix("A human: that is what I am.\nHuman: is a word") is None
    assert repeats("What is the meaning of it?", " What is the meaning of it? 42.")
    assert not repeats("Why?", "Why? Because.")


def test_copies_by_a_weight_are_no_duplicates() -> None:
    findings = Findings()
    located = [("a:1", GOOD[0]), ("a:1", GOOD[0]), ("a:2", GOOD[1]), ("b:1", GOOD[0])]
    checks = TextChecks(None)
    survey = survey_rows(
        iter(located), lambda r, w: [parse_pair(r, w)], findings, checks, invalid="error"
    )
    assert (len(survey.items), survey.rows) == (4, 3)
    [finding] = findings
    assert (finding.kind, finding.where, finding.found) == ("duplicate", ["b:1"], "the same as a:1")


# --- what it takes -------------------------------------------------------------------------------


def test_steps_are_those_of_training(tmp_path: Path) -> None:
    world = build_world(tmp_path / "world", sft_rows=20, preference_rows=20, prompt_rows=4)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{path: {world.base}}}\ndata: {{path: {world.preferences}}}\n"
        f"run_dir: {tmp_path / 'run'}\ntrainer: {{algorithm: dpo, per_device_train_batch_size: 3, "
        "gradient_accumulation_steps: 2, num_train_epochs: 1.5}\n"
    )
    result = check(path)
    assert result["errors"] == 0
    assert result["budget"]["steps"] == train(read_recipe(path))["steps"] == 6
    assert result["budget"]["seconds"] > 0
    assert result["budget"]["disk"] > result["memory"]["parameters"] * 4


@pytest.mark.parametrize(
    ("options", "rounds", "steps", "rows"),
    [
        # 10 and 11 prompts by two passes: 20 / 4 and 22 / 4 steps
        (["trainer.num_train_epochs=2"], [10, 11], 5 + 6, 42),
        (["trainer.num_train_epochs=2", "trainer.max_steps=3"], [10, 11], 3, 12),
        (["trainer.num_train_epochs=1", "trainer.data_window=all_so_far"], [8, 8], 2 + 4, 24),
    ],
)
def test_steps_of_rounds_by_hand(
    options: list[str], rounds: list[int], steps: int, rows: int, recipe: Path
) -> None:
    judge = "judge={kind: reward_model, path: nowhere}"
    batch = ["trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=1"]
    read = read_recipe(recipe, ["trainer.algorithm=online_dpo", judge, *batch, *options])
    plan = plan_of(read, make_config(read), sum(rounds), rounds, processes=2)
    assert (plan.steps, plan.rows, plan.samples) == (steps, rows, 2)


def test_a_device_that_is_not_here_is_not_measured(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = check(recipe, processes=8)
    assert (result["budget"]["seconds"], result["budget"]["time"]) == (None, NO_DEVICE)
    print_check(result)
    assert f"time: not estimated, {NO_DEVICE}" in capsys.readouterr().out


def test_a_full_disk_and_a_small_device_are_warnings(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    result = check(recipe, device_memory=0.0001)
    assert kinds(result) == [("warning", "memory"), ("warning", "disk")]
    assert "1.0 KiB" not in result["findings"][1]["found"]
    assert "are free" in result["findings"][1]["found"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (17, "20 s"), (100, "2 min"), (5000, "80 min"), (7200, "2 h"), (1e6, "10 days")],
)
def test_durations_have_one_figure(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# --- what is printed -----------------------------------------------------------------------------


def test_marks_say_what_colours_say(recipe: Path, no_memory: None) -> None:
    (recipe.parent / "rows.jsonl").write_bytes(lines([pair(1, "It is [/INST] 2.")]))
    pieces = check(recipe)["train"]["example"]["chosen"]
    text = rendered(pieces)
    assert text.plain == (
        "⟨<|im_start|>⟩user\nHow much is 1 and 1?⟨<|im_end|>⟩\n"
        "⟨<|im_start|>⟩assistant\n⟦It is [/INST] 2.⟨<|im_end|>⟩⟧"
    )
    console = Console(force_terminal=True, color_system="standard", width=200)
    with console.capture() as capture:
        console.print(text)
    assert "\x1b[32mIt is [/INST] 2." in capture.get()
    assert "\x1b[1;35m⟨<|im_end|>⟩" in capture.get()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_odd_text_reaches_any_terminal(
    encoding: str, recipe: Path, no_memory: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    odd = [pair(1, "\x1b]0;title\x07 [bold]fun[/red] é 🙂"), pair(2, "half \ud83d!")]
    (recipe.parent / "rows.jsonl").write_bytes(lines(odd))
    with (tmp_path / "out.txt").open("w", encoding=encoding) as out:
        monkeypatch.setattr("sys.stdout", out)
        assert main(["check", str(recipe)]) == 1
    text = (tmp_path / "out.txt").read_text(encoding=encoding)
    assert "\x1b" not in text
    assert "[bold]fun[/red]" in text
    assert "\\ud83d" in text
    assert text.endswith("1 error, 1 warning\n")


def test_places_name_a_file_once(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*GOOD[:2], *[{"prompt": "no"}] * 7]
    (recipe.parent / "rows.jsonl").write_bytes(lines(rows))
    print_check(check(recipe))
    printed = capsys.readouterr().out
    assert "rows.jsonl:3, 4, 5, 6, 7 and 2 more" in printed
    assert "error: missing column, 7 times" in printed


# --- any rows ------------------------------------------------------------------------------------

TEXTS = st.sampled_from(["", " ", "Hi there.", "Human: x", "\ud83d", "\x00", "fiancÃ©", "<s>"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "name", "finish_reason"]), SCALARS)
    | st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXTS}
    ),
    max_size=3,
)
COLUMNS = [
    "prompt", "chosen", "rejected", "completion", "messages", "p_chosen", "margin", "tools",
    "score_chosen", "score_rejected", "finish_reason", "finished",
]  # fmt: skip
ROWS = st.lists(st.dictionaries(st.sampled_from(COLUMNS), SCALARS | MESSAGES), max_size=6)
PARSERS = [
    lambda row, where: [parse_pair(row, where)],
    lambda row, where: [parse_prompt_row(row, where)],
    parse_demonstrations,
]


@given(ROWS, st.sampled_from(PARSERS))
def test_no_rows_break_a_survey(rows: list[dict[str, Any]], parse: Any) -> None:
    findings = Findings()
    located = ((f"a:{number}", row) for number, row in enumerate(rows, start=1))
    survey = survey_rows(located, parse, findings, TextChecks(None), invalid="error")
    bad = sum(survey.invalid.values())
    assert survey.rows + bad == len(rows)
    assert bad == sum(f.count for f in findings if f.severity == "error") - sum(
        f.count for f in findings if f.kind == "half a character"
    )
    for finding in findings:
        assert finding.found.isprintable()
        assert len(finding.where) <= 5
        assert finding.count >= len(finding.where)
