"""Nothing on disk is lost or taken for what it is not: damage, full disks, kills, older formats.

Files are damaged as disks damage them: a bit is another, the end is gone.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import contents
from safetensors.torch import save_file
from test_evaluation_in_training import run as evaluated_run
from test_rounds import Make, Stopped, brief_policy, equal, make_trainer, weights
from test_rounds_killed import (
    EVERY_TWO_STEPS,
    FOUR_STEPS,
    SAMPLE_ROUNDS,
    StopBefore,
    all_weights,
    interrupted,
)

from prefopt import disk, generate
from prefopt.cli import main
from prefopt.disk import is_full, writing
from prefopt.errors import PrefoptError
from prefopt.generate import Generator
from prefopt.recipe import Recipe
from prefopt.rounds import storage
from prefopt.rounds.facts import FORMAT, check_format, differences
from prefopt.rounds.storage import append, atomic_write, read_appended, remove_directory
from prefopt.rounds.sums import DamagedError, read_summed, sum_path, write_summed
from prefopt.run_lock import run_lock
from prefopt.train import train
from prefopt.trainers import checkpoints
from prefopt.trainers.checkpoints import (
    COMPLETE_MARKER,
    finish_checkpoint,
    last_complete_checkpoint,
    rotate,
)
from prefopt.trainers.rounds import RoundTrainer
from prefopt.world import build_world

pytestmark = pytest.mark.usefixtures("frozen_heap")


def flip(path: Path) -> None:
    """Another bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    """The second half is gone."""
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = [flip, cut]
Damage = Callable[[Path], None]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda run="run", *args, **options: make_trainer(tmp_path / run, *args, **options)


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, logger="prefopt")
    return caplog


# --- sums ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_with_what_was_found(damage: Damage, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_summed(path, "one\ntwo\n")
    assert read_summed(path, "restore it") == b"one\ntwo\n"
    damage(path)
    with pytest.raises(DamagedError, match=r"rows\.jsonl: damaged: found \d bytes .*; restore it"):
        read_summed(path, "restore it")


def test_a_sum_is_one_that_the_xxhash_tool_checks(tmp_path: Path) -> None:
    write_summed(tmp_path / "rows", "prefopt\n")
    # printf 'prefopt\n' | xxh128sum
    digest, name = (tmp_path / ".rows.xxh128").read_text().split()
    assert (len(digest), name) == (32, "rows")
    if shutil.which("xxh128sum"):
        command = ["xxh128sum", "-c", ".rows.xxh128"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)


def test_a_file_written_again_is_measured_by_its_own_sum(tmp_path: Path) -> None:
    for content in ("old", "new"):
        write_summed(tmp_path / "rows", content)
        assert read_summed(tmp_path / "rows", "").decode() == content


def test_a_kill_while_a_file_is_written_again_leaves_nothing_that_looks_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, left = Path.replace, 0

    def killed(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return replace(self, target)

    for count in (0, 1):  # of the content and its sum, so many are written
        left = 2
        monkeypatch.setattr(Path, "replace", killed)
        write_summed(tmp_path / "rows", "old")
        left = count
        with pytest.raises(KeyboardInterrupt):
            write_summed(tmp_path / "rows", "new")
        assert read_summed(tmp_path / "rows", "").decode() == ("old", "new")[count]


def test_files_without_a_sum_are_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text("older")
    assert read_summed(tmp_path / "rows", "") == b"older"


def test_an_empty_sum_says_nothing_good_of_its_file(tmp_path: Path) -> None:
    write_summed(tmp_path / "rows", "text")
    sum_path(tmp_path / "rows").write_text("")
    with pytest.raises(DamagedError, match="damaged"):
        read_summed(tmp_path / "rows", "")


# --- checkpoints ---------------------------------------------------------------------------------


def checkpoint(folder: Path, step: int) -> Path:
    partial, final = folder / ".partial" / f"checkpoint-{step}", folder / f"checkpoint-{step}"
    (partial / "kept").mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"weights" * step)
    (partial / "kept" / "target").write_bytes(b"more")
    finish_checkpoint(partial, final, seconds=2.5 * step)
    return final


