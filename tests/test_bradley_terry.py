"""Bradley-Terry: hand-derived strengths, covariates, separation, and the shape of the input."""

from __future__ import annotations

import math

import numpy as np
import pytest

from prefopt.errors import PrefoptError
from prefopt.eval.bradley_terry import ELO, fit_bradley_terry


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_two_models_have_the_logit_of_the_win_rate() -> None:
    fit = fit_bradley_terry([1] * 4, [0] * 4, [1, 1, 1, 0], 2)
    assert fit.strengths[0] == 0
    assert fit.strengths[1] == pytest.approx(logit(0.75), abs=1e-5)
    assert fit.win_rates() == pytest.approx([0.5, 0.75], abs=1e-6)
    assert fit.elo() == pytest.approx([1000, 1000 + 400 * math.log10(3)], abs=1e-3)
    assert fit.determined.all()


@pytest.mark.parametrize(("wins", "losses", "ties"), [(3, 1, 0), (5, 2, 4), (0, 1, 3)])
def test_soft_outcomes_and_weights_are_repeated_battles(wins: int, losses: int, ties: int) -> None:
    outcomes = [1.0] * wins + [0.0] * losses + [0.5] * ties
    n = len(outcomes)
    long = fit_bradley_terry([1] * n, [0] * n, outcomes, 2)
    short = fit_bradley_terry([1], [0], [np.mean(outcomes)], 2, weights=[n])
    assert long.strengths == pytest.approx(short.strengths, abs=1e-8)
    assert long.strengths[1] == pytest.approx(logit((wins + ties / 2) / n), abs=1e-4)


def test_the_scheme_of_arena_hard_0_1() -> None:
    """Weight 3 for a strong verdict, each battle entered twice, a tie one win each, X = +-ln 10.

    There the coefficients are in powers of ten and a rating is 400 c + 1000. Model against
    baseline: two strong wins, one win, one tie, one strong loss: 7.5 of 11 points.
    """
    outcomes, weights = [1.0, 1.0, 0.5, 0.0], [2 * 3, 1, 1, 3]
    doubled_y = [1, 1, 1, 1, 1, 0, 0, 0]
    doubled_w = [6, 6, 1, 1, 1, 1, 3, 3]
    by_scheme = fit_bradley_terry([1] * 8, [0] * 8, doubled_y, 2, weights=doubled_w)
    ours = fit_bradley_terry([1] * 4, [0] * 4, outcomes, 2, weights=weights)
    assert by_scheme.strengths == pytest.approx(ours.strengths, abs=1e-6)
    coefficient = math.log10(7.5 / 3.5)  # the c with 1 / (1 + 10^-c) = 7.5 / 11
    assert ours.elo()[1] == pytest.approx(400 * coefficient + 1000, abs=1e-3)
    rate = 1 / (1 + 10 ** ((1000 - ours.elo()[1]) / 400))
    assert rate == pytest.approx(7.5 / 11)
    assert ours.win_rates()[1] == pytest.approx(7.5 / 11, abs=1e-6)
    assert ours.elo(1114) - ours.elo() == pytest.approx([114, 114])


def test_strengths_are_differences_so_a_chain_adds_up() -> None:
    """1 beats 0 at 3:1 and 2 beats 1 at 4:1, with no battle between 2 and 0."""
    fit = fit_bradley_terry([1, 2], [0, 1], [0.75, 0.8], 3, weights=[100, 50])
    assert fit.strengths == pytest.approx([0, math.log(3), math.log(12)], abs=1e-6)
    other = fit_bradley_terry([1, 2], [0, 1], [0.75, 0.8], 3, weights=[100, 50], baseline=1)
    assert other.strengths == pytest.approx(fit.strengths - fit.strengths[1], abs=1e-6)


def random_battles(rows: int = 400) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 4, rows)
    second = (first + rng.integers(1, 4, rows)) % 4
    outcomes = rng.choice([0, 0.5, 1], rows)
    features = rng.normal(size=(rows, 2))
    return {"first": first, "second": second, "outcomes": outcomes, "features": features}


