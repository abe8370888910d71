"""L1-regularised logistic regression with soft labels: many weightings of the same rows at once."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from prefopt.errors import PrefoptError

FloatArray = npt.NDArray[np.float64]

# Of the decrease that a step promises, relative to the objective. It goes with the square of the
# error before the step, and so does the error after it: weights are then right to about 1e-11.
TOLERANCE = 1e-12
MOST_ITERATIONS = 200


def fit_l1_logistic(
    features: FloatArray, labels: FloatArray, weights: FloatArray, start: FloatArray | None = None
) -> FloatArray:
    """Minimises |w|_1 + sum_i weights_i * logloss(labels_i, sigmoid(features_i w)), exactly.

    This is liblinear's L1-regularised logistic regression without intercept (Fan et al. 2008,
    JMLR 9:1871) when every weight holds the factor C. Proximal Newton steps (Lee et
    al. 2014, arXiv:1206.1623, algorithm 1); with so few terms each quadratic model is minimised
    exactly, by trying all sign patterns of w. Weights of terms that help too little are exactly 0.

    Args:
        features: Shape [rows, terms], or [problems, rows, terms] where they differ; at most a
            handful of terms.
        labels: Shape [rows], in [0, 1].
        weights: Shape [problems, rows], not negative.
        start: Shape [terms] or [problems, terms], where to begin; zeros by default.

    Returns:
        Shape [problems, terms].

    Raises:
        PrefoptError: No convergence, which non-finite input causes.
    """
    problems, terms = len(weights), features.shape[-1]
    products = features[..., :, None] * features[..., None, :]
    products = products.reshape(*features.shape[:-1], terms * terms)

    w = np.zeros((problems, terms))
    if start is not None:
        w += start
    value, gradient, hessian = _derivatives(features, products, labels, weights, w)
    for _ in range(MOST_ITERATIONS):
        step = _newton_step(w, gradient, hessian)
        promised = (gradient * step).sum(1) + np.abs(w + step).sum(1) - np.abs(w).sum(1)
        if (promised >= -TOLERANCE * value).all():
            return w + step
        scale = np.ones(problems)
        while scale.min() > 1e-12:
            moved = w + scale[:, None] * step
            new = _derivatives(features, products, labels, weights, moved)
            # Near the optimum both sides are rounding error, which must not stop the step.
            too_far = new[0] > value + 0.1 * scale * promised + TOLERANCE * value
            if not too_far.any():
                break
            scale[too_far] /= 2
        w, (value, gradient, hessian) = moved, new
    raise PrefoptError(
        f"the logistic regression did not converge in {MOST_ITERATIONS} Newton steps: expected "
        "finite features, labels and weights"
    )


def log_loss(logits: FloatArray, labels: FloatArray) -> FloatArray:
    """Cross-entropy of soft labels, any shape, without overflow."""
    # The two large terms first: they cancel where a label is near 1.
    return np.log1p(np.exp(-np.abs(logits))) + (np.maximum(logits, 0) - labels * logits)


def sigmoid(logits: FloatArray) -> FloatArray:
    """1 / (1 + exp(-logits)), any shape, without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * logits))


def _derivatives(
    features: FloatArray,
    products: FloatArray,
    labels: FloatArray,
    weights: FloatArray,
    w: FloatArray,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Objective [problems], and the loss's gradient and Hessian (without the L1 term)."""
    problems, terms = w.shape
    logits = (features @ w[:, :, None])[..., 0]
    p = sigmoid(logits)
    loss = (weights * log_loss(logits, labels)).sum(1)
    gradient = ((weights * (p - labels))[:, None, :] @ features)[:, 0]
    hessian = ((weights * (p * (1 - p)))[:, None, :] @ products)[:, 0]
    return loss + np.abs(w).sum(1), gradient, hessian.reshape(problems, terms, terms)


def _newton_step(w: FloatArray, gradient: FloatArray, hessian: FloatArray) -> FloatArray:
    """The minimiser of the quadratic model plus |w + step|_1, for every problem.

    The minimiser has some pattern of signs. Given a pattern it solves a linear system, so it is
    the pattern's solution that satisfies the optimality conditions.
    """
    terms = w.shape[1]
    # A term that no row has, or two equal terms, leave the model flat: a trace of curvature
    # makes its minimiser unique and does not move the optimum.
    curvature = np.trace(hessian, axis1=1, axis2=2)[:, None, None]
    hessian = hessian + (1e-10 * curvature + 1e-12) * np.eye(terms)
    signs = np.array(list(itertools.product((-1.0, 0.0, 1.0), repeat=terms)))  # [patterns, terms]
    free = signs != 0
    both = free[:, :, None] & free[:, None, :]
    systems = np.where(both, hessian[:, None], np.eye(terms))  # [problems, patterns, terms, terms]
    centre = (hessian @ w[:, :, None])[..., 0] - gradient
    targets = np.where(free, centre[:, None] - signs, 0.0)
    solutions = np.linalg.solve(systems, targets[..., None])[..., 0]
    slope = (solutions @ hessian) - centre[:, None]  # of the quadratic model; hessian symmetric
    violation = np.where(
        solutions == 0,
        np.maximum(np.abs(slope) - 1, 0),
        np.abs(slope + np.sign(solutions)),
    ).max(2)
    best = violation.argmin(1)
    return solutions[np.arange(len(w)), best] - w