def test_a_checkpoint_says_what_it_is_made_of(tmp_path: Path) -> None:
    facts = json.loads((checkpoint(tmp_path, 3) / COMPLETE_MARKER).read_text())
    assert (facts["format"], facts["step"], facts["seconds"]) == (FORMAT, 3, 7.5)
    assert {name: fact["bytes"] for name, fact in facts["files"].items()} == {
        "kept/target": 4,
        "model.safetensors": 21,
    }
    assert not any((tmp_path / ".partial").iterdir())


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flip, "model.safetensors: found the XXH3 sum"),
        (cut, "model.safetensors: found 14 bytes, expected 28"),
        (Path.unlink, "model.safetensors: missing"),
    ],
)
def test_the_checkpoint_before_a_damaged_one_is_taken(
    damage: Damage, says: str, tmp_path: Path, warned: pytest.LogCaptureFixture
) -> None:
    good, bad = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    assert last_complete_checkpoint(tmp_path, sums=True) == bad
    damage(bad / "model.safetensors")
    assert last_complete_checkpoint(tmp_path, sums=True) == good
    assert says in warned.text
    assert "checkpoint-4" in warned.text


@pytest.mark.parametrize("marker", [None, "", '{"step": 4, "fi', "[]"])
def test_a_checkpoint_without_a_whole_marker_is_none(marker: str | None, tmp_path: Path) -> None:
    good, bad = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4) / COMPLETE_MARKER
    bad.unlink() if marker is None else bad.write_text(marker)
    assert last_complete_checkpoint(tmp_path) == good


@pytest.mark.parametrize("key", ["files", "bytes", "xxh128"])
def test_a_checkpoint_whose_marker_has_lost_its_sums_is_none(key: str, tmp_path: Path) -> None:
    good, bad = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4) / COMPLETE_MARKER
    bad.write_text(bad.read_text().replace(f'"{key}"', f'"{key[:-1]}_"'))
    assert last_complete_checkpoint(tmp_path) == good


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    marker = checkpoint(tmp_path, 2) / COMPLETE_MARKER
    facts = json.loads(marker.read_text())
    marker.write_text(json.dumps(facts | {"format": FORMAT + 1}))
    with pytest.raises(PrefoptError, match=rf"newer prefopt \(format {FORMAT + 1}; .*upgrade"):
        last_complete_checkpoint(tmp_path)


def test_the_newest_checkpoints_and_the_best_stay(tmp_path: Path) -> None:
    folders = [checkpoint(tmp_path, step) for step in (1, 2, 3, 9, 4)]
    (folders[1] / COMPLETE_MARKER).unlink()
    # the run went on from the third; the ninth was passed over
    rotate(tmp_path, limit=3, step=4, best=None)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {
        "checkpoint-1",
        "checkpoint-3",
        "checkpoint-4",
    }
    rotate(tmp_path, limit=2, step=4, best=str(folders[0]))
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-4"}


def test_a_kill_while_a_folder_is_deleted_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path, 2)

    def killed(path: Path, **_: Any) -> None:
        next(path.rglob("*")).unlink(missing_ok=True) if path.is_file() else None
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_directory(folder)
    assert not folder.exists()
    assert last_complete_checkpoint(tmp_path) is None
    checkpoints.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_goes_on_from_the_checkpoint_before_and_ends_alike(
    make: Make, whole: RoundTrainer
) -> None:
    flip(Path(interrupted(make, "run", 5, **EVERY_TWO_STEPS) or "") / "optimizer.pt")
    trainer = make("run", **EVERY_TWO_STEPS)
    older = last_complete_checkpoint(Path(trainer.args.output_dir), sums=True)
    assert older is not None
    assert older.name == "checkpoint-2"
    trainer.train(resume_from_checkpoint=str(older))
    assert equal(weights(trainer.model), weights(whole.model))
    newest = last_complete_checkpoint(Path(trainer.args.output_dir), sums=True)
    assert newest is not None
    assert newest.name == "checkpoint-6"


# --- rounds --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RoundTrainer:
    """An uninterrupted run of two rounds of three steps."""
    trainer = make_trainer(tmp_path_factory.mktemp("whole") / "run")
    trainer.train()
    return trainer


def resume(make: Make, step: int | None, **options: Any) -> RoundTrainer:
    trainer = make("run", **options)
    folder = None if step is None else Path(trainer.args.output_dir) / f"checkpoint-{step}"
    trainer.train(resume_from_checkpoint=folder and str(folder))
    return trainer


