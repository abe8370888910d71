"""RewardBench 1 and 2: published arithmetic, numbers by hand, the command with tiny judges."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import sharpen
from transformers import LlamaForSequenceClassification

import prefopt.eval.judging as judging
from prefopt.cli import main
from prefopt.errors import PrefoptError
from prefopt.eval.reward_bench import earned_by_subset, plain_scores, score_items, summarise
from prefopt.eval.reward_bench_data import Item, items_hash, read_items, read_prior_sets
from prefopt.eval.reward_bench_scores import (
    PRIOR_SETS,
    PUBLISHED_ROWS,
    SECTIONS,
    credit,
    overall_score,
    overall_weights,
    section_scores,
    section_weights,
    ties_credits,
    uncertainty,
)
from prefopt.eval.win_rate import win_rate
from prefopt.world.tokenizer import world_tokenizer, world_words

SUBSETS = [subset for subsets in SECTIONS.values() for subset in subsets]


# Arithmetic


@pytest.mark.parametrize(
    ("sections", "prior_sets", "published"),
    [
        ((96.9, 76.8, 92.2, 97.3), 74.3, 89.0),  # ArmoRM-Llama3-8B-v0.1
        ((99.4, 65.1, 87.8, 86.4), 74.9, 83.6),  # FsfairX-LLaMA3-RM-v0.1
        ((98.3, 65.8, 89.7, 94.7), 74.6, 85.7),  # pair-preference-model-LLaMA3-8B
        ((96.4, 71.3, 92.7, 97.7), 78.2, 88.2),  # Cohere May 2024
        ((95.3, 74.3, 87.2, 86.9), 70.9, 84.3),  # GPT-4 Turbo (0125 version)
        ((96.9, 57.2, 88.2, 88.5), 71.4, 81.4),  # Starling-RM-34B
    ],
)
def test_published_scores(sections: tuple[float, ...], prior_sets: float, published: float) -> None:
    """All rows of the table in the README of github.com/RLHFlow/RLHF-Reward-Modeling, 50a5c06.

    Sections and score stand there with one digit: each rounding moves the score by 0.05 at most.
    """
    score = overall_score(dict(zip(SECTIONS, sections, strict=True)), prior_sets)
    assert score == pytest.approx(published, abs=0.1)


def test_the_two_rows_of_eval_md() -> None:
    armo = overall_score(dict(zip(SECTIONS, (96.9, 76.8, 92.2, 97.3), strict=True)), 74.3)
    assert armo == pytest.approx(400.35 / 4.5)
    assert int(100 * (armo or 0)) == 8896  # 88.9667, given there as 88.96 and published as 89.0
    fsfair = overall_score(dict(zip(SECTIONS, (99.4, 65.1, 87.8, 86.4), strict=True)), 74.9)
    assert fsfair is not None
    assert round(fsfair, 1) == 83.6


def test_a_section_is_missing_or_whole() -> None:
    accuracies = dict.fromkeys(SUBSETS, 0.5)
    assert section_scores(accuracies) == pytest.approx(dict.fromkeys(SECTIONS, 0.5))
    del accuracies["hep-go"]
    sections = section_scores(accuracies)
    assert list(sections) == ["Chat", "Chat Hard", "Safety"]
    assert overall_score(sections) is None
    assert overall_score(sections, 0.5) is None


def test_counts_of_the_sections() -> None:
    counts = {section: sum(subsets.values()) for section, subsets in SECTIONS.items()}
    assert counts == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968}
    # XSTest: 154 unsafe questions to refuse, 250 safe ones to answer
    assert [SECTIONS["Safety"][f"xstest-should-{x}"] for x in ("refuse", "respond")] == [154, 250]
    assert sum(PUBLISHED_ROWS[1].values()) == 2985
    assert sum(PUBLISHED_ROWS[2].values()) == 1865
    code = sum(n for subset, n in SECTIONS["Reasoning"].items() if subset.startswith("hep-"))
    assert SECTIONS["Reasoning"]["math-prm"] == code == 6 * 164


def test_sections_by_hand() -> None:
    accuracies = dict.fromkeys(SUBSETS, 1.0) | {"math-prm": 0.0, "mt-bench-easy": 0.0}
    sections = section_scores(accuracies)
    assert sections["Reasoning"] == pytest.approx(1 / 2)
    assert sections["Chat"] == pytest.approx(330 / 358)
    doubled = section_scores(accuracies, {"mt-bench-easy": 56})
    assert doubled["Chat"] == pytest.approx(330 / 386)
    assert doubled["Reasoning"] == sections["Reasoning"]


@pytest.mark.parametrize("prior_sets", [False, True])
def test_weights_are_those_of_the_scores(prior_sets: bool) -> None:
    names = [*SUBSETS, *PRIOR_SETS] if prior_sets else SUBSETS
    accuracies = dict(zip(names, np.random.default_rng(0).random(len(names)), strict=True))
    weights = overall_weights(prior_sets=prior_sets)
    assert weights.keys() == set(names)
    assert sum(weights.values()) == pytest.approx(1)
    prior = sum(accuracies[name] for name in PRIOR_SETS) / 4 if prior_sets else None
    expected = overall_score(section_scores(accuracies), prior)
    assert sum(weights[name] * accuracies[name] for name in names) == pytest.approx(expected)


def test_credit() -> None:
    assert [credit(scores) for scores in ([2, 1], [1, 1], [1, 2])] == [1, 0.5, 0]
    assert [credit(s) for s in ([3, 1, 2, 0], [3, 3, 1, 3], [1, 1, 2, 0])] == [1, 1 / 3, 0]
    assert credit([0.0] * 4) == 1 / 4


def test_ties_by_hand() -> None:
    right_and_wrong = ([5.0], [1.0, 2.0])  # gap 3
    cases = [
        (right_and_wrong, ([4.0, 5.0], [2.0])),  # gap 2, spread 1
        (right_and_wrong, ([4.0, 8.0], [1.5])),  # gap 2.5, spread 4
        (([3.0], [2.0]), ([4.0, 6.0], [1.0])),  # gaps 1 and 3, spread 2
        (([1.0], [2.0]), ([4.0, 4.0], [1.0])),  # gaps -1 and 3, spread 0
        (([3.0], [3.0]), ([4.0, 4.0], [4.0])),  # all 0
    ]
    expected = [
        1 + 0.01 * math.tanh(2 / 1 - 1),
        0.6 + 0.01 * math.tanh(2.5 / 4 - 1),
        0.8 + 0.01 * math.tanh(1 / 2 - 1),
        0.3 + 0.2 - 0.01,
        0,
    ]
    earned = ties_credits(*zip(*cases, strict=True))
    assert earned.tolist() == pytest.approx(expected)


def test_ties_do_not_depend_on_the_unit() -> None:
    draw = np.random.default_rng(1)
    ref, tied = ([(draw.normal(size=n), draw.normal(size=3)) for _ in range(20)] for n in (1, 4))
    changed = [[(2 * a + 5, 2 * b + 5) for a, b in part] for part in (ref, tied)]
    assert ties_credits(*changed) == pytest.approx(ties_credits(ref, tied))


# Uncertainty


def test_of_one_subset_it_is_that_of_a_win_rate() -> None:
    for values in ([1, 0, 1, 0.5], [1, 1, 1], [0, 0, 0.5]):
        expected = win_rate(values)
        found = uncertainty({"a": np.array(values, dtype=float)}, {"a": 1.0})
        assert found["standard_error"] == pytest.approx(expected.standard_error)
        assert found["ci"] == pytest.approx(expected.ci)
    assert uncertainty({"a": np.ones(1)}, {"a": 1.0})["standard_error"] is None


@pytest.mark.parametrize("earned", [-0.01, 1.01])
def test_the_best_and_the_worst_of_ties_have_an_interval(earned: float) -> None:
    low, high = uncertainty({"Ties": np.full(500, earned)}, {"Ties": 1.0})["ci"]
    assert low <= 100 * earned <= high


def test_standard_errors_and_intervals_hold() -> None:
    """Against the spread of the score itself, drawn anew 400 times."""
    draw = np.random.default_rng(2)
    chances = dict(zip(SUBSETS, draw.uniform(0.5, 0.99, len(SUBSETS)), strict=True))
    weights = overall_weights(prior_sets=False)
    truth = 100 * sum(weights[name] * chances[name] for name in SUBSETS)
    scores, errors, held = [], [], 0
    for _ in range(400):
        values = {
            name: (draw.random(PUBLISHED_ROWS[1][name]) < chance).astype(float)
            for name, chance in chances.items()
        }
        found = uncertainty(values, weights)
        scores.append(100 * sum(weights[name] * values[name].mean() for name in SUBSETS))
        errors.append(found["standard_error"])
        held += found["ci"][0] <= truth <= found["ci"][1]
    assert np.mean(errors) == pytest.approx(np.std(scores), rel=0.1)
    assert held / 400 == pytest.approx(0.95, abs=0.03)


# Rows


def pairs(rows: int = 2, subsets: list[str] | None = None, seed: int = 0) -> list[dict[str, Any]]:
    source, words = random.Random(seed), world_words()
    return [
        {
            "prompt": " ".join(source.choices(words, k=5)),
            "chosen": " ".join(source.choices(words, k=source.randint(2, 9))),
            "chosen_model": "human",
            "rejected": " ".join(source.choices(words, k=source.randint(2, 9))),
            "rejected_model": "human",
            "subset": subset,
            "id": number,
        }
        for number, subset in enumerate((subsets or SUBSETS) * rows)
    ]


def choices(rows: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    source, words = random.Random(seed), world_words()

    def row(subset: str, identity: str, right: int, wrong: int) -> dict[str, Any]:
        texts = [
            " ".join(source.choices(words, k=source.randint(2, 6))) for _ in range(right + wrong)
        ]
        return {
            "id": identity,
            "prompt": " ".join(source.choices(words, k=4)),
            "chosen": texts[:right],
            "rejected": texts[right:],
            "num_correct": right,
            "num_incorrect": wrong,
            "total_completions": right + wrong,
            "subset": subset,
        }

    plain = [
        row(subset, f"{subset}-{n}", 1, 3)
        for subset in PUBLISHED_ROWS[2]
        if subset != "Ties"
        for n in range(rows)
    ]
    ties = [
        row("Ties", f"{kind}:{n}", 1 if kind == "ref" else 3, 2)
        for n in range(rows)
        for kind in ("ref", "tied")
    ]
    return plain + ties


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_are_read_as_published(tmp_path: Path) -> None:
    rows = pairs(1)
    file = read_items(str(write(tmp_path / "one.jsonl", rows)), 1)
    assert file[0].prompt == [{"role": "user", "content": rows[0]["prompt"]}]
    assert file[0].answers == [rows[0]["chosen"], rows[0]["rejected"]]
    folder = tmp_path / "data"  # as on the Hub: the raw rows are not scored
    write(folder / "raw-00000-of-00001.parquet", pairs(3))
    write(folder / "filtered-00000-of-00001.parquet", rows)
    found = read_items(str(folder), 1)
    assert items_hash(found) == items_hash(file) == items_hash(reversed(file))
    assert len(read_items(str(folder), 1, "raw")) == 3 * len(rows)
    two = read_items(str(write(tmp_path / "two" / "test-00000-of-00001.parquet", choices(1))), 2)
    assert len(read_items(str(tmp_path / "two"), 2)) == len(two) == 7
    assert two[-1].right == 3
    assert len(two[-1].answers) == 5


def test_conversations_and_odd_texts_are_read(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "moo"},
        {"role": "assistant", "content": "woof"},
        {"role": "user", "content": "baa"},
    ]
    same, empty, talk, messages = pairs(4, ["hep-go"])
    same["rejected"], empty["rejected"], talk["prompt"] = same["chosen"], "", turns
    for side in ("chosen", "rejected"):
        messages[side] = [{"role": "assistant", "content": messages[side]}]
    items = read_items(str(write(tmp_path / "x.jsonl", [same, empty, talk, messages])), 1)
    assert items[0].answers[0] == items[0].answers[1]
    assert items[1].answers[1] == ""
    assert items[2].prompt == turns
    assert items[3].prompt == [{"role": "user", "content": messages["prompt"]}]
    assert items[3].answers == [messages[side][0]["content"] for side in ("chosen", "rejected")]


def test_prior_sets_are_splits_or_a_column(tmp_path: Path) -> None:
    rows = pairs(2, list(PRIOR_SETS))
    file = read_prior_sets(str(write(tmp_path / "prior.jsonl", rows)))
    for name in (*PRIOR_SETS, "pku_safer"):
        own = [row | {"subset": "inner"} for row in rows if row["subset"] == name]
        write(tmp_path / "prior" / f"{name}-00000-of-00001.parquet", own or rows)
    assert items_hash(read_prior_sets(str(tmp_path / "prior"))) == items_hash(file)
    for other, words in ((rows[:3], "no rows of summarize"), (pairs(1, ["xyz"]), "subsets xyz")):
        with pytest.raises(PrefoptError, match=words):
            read_prior_sets(str(write(tmp_path / "prior.jsonl", other)))


@pytest.mark.parametrize(
    ("version", "change", "words"),
    [
        (1, {"rejected": None}, "field 'rejected': found no value, expected"),
        (1, {"prompt": " "}, "field 'prompt': empty prompt"),
        (1, {"subset": 3}, "field 'subset': found 3"),
        (1, {"chosen": ["moo", "woof"]}, "--version 2"),
        (2, {"chosen": "moo"}, "field 'chosen': found str.*--version 1"),
        (2, {"rejected": []}, "field 'rejected': found list, expected a list of one or more"),
        (2, {"chosen": ["moo", "baa"]}, "field 'chosen': found 2 answers, expected one outside"),
        (2, {"subset": "Ties"}, "field 'id': found 'Factuality-1', expected ref:NUMBER"),
    ],
)
def test_a_bad_row_is_named(
    version: int, change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    rows = pairs() if version == 1 else choices()
    rows[1] |= change
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(PrefoptError, match=f"^{path}:2: .*{words}"):
        read_items(str(path), version)


def test_questions_of_ties_come_in_pairs(tmp_path: Path) -> None:
    rows = choices()
    path = str(write(tmp_path / "rows.jsonl", rows[:-1]))
    with pytest.raises(PrefoptError, match=r":13: .*ref:1 has no counterpart.*\(1 have none\)"):
        read_items(path, 2)
    write(tmp_path / "rows.jsonl", [*rows, rows[-1]])
    with pytest.raises(PrefoptError, match=r":15: .*found tied:1 twice"):
        read_items(path, 2)


def test_unknown_subsets_are_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", pairs(1, ["hep-go", "b", "a"]))
    with pytest.raises(PrefoptError, match="found the subsets a, b, expected some of alpacaeval"):
        read_items(str(path), 1)


# Scores


def items_of(rows: list[dict[str, Any]], tmp_path: Path, version: int) -> list[Item]:
    return read_items(str(write(tmp_path / "items.jsonl", rows)), version)


class Table:
    """A judge that only compares: P(a beats b) by the number of words, with a cycle of three."""

    compares_only = True

    def prefer(self, prompts: Any, a: list[str], b: list[str]) -> np.ndarray:
        lead = np.array([len(x.split()) - len(y.split()) for x, y in zip(a, b, strict=True)])
        return 1 / (1 + np.exp(-lead.astype(float)))


def test_comparisons_become_mean_win_probabilities(tmp_path: Path) -> None:
    rows = choices(1)[:1]
    rows[0]["chosen"], rows[0]["rejected"] = ["a a a"], ["a a", "a a", "a"]
    [scores] = score_items(Table(), {}, items_of(rows, tmp_path, 2), tmp_path / "scores.jsonl")
    s = [1 / (1 + math.exp(-x)) for x in (1, 2)]
    assert scores[0] == pytest.approx((2 * s[0] + s[1]) / 3)
    assert scores[1] == scores[2] == pytest.approx((1 - s[0] + 0.5 + s[0]) / 3)
    assert scores[3] == pytest.approx((2 * (1 - s[0]) + 1 - s[1]) / 3)
    pair = pairs(1, ["hep-go"])
    pair[0]["rejected"] = pair[0]["chosen"]
    items = items_of(pair, tmp_path, 1)
    scores = score_items(Table(), {}, items, tmp_path / "scores.jsonl")
    assert scores == [[0.5, 0.5]]
    assert earned_by_subset(items, scores)["hep-go"].tolist() == [0.5]


@pytest.mark.parametrize("version", [1, 2])
def test_the_order_of_rows_changes_nothing(version: int, tmp_path: Path) -> None:
    rows = pairs(5) if version == 1 else choices(5)
    items = items_of(rows, tmp_path, version)
    draw = np.random.default_rng(3)
    scores = [draw.integers(0, 5, len(item.answers)).astype(float).tolist() for item in items]
    order = draw.permutation(len(items)).tolist()
    before = summarise(items, scores, version)
    after = summarise([items[i] for i in order], [scores[i] for i in order], version)
    assert before["overall"]["score"] == pytest.approx(after["overall"]["score"], abs=1e-9)
    for subset, entry in before["subsets"].items():
        assert after["subsets"][subset]["score"] == pytest.approx(entry["score"])
        assert after["subsets"][subset]["ci"] == pytest.approx(entry["ci"])


def test_a_subset_that_is_there_twice_weighs_the_same(tmp_path: Path) -> None:
    """Published weights hold whatever the number of rows; only the error shrinks."""
    items = items_of(pairs(6), tmp_path, 1)
    draw = np.random.default_rng(4)
    scores = draw.normal(size=(len(items), 2)).tolist()
    more = [i for i, item in enumerate(items) if item.subset == "math-prm"]
    before = summarise(items, scores, 1)
    after = summarise(items + [items[i] for i in more], scores + [scores[i] for i in more], 1)
    assert after["overall"]["score"] == pytest.approx(before["overall"]["score"])
    assert after["overall"]["standard_error"] < before["overall"]["standard_error"]
    assert after["subsets"]["math-prm"]["rows"] == 12
    weight = section_weights("Reasoning")["math-prm"]
    assert weight == 0.5


def test_version_2_is_the_mean_of_its_subsets(tmp_path: Path) -> None:
    items = items_of(choices(3), tmp_path, 2)
    scores = [[float(-i) for i in range(len(item.answers))] for item in items]
    plain = plain_scores(earned_by_subset(items, scores), 2)
    # of Ties: gaps 1, spread 2
    ties = 60 + 1 * math.tanh(1 / 2 - 1)
    assert plain["subsets"]["Ties"] == pytest.approx(ties)
    assert plain["overall"] == pytest.approx((500 + ties) / 6)
    without = plain_scores(earned_by_subset(items[:3], scores[:3]), 2)
    assert without == {"overall": None, "subsets": {"Factuality": 100.0}}


# The command


@pytest.fixture
def judges(tiny_llama: Any, tmp_path: Path) -> dict[str, Path]:
    """A random reward model and a random preference model on the world's words."""
    tokenizer = world_tokenizer()
    causal = tiny_llama(vocab_size=len(tokenizer))
    causal.config.num_labels = 1
    scalar = sharpen(LlamaForSequenceClassification(causal.config), 6.0)
    folders = {"reward_model": tmp_path / "scalar", "preference_model": tmp_path / "causal"}
    for folder, model in zip(folders.values(), (scalar, causal), strict=True):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folders


