"""Pairs made of samples: any texts, scores and probabilities, ties and copies among them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from fuzz.target import Target, attempt, texts
from prefopt.errors import PrefoptError
from prefopt.rounds.judging import Judgement, compare_all, win_rates
from prefopt.rounds.pairing import (
    PAIRINGS,
    SCORED_PAIRINGS,
    TIES,
    PairingSettings,
    PromptPairs,
    check_samples,
    count_pairs,
    judge_samples,
    make_pairs,
)

finite = st.floats(allow_nan=False, allow_infinity=False)
scores = st.sampled_from([0.0, -0.0, 1.0, 2.0]) | finite
chances = st.sampled_from([0.0, 0.5, 1.0, 0.25]) | st.floats(0, 1)
settings = st.fixed_dictionaries(
    {
        "pairing": st.sampled_from(PAIRINGS),
        "length_penalty": st.just(0.0) | st.sampled_from([0.01, 1.0, 1e308]) | st.floats(),
        "ties": st.sampled_from(TIES),
        "soft_labels": st.booleans(),
    }
)
samples = st.sampled_from(["a", "b", "cc", "ddd"]) | texts
prompts = st.lists(samples, min_size=1, max_size=9)
WORDS = 7  # of a judge's table; texts that fall on the same word are tied


@dataclass(frozen=True)
class TableJudge:
    """A judge whose answers stand in two tables: any numbers, the second one antisymmetric."""

    of_word: list[float]
    of_pair: list[float]

    def score(self, prompts: Any, completions: Any) -> np.ndarray:
        return np.array([self.of_word[_word(text)] for text in completions])

    def prefer(self, prompts: Any, a: Any, b: Any) -> np.ndarray:
        return np.array([self.chance(first, second) for first, second in zip(a, b, strict=True)])

    def chance(self, a: str, b: str) -> float:
        i, j = _word(a), _word(b)
        if i == j:
            return 0.5
        p = self.of_pair[min(i, j) * WORDS + max(i, j)]
        return p if i < j else 1 - p


def _word(text: str) -> int:
    return sum(map(ord, text)) % WORDS


judges = st.builds(
    TableJudge,
    st.lists(scores, min_size=WORDS, max_size=WORDS),
    st.lists(chances, min_size=WORDS**2, max_size=WORDS**2),
)


def pair_up(case: tuple[dict[str, Any], TableJudge, list[list[str]]]) -> None:
    """Pairs obey the judge, hold two texts, add up, and depend on nothing but their own prompt."""
    options, judge, groups = case
    chosen = attempt(PairingSettings, **options)
    if isinstance(chosen, PrefoptError):
        return
    keys = [f"{number}" for number in range(len(groups))]
    asked = [f"prompt {key}" for key in keys]
    judged = attempt(judge_samples, judge, asked, groups, chosen, keys)
    allowed = [attempt(check_samples, chosen, len(group)) is None for group in groups]
    assert isinstance(judged, list) == all(allowed)
    if not isinstance(judged, list):
        return
    backwards = judge_samples(judge, asked[::-1], groups[::-1], chosen, keys[::-1])
    assert judged == backwards[::-1]
    results = []
    for judgement, group, key in zip(judged, groups, keys, strict=True):
        result = make_pairs(judgement, group, chosen, key)
        stored = json.loads(json.dumps([judgement.scores, judgement.matches]))
        again = Judgement(stored[0], [(i, j, p) for i, j, p in stored[1]])
        assert make_pairs(again, group, chosen, key) == result
        check_pairs(result, judgement, group, chosen)
        results.append(result)
    counts = count_pairs(results)
    assert counts.pairs == sum(len(result.pairs) for result in results)


def check_pairs(
    result: PromptPairs, judgement: Judgement, group: list[str], chosen: PairingSettings
) -> None:
    """One prompt's pairs against what the judge said."""
    candidates = len(group) // 2 if chosen.pairing == "independent" else 1
    assert len(result.pairs) + result.ties_dropped + result.identical == candidates
    assert result.ties_kept == sum(pair.p_chosen == 0.5 for pair in result.pairs)
    assert result.ties_kept == 0 or chosen.ties == "keep"
    assert result.ties_dropped == 0 or chosen.ties != "keep"
    assert result.tied == all(pair.p_chosen == 0.5 for pair in result.pairs)
    said = {(i, j): p for i, j, p in judgement.matches}
    said |= {(j, i): 1 - p for (i, j), p in said.items()}
    for pair in result.pairs:
        assert group[pair.chosen] != group[pair.rejected]
        assert 0 <= pair.p_chosen <= 1
        p = said.get((pair.chosen, pair.rejected))
        if chosen.pairing in SCORED_PAIRINGS:
            values = [
                score - chosen.length_penalty * len(text)
                for score, text in zip(judgement.scores, group, strict=True)
            ]
            assert values[pair.chosen] == max(values)
            assert (values[pair.chosen] == values[pair.rejected]) == (
                pair.p_chosen == 0.5 and p in (None, 0.5)
            ) or chosen.soft_labels
            assert chosen.pairing == "best_random" or values[pair.rejected] == min(values)
        elif chosen.pairing == "independent":
            assert {pair.chosen // 2} == {pair.rejected // 2}
            assert p is not None
            assert p >= 0.5
        if p is not None and chosen.soft_labels:
            assert pair.p_chosen == p
        if not chosen.soft_labels:
            assert pair.p_chosen in (0.5, 1.0)


PAIRS = Target(st.tuples(settings, judges, st.lists(prompts, min_size=1, max_size=3)), pair_up)


def pair_up_anything(case: tuple[dict[str, Any], list[str], list[float], list[Any]]) -> None:
    """A judgement of other samples or of other settings makes pairs of these, or is refused."""
    options, group, values, matches = case
    chosen = attempt(PairingSettings, **options)
    if isinstance(chosen, PrefoptError):
        return
    judgement = Judgement(values, matches)
    result = attempt(make_pairs, judgement, group, chosen, "p")
    if isinstance(result, PromptPairs):
        for pair in result.pairs:
            assert group[pair.chosen] != group[pair.rejected]


_index = st.integers(-1, 9)
ANY_JUDGEMENTS = Target(
    st.tuples(
        settings,
        prompts,
        st.lists(scores, max_size=9),
        st.lists(st.tuples(_index, _index, chances), max_size=20),
    ),
    pair_up_anything,
)


def compare(case: tuple[TableJudge, list[str], int]) -> None:
    """Win rates of all against all are in [0, 1] and their mean is one half."""
    judge, group, opponents = case
    opponents = min(opponents, len(group) - 1)
    judged = compare_all(judge, ["p", "q"], [group, group[::-1]], ["p", "q"], opponents=opponents)
    rates = win_rates(judged[0], len(group), opponents=opponents)
    assert len(rates) == len(group) - opponents
    assert all(-1e-12 <= rate <= 1 + 1e-12 for rate in rates)
    if not opponents:
        assert abs(sum(rates) / len(rates) - 0.5) < 1e-12


WIN_RATES = Target(
    st.tuples(judges, st.lists(samples, min_size=2, max_size=8), st.integers(0, 3)), compare
)