# a run that stopped as its second round began, or one step into it
@pytest.mark.parametrize(
    ("step", "name"),
    [
        (3, "0001/draw-0/rollouts-00000.parquet"),
        (3, "0001/draw-0/judgements-00000.jsonl"),
        (3, "0001/pairs.jsonl"),
        (3, "0001/round.json"),
        (3, "0001/log_probs/initial/shard-00000.safetensors"),
        (3, "start.json"),
        (3, "0000/round.json"),
        (4, "0001/pairs.jsonl"),
        (4, "0001/round.json"),
        (4, "0001/log_probs/initial/shard-00000.safetensors"),
    ],
)
def test_what_can_be_made_again_is_and_the_run_ends_alike(
    make: Make, whole: RoundTrainer, step: int, name: str, warned: pytest.LogCaptureFixture
) -> None:
    options = {"save_strategy": "steps", "save_steps": step}
    interrupted(make, "run", step + 1 if step == 4 else 3, **options)
    path = make("run", **options).rounds_dir / name
    flip(path)
    damaged = path.read_bytes()
    trainer = resume(make, step, **options)
    assert f"{path}: damaged" in warned.text
    assert path.with_name(f"{path.name}.corrupt").read_bytes() == damaged
    assert equal(weights(trainer.model), weights(whole.model))
    kept = {n: c for n, c in contents(trainer.rounds_dir).items() if not n.endswith(".corrupt")}
    assert kept == contents(whole.rounds_dir)


@pytest.mark.parametrize("name", ["rollouts-00000.parquet", "judgements-00000.jsonl"])
def test_what_is_gone_of_a_round_that_begins_is_made_again(
    make: Make, whole: RoundTrainer, name: str
) -> None:
    options = {"save_strategy": "steps", "save_steps": 3}
    interrupted(make, "run", 3, **options)
    (make("run", **options).rounds_dir / "0001" / "draw-0" / name).unlink()
    trainer = resume(make, 3, **options)
    assert equal(weights(trainer.model), weights(whole.model))
    assert contents(trainer.rounds_dir) == contents(whole.rounds_dir)


@pytest.mark.parametrize(("damage", "older"), [(flip, True), (cut, False)])
def test_samples_of_a_past_policy_are_refused_with_the_way_back(
    make: Make, damage: Damage, older: bool
) -> None:
    options = {"save_strategy": "steps", "save_steps": 1 if older else 4, "save_total_limit": 4}
    interrupted(make, "run", 5, **options)
    trainer = make("run", **options)
    folder = trainer.rounds_dir / "0001"
    damage(folder / "draw-0" / "rollouts-00000.parquet")
    flip(folder / "pairs.jsonl")
    before = contents(trainer.rounds_dir)
    with pytest.raises(PrefoptError) as caught:
        resume(make, 4, **options)
    said = str(caught.value)
    assert "0001/draw-0/rollouts-00000.parquet: damaged: found" in said
    assert f"delete {Path(trainer.args.output_dir) / 'checkpoint-4'}" in said
    assert f"{folder} and the rounds after it" in said
    assert said.endswith("checkpoint-3" if older else "from the beginning")
    assert contents(trainer.rounds_dir) == before, "nothing was moved"


def test_the_way_back_leads_to_the_same_end(make: Make, whole: RoundTrainer) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 4}
    interrupted(make, "run", 5, **options)
    trainer = make("run", **options)
    output_dir = Path(trainer.args.output_dir)
    flip(trainer.rounds_dir / "0001" / "draw-0" / "rollouts-00000.parquet")
    for path in (output_dir / "checkpoint-4", output_dir / "checkpoint-5"):
        shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(trainer.rounds_dir / "0001")
    assert equal(weights(resume(make, 3, **options).model), weights(whole.model))


def test_damaged_initial_weights_are_made_again_before_the_first_step_only(make: Make) -> None:
    interrupted(make, "run", 3, **EVERY_TWO_STEPS)
    trainer = make("run", **EVERY_TWO_STEPS)
    path = trainer.initial_weights / "trainable.safetensors"
    content = path.read_bytes()
    flip(path)
    with pytest.raises(PrefoptError, match=r"trainable\.safetensors: damaged.*weights this run"):
        resume(make, 2, **EVERY_TWO_STEPS)
    shutil.rmtree(Path(trainer.args.output_dir) / "checkpoint-2")
    resume(make, None, max_steps=1)
    assert path.read_bytes() == content