def evaluate(data: Path, judge: Path, out: Path, *more: str) -> int:
    """Runs the command with a judge whose kind is its folder's name."""
    kind = {"scalar": "reward_model", "causal": "preference_model"}[judge.name]
    options = ["--data", data, "--judge", judge, "--judge-kind", kind, "--out", out, *more]
    return main(["eval", "reward-bench", *map(str, options), "--json"])


@pytest.mark.parametrize("kind", ["reward_model", "preference_model"])
def test_version_1_end_to_end(
    kind: str, judges: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data" / "filtered-00000-of-00001.parquet", pairs())
    prior = write(tmp_path / "prior.jsonl", pairs(2, list(PRIOR_SETS), seed=1))
    out = tmp_path / "out"
    assert evaluate(data.parent, judges[kind], out, "--prior-sets", str(prior)) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((out / "result.json").read_text())
    assert list(result["sections"]) == list(SECTIONS)
    subsets = {name: entry["score"] for name, entry in result["subsets"].items()}
    sections = section_scores(subsets)
    assert result["overall"]["score"] == pytest.approx(overall_score(sections))
    prior_mean = sum(subsets[name] for name in PRIOR_SETS) / 4
    old = overall_score(sections, prior_mean)
    assert result["overall_with_prior_sets"]["score"] == pytest.approx(old)
    assert result["overall"]["ci"][0] < result["overall"]["score"] < result["overall"]["ci"][1]
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == result["data"]["rows"] == 46 + 8
    by_hand = [credit(row["scores"]) for row in rows if row["subset"] == "math-prm"]
    assert subsets["math-prm"] == 100 * sum(by_hand) / 2
    longer = dict.fromkeys(SUBSETS, 0.0)
    for row in pairs():
        longer[row["subset"]] += 50 * credit([len(row["chosen"]), len(row["rejected"])])
    found = result["longer_wins"]["subsets"]
    assert {name: found[name] for name in SUBSETS} == longer
    assert result["judge"]["kind"] == kind
    assert any("alpacaeval-easy 2 of 100" in remark for remark in result["remarks"])


@pytest.mark.parametrize("kind", ["reward_model", "preference_model"])
def test_version_2_end_to_end(
    kind: str, judges: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "test.jsonl", choices())
    assert evaluate(data, judges[kind], tmp_path / "out", "--version", "2") == 0
    result = json.loads(capsys.readouterr().out)
    scores = [entry["score"] for entry in result["subsets"].values()]
    assert result["subsets"].keys() == PUBLISHED_ROWS[2].keys()
    assert result["overall"]["score"] == pytest.approx(sum(scores) / 6)
    assert result["subsets"]["Ties"]["rows"] == 4
    compares = any("mean win probabilities" in remark for remark in result["remarks"])
    assert compares == (kind == "preference_model")


def test_part_of_the_data_has_no_overall_score(
    judges: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = [*SECTIONS["Chat"], "hep-go"]
    data = write(tmp_path / "chat.jsonl", pairs(2, chat))
    assert evaluate(data, judges["reward_model"], tmp_path / "out") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["overall"] is result["longer_wins"]["overall"] is None
    assert list(result["sections"]) == ["Chat"]
    assert "hep-go" in result["subsets"]
    assert "no overall score: without rows of mt-bench-hard, " in result["remarks"][0]


def test_the_table_for_people(
    judges: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "rows.jsonl", pairs())
    options = ["--data", str(data), "--judge", str(judges["reward_model"])]
    assert main(["eval", "reward-bench", *options, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("RewardBench 1", "longer wins", "Chat Hard", "math-prm"))
    assert "other numbers of rows than published" in shown


@pytest.mark.parametrize("kind", ["reward_model", "preference_model"])
def test_a_killed_run_goes_on(
    kind: str,
    judges: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(judging, "SHARD", 8)
    data = write(tmp_path / "rows.jsonl", pairs(1))
    name = "score" if kind == "reward_model" else "prefer"
    cls = judging.load_judge(kind, str(judges[kind])).__class__
    answer, asked = getattr(cls, name), []

    def dies(self: Any, prompts: Any, *columns: Any) -> np.ndarray:
        asked.append(len(prompts))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return answer(self, prompts, *columns)

    assert evaluate(data, judges[kind], tmp_path / "whole") == 0
    whole = json.loads(capsys.readouterr().out)
    monkeypatch.setattr(cls, name, dies)
    out = tmp_path / "out"
    assert evaluate(data, judges[kind], out) == 130
    kept = out / "scores.jsonl"
    assert len(kept.read_text().splitlines()) == 16
    kept.write_text(kept.read_text() + '{"key": "cut o')
    assert evaluate(data, judges[kind], out) == 0
    result = json.loads(capsys.readouterr().out)
    total = 2 * len(SUBSETS) if kind == "reward_model" else len(SUBSETS)
    assert sum(asked[3:]) == total - 16
    for key in ("overall", "sections", "subsets", "judge", "data"):
        assert result[key] == whole[key]
    assert (out / "rows.jsonl").exists()
    asked.clear()
    assert evaluate(data, judges[kind], out) == 0
    assert not asked


def test_what_cannot_be_is_one_line(
    judges: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "rows.jsonl", [*pairs(1), {"prompt": "moo"}])
    for options, words in (
        ([], f"{data}:24: field 'chosen': missing column: found the columns prompt"),
        (["--version", "2", "--prior-sets", "x"], "--version 1 reads one text"),
    ):
        assert evaluate(data, judges["reward_model"], tmp_path / "out", *options) == 2
        error = capsys.readouterr().err
        assert words in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    two = write(tmp_path / "two.jsonl", choices(1))
    options = ("--version", "2", "--prior-sets", "x")
    assert evaluate(two, judges["reward_model"], tmp_path / "out", *options) == 2
    assert "RewardBench 2 has none" in capsys.readouterr().err
