"""Which prompts each round takes, decided before the first one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from prefopt.errors import PrefoptError


@dataclass(frozen=True)
class PlannedRound:
    """The prompts of one round.

    Attributes:
        prompts: Indices into the prompt set, in the order they are sampled.
        passes: For each of them, which pass over the prompt set it belongs to, from 0. A prompt
            occurs at most once a pass, so (prompt, pass) is unique in a round.
    """

    prompts: list[int]
    passes: list[int]


def plan_rounds(
    num_prompts: int,
    *,
    rounds: int | None,
    prompts_per_round: int | None,
    seed: int,
    shuffle: bool = True,
) -> list[PlannedRound]:
    """Deals prompts to rounds from an endless stream of shuffled passes over the prompt set.

    Every prompt is used equally often, give or take one: a round that begins with what is left of
    a pass goes on with the next pass.

    Args:
        num_prompts: Size of the prompt set.
        rounds: How many rounds; None: as many as one pass over the prompts fills, the last of
            which may be smaller.
        prompts_per_round: Prompts in each; None: one pass, in ``rounds`` parts whose sizes differ
            by at most one.
        seed: Of the shuffles.
        shuffle: Whether each pass has an order of its own, or that of the prompts.

    Raises:
        PrefoptError: Neither number is given, or one is out of range.
    """
    for name, value in (("rounds", rounds), ("prompts_per_round", prompts_per_round)):
        if value is not None and value < 1:
            raise PrefoptError(f"{name}: found {value}, expected at least 1, or null")
    if prompts_per_round is not None:
        total = num_prompts if rounds is None else rounds * prompts_per_round
        bounds = np.append(np.arange(0, total, prompts_per_round), total)
    elif rounds is None:
        raise PrefoptError("rounds and prompts_per_round are both null; set one of them")
    elif rounds > num_prompts:
        raise PrefoptError(f"rounds: found {rounds}, but there are {num_prompts} prompts")
    else:
        bounds = np.linspace(0, num_prompts, rounds + 1).astype(int)
    passes = -(-int(bounds[-1]) // num_prompts)
    stream = np.concatenate(
        [
            np.random.default_rng((seed, p)).permutation(num_prompts)
            if shuffle
            else np.arange(num_prompts)
            for p in range(passes)
        ]
    )
    return [
        PlannedRound(
            prompts=stream[start:end].tolist(),
            passes=(np.arange(start, end) // num_prompts).tolist(),
        )
        for start, end in pairwise(bounds)
    ]


def row_order(rows: int, *, passes: float, shuffle: bool, seed: tuple[int, ...]) -> np.ndarray:
    """Row numbers in the order they are trained on, all passes one after another.

    Args:
        rows: How many rows there are.
        passes: How often each is used; of a fraction, the last pass is cut short.
        shuffle: Whether each pass has an order of its own.
        seed: Of the shuffles.

    Returns:
        int64 [ceil(rows * passes)].
    """
    order = [
        np.random.default_rng((*seed, number)).permutation(rows) if shuffle else np.arange(rows)
        for number in range(math.ceil(passes))
    ]
    return np.concatenate(order)[: math.ceil(rows * passes)]