def test_initial_weights_stay_though_what_the_rounds_depend_on_is_gone(make: Make) -> None:
    interrupted(make, "run", 5, **EVERY_TWO_STEPS)
    trainer = make("run", **EVERY_TWO_STEPS)
    before = contents(trainer.rounds_dir)
    (trainer.rounds_dir / "start.json").unlink()
    resume(make, 4, **EVERY_TWO_STEPS)  # by then the policy is another
    after = contents(trainer.rounds_dir)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("with_sum", [True, False])
def test_rounds_are_not_taken_for_those_of_other_settings(make: Make, with_sum: bool) -> None:
    interrupted(make, "run", 1, save_strategy="no")
    path = make("run").rounds_dir / "start.json"
    path.unlink()
    if not with_sum:
        sum_path(path).unlink()
    with pytest.raises(PrefoptError, match=r"start\.json: gone, and other rounds than these may"):
        make("run", seed=1).train()


def test_rounds_of_samples_are_mended_while_they_are_trained_on(
    make: Make, warned: pytest.LogCaptureFixture
) -> None:
    options = {**FOUR_STEPS, **SAMPLE_ROUNDS["ppo"], **EVERY_TWO_STEPS, "rounds": 2}

    def brief(run: str, **more: Any) -> RoundTrainer:
        return make(run, model=brief_policy(), **options, **more)

    whole = brief("whole")
    whole.train()
    trainer = brief("run", callbacks=[StopBefore(7)])
    with pytest.raises(Stopped):
        trainer.train()
    folder = trainer.rounds_dir / "0001"
    flip(folder / "draw-0" / "judgements-00000.jsonl")
    newest = last_complete_checkpoint(Path(trainer.args.output_dir), sums=True)
    assert newest is not None
    assert newest.name == "checkpoint-6"
    resumed = brief("run")
    resumed.train(resume_from_checkpoint=str(newest))
    assert "judgements-00000.jsonl: damaged" in warned.text
    assert [n for n, w in all_weights(whole).items() if not equal(w, all_weights(resumed)[n])] == []
    for path, says in (
        (folder / "log_probs" / "critic" / "shard-00000.safetensors", "damaged"),
        (folder / "draw-0" / "rollouts-00000.parquet", "damaged"),
    ):
        flip(path)
        with pytest.raises(PrefoptError, match=rf"{path.name}: {says}: .*delete .*go(es)? on"):
            brief("run").train(resume_from_checkpoint=str(newest))


def dpo_recipe(folder: Path, data: dict[str, Any], trainer: dict[str, Any]) -> Recipe:
    """DPO on a small world, with a checkpoint every two of four steps."""
    world = build_world(folder / "world", sft_rows=8, preference_rows=24, prompt_rows=4)
    return Recipe.model_validate(
        {
            "name": "dpo",
            "run_dir": str(folder / "run"),
            "model": {"path": str(world.base)},
            "data": {"path": str(world.preferences), **data},
            "trainer": {
                "algorithm": "dpo",
                "max_steps": 4,
                "save_steps": 2,
                "save_strategy": "steps",
                "per_device_train_batch_size": 4,
                **trainer,
            },
        }
    )


def test_the_best_checkpoint_is_known_by_the_name_it_keeps(tmp_path: Path) -> None:
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    train(dpo_recipe(tmp_path, {"eval_fraction": 0.3}, {**best, "learning_rate": 1e-3}))
    folder = tmp_path / "run" / "checkpoints"
    for step in (2, 4):
        state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
        expected = folder / f"checkpoint-{state['best_global_step']}"
        assert state["best_model_checkpoint"] == str(expected)
    assert state["best_global_step"] == 4


