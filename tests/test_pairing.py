"""Pairs from K samples: who meets whom, what the judge is asked, ties, and replay from disk."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from prefopt.data.rows import Prompt
from prefopt.errors import PrefoptError
from prefopt.judge import Judge
from prefopt.rounds.pairing import (
    PAIRINGS,
    TIES,
    Judgement,
    Pair,
    PairingSettings,
    PromptPairs,
    check_samples,
    count_pairs,
    judge_samples,
    make_pairs,
)

COMPARING = ("tournament", "independent")


class ListedJudge:
    """Texts are numbers: the score is the number, P(a beats b) a function of the two scores."""

    def __init__(self, p: Callable[[float, float], float] | None = None) -> None:
        self.p = p or (lambda a, b: 1 / (1 + math.exp(b - a)))
        self.score_calls: list[int] = []
        self.prefer_calls: list[list[tuple[str, str]]] = []

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        assert len(prompts) == len(completions)
        self.score_calls.append(len(prompts))
        return np.array([float(text) for text in completions])

    def prefer(self, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str]) -> np.ndarray:
        assert len(prompts) == len(a) == len(b)
        assert all(x != y for x, y in zip(a, b, strict=True)), "asked about identical texts"
        self.prefer_calls.append(list(zip(a, b, strict=True)))
        return np.array([self.p(float(x), float(y)) for x, y in zip(a, b, strict=True)])


def undecided(a: float, b: float) -> float:
    return 0.5


def certain(a: float, b: float) -> float:
    return 0.5 + 0.5 * ((a > b) - (a < b))


def texts(*numbers: float) -> list[str]:
    return [str(number) for number in numbers]


def judged(judge: Judge, samples: Sequence[str], settings: PairingSettings) -> Judgement:
    [judgement] = judge_samples(judge, ["prompt"], [samples], settings, ["key"])
    return judgement


def pairs_of(
    samples: Sequence[str], judge: Judge | None = None, key: str = "key", **settings: Any
) -> PromptPairs:
    chosen = PairingSettings(**settings)
    [judgement] = judge_samples(judge or ListedJudge(), ["prompt"], [samples], chosen, [key])
    return make_pairs(judgement, samples, chosen, key)


def from_scores(scores: list[float], samples: Sequence[str], **settings: Any) -> PromptPairs:
    return make_pairs(Judgement(scores, []), samples, PairingSettings(**settings), "key")


# Best against worst, best against random


def test_best_against_worst() -> None:
    assert pairs_of(texts(1, 3, 2, 0)).pairs == [Pair(1, 3, 1.0)]


def test_of_equal_scores_the_first_is_best_and_the_last_is_worst() -> None:
    found = from_scores([2, 0, 2, 0], ["a", "b", "c", "d"])
    assert found.pairs == [Pair(0, 3, 1.0)]


def test_the_penalised_order_decides_both_the_pair_and_its_direction() -> None:
    # raw: the long answer wins 2 to 1.5; penalised by .1 a character: 2 - 1 = 1 against 1.5 - .2
    samples = ["x" * 10, "yy"]
    assert from_scores([2.0, 1.5], samples).pairs == [Pair(0, 1, 1.0)]
    assert from_scores([2.0, 1.5], samples, length_penalty=0.1).pairs == [Pair(1, 0, 1.0)]


def test_a_penalty_can_make_a_tie() -> None:
    found = from_scores([2.0, 1.0], ["xxxx", "yy"], length_penalty=0.5)
    assert (found.pairs, found.ties_dropped) == ([], 1)


def test_best_against_a_uniformly_random_other() -> None:
    samples = texts(1, 3, 2, 0)
    drawn = Counter(
        pair.rejected
        for n in range(3000)
        for pair in make_pairs(
            Judgement([1, 3, 2, 0], []), samples, PairingSettings("best_random"), f"prompt-{n}"
        ).pairs
    )
    assert set(drawn) == {0, 2, 3}
    # 1000 each, standard deviation sqrt(3000 * 1/3 * 2/3) = 26: five of them
    assert all(abs(count - 1000) < 130 for count in drawn.values())


def test_the_random_other_depends_on_the_key_alone() -> None:
    # values of random.Random(key), fixed so that another process or machine cannot differ
    samples = texts(1, 3, 2, 0)
    drawn = [
        pairs_of(samples, key=f"prompt-{n}", pairing="best_random").pairs[0].rejected
        for n in range(8)
    ]
    assert drawn == [3, 2, 3, 2, 2, 3, 2, 0]


@pytest.mark.parametrize("pairing", ["best_worst", "best_random"])
def test_soft_labels_of_scored_pairs_are_asked_once_and_stored(pairing: str) -> None:
    judge = ListedJudge()
    settings = PairingSettings(pairing, soft_labels=True)
    samples = [texts(1, 3, 2, 0), texts(5, 5.5)]
    judgements = judge_samples(judge, ["p", "q"], samples, settings, ["0", "1"])
    assert judge.score_calls == [6]
    assert [len(call) for call in judge.prefer_calls] == [2]
    [pair] = make_pairs(judgements[1], samples[1], settings, "1").pairs
    assert judgements[1].matches == [(1, 0, pair.p_chosen)]
    assert pair == Pair(1, 0, pytest.approx(1 / (1 + math.exp(-0.5))))


def test_a_judge_that_contradicts_its_scores_gives_a_label_below_one_half() -> None:
    [pair] = pairs_of(texts(1, 3), ListedJudge(lambda a, b: 0.3), soft_labels=True).pairs
    assert pair == Pair(1, 0, 0.3)


# Tournament


def test_eight_samples_play_ten_matches_in_three_calls_over_all_prompts() -> None:
    judge = ListedJudge()
    rng = np.random.default_rng(0)
    samples = [texts(*rng.permutation(8).tolist()) for _ in range(50)]
    keys = [str(n) for n in range(50)]
    settings = PairingSettings("tournament")
    judgements = judge_samples(judge, ["p"] * 50, samples, settings, keys)
    assert [len(call) for call in judge.prefer_calls] == [50 * 4, 50 * 4, 50 * 2]
    assert judge.score_calls == []
    assert all(len(judgement.matches) == 10 for judgement in judgements)


@pytest.mark.parametrize("count", [2, 4, 6, 8, 10, 12, 16])
def test_a_transitive_judge_finds_the_best_and_the_worst(count: int) -> None:
    rng = np.random.default_rng(count)
    for _ in range(20):
        numbers = rng.permutation(count).tolist()
        judge, settings = ListedJudge(certain), PairingSettings("tournament")
        judgement = judged(judge, texts(*numbers), settings)
        assert len(judgement.matches) == max(1, 3 * count // 2 - 2)
        [pair] = make_pairs(judgement, texts(*numbers), settings, "key").pairs
        assert (numbers[pair.chosen], numbers[pair.rejected]) == (count - 1, 0)


def test_a_bye_goes_on_without_a_match() -> None:
    # (0,1), (2,3), (4,5); winners 1, 3, 5: 1-3 meets, 5 waits; losers 0, 2, 4: 0-2 meets, 4 waits
    judgement = judged(ListedJudge(certain), texts(0, 1, 2, 3, 4, 5), PairingSettings("tournament"))
    played = [(i, j) for i, j, _ in judgement.matches]
    assert played == [(0, 1), (2, 3), (4, 5), (1, 3), (0, 2), (3, 5), (0, 4)]


def test_an_even_match_is_won_by_the_lower_index() -> None:
    # 0-1 and 2-3 are even, so 0 and 2 go for best, 1 and 3 for worst; 1 is clearly below 3
    def p(a: float, b: float) -> float:
        return {(1, 3): 0.1, (0, 2): 0.9}.get((a, b), 0.5)

    found = pairs_of(texts(0, 1, 2, 3), ListedJudge(p), pairing="tournament", ties="keep")
    assert found.pairs == [Pair(0, 1, 0.5)]


def test_the_label_of_samples_that_met_is_that_match() -> None:
    judge = ListedJudge()
    settings = PairingSettings("tournament", soft_labels=True)
    samples = texts(0, 3, 1, 2)  # best and worst are neighbours, the better one second
    judgement = judged(judge, samples, settings)
    assert len(judgement.matches) == 4
    [pair] = make_pairs(judgement, samples, settings, "key").pairs
    assert pair == Pair(1, 0, pytest.approx(1 / (1 + math.exp(-3))))


def test_the_label_of_samples_that_never_met_is_one_more_match() -> None:
    judge = ListedJudge()
    soft, hard = PairingSettings("tournament", soft_labels=True), PairingSettings("tournament")
    samples = [texts(0, 1, 3, 2), texts(0, 3, 1, 2)]  # 0 and 3 meet in the second prompt only
    judgements = judge_samples(judge, ["p", "q"], samples, soft, ["0", "1"])
    assert [len(judgement.matches) for judgement in judgements] == [5, 4]
    assert judge.prefer_calls[-1] == [("3", "0")]
    [pair] = make_pairs(judgements[0], samples[0], soft, "0").pairs
    assert pair == Pair(2, 0, pytest.approx(1 / (1 + math.exp(-3))))
    unasked = judged(ListedJudge(), samples[0], hard)
    assert len(unasked.matches) == 4
    assert make_pairs(unasked, samples[0], hard, "0").pairs == [Pair(2, 0, 1.0)]


def test_an_intransitive_judge_still_gives_two_samples() -> None:
    # 0 beats 1 beats 2 beats 3 beats 0 and so on around the circle of eight
    def circle(a: float, b: float) -> float:
        return 1.0 if (b - a) % 8 < 4 or ((b - a) % 8 == 4 and a < b) else 0.0

    [pair] = pairs_of(texts(*range(8)), ListedJudge(circle), pairing="tournament").pairs
    assert pair.chosen != pair.rejected


# Independent pairs


def test_independent_pairs_are_neighbours_turned_to_the_winner() -> None:
    samples = texts(0, 1, 5, 2)
    hard = pairs_of(samples, pairing="independent").pairs
    assert hard == [Pair(1, 0, 1.0), Pair(2, 3, 1.0)]
    soft = pairs_of(samples, pairing="independent", soft_labels=True).pairs
    sigmoid = [1 / (1 + math.exp(-difference)) for difference in (1, 3)]
    assert [(pair.chosen, pair.rejected) for pair in soft] == [(1, 0), (2, 3)]
    assert [pair.p_chosen for pair in soft] == pytest.approx(sigmoid)


def test_independent_pairs_take_one_call() -> None:
    judge = ListedJudge()
    samples = [texts(0, 1, 2, 3), texts(4, 5)]
    judge_samples(judge, ["p", "q"], samples, PairingSettings("independent"), ["0", "1"])
    assert [len(call) for call in judge.prefer_calls] == [3]
    assert judge.score_calls == []


# Ties and identical texts


@pytest.mark.parametrize("soft_labels", [False, True])
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_a_judge_that_cannot_tell(pairing: str, ties: str, soft_labels: bool) -> None:
    samples = ["0", "00", "0.0", "-0"]  # different texts of equal scores
    settings = PairingSettings(pairing, ties=ties, soft_labels=soft_labels)
    found = make_pairs(judged(ListedJudge(undecided), samples, settings), samples, settings, "key")
    count = 2 if pairing == "independent" else 1
    kept = count if ties == "keep" else 0
    assert [pair.p_chosen for pair in found.pairs] == [0.5] * kept
    assert (found.ties_kept, found.ties_dropped) == (kept, count - kept)
    assert found.identical == 0
    assert found.tied


@pytest.mark.parametrize("soft_labels", [False, True])
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_identical_texts_never_make_a_pair(pairing: str, ties: str, soft_labels: bool) -> None:
    judge = ListedJudge()
    settings = PairingSettings(pairing, ties=ties, soft_labels=soft_labels)
    samples = texts(7, 7, 7, 7)
    found = make_pairs(judged(judge, samples, settings), samples, settings, "key")
    assert found == PromptPairs([], 0, 0, 2 if pairing == "independent" else 1, tied=True)
    assert judge.prefer_calls == []


def test_identical_texts_keep_their_scores() -> None:
    assert judged(ListedJudge(), texts(7, 7, 8), PairingSettings()).scores == [7, 7, 8]


def test_identical_texts_that_were_scored_apart_make_no_pair() -> None:
    found = from_scores([1.0, 2.0], ["same", "same"], ties="keep")
    assert (found.pairs, found.identical) == ([], 1)


def test_a_tournament_goes_on_past_identical_texts() -> None:
    # 0-1 and 2-3 are identical and even: 0 and 2 go for best, 1 and 3 for worst
    [pair] = pairs_of(texts(5, 5, 1, 1), pairing="tournament").pairs
    assert pair == Pair(0, 3, 1.0)


def test_one_decided_pair_is_enough_not_to_be_tied() -> None:
    samples = texts(1, 1, 2, 2.5, 4, 4.5)
    judge = ListedJudge(lambda a, b: 0.5 if a == 2 else 0.2)
    found = pairs_of(samples, judge, pairing="independent", ties="resample")
    assert found == PromptPairs([Pair(5, 4, 1.0)], 1, 0, 1, tied=False)
    kept = pairs_of(samples, judge, pairing="independent", ties="keep")
    assert kept == PromptPairs([Pair(2, 3, 0.5), Pair(5, 4, 1.0)], 0, 1, 1, tied=False)


def test_counts_add_up_over_prompts() -> None:
    found = [
        PromptPairs([Pair(0, 1, 0.5)], 0, 1, 0, tied=True),
        PromptPairs([Pair(0, 1, 1.0), Pair(3, 2, 1.0)], 1, 0, 3, tied=False),
    ]
    counts = count_pairs(iter(found))
    assert asdict(counts) == {"pairs": 3, "ties_dropped": 1, "ties_kept": 1, "identical": 3}


# Every pairing


@pytest.mark.parametrize("soft_labels", [False, True])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_a_prompt_does_not_see_the_others(pairing: str, soft_labels: bool) -> None:
    rng = np.random.default_rng(1)
    settings = PairingSettings(pairing, soft_labels=soft_labels)
    samples = [texts(*rng.integers(0, 6, size=count).tolist()) for count in (8, 2, 6, 4, 8)]
    keys = [f"key {n}" for n in range(5)]
    prompts = [f"prompt {n}" for n in range(5)]
    together = judge_samples(ListedJudge(), prompts, samples, settings, keys)
    for n in range(5):
        alone = judge_samples(ListedJudge(), [prompts[n]], [samples[n]], settings, [keys[n]])
        assert alone == [together[n]]


@pytest.mark.parametrize("soft_labels", [False, True])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_pairs_can_be_made_from_what_was_stored(pairing: str, soft_labels: bool) -> None:
    samples = texts(0.1, 3, 2, 5, 5, 1.7, 4, 0.3)
    settings = PairingSettings(pairing, soft_labels=soft_labels)
    judgement = judged(ListedJudge(), samples, settings)
    stored = Judgement(**json.loads(json.dumps(asdict(judgement))))
    rebuilt = make_pairs(stored, samples, settings, "key")
    assert rebuilt == make_pairs(judgement, samples, settings, "key")
    assert rebuilt.pairs
    assert all(type(pair.p_chosen) is float for pair in rebuilt.pairs)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_no_prompts_no_questions(pairing: str) -> None:
    judge = ListedJudge()
    assert judge_samples(judge, [], [], PairingSettings(pairing), []) == []
    assert judge.score_calls == judge.prefer_calls == []


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_an_answer_that_is_no_number_names_the_prompt(pairing: str, score: float) -> None:
    samples = [texts(0, 1), ["2", str(score)]]
    judge = ListedJudge(lambda a, b: 0.5 if a + b < 2 else score)
    with pytest.raises(PrefoptError, match=f"prompt 'second': found .*{score}") as error:
        judge_samples(judge, ["p", "q"], samples, PairingSettings(pairing), ["first", "second"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("judgement", "settings"),
    [
        (Judgement([], []), {}),
        (Judgement([1, 2, 3], []), {}),
        (Judgement([1, 2], []), {"soft_labels": True}),
        (Judgement([1, 2], []), {"pairing": "tournament"}),
        (Judgement([], [(0, 2, 0.7)]), {"pairing": "independent"}),
    ],
)
def test_a_judgement_of_something_else_is_refused(
    judgement: Judgement, settings: dict[str, Any]
) -> None:
    with pytest.raises(PrefoptError, match=r"prompt 'key': found a judgement of .*judge it again"):
        make_pairs(judgement, ["a", "b"], PairingSettings(**settings), "key")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairing": "max_min"}, "pairing: found 'max_min', expected one of best_worst, best_rand"),
        ({"ties": "random"}, "ties: found 'random', expected one of drop, keep, resample"),
        ({"length_penalty": -0.1}, "length_penalty: found -0.1, expected a score per character"),
        ({"length_penalty": math.nan}, "length_penalty: found nan"),
        ({"length_penalty": 0.1, "pairing": "tournament"}, "pairing=best_worst or best_random"),
        ({"length_penalty": 0.1, "pairing": "independent"}, "pairing=best_worst or best_random"),
        ({"length_penalty": 0.1, "soft_labels": True}, "soft_labels=true, .* could contradict"),
    ],
)
def test_settings_without_meaning_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PrefoptError, match=message):
        PairingSettings(**settings)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_numbers_of_samples_that_cannot_be_paired_are_refused(pairing: str) -> None:
    settings = PairingSettings(pairing)
    with pytest.raises(PrefoptError, match=f"found 1 with pairing={pairing}, expected at least 2"):
        check_samples(settings, 1)
    check_samples(settings, 2)
    if pairing in COMPARING:
        with pytest.raises(PrefoptError, match=f"found 5 with pairing={pairing}, .*even number"):
            judge_samples(ListedJudge(), ["p"], [texts(1, 2, 3, 4, 5)], settings, ["key"])
    else:
        assert len(pairs_of(texts(1, 2, 3, 4, 5), pairing=pairing).pairs) == 1


def test_a_tie_is_not_lost_as_a_copy_of_the_best() -> None:
    settings = PairingSettings(ties="keep")
    result = make_pairs(Judgement([1.0, 1.0, 1.0], []), ["x", "y", "x"], settings, "key")
    assert result.pairs == [Pair(0, 1, 0.5)]
    assert (result.ties_kept, result.identical) == (1, 0)


def test_a_prompt_that_occurs_twice_is_judged_each_time_by_itself() -> None:
    class Relative:
        """Scores within the call, as a preference model does."""

        def score(self, prompts: Sequence[Any], completions: Sequence[str]) -> np.ndarray:
            groups = {
                p: [c for q, c in zip(prompts, completions, strict=True) if p == q] for p in prompts
            }
            return np.array(
                [
                    sum(len(c) > len(other) for other in groups[p])
                    for p, c in zip(prompts, completions, strict=True)
                ]
            )

    samples = [["a", "bb"], ["ccc", "dddd"], ["a", "bb"]]
    found = judge_samples(Relative(), ["p", "p", "q"], samples, PairingSettings(), ["1", "2", "3"])
    assert [judgement.scores for judgement in found] == [[0.0, 1.0]] * 3
