"""The command: one clear line and exit 2 for whatever a user can mend."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest

from prefopt.cli import main
from prefopt.world import WorldPaths, build_world

PROMPT = [{"role": "user", "content": "sort 4 3"}]
GOOD = [{"role": "assistant", "content": "3 4 ."}]
BAD = [{"role": "assistant", "content": "4 ."}]
PAIR = {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldPaths:
    folder = tmp_path_factory.mktemp("world") / "world"
    return build_world(folder, sft_rows=20, preference_rows=20, prompt_rows=4)


@pytest.fixture
def recipe(world: WorldPaths, tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text(json.dumps(PAIR) + "\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{path: {world.base}}}\ndata: {{path: {tmp_path / 'rows.jsonl'}}}\n"
        f"run_dir: {tmp_path / 'run'}\ntrainer: {{algorithm: dpo, max_steps: 1}}\n"
    )
    return path


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Runs the command, expects exit 2 and one line on stderr, and returns the line."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    output = capsys.readouterr()
    lines = output.err.strip().splitlines()
    assert len(lines) == 1, output.err
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": PROMPT, "chosen": GOOD}, ["'rejected'", "missing column"]),
        (PAIR | {"chosen": [GOOD[0] | {"content": " "}]}, ["'chosen'", "empty completion"]),
        (PAIR | {"rejected": GOOD}, ["chosen equals rejected"]),
        (PAIR | {"p_chosen": float("nan")}, ["'p_chosen'", "nan"]),
    ],
)
def test_a_bad_row_is_named_with_file_row_and_field(
    row: dict, words: list[str], recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = recipe.parent / "rows.jsonl"
    rows.write_text(json.dumps(PAIR) + "\n" + json.dumps(row) + "\n")
    line = error_of(capsys, "train", recipe)
    assert f"{rows}:2" in line
    assert all(word in line for word in words), line
    assert not (recipe.parent / "run").exists()


def test_zero_rows(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (recipe.parent / "rows.jsonl").write_text("")
    assert "no rows" in error_of(capsys, "train", recipe)


def test_an_unreadable_gzip(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe.parent / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(PAIR).encode())[:40])
    assert "gzip" in error_of(capsys, "train", recipe, f"data.path={path}")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.max_prompt_length=2", "prompt longer than the limit everywhere"),
        ("trainer.bta=0.2", "did you mean 'trainer.beta'"),
        ("trainer.max_length=9", "did you mean 'data.max_length'"),
        ("trainer.learning_rate=fast", "trainer.learning_rate: found 'fast'"),
        ("trainer.loss_type=sigmod", "did you mean 'sigmoid'"),
        ("trainer.label_smoothing=0.1", "no effect on loss_type 'sigmoid'"),
        ("trainer.eval_strategy=steps", "eval_dataset"),
        ("trainer.optim=adamw_8bit", "a package is missing"),
        ("trainer.report_to=wandb", "wandb"),
        ("trainer.save_total_limit=1", "set 2 or more"),
        ("trainer.train_sampling_strategy=group_by_length", "expected random or sequential"),
        ("model.lora={target_modules: [nosuch]}", "nosuch"),
        ("trainer.layout=row", "expected auto, tree or separate"),
        ("model.path=./nowhere", "model path './nowhere'"),
        ("data.path=nowhere.jsonl", "nowhere.jsonl: no such file"),
    ],
)
def test_a_bad_value_is_named(
    override: str, words: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in error_of(capsys, "train", recipe, override)


def spoiled(world: WorldPaths, folder: Path, key: str) -> Path:
    """A copy of the base model without one entry of its tokenizer."""
    shutil.copytree(world.base, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop(key, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").unlink() if key == "chat_template" else None
    return folder


@pytest.mark.parametrize(
    ("key", "words"), [("chat_template", "no chat template"), ("eos_token", "no EOS token")]
)
def test_a_tokenizer_that_cannot_serve(
    key: str, words: str, world: WorldPaths, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = spoiled(world, recipe.parent / "model", key)
    assert words in error_of(capsys, "train", recipe, f"model.path={model}")


def test_generate_and_win_rate(
    world: WorldPaths, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [recipe.parent / f"{name}.jsonl" for name in "ab"]
    for seed, path in enumerate(answers):
        sampling = ["--seed", str(seed), "--max-new-tokens", "5"]
        assert (
            main(["generate", str(world.base), str(world.prompts), "--out", str(path), *sampling])
            == 0
        )
    assert main(["train", str(recipe), "trainer.algorithm=reward_model"]) == 0
    capsys.readouterr()
    judge = ["--judge", str(recipe.parent / "run" / "final"), "--json"]
    assert main(["eval", "win-rate", str(answers[0]), str(answers[1]), *judge]) == 0
    ab = json.loads(capsys.readouterr().out)
    assert main(["eval", "win-rate", str(answers[1]), str(answers[0]), *judge]) == 0
    ba = json.loads(capsys.readouterr().out)
    assert ab["prompts"] == 4
    assert ab["win_rate"] + ba["win_rate"] == pytest.approx(100)
    answers[1].write_text(answers[1].read_text().splitlines()[0] + "\n")
    line = error_of(capsys, "eval", "win-rate", answers[0], answers[1], "--judge", judge[1])
    assert "same prompts" in line


def test_check_says_what_would_be_trained_on(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(recipe), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["train"]
    assert report["rows"] == 1
    assert main(["check", str(recipe)]) == 0
    assert "3 4 ." in capsys.readouterr().out


def test_report_of_a_run(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe)]) == 0
    assert main(["report", str(recipe.parent / "run")]) == 0
    assert (recipe.parent / "run" / "report.html").exists()
    assert "no such folder" in error_of(capsys, "report", recipe.parent / "nothing").lower()


def test_a_model_without_a_score_head_is_no_judge(
    world: WorldPaths, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = recipe.parent / "answers.jsonl"
    answers.write_text(json.dumps({"prompt": PROMPT, "completion": "3 4 ."}) + "\n")
    line = error_of(capsys, "eval", "win-rate", answers, answers, "--judge", world.base)
    assert "not a reward model: it lacks score.weight" in line


def test_json_on_stdout_is_json(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["train", str(recipe), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 1


def test_a_run_that_trained_nothing_can_be_corrected(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error_of(capsys, "train", recipe, "trainer.optim=adamw_8bit")
    assert main(["train", str(recipe)]) == 0


def test_soft_labels_that_a_loss_cannot_use_are_refused_before_training(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = recipe.parent / "rows.jsonl"
    rows.write_text(json.dumps(PAIR | {"p_chosen": 0.7}) + "\n")
    line = error_of(capsys, "train", recipe, "trainer.loss_type=aot")
    assert "soft labels" in line
    assert not (recipe.parent / "run" / "log_probs").exists()


def test_a_file_where_a_folder_is_wanted(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (recipe.parent / "file").write_text("")
    assert "file" in error_of(capsys, "train", recipe, f"run_dir={recipe.parent / 'file'}")


def test_a_run_needs_no_git(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(["train", str(recipe)]) == 0
