"""The L1-penalised fit satisfies its optimality conditions and agrees with liblinear."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from prefopt.errors import PrefoptError
from prefopt.eval.l1_logistic import fit_l1_logistic, log_loss, sigmoid


def problem(rows=300, terms=3, seed=0):
    rng = np.random.default_rng(seed)
    features = np.tanh(rng.normal(0.4, 1, size=(rows, terms)))
    labels = np.clip(
        sigmoid(features @ rng.normal(0, 2, terms)) + rng.normal(0, 0.2, rows), 0.0, 1.0
    )
    return features, labels, rng.random(rows)


def violation(w, features, labels, weights):
    """How far 0 is from the subgradient, in the largest term."""
    slope = features.T @ (weights * (sigmoid(features @ w) - labels))
    at_zero = np.maximum(np.abs(slope) - 1, 0)
    return np.where(w == 0, at_zero, np.abs(slope + np.sign(w))).max()


@pytest.mark.parametrize("terms", [1, 2, 3])
@pytest.mark.parametrize("c", np.logspace(-4, 4, 9))
def test_optimality_conditions(c, terms):
    features, labels, weights = problem(terms=terms)
    (w,) = fit_l1_logistic(features, labels, c * weights[None])
    assert violation(w, features, labels, c * weights) < 1e-9 * max(1, c)


def test_weak_terms_are_exactly_zero_and_all_are_in_the_end():
    features, labels, weights = problem()
    w = fit_l1_logistic(features, labels, np.logspace(-4, 4, 60)[:, None] * weights)
    zeros = (w == 0).sum(1)
    assert zeros[0] == 3
    assert zeros[-1] == 0
    assert {1, 2} & set(zeros)


@pytest.mark.parametrize("c", [0.02, 0.5, 3.0, 100.0])
def test_agrees_with_liblinear(c):
    features, labels, weights = problem()
    # liblinear has hard labels: each row twice, once for every outcome.
    liblinear = LogisticRegression(
        l1_ratio=1, solver="liblinear", fit_intercept=False, C=c, tol=1e-10, max_iter=100_000
    ).fit(
        np.concatenate([features, features]),
        np.repeat([1, 0], len(labels)),
        sample_weight=np.concatenate([weights * labels, weights * (1 - labels)]),
    )
    (w,) = fit_l1_logistic(features, labels, c * weights[None])
    assert w == pytest.approx(liblinear.coef_[0], abs=1e-5)


def test_problems_are_independent_of_each_other():
    features, labels, weights = problem()
    many = np.stack([weights, 50 * weights, weights * (np.arange(300) < 5), 0 * weights])
    together = fit_l1_logistic(features, labels, many)
    alone = np.concatenate([fit_l1_logistic(features, labels, row[None]) for row in many])
    assert together == pytest.approx(alone, abs=1e-9)
    assert (together[3] == 0).all()


def test_features_may_differ_by_problem():
    first, labels, weights = problem(seed=0)
    second = problem(seed=1)[0]
    both = fit_l1_logistic(np.stack([first, second]), labels, np.stack([weights, weights]))
    for features, w in zip((first, second), both, strict=True):
        assert w == pytest.approx(fit_l1_logistic(features, labels, weights[None])[0], abs=1e-9)


def test_start_does_not_move_the_optimum():
    features, labels, weights = problem()
    w = fit_l1_logistic(features, labels, weights[None])
    far = fit_l1_logistic(features, labels, weights[None], start=np.array([30.0, -30.0, 30.0]))
    assert far == pytest.approx(w, abs=1e-9)


@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("c", [1e-4, 1.0, 1e4])
def test_separable_rows_and_absent_terms(label, c):
    features, _, weights = problem()
    features = np.concatenate([features[:, :1], np.zeros((300, 1)), np.ones((300, 1))], axis=1)
    labels = np.full(300, label)
    (w,) = fit_l1_logistic(features, labels, c * weights[None])
    assert w[1] == 0
    assert violation(w, features, labels, c * weights) < 1e-9 * max(1, c)
    assert w[2] == 0 or (w[2] > 0) == (label == 1)


def test_equal_terms_share_what_one_would_have():
    features, labels, weights = problem(terms=1)
    (alone,) = fit_l1_logistic(features, labels, 1e3 * weights[None])
    (both,) = fit_l1_logistic(np.repeat(features, 3, axis=1), labels, 1e3 * weights[None])
    assert both.sum() == pytest.approx(alone[0], abs=1e-6)


def test_input_that_is_not_finite_is_refused():
    features, labels, weights = problem()
    features[3, 1] = np.nan
    with pytest.raises(PrefoptError, match="did not converge"):
        fit_l1_logistic(features, labels, weights[None])


def test_log_loss_and_sigmoid_do_not_overflow():
    logits = np.array([-1e4, 0.0, 1e4])
    with np.errstate(over="raise", invalid="raise"):
        assert sigmoid(logits).tolist() == [0.0, 0.5, 1.0]
        assert log_loss(logits, np.array([0.0, 0.5, 0.0])) == pytest.approx([0, np.log(2), 1e4])
    # 1 - sigmoid(30) is 9.4e-14: small losses keep their digits whatever the label.
    for logit, label in ((30.0, 1.0), (-30.0, 0.0)):
        assert log_loss(np.array(logit), np.array(label)) == pytest.approx(np.exp(-30), rel=1e-6)