def test_order_and_direction_of_the_rows_change_nothing() -> None:
    battles = random_battles()
    fit = fit_bradley_terry(**battles, models=4)
    order = np.random.default_rng(1).permutation(400)
    shuffled = fit_bradley_terry(**{k: v[order] for k, v in battles.items()}, models=4)
    mirrored = fit_bradley_terry(
        battles["second"],
        battles["first"],
        1 - battles["outcomes"],
        4,
        features=-battles["features"],
    )
    for other in (shuffled, mirrored):
        assert other.strengths == pytest.approx(fit.strengths, abs=1e-9)
        assert other.slopes == pytest.approx(fit.slopes, abs=1e-9)
    again = fit_bradley_terry(**battles, models=4, start=fit)
    assert again.strengths == pytest.approx(fit.strengths, abs=1e-9)


def test_it_agrees_with_a_well_kept_library() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    battles = random_battles()
    design = np.zeros((400, 4))
    design[np.arange(400), battles["first"]] += 1
    design[np.arange(400), battles["second"]] -= 1
    design = np.concatenate([design[:, 1:], battles["features"]], axis=1)
    y = battles["outcomes"]
    model = linear.LogisticRegression(fit_intercept=False, C=np.inf, tol=1e-10, max_iter=1000)
    model.fit(
        np.concatenate([design, design]),
        np.repeat([1, 0], 400),
        sample_weight=np.concatenate([y, 1 - y]),
    )
    fit = fit_bradley_terry(**battles, models=4)
    assert fit.strengths[1:] == pytest.approx(model.coef_[0, :3], abs=1e-4)
    assert fit.slopes == pytest.approx(model.coef_[0, 3:], abs=1e-4)


def test_planted_strengths_and_slope_are_recovered() -> None:
    """Outcomes are the exact probabilities, so nothing but the ridge is between fit and truth."""
    rng = np.random.default_rng(2)
    strengths, slopes = np.array([0, 0.7, -1.2]), np.array([0.9, 0.0])
    first = rng.integers(1, 3, 500)
    x = rng.normal(0.5, 1, size=(500, 2))
    p = 1 / (1 + np.exp(-(strengths[first] + x @ slopes)))
    fit = fit_bradley_terry(first, np.zeros(500, int), p, 3, features=x)
    assert fit.strengths == pytest.approx(strengths, abs=1e-5)
    assert fit.slopes == pytest.approx(slopes, abs=1e-5)


def test_models_without_a_finite_strength_are_said_to_have_none() -> None:
    """1 wins everything, 2 loses everything, 3 does not play, 4 wins all but one of 10,000."""
    fit = fit_bradley_terry([1, 2, 4, 4], [0, 0, 0, 0], [1, 0, 1, 0], 5, weights=[50, 50, 9999, 1])
    assert fit.determined.tolist() == [True, False, False, False, True]
    elo = fit.elo()
    assert (elo[1], elo[2]) == (math.inf, -math.inf)
    assert math.isnan(elo[3])
    assert elo[4] == pytest.approx(1000 + ELO * math.log(9999), abs=0.1)
    assert fit.win_rates()[[1, 2]] == pytest.approx([1, 0], abs=1e-6)


def test_a_feature_that_decides_or_never_varies_is_not_determined() -> None:
    x = np.array([[1.0, 0], [1, 0], [-1, 0], [-1, 0]])
    fit = fit_bradley_terry([1] * 4, [0] * 4, [1, 1, 0, 0], 2, features=x)
    assert fit.slopes_determined.tolist() == [False, False]
    assert fit.slopes[1] == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"outcomes": []}, "one battle or more"),
        ({"outcomes": [1.5, 0]}, "outside"),
        ({"outcomes": [math.nan, 0]}, "outside"),
        ({"weights": [1, -1]}, "negative"),
        ({"weights": [1]}, "weights of"),
        ({"features": [1, 2]}, "features"),
        ({"first": [1, 2]}, "from 0 to 1"),
        ({"second": [0]}, "players of shape"),
    ],
)
def test_input_that_does_not_fit_is_named(change: dict, words: str) -> None:
    battles = {"first": [1, 1], "second": [0, 0], "outcomes": [1, 0], "models": 2}
    with pytest.raises(PrefoptError, match=words):
        fit_bradley_terry(**battles | change)
