"""MT-Bench: reading the judge, scores by hand, references, formats, and the whole command."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_chat_api import FakeChatAPI, serving

from prefopt.cli import main
from prefopt.errors import PrefoptError
from prefopt.eval.judge_prompts import render
from prefopt.eval.mt_bench_answers import read_references
from prefopt.eval.mt_bench_scores import (
    Mark,
    comparison_scores,
    parse_rating,
    parse_winner,
    preference,
    rating_scores,
)
from prefopt.eval.questions import Question, read_player, read_questions
from prefopt.world import WorldPaths, build_world

REAL = Path(__file__).parents[2] / "shared" / "data" / "judge"


# reading the judge, and scores by hand


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Rating: [[7]]", 7),
        ("Rating: [[ 7.5 ]].", 7.5),
        ("The answer claims [[10]]. Rating: [[2]]", 2),
        ("Rating: [8]", 8),
        ("[[3]] and not [9]", 3),
        ("[[11]]", -1),
        ("[[0]]", -1),
        ("Rating: 8", -1),
        ("[[good]]", -1),
        ("", -1),
    ],
)
def test_ratings_are_read(text: str, rating: float) -> None:
    assert parse_rating(text) == rating


def test_winners_are_read() -> None:
    assert parse_winner("[[A]] is what B wants. [[b]]") == "B"
    assert parse_winner("[[C]]") == "C"
    assert parse_winner("[[D]] [A]") is None


@pytest.mark.parametrize(
    ("model_first", "baseline_first", "value"),
    [
        ("A", "B", 1),
        ("B", "A", 0),
        ("A", "A", 0.5),  # the judge likes what stands first
        ("B", "B", 0.5),
        ("A", "C", 0.5),
        ("C", "A", 0.5),
        ("C", "C", 0.5),
        (None, "B", None),
        ("A", None, None),
    ],
)
def test_only_both_orders_make_a_win(
    model_first: str | None, baseline_first: str | None, value: float | None
) -> None:
    assert preference(model_first, baseline_first) == value


def marks_of(*values: tuple[int, str, int, float | None]) -> list[Mark]:
    return [Mark(*value) for value in values]


RATED = marks_of(
    (1, "math", 1, 10),
    (1, "math", 2, 5),
    (2, "stem", 1, 3),
    (2, "stem", 2, None),
    (3, "stem", 1, 2),
)


def test_ratings_are_averaged_over_turns_that_count() -> None:
    parts = rating_scores(RATED, 0)
    assert parts["all"]["score"] == 20 / 4
    assert (parts["all"]["ratings"], parts["all"]["failed"]) == (4, 1)
    assert parts["turns"]["1"]["score"] == 5
    assert parts["turns"]["2"]["score"] == 5
    assert parts["categories"]["math"]["score"] == 7.5
    assert parts["categories"]["stem"]["score"] == 2.5
    low, high = parts["all"]["ci"]
    assert (low, high) == pytest.approx((2, 7.5))  # all draws of question 3, all of question 1
    assert parts == rating_scores(RATED[::-1], 0) | {
        "categories": parts["categories"],
        "turns": parts["turns"],
    }


def test_a_part_without_any_rating_has_no_score() -> None:
    parts = rating_scores(marks_of((1, "a", 1, None), (2, "b", 1, 4)), 0)
    assert parts["categories"]["a"] == {"score": None, "ci": None, "ratings": 0, "failed": 1}
    assert parts["categories"]["b"]["ci"] == [4, 4]


def test_comparisons_by_hand() -> None:
    values = [1, 1, 1, 0, 0.5, 0.5, None]
    parts = comparison_scores([Mark(n, "x", 1 + n % 2, v) for n, v in enumerate(values)])
    whole = parts["all"]
    assert (whole["wins"], whole["ties"], whole["losses"], whole["failed"]) == (3, 2, 1, 1)
    assert whole["win_rate"] == 50
    assert whole["loss_rate"] == pytest.approx(100 / 6)
    assert whole["win_rate_adjusted"] == pytest.approx(100 * 4 / 6)
    assert whole["ci"][0] < 100 * 4 / 6 < whole["ci"][1]
    assert parts["turns"]["1"]["win_rate_adjusted"] == pytest.approx(100 * 2.5 / 3)
    mirrored = comparison_scores(
        [Mark(n, "x", 1, None if v is None else 1 - v) for n, v in enumerate(values)]
    )["all"]
    assert mirrored["win_rate_adjusted"] == pytest.approx(100 - whole["win_rate_adjusted"])
    assert mirrored["ci"] == pytest.approx([100 - bound for bound in whole["ci"][::-1]])


# files


QUESTIONS = [
    Question(101, "reasoning", ["r1", "r2"]),
    Question(111, "math", ["m1", "m2"]),
    Question(112, "math", ["n1", "n2"]),
    Question(81, "writing", ["w1", "w2"]),
]


def fastchat(id: int, *turns: str, model: str = "fish") -> dict:
    return {"question_id": id, "model_id": model, "choices": [{"index": 0, "turns": [*turns]}]}


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_references_go_to_the_categories_that_need_them(tmp_path: Path) -> None:
    rows = [fastchat(id, f"{id} one", f"{id} two") for id in (81, 112, 111)]
    path = write_lines(tmp_path / "gpt-4.jsonl", rows)
    references, without = read_references(path, QUESTIONS)
    assert references == [None, ["111 one", "111 two"], ["112 one", "112 two"], None]
    assert without == ["reasoning"]
    assert read_references(None, QUESTIONS) == ([None] * 4, ["math", "reasoning"])


def test_a_missing_reference_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "gpt-4.jsonl", [fastchat(111, "a", "b")])
    with pytest.raises(PrefoptError, match=r"no reference answer to question 112 \(math\)"):
        read_references(path, QUESTIONS)


def test_answers_need_both_turns(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [fastchat(101, "a")])
    with pytest.raises(PrefoptError, match="found 1, expected 2"):
        read_player(path, QUESTIONS[:1], 2)
    path = write_lines(tmp_path / "b.jsonl", [{"prompt": "r1", "completion": "a"}])
    with pytest.raises(PrefoptError, match="as FastChat writes them"):
        read_player(path, QUESTIONS[:1], 2)


@pytest.mark.skipif(not REAL.exists(), reason="no ../shared")
def test_the_real_questions_and_references() -> None:
    questions = read_questions(REAL / "mt_bench_question.jsonl", 2)
    assert len(questions) == 80
    assert len({question.category for question in questions}) == 8
    references, without = read_references(REAL / "mt_bench_reference_gpt4.jsonl", questions)
    assert without == []
    assert sum(reference is not None for reference in references) == 30
    assert all(
        (reference is not None) == (question.category in ("math", "reasoning", "coding"))
        for question, reference in zip(questions, references, strict=True)
    )


# the judge's prompts


@pytest.mark.parametrize("template", ["mt_bench_single", "mt_bench_pair"])
@pytest.mark.parametrize("turn", [1, 2])
@pytest.mark.parametrize("reference", [False, True])
def test_a_prompt_shows_the_conversation_so_far(template: str, turn: int, reference: bool) -> None:
    turns = [
        {
            "question": f"question<{k}>",
            "reference": f"reference<{k}>" if reference else None,
            "answer": f"answer<{k}>",
            "answers": [f"a<{k}>", f"b<{k}>"],
        }
        for k in range(turn)
    ]
    text = render(template, turns=turns)
    answers = ["answer"] if template == "mt_bench_single" else ["a", "b"]
    for k in range(2):
        for word in ("question", *answers):
            assert (f"{word}<{k}>" in text) == (k < turn)
        assert (f"reference<{k}>" in text) == (reference and k < turn)
    assert ("reference" in text) == reference
    assert ("second" in text) == (turn == 2)
    assert "\n\n\n" not in text


# the command


@pytest.fixture
def server() -> Iterator[FakeChatAPI]:
    with serving() as server:
        yield server


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    questions = [{"question_id": q.id, "category": q.category, "turns": q.turns} for q in QUESTIONS]
    references = [fastchat(q.id, "right", "right too") for q in QUESTIONS[:3]]
    answers = {
        "fish": [fastchat(q.id, "a" * 4, "a" * 8) for q in QUESTIONS[:3]]
        + [fastchat(81, "a" * 6, "mute")],
        "cow": [fastchat(q.id, "b" * 5, "b" * 5, model="cow") for q in QUESTIONS],
    }
    return {
        "questions": write_lines(tmp_path / "question.jsonl", questions),
        "references": write_lines(tmp_path / "reference.jsonl", references),
        **{name: write_lines(tmp_path / f"{name}.jsonl", rows) for name, rows in answers.items()},
    }


def answers_shown(body: dict) -> list[str]:
    text = body["messages"][0]["content"]
    return re.findall(r"(?<!reference )answer \d[^\n]* ====\n(\w*)\n", text)


def rate_by_length(body: dict) -> tuple[str, None]:
    """The number of letters of the last answer; "mute" is not rated."""
    last = answers_shown(body)[-1]
    return ("hm" if last == "mute" else f"Let me see. [[1]]? Rating: [[{len(last)}]]"), None


def compare_by_length(body: dict) -> tuple[str, None]:
    """The longer last answer; a judge that likes A where it is longer by just one letter."""
    shown = answers_shown(body)
    a, b = len(shown[len(shown) // 2 - 1]), len(shown[-1])
    if "mute" in shown:
        return "hm", None
    return f"[[{'A' if abs(a - b) == 1 or a > b else 'B'}]]", None


def command(files: dict[str, Path], url: str, out: Path, *more: str | Path) -> list[str]:
    fixed = ["--judge", "fake", "--base-url", url, "--questions", files["questions"]]
    fixed += ["--references", files["references"], "--out", out]
    return [str(word) for word in ("eval", "mt-bench", *more, *fixed)]


def test_single_mode(
    files: dict[str, Path],
    server: FakeChatAPI,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.reply = rate_by_length
    out = tmp_path / "out"
    assert main(command(files, server.url, out, files["fish"], files["cow"])) == 0
    assert "MT-Bench: 1-10" in capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    assert list(result["models"]) == ["fish", "cow"]  # best first
    fish, cow = result["models"].values()
    # first turns 4 4 4 6, second turns 8 8 8 and one that is not rated
    assert fish["all"]["score"] == 42 / 7
    assert (fish["all"]["ratings"], fish["all"]["failed"]) == (7, 1)
    assert fish["turns"]["1"]["score"] == 4.5
    assert fish["turns"]["2"]["score"] == 8
    assert fish["categories"]["writing"]["score"] == 6
    assert cow["all"]["ci"] == [5, 5]
    assert result["judged_without_reference"] == []
    lines = [json.loads(line) for line in (out / "judgments.jsonl").read_text().splitlines()]
    assert len(lines) == 16
    assert (lines[7]["question_id"], lines[7]["turn"], lines[7]["score"]) == (81, 2, -1)
    assert sum("right too" in body["messages"][0]["content"] for body in server.bodies) == 6


def test_pairwise_mode_and_a_run_that_broke_off(
    files: dict[str, Path],
    server: FakeChatAPI,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.reply = compare_by_length
    out = tmp_path / "out"
    words = [files["fish"], "--mode", "pairwise", "--baseline", files["cow"], "--concurrency", "1"]
    server.manners = lambda call: "401" if call.number >= 5 else None
    assert main(command(files, server.url, out, *words)) == 2
    assert len(server.answered) == 5
    server.manners = lambda call: None
    capsys.readouterr()
    assert main(command(files, server.url, out, *words)) == 0
    assert "win rate over cow" in capsys.readouterr().out
    assert len(server.answered) == 16
    assert set(server.answered.values()) == {1}
    result = json.loads((out / "result.json").read_text())
    whole = result["models"]["fish"]["all"]
    # first turns 4 or 6 letters against 5: ties; second turns 8 against 5: wins; one failure
    assert (whole["wins"], whole["ties"], whole["losses"], whole["failed"]) == (3, 4, 0, 1)
    assert whole["win_rate_adjusted"] == pytest.approx(100 * 5 / 7)
    assert result["models"]["fish"]["turns"]["1"]["win_rate_adjusted"] == 50
    lines = [json.loads(line) for line in (out / "judgments.jsonl").read_text().splitlines()]
    winners = [(line["g1_winner"], line["g2_winner"]) for line in lines]
    assert winners[:2] == [("model_1", "model_2"), ("model_1", "model_1")]
    assert winners[-1] == ("error", "error")


@pytest.mark.parametrize("mode", ["single", "pairwise"])
def test_a_judge_that_says_nothing_that_can_be_read(
    mode: str,
    files: dict[str, Path],
    server: FakeChatAPI,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.reply = lambda body: ("no idea", None)
    more = ["--mode", mode, *(["--baseline", files["cow"]] if mode == "pairwise" else [])]
    assert main(command(files, server.url, tmp_path / "out", files["fish"], *more)) == 2
    assert "nothing that the judge says could be read" in capsys.readouterr().err
    assert not (tmp_path / "out" / "result.json").exists()
    assert "no idea" in (tmp_path / "out" / "judgments.jsonl").read_text()


def test_one_clear_line_for_what_is_wrong(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "http://127.0.0.1:9/v1"
    for words, message in (
        ([files["fish"], "--mode", "pairwise"], "expected a baseline with --mode pairwise"),
        ([files["fish"], "--baseline", files["cow"]], "and only there"),
        ([files["fish"], files["fish"]], "second model named 'fish'"),
    ):
        assert main(command(files, url, tmp_path / "out", *words)) == 2
        assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldPaths:
    folder = tmp_path_factory.mktemp("world") / "world"
    return build_world(folder, sft_rows=20, preference_rows=20, prompt_rows=4)


def test_a_model_that_answers_here_sees_its_own_first_turn(
    files: dict[str, Path],
    world: WorldPaths,
    server: FakeChatAPI,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    questions = [
        {"question_id": n, "category": category, "turns": [f"sort {n} 1", f"sort {n} 2"]}
        for n, category in ((1, "writing"), (2, "stem"), (3, "extraction"), (4, "unheard of"))
    ]
    files["questions"] = write_lines(tmp_path / "own.jsonl", questions)
    server.reply = lambda body: ("[[4]]", None)
    out = tmp_path / "out"
    words = [world.base, "--max-new-tokens", "4", "--seed", "3"]
    assert main(command(files, server.url, out, *words)) == 0
    first, second = (read_jsonl(out / "answers" / f"base_turn_{n}.jsonl") for n in (1, 2))
    for question, one, two in zip(questions, first, second, strict=True):
        user = [{"role": "user", "content": text} for text in question["turns"]]
        said = {"role": "assistant", "content": one["completion"]}
        assert one["prompt"] == user[:1]
        assert two["prompt"] == [user[0], said, user[1]]
    result = json.loads((out / "result.json").read_text())
    (made,) = result["answers"].values()
    temperatures = [part["temperature"] for part in made["decoding"]["turn 2"]["sampling"]]
    assert temperatures == [0.7, 0.1, 0]
    assert {part["seed"] for part in made["decoding"]["turn 1"]["sampling"]} == {3}
    asked = read_questions(files["questions"], 2)
    player = read_player(out / "answers" / "base.jsonl", asked, 2)
    assert player.answers == [
        [one["completion"], two["completion"]] for one, two in zip(first, second, strict=True)
    ]

    # a killed run: the second turn's file is cut after two answers
    path = out / "answers" / "base_turn_2.jsonl"
    before = path.read_text()
    path.write_text("".join(before.splitlines(keepends=True)[:2]) + '{"index": 2, "pro')
    asked_again = counting_prompts(monkeypatch)
    assert main(command(files, server.url, out, *words)) == 0
    assert asked_again == [2]
    assert path.read_text() == before


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def counting_prompts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of prompts of each call that a model is given from now on."""
    from prefopt.generate import Generator

    counts: list[int] = []
    real: Callable = Generator.answer

    def answer(self: Generator, prompts: list, *rest: object, **more: object) -> object:
        counts.append(len(prompts))
        return real(self, prompts, *rest, **more)

    monkeypatch.setattr(Generator, "answer", answer)
    return counts
