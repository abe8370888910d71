"""prefopt eval alpaca, leaderboard and win-rate, from the command line to their files."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_chat_api import FakeChatAPI, content_of, serving, troubled

from prefopt.cli import main
from prefopt.data.sources import read_rows
from prefopt.errors import PrefoptError
from prefopt.eval.alpaca import pair_up
from prefopt.eval.answers import Answer, Answers, read_answers, sample_to_file, write_model_outputs
from prefopt.eval.judging import judge_pairs
from prefopt.eval.leaderboard import read_leaderboard
from prefopt.eval.length_control import length_controlled_win_rate
from prefopt.eval.win_rate_command import by_length
from prefopt.generate import Generator
from prefopt.models.load import load_reward_model, load_tokenizer
from prefopt.reward_models import RuleJudge
from prefopt.rollout.engine import SamplingSettings
from prefopt.world import WorldPaths, build_world

DATA = Path(__file__).parents[2] / "shared" / "data" / "alpaca_eval2"
INSTRUCTIONS = [f"Say {n} words about {n}." for n in range(30)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldPaths:
    folder = tmp_path_factory.mktemp("world") / "world"
    return build_world(folder, sft_rows=20, preference_rows=20, prompt_rows=6)


@pytest.fixture(scope="module")
def judge(world: WorldPaths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with a random head."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(str(world.base))
    model = load_reward_model(str(world.base), tokenizer, new_head=True, dtype="float32")
    folder = tmp_path_factory.mktemp("judge")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def outputs(path: Path, name: str, words: int, count: int = len(INSTRUCTIONS)) -> Path:
    """A model_outputs.json; how many words an answer has depends on the instruction."""
    rows = [
        {
            "dataset": "toy",
            "instruction": text,
            "generator": name,
            "output": name + " word" * (words + i * words % 11),
        }
        for i, text in enumerate(INSTRUCTIONS[:count])
    ]
    path.write_text(json.dumps(rows))
    return path


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def result_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert run(*arguments, "--json") == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert run(*arguments) == 2
    return capsys.readouterr().err


def api_options(server: FakeChatAPI) -> list[object]:
    return ["--judge", "fake", "--judge-kind", "api", "--base-url", server.url]


def test_alpaca_with_an_api(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = outputs(tmp_path / "model.json", "new", 9)
    baseline = outputs(tmp_path / "baseline.json", "old", 4)
    out = tmp_path / "out"
    command = ("eval", "alpaca", model, "--baseline", baseline, "--out", out, "--bootstrap", 50)
    with serving() as server:
        options = [*api_options(server), "--price", "10", "30"]
        result = result_of(capsys, *command, *options)
        assert set(server.answered.values()) == {1}
        assert len(server.answered) == 2 * len(INSTRUCTIONS)  # both orders
        again = result_of(capsys, *command, *options)
        assert sum(server.requests.values()) == 2 * len(INSTRUCTIONS)
    assert again["usage"]["cached"] == 60
    assert result["usage"]["cost"] == pytest.approx((60 * 100 * 10 + 60 * 30) / 1e6)
    assert result["judge"]["template_hash"] == again["judge"]["template_hash"]
    assert {key: result[key] for key in ("lc_win_rate", "win_rate", "C", "bootstrap")} == {
        key: again[key] for key in ("lc_win_rate", "win_rate", "C", "bootstrap")
    }
    annotations = json.loads((out / "annotations.json").read_text())
    assert [row["instruction"] for row in annotations] == INSTRUCTIONS
    assert {(row["generator_1"], row["generator_2"]) for row in annotations} == {("old", "new")}
    preferences = [row["preference"] for row in annotations]
    expected = length_controlled_win_rate(
        preferences,
        [len(row["output_2"]) for row in annotations],
        [len(row["output_1"]) for row in annotations],
    )
    assert result["win_rate"] == pytest.approx(100 * (np.mean(preferences) - 1))
    assert result["lc_win_rate"] == pytest.approx(expected.lc_win_rate)
    assert "no instruction difficulty" in result["approximation"]
    (row,) = read_leaderboard(out / "leaderboard.csv")
    assert (row.model, row.win_rate) == ("new", pytest.approx(result["win_rate"]))
    assert row.length_controlled_winrate == pytest.approx(result["lc_win_rate"])
    assert read_answers(out / "model_outputs.json") == read_answers(model)
    assert json.loads((out / "result.json").read_text()) == again


def test_swapped_files_mirror_the_win_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = outputs(tmp_path / "a.json", "a", 9), outputs(tmp_path / "b.json", "b", 4)
    with serving() as server:
        rates = [
            result_of(
                capsys,
                *("eval", "alpaca", *pair, "--out", tmp_path / "out", "--bootstrap", 0),
                *api_options(server),
            )
            for pair in ((a, "--baseline", b), (b, "--baseline", a))
        ]
    assert rates[0]["win_rate"] + rates[1]["win_rate"] == pytest.approx(100)
    assert (rates[0]["n_wins"], rates[0]["n_wins_base"]) == (
        rates[1]["n_wins_base"],
        rates[1]["n_wins"],
    )


def test_what_a_judge_cannot_say_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = outputs(tmp_path / "model.json", "new", 9)
    baseline = outputs(tmp_path / "baseline.json", "old", 4)
    with serving() as server:
        usual = server.reply

        def reply(body: Any) -> Any:
            odd = "about 7" in content_of(body)
            return ("Neither", {"Neither": 0.9}) if odd else usual(body)

        server.reply = reply
        command = ("eval", "alpaca", model, "--baseline", baseline, "--bootstrap", 20)
        result = result_of(capsys, *command, "--out", tmp_path, *api_options(server))
        assert (result["unjudged"], result["n"]) == (1, 29)
        server.reply = lambda body: ("Neither", {"Neither": 0.9})
        line = error_of(capsys, *command, "--out", tmp_path / "none", *api_options(server))
        assert "none of its 30 answers could be read; it said 'Neither'" in line
    annotations = json.loads((tmp_path / "annotations.json").read_text())
    assert [row["preference"] is None for row in annotations].count(True) == 1


def test_alpaca_through_a_troubled_server_that_is_left_half_way(tmp_path: Path) -> None:
    """Two runs of the command as processes, which take 10 s: the first is killed."""
    model = outputs(tmp_path / "model.json", "new", 9)
    baseline = outputs(tmp_path / "baseline.json", "old", 4)
    out = tmp_path / "out"
    key = "sk-a-key-that-nobody-may-see"
    with serving() as server:
        command = [sys.executable, "-c", IMPATIENT, "eval", "alpaca", str(model)]
        command += ["--baseline", str(baseline), "--out", str(out), "--concurrency", "4"]
        command += [str(option) for option in api_options(server)]
        environment = os.environ | {"OPENAI_API_KEY": key}
        server.manners = lambda call: troubled(call) or ("slow" if call.number % 3 else None)
        with (tmp_path / "log").open("w") as log:
            first = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            while sum(server.answered.values()) < 25 and first.poll() is None:
                time.sleep(0.01)
            first.send_signal(signal.SIGKILL)
            first.wait()
            known = len((out / "api_answers.jsonl").read_text().splitlines())
            before = server.requests.copy()
            second = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False)
        assert second.returncode == 0, (tmp_path / "log").read_text()
        asked = server.requests - before
    assert 20 <= known < 60
    assert len(asked) <= 60 - known + 1  # half a line may have been left
    lines = [json.loads(line) for line in (out / "api_answers.jsonl").read_text().splitlines()]
    assert len(lines) == len({line["key"] for line in lines}) == 60
    annotations = json.loads((out / "annotations.json").read_text())
    assert [row["instruction"] for row in annotations] == INSTRUCTIONS
    assert all(1 <= row["preference"] <= 2 for row in annotations)
    assert all(header["authorization"] == f"Bearer {key}" for header in server.headers)
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or key.encode() not in path.read_bytes(), path


IMPATIENT = """
import sys
from prefopt.cli import main
from prefopt.reward_models import chat_api
chat_api._FIRST_WAIT, chat_api._LONGEST_WAIT = 0.01, 0.05
sys.exit(main(sys.argv[1:]))
"""


def test_alpaca_generates_and_judges_with_models(
    world: WorldPaths, judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [row["prompt"] for _, row in read_rows(world.prompts)]
    old = Answers("old", [Answer(prompt, 0, "a b c .") for prompt in prompts])
    write_model_outputs(tmp_path / "baseline.json", old)
    command = ("eval", "alpaca", world.base, "--baseline", tmp_path / "baseline.json")
    options = ("--judge", judge, "--max-new-tokens", 6, "--bootstrap", 20, "--name", "base")
    result = result_of(capsys, *command, *options, "--out", tmp_path / "out")
    assert result["n"] == len(prompts)
    assert result["model"] == "base"
    assert result["decoding"]["sampling"][0]["temperature"] == 0
    answers = read_answers(tmp_path / "out" / "model_outputs.json")
    assert [row.prompt for row in answers.rows] == prompts
    again = result_of(capsys, *command, *options, "--out", tmp_path / "out")
    assert again["win_rate"] == result["win_rate"]
    options = (*options, "--temperature", 1)
    line = error_of(capsys, *command, *options, "--out", tmp_path / "out")
    assert "made with other sampling" in line


def test_real_judgements_make_the_published_leaderboard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not DATA.exists():
        pytest.skip("needs ../shared/data")
    published = {row.model: row for row in read_leaderboard(DATA / "public" / "leaderboard.csv")}
    instructions = [json.loads(line) for line in (DATA / "common" / "instructions.jsonl").open()]
    reference = [{"instruction": row["instruction"], "output": ""} for row in instructions]
    (tmp_path / "reference.json").write_text(json.dumps(reference))
    files = []
    for path in sorted((DATA / "public").glob("*.jsonl")):
        rows = [json.loads(line) for line in path.open()]
        annotations = [
            {
                "instruction": instructions[row["index"]]["instruction"],
                "output_1": "x" * row["len_baseline"],
                "generator_1": "gpt4_1106_preview",
                "output_2": "x" * row["len_model"],
                "generator_2": row["generator"],
                "preference": row["preference"],
            }
            for row in rows
        ]
        files.append(tmp_path / f"{path.stem}.json")
        files[-1].write_text(json.dumps(annotations))
    common = DATA / "common"
    result = result_of(
        capsys,
        *("eval", "leaderboard", *files, "--baseline", tmp_path / "reference.json"),
        *("--difficulty", common / "instruction_difficulty.csv"),
        *("--gamed", common / "gamed_baselines.csv", "--out", tmp_path / "leaderboard.csv"),
    )
    for row in result["rows"]:
        expected = published[row["model"]]
        assert row["win_rate"] == pytest.approx(expected.win_rate, abs=1e-6)
        assert row["standard_error"] == pytest.approx(expected.standard_error, abs=1e-6)
        assert row["length_controlled_winrate"] == pytest.approx(
            expected.length_controlled_winrate, abs=0.2
        )
        assert row["avg_length"] == expected.avg_length
    assert len(result["rows"]) == 6
    written = read_leaderboard(tmp_path / "leaderboard.csv")
    ranks = [row.length_controlled_winrate for row in written]
    assert ranks == sorted(ranks, reverse=True)


def test_comparison_with_other_annotations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = outputs(tmp_path / "baseline.json", "old", 4)
    with serving() as server:
        for name, words in (("a", 9), ("b", 12)):
            out = tmp_path / name
            model = outputs(tmp_path / f"{name}.json", name, words)
            command = ("eval", "alpaca", model, "--baseline", baseline, "--out", out)
            more = ("--compare", tmp_path / "a" / "annotations.json") if name == "b" else ()
            result = result_of(capsys, *command, "--bootstrap", 0, *api_options(server), *more)
    (compared,) = result["compared_with"]
    rates = [json.loads((tmp_path / name / "result.json").read_text())["win_rate"] for name in "ab"]
    assert compared["difference"] == pytest.approx(rates[1] - rates[0])
    assert 0 < compared["p_value"] <= 1


def test_comparison_with_what_another_judge_said_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model, baseline = (outputs(tmp_path / f"{name}.json", name, 4) for name in ("new", "old"))
    command = ("eval", "alpaca", model, "--baseline", baseline, "--out", tmp_path, "--bootstrap", 0)
    with serving() as server:
        first = result_of(capsys, *command, *api_options(server))
        options = ("--judge", "second", *api_options(server)[2:])
        before = ("--compare", tmp_path / "annotations.json")
        second = result_of(capsys, *command, *options, *before)
    (compared,) = second["compared_with"]
    assert compared["difference"] == pytest.approx(second["win_rate"] - first["win_rate"])
    assert compared["difference"] != 0
    assert "the judges differ (fake, second)" in caplog.text


def test_errors_come_before_the_answers(
    world: WorldPaths,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, baseline = (outputs(tmp_path / f"{name}.json", name, 4) for name in ("new", "old"))
    (tmp_path / "d.csv").write_text("index,instruction_difficulty\n0,0.5\n")
    row = dict.fromkeys(("instruction", "output_1", "output_2", "generator_1", "generator_2"), "x")
    (tmp_path / "x.json").write_text(json.dumps([row | {"preference": 1}]))
    out = ("--out", tmp_path / "out")
    with serving() as server:
        command = ("eval", "alpaca", model, "--baseline", baseline, *api_options(server), *out)
        for options, words in (
            (("--difficulty", tmp_path / "none.csv"), "none.csv: cannot be read"),
            (("--difficulty", tmp_path / "d.csv"), "1 difficulties for 30 reference"),
            (("--difficulty-by-position",), "expected a file with --difficulty"),
            (("--gamed", tmp_path / "d.csv"), "no such column, nor 'preference_recon"),
            (("--compare", tmp_path / "x.json"), "found the baseline 'x', expected 'old'"),
        ):
            assert words in error_of(capsys, *command, *options)
        assert not server.bodies
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    without_key = ("--judge", "gpt", "--judge-kind", "api", *out)
    alpaca = ("eval", "alpaca", world.base, "--baseline", baseline, *without_key)
    win_rate = ("eval", "win-rate", world.base, world.base, "--prompts", world.prompts)
    for command in (alpaca, (*win_rate, *without_key)):
        assert "OPENAI_API_KEY is not set" in error_of(capsys, *command)
    assert not (tmp_path / "out").exists()
    command = ("eval", "alpaca", model, "--baseline", baseline, "--judge", baseline, *out)
    assert "old.json': found a file, expected a checkpoint's folder" in error_of(capsys, *command)


def test_missing_and_unknown_instructions() -> None:
    def answers(name: str, prompts: list[Any]) -> Answers:
        return Answers(name, [Answer(prompt, 0, "text") for prompt in prompts])

    pairs = pair_up(answers("m", ["c", "a"]), answers("b", ["a", "b", "c"]))
    assert pairs.index == [0, 2]
    assert [row.prompt for row in pairs.model] == ["a", "c"]
    with pytest.raises(PrefoptError, match=r"1 of 2 answers .* word for word"):
        pair_up(answers("m", ["a", "d"]), answers("b", ["a", "b", "c"]))
    assert pair_up(answers("m", ["a", "d"]), answers("b", ["a"]), limit=1).index == [0]
    messages = [[{"role": "user", "content": text}] for text in "ab"]
    assert pair_up(answers("m", ["b"]), answers("b", messages)).index == [1]
    with pytest.raises(PrefoptError, match="2 of 2"):
        pair_up(answers("m", ["x", "d"]), answers("b", ["a"]), limit=1)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"instruction": "a"}], "found None, expected text"),
        ([{"instruction": "a", "output": "b", "generator": g} for g in "xy"], "2 generators"),
        ([{"prompt": "a", "completion": "b"}] * 2, "answered before"),
        ([{"prompt": "a", "completion": "b", "sample": [1]}], r"found \[1\], expected a whole"),
        ([{"instruction": "a", "output": "b \ud83d"}], r"'output': found '\\ud83d', half of a"),
    ],
)
def test_files_of_answers_that_are_none(
    rows: list[dict[str, Any]], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(PrefoptError, match=words):
        read_answers(path)


def test_answers_survive_a_killed_process(world: WorldPaths, tmp_path: Path) -> None:
    generator = Generator(str(world.base))
    prompts = [row["prompt"] for _, row in read_rows(world.prompts)]
    settings = SamplingSettings(max_new_tokens=5, samples_per_prompt=2)
    path = tmp_path / "answers.jsonl"
    whole, _ = sample_to_file(generator, prompts, settings, path)
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    # two prompts in any order, one of two answers to the next, and half a line
    foreign = ['{"key": "a"}\n', '{"index": [0]}\n', lines[8].replace('"index": 4', '"index": 999')]
    path.write_text("".join([*lines[4:6], *foreign, *lines[:2], lines[2], lines[8][:20]]))
    asked: list[int] = []
    answer = generator.answer

    def counted(some: Any, *rest: Any, **more: Any) -> Any:
        asked.append(len(some))
        return answer(some, *rest, **more)

    generator.answer = counted  # type: ignore[method-assign]
    assert sample_to_file(generator, prompts, settings, path)[0] == whole
    assert path.read_text() == text
    assert asked == [len(prompts) - 2]
    with pytest.raises(PrefoptError, match="made with other prompts"):
        sample_to_file(generator, prompts[:2], settings, path)


def test_judgements_survive_a_killed_process(tmp_path: Path) -> None:
    asked: list[str] = []

    def score(prompts: list[str], completions: list[str]) -> list[float]:
        asked.extend(completions)
        return [float(len(text)) for text in completions]

    judge, path = RuleJudge(score), tmp_path / "preferences.jsonl"
    a, b = ["x", "xxx", "xx"], ["xx", "xx", "xx"]
    first = judge_pairs(judge, {"path": "r"}, ["p", "q", "r"], a, b, path)
    assert first.tolist() == [0, 1, 0.5]
    kept = path.read_text()
    key = kept.splitlines()[0].replace("0.0", '"0"')
    path.write_text(f'{key}\n{{"other": 1}}\n{{"key": [1]}}\n' + kept[kept.index("\n") + 1 : -5])
    asked.clear()
    assert judge_pairs(judge, {"path": "r"}, ["p", "q", "r"], a, b, path).tolist() == [0, 1, 0.5]
    assert asked == ["x", "xx", "xx", "xx"]
    with pytest.raises(PrefoptError, match="found nan as preference of number 1"):
        judge_pairs(RuleJudge(lambda **_: [math.nan]), {}, ["p"], ["x"], ["y"], path)


def test_win_rate_of_models(
    world: WorldPaths, judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--judge", judge, "--max-new-tokens", 5, "--out", tmp_path / "ab")
    command = ("eval", "win-rate", world.base, world.base, *common)
    assert "--prompts: expected" in error_of(capsys, *command)
    same = result_of(capsys, *command, "--prompts", world.prompts)
    assert same["win_rate"] == 50
    assert same["ties"] == same["prompts"] == 6
    assert same["by_length"][0]["first answer"] == "equal within 5 %"
    file = tmp_path / "ab" / "baseline.jsonl"
    common = (*common[:-1], tmp_path / "af")
    against_file = result_of(capsys, "eval", "win-rate", world.base, file, *common)
    assert against_file["win_rate"] == 50
    few = result_of(
        capsys,
        *("eval", "win-rate", file, file, "--judge", judge, "--out", tmp_path / "ff"),
        *("--prompts", world.prompts, "--limit", 2),
    )
    assert few["prompts"] == 2
    short = tmp_path / "short.jsonl"
    short.write_text(file.read_text().splitlines()[0] + "\n")
    line = error_of(
        capsys,
        *("eval", "win-rate", short, file, "--judge", judge, "--prompts", world.prompts),
    )
    assert "no answer to 5 of 6 prompts" in line


def test_table_by_length() -> None:
    a = ["x" * n for n in (10, 100, 100, 20, 0)]
    b = ["x" * n for n in (100, 98, 90, 10, 0)]
    rows = by_length(np.array([0.2, 0.5, 0.75, 1, np.nan]), a, b)
    assert [(row["first answer"], row["pairs"], row["win_rate"]) for row in rows] == [
        ("shorter by more than 25 %", 1, 20),
        ("equal within 5 %", 1, 50),
        ("longer by 5-25 %", 1, 75),
        ("longer by more than 25 %", 1, 100),
    ]


@pytest.mark.parametrize("measure", ["win-rate", "alpaca", "arena", "mt-bench", "reward-bench"])
def test_help_needs_nothing_heavy(measure: str) -> None:
    command = (
        "import sys; from prefopt.cli import main\n"
        f"try: main(['eval', '{measure}', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
