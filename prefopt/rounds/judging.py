"""What a judge is asked about the samples of prompts, and what it said."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np

from prefopt.data.rows import Prompt
from prefopt.errors import PrefoptError
from prefopt.judge import Judge

Match = tuple[int, int]


@dataclass(frozen=True)
class Judgement:
    """What a judge said about the samples of one prompt.

    Attributes:
        scores: One a sample, as the judge gave them, unpenalised; empty for pairings that only
            compare.
        matches: ``(i, j, P(i beats j))`` in the order played; samples of the same text are not
            among them.
    """

    scores: list[float]
    matches: list[tuple[int, int, float]]


def score_samples(
    judge: Judge, prompts: Sequence[Prompt], samples: Sequence[Sequence[str]], keys: Sequence[str]
) -> list[list[float]]:
    """Every sample's score, [prompts][samples], in one call; a prompt that recurs has the next.

    A judge that only compares scores samples against each other, and must not mix two occurrences.

    Raises:
        PrefoptError: A score is not finite.
    """
    calls: dict[int, list[int]] = {}
    seen: Counter[str] = Counter()
    for n, prompt in enumerate(prompts):
        name = json.dumps(prompt, sort_keys=True)
        calls.setdefault(seen[name], []).append(n)
        seen[name] += 1
    scores: list[list[float]] = [[] for _ in samples]
    for numbers in calls.values():
        asked = [(n, text) for n in numbers for text in samples[n]]
        answers = judge.score([prompts[n] for n, _ in asked], [text for _, text in asked])
        values = _numbers(answers, len(asked))
        for (n, _), value in zip(asked, values, strict=True):
            if not math.isfinite(value):
                raise PrefoptError(
                    f"prompt {keys[n]!r}: found score {value} for sample {len(scores[n])}, "
                    "expected a finite number; correct the judge"
                )
            scores[n].append(value)
    return scores


def compare_samples(
    judge: Judge,
    prompts: Sequence[Prompt],
    samples: Sequence[Sequence[str]],
    keys: Sequence[str],
    matches: Sequence[tuple[int, int, int]],
) -> list[float]:
    """P(sample i beats sample j) for matches ``(prompt, i, j)``, in one call.

    Raises:
        PrefoptError: A P is outside [0, 1].
    """
    values = judge.prefer(
        [prompts[n] for n, _, _ in matches],
        [samples[n][i] for n, i, _ in matches],
        [samples[n][j] for n, _, j in matches],
    )
    answers = _numbers(values, len(matches))
    for (n, i, j), p in zip(matches, answers, strict=True):
        if not 0 <= p <= 1:
            raise PrefoptError(
                f"prompt {keys[n]!r}: found P={p} for sample {i} against {j}, expected a "
                "probability in [0, 1]; correct the judge"
            )
    return answers


def compare_all(
    judge: Judge,
    prompts: Sequence[Prompt],
    samples: Sequence[Sequence[str]],
    keys: Sequence[str],
    *,
    opponents: int = 0,
) -> list[Judgement]:
    """Has every two samples of a prompt compared, in one call.

    Args:
        judge: The judge.
        prompts: [prompts].
        samples: The texts of each prompt's samples.
        keys: A name for each prompt, for errors.
        opponents: If above 0, the last so many samples of each prompt are an opponent's: each of
            the others is compared with each of these, and with nothing else.

    Returns:
        One judgement a prompt; samples of the same text are not asked about.

    Raises:
        PrefoptError: A P is outside [0, 1].
    """
    matches = [
        (n, i, j)
        for n, texts in enumerate(samples)
        for i, j in _all_matches(len(texts), opponents)
        if texts[i] != texts[j]
    ]
    answers = compare_samples(judge, prompts, samples, keys, matches) if matches else []
    judgements = [Judgement([], []) for _ in samples]
    for (n, i, j), p in zip(matches, answers, strict=True):
        judgements[n].matches.append((i, j, p))
    return judgements


def win_rates(judgement: Judgement, count: int, *, opponents: int = 0) -> list[float]:
    """The mean of P(sample beats the other) over those a sample was compared with.

    Args:
        judgement: What :func:`compare_all` said of a prompt, with the same ``opponents``.
        count: How many samples the prompt has, the opponent's among them.
        opponents: How many of them are an opponent's.

    Returns:
        One win rate for each sample that is not an opponent's.
    """
    table = np.full((count, count), 0.5)  # samples of the same text were not compared
    for i, j, p in judgement.matches:
        table[i, j], table[j, i] = p, 1 - p
    own = count - opponents
    if opponents:
        return table[:own, own:].mean(1).tolist()
    return ((table.sum(1) - 0.5) / (count - 1)).tolist()


def _numbers(answers: Sequence[float] | np.ndarray, count: int) -> list[float]:
    values = np.asarray(answers, dtype=float)
    if values.shape != (count,):
        raise PrefoptError(
            f"the judge's answer has the shape {list(values.shape)}, expected [{count}], a number "
            "for each question; correct the judge"
        )
    return values.tolist()


def _all_matches(count: int, opponents: int) -> list[Match]:
    own = range(count - opponents)
    if opponents:
        return list(product(own, range(count - opponents, count)))
    return list(combinations(own, 2))