def test_training_ends_with_the_best_checkpoint_only_as_it_was_written(tmp_path: Path) -> None:
    worst = {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    every = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    recipe = dpo_recipe(tmp_path, {"eval_fraction": 0.3}, {**worst, **every, "learning_rate": 1e-3})
    train(recipe)
    run = Path(recipe.run_dir)
    best = run / "checkpoints" / "checkpoint-2" / "model.safetensors"
    for path in (run / "final" / "model.safetensors", run / "summary.json"):
        path.unlink()
    train(recipe)
    assert (run / "final" / "model.safetensors").read_bytes() == best.read_bytes()
    (run / "summary.json").unlink()
    flip(best)
    with pytest.raises(PrefoptError, match=r"checkpoint-2/model\.safetensors: found the XXH3 sum"):
        train(recipe)


@pytest.mark.parametrize("steps", [4, 8])  # of six in an epoch
def test_a_run_killed_after_its_last_step_takes_no_more(tmp_path: Path, steps: int) -> None:
    more = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1}
    epochs = {"num_train_epochs": steps / 6, "max_steps": -1, "save_strategy": "epoch"}
    for name, options in (("steps", {"max_steps": steps}), ("epochs", epochs)):
        recipe = dpo_recipe(tmp_path / name, {}, {**more, **options})
        train(recipe)
        run = Path(recipe.run_dir)
        lines = read_appended(run / "metrics.jsonl")
        final = (run / "final" / "model.safetensors").read_bytes()
        (run / "summary.json").unlink()
        assert train(recipe)["steps"] == steps
        assert read_appended(run / "metrics.jsonl") == lines
        assert (run / "final" / "model.safetensors").read_bytes() == final


def test_a_checkpoint_that_cannot_be_gone_on_from_is_not_asked_for(tmp_path: Path) -> None:
    with pytest.raises(PrefoptError, match="save_only_model=true would leave checkpoints"):
        train(dpo_recipe(tmp_path, {}, {"save_only_model": True}))


def test_a_damaged_recipe_is_named_with_what_to_do(tmp_path: Path) -> None:
    recipe = dpo_recipe(tmp_path, {}, {})
    recipe.write_resolved(tmp_path / "run" / "recipe.yaml")
    checkpoint(tmp_path / "run" / "checkpoints", 2)
    (tmp_path / "run" / "recipe.yaml").write_text("seed: \0")
    with pytest.raises(PrefoptError, match=r"recipe\.yaml: .*; restore the file, or, if"):
        train(recipe)


def test_a_damaged_summary_is_named(tmp_path: Path) -> None:
    recipe = dpo_recipe(tmp_path, {}, {})
    Path(recipe.run_dir).mkdir()
    (Path(recipe.run_dir) / "summary.json").write_text('{"steps": ')
    with pytest.raises(PrefoptError, match=r"summary\.json: cannot be read .*delete the file"):
        train(recipe)


def test_a_run_goes_on_though_its_checkpoint_and_reference_are_damaged(
    tmp_path: Path, warned: pytest.LogCaptureFixture
) -> None:
    recipe = dpo_recipe(tmp_path, {}, {})
    train(recipe)
    run = Path(recipe.run_dir)
    expected = (run / "final" / "model.safetensors").read_bytes()
    (run / "summary.json").unlink()
    cut(run / "checkpoints" / "checkpoint-4" / "model.safetensors")
    (shard,) = run.glob("log_probs/*/shard-00000.safetensors")
    flip(shard)
    flip(run / "final" / "model.safetensors")
    for path in (run / "recipe.yaml", shard):
        path.with_name(f".{path.name}.partial-1").write_text("half")
    train(recipe)
    assert "checkpoint-4/model.safetensors: found" in warned.text
    assert "this checkpoint is passed over" in warned.text
    assert f"{shard}: damaged" in warned.text
    assert (run / "final" / "model.safetensors").read_bytes() == expected
    assert json.loads((run / "data.json").read_text())["format"] == FORMAT
    assert not list(run.rglob("*.partial*"))


def test_a_damaged_evaluation_is_made_again_while_its_policy_is_there(
    tmp_path: Path, warned: pytest.LogCaptureFixture
) -> None:
    options = {"save_strategy": "steps", "save_steps": 3}
    with pytest.raises(Stopped):
        evaluated_run("online_dpo", tmp_path, None, 4, **options)
    folder = tmp_path / "evaluations" / "0001"
    before = contents(folder)
    for name in ("result.json", "answers.jsonl"):
        flip(folder / name)
    flip(tmp_path / "evaluations" / "start.json")
    evaluated_run("online_dpo", tmp_path, **options)
    assert warned.text.count("made again") == 3
    kept = {n: c for n, c in contents(folder).items() if not n.endswith(".corrupt")}
    assert kept == before
    flip(folder / "result.json")
    with pytest.raises(PrefoptError, match=r"0001/result\.json: damaged: .* delete its folder"):
        evaluated_run("online_dpo", tmp_path, **options)  # from its last checkpoint
    shutil.rmtree(folder)
    assert [result["after"] for result in evaluated_run("online_dpo", tmp_path, **options)[1]] == [
        2
    ]


