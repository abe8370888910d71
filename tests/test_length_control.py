"""Length-controlled win rates: the published leaderboard, numbers by hand, and invariants."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import prefopt.eval
from prefopt.errors import DataError, PrefoptError
from prefopt.eval.annotations import difficulty_by_position, read_difficulty
from prefopt.eval.l1_logistic import sigmoid
from prefopt.eval.length_control import (
    GRID,
    Weights,
    bootstrap_length_controlled,
    length_controlled_against,
    length_controlled_win_rate,
)
from prefopt.eval.length_design import read_gamed

DATA = Path(__file__).parents[2] / "shared" / "data" / "alpaca_eval2"
GAMED = DATA / "common" / "gamed_baselines.csv"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="no ../shared/data/alpaca_eval2")
PUBLIC = [
    "FuseChat-Gemma-2-9B-Instruct",
    "FuseChat-Llama-3.2-1B-Instruct",
    "Mixtral-8x7B-Instruct-v0.1_concise",
    "claude-2.1",
    "gemma-2b-it",
    "gpt-3.5-turbo-1106_concise",
]
EDGE = ["alpaca-7b_concise", "minotaur-13b", "phi-2"]


def published(part, model):
    """The published line, preferences and lengths, and difficulties by row and by instruction."""
    with (DATA / part / "leaderboard.csv").open() as file:
        (line,) = (row for row in csv.DictReader(file) if row["model"] == model)
    rows = [json.loads(text) for text in (DATA / part / f"{model}.jsonl").read_text().splitlines()]
    columns = [[row[key] for row in rows] for key in ("preference", "len_model", "len_baseline")]
    difficulty = read_difficulty(DATA / "common" / "instruction_difficulty.csv")
    by_position = difficulty_by_position(difficulty, len(rows))
    assert [row["position"] for row in rows] == list(range(len(rows)))
    numbers = {k: float(v) for k, v in line.items() if v and k != "model"}
    return numbers, columns, by_position, difficulty[[row["index"] for row in rows]]


def simulated(n=120, seed=0, length=-1.5, difficulty=0.7, model=0.3, hard=False):
    """Rows of the model that is fitted: preferences, lengths, and difficulties."""
    rng = np.random.default_rng(seed)
    baseline = rng.integers(500, 2500, n)
    own = np.maximum(baseline + rng.normal(100, 400, n).round(), 1)
    excess = baseline - own
    d = rng.normal(0, 1, n)
    p = sigmoid(length * np.tanh(excess / 400) + difficulty * d + model)
    y = (rng.random(n) < p).astype(float) if hard else rng.beta(3 * p, 3 * (1 - p))
    return (1 + y, own, baseline), d


def gamed_table(n=60, seed=1):
    rng = np.random.default_rng(seed)
    length, d = rng.normal(0, 1.5, n), rng.normal(0, 1, n)
    y = sigmoid(-1.3 * np.tanh(length) + 0.5 * d)
    return {"preference": y, "std_delta_len": length, "instruction_difficulty": d}


def close(one, other, tolerance=1e-9):
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert a == (b if isinstance(b, str | None) else pytest.approx(b, abs=tolerance))


# The published leaderboard


@needs_data
@pytest.mark.parametrize(
    ("part", "model"), [("public", m) for m in PUBLIC] + [("edge", m) for m in EDGE]
)
def test_published_values(part, model):
    line, columns, difficulty, _ = published(part, model)
    c = line["C_published_inferred"]
    at_c, chosen = (
        length_controlled_win_rate(*columns, instruction_difficulty=difficulty, gamed=GAMED, C=C)
        for C in (c, None)
    )
    for result in (at_c, chosen):
        assert result.win_rate == pytest.approx(line["win_rate"], abs=1e-6)
        assert result.standard_error == pytest.approx(line["standard_error"], abs=1e-6)
        assert result.discrete_win_rate == pytest.approx(line["discrete_win_rate"], abs=1e-6)
        counts = (result.n_wins, result.n_wins_base, result.n_draws, result.n)
        assert counts == tuple(line[k] for k in ("n_wins", "n_wins_base", "n_draws", "n_total"))
        assert result.weights.length < 0
        assert result.approximation == ""
    assert c == at_c.C
    assert at_c.lc_win_rate == pytest.approx(line["length_controlled_winrate"], abs=0.01)
    expected = [line[k] for k in ("w_tanh_len", "w_difficulty", "w_model")]
    assert at_c.weights == pytest.approx(expected, abs=0.02)
    assert at_c.lc_standard_error == pytest.approx(line["lc_se_from_published_weights"], abs=0.001)
    assert chosen.C in GRID
    assert chosen.lc_win_rate == pytest.approx(line["length_controlled_winrate"], abs=0.2)


@needs_data
@pytest.mark.parametrize("model", EDGE)
def test_short_files_were_published_with_shifted_difficulties(model):
    line, columns, _, by_instruction = published("edge", model)
    result = length_controlled_win_rate(
        *columns,
        instruction_difficulty=by_instruction,
        gamed=GAMED,
        C=line["C_published_inferred"],
    )
    assert abs(result.lc_win_rate - line["length_controlled_winrate"]) > 0.05


@needs_data
def test_the_gate_fails_without_gamed_rows_or_difficulty():
    misses = {"gamed": 0, "difficulty": 0}
    for model in PUBLIC:
        line, columns, difficulty, _ = published("public", model)
        for left_out in misses:
            given = {"instruction_difficulty": difficulty, "gamed": GAMED}
            del given["gamed" if left_out == "gamed" else "instruction_difficulty"]
            result = length_controlled_win_rate(*columns, **given)
            misses[left_out] += abs(result.lc_win_rate - line["length_controlled_winrate"]) > 0.2
            assert left_out in result.approximation
    assert misses["gamed"] >= 4
    assert misses["difficulty"] >= 3


@needs_data
def test_file_frame_and_columns_of_gamed_rows_are_the_same():
    _, columns, difficulty, _ = published("public", "gemma-2b-it")
    results = [
        length_controlled_win_rate(*columns, instruction_difficulty=difficulty, gamed=gamed, C=2.0)
        for gamed in (GAMED, str(GAMED), pd.read_csv(GAMED), read_gamed(GAMED))
    ]
    assert all(result == results[0] for result in results)


def test_the_package_has_the_function():
    assert prefopt.eval.length_controlled_win_rate is length_controlled_win_rate


# Numbers by hand


def test_counts_ties_and_old_ties_by_hand():
    result = length_controlled_win_rate([2, 1.5, 0, 1, 1.7], [1, 2, 3, 4, 5], [5] * 5, C=1)
    assert (result.n, result.n_wins, result.n_wins_base, result.n_draws) == (5, 2, 1, 2)
    assert result.win_rate == pytest.approx(100 * (1 + 0.5 + 0.5 + 0 + 0.7) / 5)
    assert result.discrete_win_rate == pytest.approx(100 * (2 + 2 / 2) / 5)
    # Deviations from .54: .46, -.04, -.04, -.54, .16.
    squares = 0.46**2 + 2 * 0.04**2 + 0.54**2 + 0.16**2
    assert result.standard_error == pytest.approx(100 * math.sqrt(squares / 4 / 5))


def test_fit_by_hand_when_all_lengths_are_equal():
    # C n (sigmoid(c) - mean) = -1 for c > 0: sigmoid(c) = 3/4 - 1 / (2 * 4).
    result = length_controlled_win_rate([2, 2, 2, 1], [7] * 4, [7] * 4, C=2)
    assert result.lc_win_rate == pytest.approx(62.5)
    assert result.weights == pytest.approx((0, 0, math.log(0.625 / 0.375)))
    assert "length" in result.approximation


def test_fit_by_hand_with_two_lengths():
    # Half of 8 rows are longer by 10 (mean .75), half shorter by 10 (mean .25 + 1/2). With
    # t = tanh(10 / s) the conditions are sums of C (sigmoid - y) = -sign(w), also times +-t.
    y = np.array([1, 1, 1, 0, 0.5, 0.5, 0.5, 0.5])
    own, c = np.array([20] * 4 + [0] * 4), 40.0
    t = math.tanh(10 / np.std([10] * 4 + [-10] * 4, ddof=1))
    total = y.sum() / 4 - 1 / (4 * c)  # of the two rates: longer + shorter
    gap = 0.25 - 1 / (4 * c * t)  # longer - shorter, since length < 0
    longer, shorter = (total + gap) / 2, (total - gap) / 2
    logits = [math.log(p / (1 - p)) for p in (longer, shorter)]
    result = length_controlled_win_rate(1 + y, own, [10] * 8, C=c)
    assert result.weights.model == pytest.approx(sum(logits) / 2)
    assert result.weights.length == pytest.approx((logits[1] - logits[0]) / (2 * t))
    assert result.lc_win_rate == pytest.approx(100 * sigmoid(np.array(sum(logits) / 2)))


def test_standard_error_is_the_spread_of_predictions():
    columns, d = simulated()
    result = length_controlled_win_rate(*columns, instruction_difficulty=d, C=5)
    q = sigmoid(result.weights.difficulty * d + result.weights.model)
    assert result.lc_win_rate == pytest.approx(100 * q.mean())
    assert result.lc_standard_error == pytest.approx(100 * q.std(ddof=1) / math.sqrt(len(q)))


def test_weights_of_the_simulation_are_found():
    columns, d = simulated(20_000)
    result = length_controlled_win_rate(*columns, instruction_difficulty=d, C=1e4)
    # The simulation scales by 400, the fit by the sample's standard deviation, about the same.
    assert result.weights == pytest.approx((-1.5, 0.7, 0.3), abs=0.06)
    assert result.win_rate > result.lc_win_rate  # the model's answers are longer


def test_other_baseline():
    d = np.array([-1.0, 0.0, 2.0])
    a, b, c = Weights(-1, 0.5, 0.2), Weights(-2, -0.3, -0.4), Weights(-1, 0.5, 0)
    expected = 100 * np.mean([sigmoid(np.array(0.6 + 0.8 * x)) for x in d])
    assert length_controlled_against(a, b, d) == pytest.approx(expected)
    assert length_controlled_against(b, a, d) == pytest.approx(100 - expected)
    assert length_controlled_against(a, a, d) == 50
    assert length_controlled_against(a, c) == pytest.approx(100 / (1 + math.exp(-0.2)))
    with pytest.raises(PrefoptError, match="give the instruction_difficulty"):
        length_controlled_against(a, b)


# Invariants


@pytest.mark.parametrize("c", [None, 3.0])
def test_order_of_rows_changes_nothing(c):
    columns, d = simulated()
    table, order = gamed_table(), np.random.default_rng(3).permutation(120)
    reversed_table = {column: values[::-1] for column, values in table.items()}
    one = length_controlled_win_rate(*columns, instruction_difficulty=d, gamed=table, C=c)
    other = length_controlled_win_rate(
        *(column[order] for column in columns),
        instruction_difficulty=d[order],
        gamed=reversed_table,
        C=c,
    )
    assert one == other


@pytest.mark.parametrize("c", [None, 3.0])
def test_swapping_model_and_baseline_mirrors(c):
    (preferences, own, baseline), d = simulated()
    there = length_controlled_win_rate(preferences, own, baseline, instruction_difficulty=d, C=c)
    back = length_controlled_win_rate(
        3 - preferences, baseline, own, instruction_difficulty=-d, C=c
    )
    assert back.win_rate == pytest.approx(100 - there.win_rate)
    assert back.discrete_win_rate == pytest.approx(100 - there.discrete_win_rate)
    assert (back.n_wins, back.n_wins_base) == (there.n_wins_base, there.n_wins)
    assert back.standard_error == pytest.approx(there.standard_error)
    if c is not None:  # the folds are dealt from the other end: C may be chosen differently
        assert back.lc_win_rate == pytest.approx(100 - there.lc_win_rate)
        length, difficulty, model = there.weights
        assert back.weights == pytest.approx((length, difficulty, -model))


def test_unjudged_rows_are_predicted_but_count_in_nothing_else():
    columns, d = simulated()
    # Extra rows are the old ones again: the same spread but for ddof, and the same predictions.
    twice = [np.tile(column, 2) for column in columns]
    twice[0] = np.concatenate([columns[0], np.full(60, np.nan), np.full(60, 2.5)])
    one = length_controlled_win_rate(*columns, instruction_difficulty=d, C=3)
    other = length_controlled_win_rate(*twice, instruction_difficulty=np.tile(d, 2), C=3)
    assert other.unjudged == 120
    assert other.n == 120
    close(
        dataclasses.replace(other, unjudged=0, lc_standard_error=0, lc_win_rate=0, weights=0),
        dataclasses.replace(one, lc_standard_error=0, lc_win_rate=0, weights=0),
    )
    assert other.lc_win_rate == pytest.approx(one.lc_win_rate, abs=0.05)
    harder = length_controlled_win_rate(
        *twice, instruction_difficulty=np.concatenate([d, d - 3]), C=3
    )
    assert harder.weights == other.weights
    assert harder.lc_win_rate < other.lc_win_rate - 5


def test_the_model_s_own_length_cancels_out():
    """Two models of equal quality, one wordy: raw rates differ, length-controlled ones do not."""
    brief, d = simulated(20_000, length=-1.5, seed=4)
    rng = np.random.default_rng(5)
    own = np.maximum(brief[2] + rng.normal(900, 400, 20_000), 1)
    excess = (brief[2] - own) / 400
    p = sigmoid(-1.5 * np.tanh(excess) + 0.7 * d + 0.3)
    wordy = (1 + rng.beta(3 * p, 3 * (1 - p)), own, brief[2])
    a, b = (length_controlled_win_rate(*x, instruction_difficulty=d, C=1e3) for x in (brief, wordy))
    assert b.win_rate > a.win_rate + 10
    assert b.lc_win_rate == pytest.approx(a.lc_win_rate, abs=4)
    assert "far from" in b.warning
    assert a.warning == ""


@pytest.mark.parametrize("c", [None, 2.8])
def test_baseline_against_itself(c):
    result = length_controlled_win_rate([1.5] * 20, range(20), range(20), gamed=gamed_table(), C=c)
    assert (result.win_rate, result.lc_win_rate, result.discrete_win_rate) == (50, 50, 50)
    assert (result.standard_error, result.lc_standard_error) == (0, 0)
    assert result.weights == (0, 0, 0)
    assert result.C is None
    assert result.n_draws == 20
    interval = bootstrap_length_controlled([1.5] * 20, range(20), range(20))
    assert interval.lc_win_rate == (50, 50)


@pytest.mark.parametrize("preference", [1.0, 2.0])
@pytest.mark.parametrize("gamed", [None, gamed_table()])
@pytest.mark.parametrize("c", [None, 1e-4, 1e4])
def test_one_sided_preferences(preference, gamed, c):
    (_, own, baseline), d = simulated(50)
    result = length_controlled_win_rate(
        [preference] * 50, own, baseline, instruction_difficulty=d, gamed=gamed, C=c
    )
    assert result.win_rate == 100 * (preference - 1)
    assert result.standard_error == 0
    if c == 1e-4:
        assert result.lc_win_rate == 50  # the penalty leaves nothing
    else:
        assert result.lc_win_rate == pytest.approx(result.win_rate, abs=15)
        assert 0 < result.lc_win_rate < 100


def test_one_row():
    result = length_controlled_win_rate([1.9], [10], [20], C=10)
    assert result.win_rate == pytest.approx(90)
    assert math.isnan(result.standard_error)
    assert math.isnan(result.lc_standard_error)
    assert result.lc_win_rate == pytest.approx(80)  # .9 - 1 / (C n)
    assert "length is the same" in result.approximation


def test_warnings_are_of_large_corrections():
    # At equal lengths only the penalty corrects: by 1 / (C n), towards 50.
    def warning(wins, n, c):
        preferences = [2] * wins + [1] * (n - wins)
        return length_controlled_win_rate(preferences, [5] * n, [5] * n, C=c).warning

    assert warning(8, 10, 1.02) == ""  # from 80 to 70.2
    assert "of 69.8 is far from the win rate of 80.0" in warning(8, 10, 0.98)
    assert warning(1, 10, 2) == ""  # from 10 to 15, 1/18 of the way to 100
    assert "far from" not in warning(1, 5, 2.02)  # from 20 to 29.9, 1/8
    # From 8.3 down to 5.8: three tenths of the way to 0.
    columns, _ = simulated(2000, length=-1.2, model=-3, seed=2)
    result = length_controlled_win_rate(*columns, C=50)
    assert result.win_rate / 2 < result.lc_win_rate < result.win_rate * 0.75
    assert "far from" in result.warning


# Bootstrap


def test_a_resample_is_the_whole_evaluation_of_the_drawn_rows():
    columns, d = simulated(40)
    order = np.argsort(columns[0])  # the order in which rows are drawn
    columns, d = [column[order] for column in columns], d[order]
    table = gamed_table()
    drawn = np.repeat(np.arange(40), np.random.default_rng(5).multinomial(40, np.full(40, 1 / 40)))
    expected = length_controlled_win_rate(
        *(column[drawn] for column in columns), instruction_difficulty=d[drawn], gamed=table, C=3
    )
    result = bootstrap_length_controlled(
        *columns, instruction_difficulty=d, gamed=table, C=3, samples=1, seed=5
    )
    assert result.win_rate == pytest.approx([expected.win_rate] * 2)
    assert result.lc_win_rate == pytest.approx([expected.lc_win_rate] * 2)


def test_intervals_hold_the_estimate_and_the_uncertainty_of_the_fit():
    columns, d = simulated(300)
    given = {"instruction_difficulty": d, "gamed": gamed_table()}
    estimate = length_controlled_win_rate(*columns, **given)
    result = bootstrap_length_controlled(*columns, **given, samples=400)
    assert result.C == estimate.C
    low, high = result.win_rate
    assert (high - low) / 2 == pytest.approx(1.96 * estimate.standard_error, rel=0.15)
    low, high = result.lc_win_rate
    assert low < estimate.lc_win_rate < high
    assert (high - low) / 2 > 1.5 * 1.96 * estimate.lc_standard_error


def test_intervals_depend_on_the_seed_only():
    columns, d = simulated(60)
    order = np.random.default_rng(8).permutation(60)
    given = {"C": 3.0, "samples": 100}
    one = bootstrap_length_controlled(*columns, instruction_difficulty=d, **given)
    again = bootstrap_length_controlled(
        *(column[order] for column in columns), instruction_difficulty=d[order], **given
    )
    other = bootstrap_length_controlled(*columns, instruction_difficulty=d, **given, seed=1)
    assert one == again
    assert one.lc_win_rate != other.lc_win_rate


def test_equal_differences_of_lengths_that_round_are_equal():
    result = length_controlled_win_rate([1.9] * 7 + [1.2] * 3, [0.1] * 10, [0.4] * 10, C=10)
    assert result.weights.length == 0
    assert "length is the same" in result.approximation


def test_few_judged_rows_do_not_stop_the_bootstrap():
    preferences = [1.2, 1.9, *[math.nan] * 6]
    result = bootstrap_length_controlled(preferences, range(8), [5] * 8, C=5, samples=200)
    assert result.win_rate == pytest.approx((20, 90))
    assert all(map(math.isfinite, result.lc_win_rate))
    with pytest.raises(PrefoptError, match="samples is 0"):
        bootstrap_length_controlled(preferences, range(8), [5] * 8, C=5, samples=0)


def test_intervals_cover_the_truth():
    """100 simulated evaluations on 300 instructions: a rate of 0.95 has an error of 0.022."""
    truth = sigmoid(0.7 * np.random.default_rng(0).normal(size=400_000) + 0.3).mean()
    hits, naive = 0, 0
    for seed in range(100):
        columns, d = simulated(300, seed=1000 + seed, hard=True)
        given = {"instruction_difficulty": d, "C": 20.0}
        low, high = bootstrap_length_controlled(*columns, **given, samples=100).lc_win_rate
        hits += low <= 100 * truth <= high
        rate = length_controlled_win_rate(*columns, **given)
        naive += abs(rate.lc_win_rate - 100 * truth) <= 1.96 * rate.lc_standard_error
    assert 0.90 <= hits / 100 <= 0.99
    assert naive / 100 < 0.6  # what lc_standard_error does not say


# Refusals


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([0.2, 0.9], [1, 2], [1, 2]), {"C": 1}, r"expected \[1, 2\].*add 1"),
        (([0.0, 1.0], [1, 2], [1, 2]), {"C": 1}, "write ties as 1.5"),
        (([1.2], [1, 2], [1, 2]), {"C": 1}, "model_lengths has 2 values for 1"),
        (([1.2, 1.3], [1, 2], [1]), {"C": 1}, "baseline_lengths has 1 values for 2"),
        (([1.2], [[1]], [1]), {"C": 1}, "model_lengths has shape"),
        (([[1.2]], [1], [1]), {"C": 1}, "preferences has shape"),
        (([1.2], [-1], [1]), {"C": 1}, "model_lengths has -1"),
        (([1.2], [1], [math.nan]), {"C": 1}, r"baseline_lengths\[0\] is nan"),
        (([], [], []), {"C": 1}, "at least one row"),
        ((["a"], [1], [1]), {"C": 1}, "no number"),
        (([math.nan, 3.0], [1, 2], [1, 2]), {"C": 1}, "none of 2 preferences"),
        (([1.2], [1], [2]), {"C": 0}, "C is 0"),
        (([1.2], [1], [2]), {"C": math.nan}, "C is nan"),
        (([1.2] * 4, [1] * 4, [2] * 4), {}, "4 judged rows are too few"),
        (([1.2], [1], [2]), {"instruction_difficulty": [1, 2]}, "2 values for 1"),
        (([1.2], [1], [2]), {"instruction_difficulty": [math.inf]}, "difficulty.*is inf"),
    ],
)
def test_unusable_rows_are_refused(arguments, options, message):
    with pytest.raises(PrefoptError, match=message):
        length_controlled_win_rate(*arguments, **options)


@pytest.mark.parametrize(
    ("change", "place", "field", "message"),
    [
        ({"preference": None}, "gamed", "preference", "preference_reconstructed.*rename"),
        ({"std_delta_len": None}, "gamed", "std_delta_len", "no such column"),
        ({"instruction_difficulty": None}, "gamed", "instruction_difficulty", "no such column"),
        ({"preference": [0.5, 1.5]}, "gamed:2", "preference", r"found 1.5.*\[0, 1\]"),
        ({"preference": ["", "x"]}, "gamed:2", "preference", "found 'x'"),
        ({"preference": [None, math.nan]}, "gamed", "preference", "none of 2 rows was judged"),
        ({"std_delta_len": ["1", ""]}, "gamed:2", "std_delta_len", "found ''"),
        ({"std_delta_len": ["1", "x"]}, "gamed:2", "std_delta_len", "found 'x'"),
        ({"not_gamed_baseline": [False, True]}, "gamed:2", "not_gamed_baseline", "expected False"),
        ({"std_delta_len": [1.0]}, "gamed", "preference", r"\[1, 2\] rows"),
    ],
)
def test_unusable_gamed_rows_are_refused(change, place, field, message):
    table = {k: v[:2] for k, v in gamed_table().items()} | change
    table = {k: v for k, v in table.items() if v is not None}
    columns, d = simulated(10)
    with pytest.raises(DataError, match=message) as caught:
        length_controlled_win_rate(*columns, instruction_difficulty=d, gamed=table, C=1)
    assert (caught.value.where, caught.value.field) == (place, field)


def test_gamed_rows_that_were_not_judged_are_left_out(tmp_path):
    columns, d = simulated()
    table = pd.DataFrame(gamed_table())
    fewer = table.drop(index=[3, 17, 40])
    table.loc[[3, 17, 40], "preference"] = np.nan
    table.to_csv(tmp_path / "gamed.csv", index=False, encoding="utf-8-sig")  # as Excel writes it
    one, *others = (
        length_controlled_win_rate(*columns, instruction_difficulty=d, gamed=gamed)
        for gamed in (fewer, table, tmp_path / "gamed.csv")
    )
    for other in others:
        close(one, other)


def test_gamed_rows_need_no_difficulty_where_it_is_not_used():
    columns, _ = simulated(10)
    table = gamed_table()
    del table["instruction_difficulty"]
    result = length_controlled_win_rate(*columns, gamed=table, C=1)
    assert "no instruction difficulty" in result.approximation
    assert result.lc_standard_error == pytest.approx(0, abs=1e-12)


def test_gamed_files_that_cannot_be_read_are_named(tmp_path):
    columns, _ = simulated(10)
    with pytest.raises(PrefoptError, match=r"absent\.csv"):
        length_controlled_win_rate(*columns, gamed=tmp_path / "absent.csv", C=1)
    (tmp_path / "empty.csv").write_text("preference,std_delta_len\n")
    with pytest.raises(PrefoptError, match="no rows"):
        length_controlled_win_rate(*columns, gamed=tmp_path / "empty.csv", C=1)
    (tmp_path / "bad.csv").write_text("preference,std_delta_len\n0.5,1\n0.5,\n")
    with pytest.raises(DataError, match=r"bad\.csv:2: field 'std_delta_len'"):
        length_controlled_win_rate(*columns, gamed=tmp_path / "bad.csv", C=1)