def test_generating_goes_on_where_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = build_world(tmp_path / "world", sft_rows=8, preference_rows=8, prompt_rows=6)
    outs = [tmp_path / name for name in ("whole.jsonl", "killed.jsonl")]
    command = ["generate", str(world.base), str(world.prompts), "--max-new-tokens", "4"]
    assert main([*command, "--out", str(outs[0])]) == 0
    asked: list[int] = []
    answer = Generator.answer

    def watched(self: Generator, prompts: Any, *rest: Any, **more: Any) -> Any:
        asked.append(len(prompts))
        return answer(self, prompts, *rest, **more)

    def killed(path: Path, lines: str) -> None:
        append(path, lines)
        if path.read_text().count("\n") == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "answer", watched)
    with monkeypatch.context() as patch:
        patch.setattr(generate, "append", killed)
        assert main([*command, "--out", str(outs[1])]) == 130
    assert not outs[1].exists()
    record = tmp_path / ".killed.jsonl.unfinished.decoding.json"
    content = record.read_bytes()
    cut(record)
    with pytest.raises(PrefoptError, match=r"decoding\.json: cannot be read"):
        generate._read_record(record)
    record.write_bytes(content)
    assert main([*command, "--out", str(outs[1])]) == 0
    assert asked == [6, 4]
    assert outs[1].read_bytes() == outs[0].read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "killed.jsonl",
        "whole.jsonl",
        "world",
    ]


# --- older formats -------------------------------------------------------------------------------


def as_older(output_dir: Path) -> None:
    """Makes of a folder what versions without a format left: no sums, and less in the marker."""
    for path in output_dir.rglob("*.xxh128"):
        path.unlink()
    for path in output_dir.rglob(COMPLETE_MARKER):
        facts = json.loads(path.read_text())
        path.write_text(json.dumps({"step": facts["step"], "seconds": facts["seconds"]}))
    path = output_dir / "rounds" / "start.json"
    facts = json.loads(path.read_text())
    del facts["format"]
    path.write_text(json.dumps(facts, indent=2) + "\n")


def test_a_run_of_the_older_format_goes_on_and_ends_alike(make: Make, whole: RoundTrainer) -> None:
    last = interrupted(make, "run", 5, **EVERY_TWO_STEPS)
    assert last is not None
    as_older(Path(last).parent)
    assert str(last_complete_checkpoint(Path(last).parent, sums=True)) == last
    assert equal(weights(resume(make, 4, **EVERY_TWO_STEPS).model), weights(whole.model))


def test_rounds_of_a_newer_version_are_refused(make: Make) -> None:
    interrupted(make, "run", 1, save_strategy="no")
    path = make("run").rounds_dir / "start.json"
    facts = json.loads(path.read_text()) | {"format": FORMAT + 1}
    write_summed(path, json.dumps(facts))
    with pytest.raises(PrefoptError, match=r"start\.json: written by a newer prefopt.*upgrade"):
        make("run").train()


def test_formats_up_to_this_one_are_read(tmp_path: Path) -> None:
    for found in ({}, {"format": FORMAT}):
        check_format(tmp_path, found)
    for version in (FORMAT + 1, "one"):
        with pytest.raises(PrefoptError, match="newer prefopt"):
            check_format(tmp_path, {"format": version})


def test_differences_show_both_values() -> None:
    old = {"trainer": {"beta": 0.1, "lr": 1e-6}, "seed": 0, "long": "x" * 100}
    new = {"trainer": {"beta": 0.2, "lr": 1e-6}, "seed": None, "long": "y" * 100, "new": [1]}
    found = dict(differences(old, new))
    assert found["trainer.beta"] == "0.1 -> 0.2"
    assert found["seed"] == "0 -> null"
    assert found["new"] == "null -> [1]"
    assert len(found["long"]) < 130
    assert found.keys() == {"trainer.beta", "seed", "new", "long"}


# --- full disks ----------------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


def test_a_nearly_full_disk_ends_a_run_before_a_checkpoint_and_it_goes_on(
    make: Make, whole: RoundTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fills(StopBefore):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == self.step:
                usage = Usage(2**30, 2**30 - 2**20, 2**20)
                monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage)

    trainer = make("run", callbacks=[Fills(3)], **EVERY_TWO_STEPS)
    with pytest.raises(
        PrefoptError, match=r"nearly full: checkpoint-4 takes about .* KiB"
    ) as found:
        trainer.train()
    assert "1 MiB are free" in str(found.value)
    assert "run the same command again" in str(found.value)
    output_dir = Path(trainer.args.output_dir)
    assert [path.name for path in output_dir.glob("*checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    assert equal(weights(resume(make, 2, **EVERY_TWO_STEPS).model), weights(whole.model))


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_while_a_checkpoint_is_written_loses_nothing(
    make: Make, whole: RoundTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make("run", **EVERY_TWO_STEPS)
    save = trainer._save_rng_state
    monkeypatch.setattr(
        trainer, "_save_rng_state", lambda at: full() if at.endswith("-4") else save(at)
    )
    with pytest.raises(PrefoptError, match=r"the disk is full .* while checkpoint-4 was written"):
        trainer.train()
    output_dir = Path(trainer.args.output_dir)
    assert {path.name for path in output_dir.iterdir()} == {"checkpoint-2", "rounds"}
    assert equal(weights(resume(make, 2, **EVERY_TWO_STEPS).model), weights(whole.model))


def test_a_shard_that_does_not_fit_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: Usage(2**30, 2**30, 2**20))
    with pytest.raises(PrefoptError, match="nearly full: rollouts takes about 4 bytes"):
        write_summed(tmp_path / "new" / "rollouts", "rows")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_does_not_fit_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "write_text", full)
    found = pytest.raises(PrefoptError, match=r"run: the disk is full .* while \.lock was written")
    with found, run_lock(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


def test_lines_that_do_not_fit_are_not_there_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, '{"step": 1}\n')

    class Filling:
        """Takes four bytes and then no more."""

        def __init__(self, file: Any) -> None:
            self.file, self.left = file, 4

        def __enter__(self) -> Filling:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> int:
            if not self.left:
                full()
            self.left = 0
            return self.file.write(content[:4])

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    with monkeypatch.context() as patch:
        plain = Path.open
        patch.setattr(Path, "open", lambda self, *a, **k: Filling(plain(self, *a, **k)))
        with pytest.raises(PrefoptError, match=r"while metrics\.jsonl was written"):
            append(path, '{"step": 2}\n')
    append(path, '{"step": 3}\n')
    assert read_appended(path) == [{"step": 1}, {"step": 3}]


def test_half_lines_are_taken_out_wherever_they_are(
    tmp_path: Path, warned: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text('{"key": 1}\n{"key":\n{"key": 3}\n{"ke')
    assert read_appended(path) == [{"key": 1}, {"key": 3}]
    assert path.read_text() == '{"key": 1}\n{"key": 3}\n'
    assert "scores.jsonl:2" in warned.text
    assert read_appended(path, key=int, score=float) == []
    assert path.read_text() == ""
    assert "found no JSON object with key, score" in warned.text


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    for error in (OSError(errno.EACCES, "no"), RuntimeError("shape"), PrefoptError("x")):
        assert not is_full(error)
        with pytest.raises(type(error)), writing(tmp_path, "rows"):
            raise error
    assert is_full(OSError(errno.EDQUOT, "quota"))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of one MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_libraries_say_that_a_disk_is_full_in_words_that_are_known(small: Path) -> None:
    weights = torch.zeros(10**6)
    atomic_write(small / "kept", "before")
    writers: list[Callable[[], Any]] = [
        lambda: torch.save({"a": weights}, small / "optimizer.pt"),
        lambda: torch.save({str(n): torch.zeros(500) + n for n in range(999)}, small / "many.pt"),
        lambda: save_file({"a": weights}, small / "model.safetensors"),
        lambda: (small / "rows").write_bytes(bytes(2**21)),
    ]
    for write in writers:
        says = pytest.raises(
            PrefoptError, match=r"small: the disk is full \(.* free\) while a file"
        )
        with says, writing(small / "any", "a file"):
            write()
        for path in small.iterdir():
            if path.name != "kept":
                path.unlink()
    with pytest.raises(PrefoptError, match="run the same command again"):
        atomic_write(small / "kept", bytes(2**21))
    assert [path.name for path in small.iterdir()] == ["kept"]
    assert (small / "kept").read_text() == "before"
