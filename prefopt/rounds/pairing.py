"""How the K samples of a prompt become preference pairs.

Asking and pairing are two steps. ``judge_samples`` asks the judge, in few calls over all prompts,
and returns everything it said; ``make_pairs`` is a pure function of that and of the texts, so that
pairs can be made anew from what is stored on disk, without the judge.

- ``best_worst``: highest against lowest score (Dong et al., RLHF Workflow, arXiv 2405.07863,
  Algorithm 2). Of equal scores the first is the best and the last the worst, if its text is
  another.
- ``best_random``: highest score against another sample, drawn uniformly.
- ``tournament``: neighbours meet; the winners play a knock-out for the best, the losers for the
  worst. Of an odd number in a round the last goes on without a match; at P = 1/2 the lower index
  wins. K samples play 3K/2 - 2 matches, 10 for K = 8.
- ``independent``: samples 0 and 1, 2 and 3, and so on: the pair of i.i.d. answers that the theory
  of INPO (arXiv 2407.00617) and online IPO asks for.

Two answers of the same text are never asked about (P = 1/2 by definition) and never make a pair:
the loss would have no gradient.
"""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass

from prefopt.data.rows import Prompt
from prefopt.errors import PrefoptError
from prefopt.judge import Judge
from prefopt.rounds.judging import Judgement, Match, compare_samples, score_samples

PAIRINGS = ("best_worst", "best_random", "tournament", "independent")
TIES = ("drop", "keep", "resample")
SCORED_PAIRINGS = ("best_worst", "best_random")  # the others only compare

# Two samples and P(first beats second); the first is to be the chosen one.
_Candidate = tuple[int, int, float]
# A pairing yields matches stage by stage, is sent P(first beats second) of each, and returns
# its candidates.
_Play = Generator[list[Match], list[float], list[_Candidate]]


@dataclass(frozen=True)
class PairingSettings:
    """How pairs are made.

    Attributes:
        pairing: One of ``PAIRINGS``.
        length_penalty: Score per character, subtracted from the scores before best and worst are
            looked for, so that it decides which pair and which side is chosen. Only where samples
            are scored, and only with hard labels: a soft label is of the unpenalised judge and
            could contradict the order.
        ties: What becomes of a pair the judge is undecided about: "drop" it, "keep" it with
            ``p_chosen`` 1/2, or "resample", which drops it and tells the caller, by
            ``PromptPairs.tied``, where new samples are called for.
        soft_labels: Whether ``p_chosen`` is the judge's P(chosen beats rejected) instead of 1.

    Raises:
        PrefoptError: An unknown name, or settings that have no meaning together.
    """

    pairing: str = "best_worst"
    length_penalty: float = 0.0
    ties: str = "drop"
    soft_labels: bool = False

    def __post_init__(self) -> None:
        for field, value, known in (
            ("pairing", self.pairing, PAIRINGS),
            ("ties", self.ties, TIES),
        ):
            if value not in known:
                raise PrefoptError(f"{field}: found {value!r}, expected one of {', '.join(known)}")
        found = f"length_penalty: found {self.length_penalty}"
        if not 0 <= self.length_penalty < math.inf:
            raise PrefoptError(f"{found}, expected a score per character of 0 or more")
        if self.length_penalty and self.pairing not in SCORED_PAIRINGS:
            raise PrefoptError(
                f"{found} with pairing={self.pairing}, which compares and has no scores to "
                f"subtract from; set it to 0 or use pairing={' or '.join(SCORED_PAIRINGS)}"
            )
        if self.length_penalty and self.soft_labels:
            raise PrefoptError(
                f"{found} with soft_labels=true, which are P of the unpenalised judge and could "
                "contradict the penalised order; set one of the two to 0 or false"
            )


@dataclass(frozen=True)
class Pair:
    """Two samples of a prompt, by index, and the label: the probability that it is right."""

    chosen: int
    rejected: int
    p_chosen: float


@dataclass(frozen=True)
class PromptPairs:
    """The pairs of one prompt.

    Attributes:
        pairs: The pairs to train on, kept ties among them.
        ties_dropped: Undecided pairs left out.
        ties_kept: Undecided pairs in ``pairs``.
        identical: Pairs left out because both samples are the same text.
        tied: Whether the prompt gave no decided pair, only ties and identical texts. With
            ``ties="resample"`` the caller draws new samples then; if it gives up, the counts stand.
    """

    pairs: list[Pair]
    ties_dropped: int
    ties_kept: int
    identical: int
    tied: bool


@dataclass(frozen=True)
class PairingCounts:
    """What became of the candidate pairs of many prompts; ``pairs`` includes ``ties_kept``."""

    pairs: int
    ties_dropped: int
    ties_kept: int
    identical: int


def check_samples(settings: PairingSettings, samples_per_prompt: int) -> None:
    """Checks that so many samples a prompt can be paired.

    Raises:
        PrefoptError: Fewer than two, or an odd number where every sample needs a neighbour.
    """
    found = f"samples_per_prompt: found {samples_per_prompt} with pairing={settings.pairing}"
    if samples_per_prompt < 2:
        raise PrefoptError(f"{found}, expected at least 2 to make a pair of")
    if samples_per_prompt % 2 and settings.pairing not in SCORED_PAIRINGS:
        raise PrefoptError(f"{found}, which pairs up neighbours; expected an even number")


def judge_samples(
    judge: Judge,
    prompts: Sequence[Prompt],
    samples: Sequence[Sequence[str]],
    settings: PairingSettings,
    keys: Sequence[str],
) -> list[Judgement]:
    """Asks a judge what a pairing needs to know, in as few calls as there are questions.

    ``best_worst`` and ``best_random`` take one ``score`` call (one more where a prompt occurs
    twice), and one ``prefer`` call with soft labels; ``independent`` takes one ``prefer`` call; a
    tournament one a stage, 3 for K = 8, and with soft labels one more where best and worst have
    not met.

    Args:
        judge: The judge.
        prompts: [prompts].
        samples: The texts of each prompt's samples; as many as ``check_samples`` allows.
        settings: How pairs will be made.
        keys: A name for each prompt: the seed of its random choice, and its name in errors.

    Returns:
        One judgement a prompt. It does not depend on the other prompts of the call.

    Raises:
        PrefoptError: Too few samples; a score that is not finite; a P outside [0, 1].
    """
    for texts in samples:
        check_samples(settings, len(texts))
    scores: list[list[float]] = [[] for _ in samples]
    if settings.pairing in SCORED_PAIRINGS:
        scores = score_samples(judge, prompts, samples, keys)
    known: list[dict[Match, float]] = [{} for _ in samples]
    judged = list(zip(scores, samples, keys, known, strict=True))
    while open_matches := [
        (n, i, j) for n, prompt in enumerate(judged) for i, j in _replay(settings, *prompt)[0]
    ]:
        answers = compare_samples(judge, prompts, samples, keys, open_matches)
        for (n, i, j), p in zip(open_matches, answers, strict=True):
            known[n][i, j] = p
    return [
        Judgement(values, [(i, j, p) for (i, j), p in played.items()])
        for values, played in zip(scores, known, strict=True)
    ]


def make_pairs(
    judgement: Judgement, samples: Sequence[str], settings: PairingSettings, key: str
) -> PromptPairs:
    """The pairs of one prompt; the same on every machine and in every process.

    A pair is a tie if the penalised scores are equal, if P(chosen beats rejected) is known to be
    exactly 1/2, or, in a tournament with hard labels whose best and worst never met, if every
    match was. In ``independent`` pairs the chosen sample is the one with P above 1/2; elsewhere it
    is the best by the order, and a soft label below 1/2 says that the judge contradicts itself.

    Args:
        judgement: What ``judge_samples`` returned for this prompt, with the same settings.
        samples: The texts of the samples.
        settings: How to make pairs.
        key: The prompt's key, as given to ``judge_samples``.

    Raises:
        PrefoptError: The judgement is of other settings or of other samples.
    """
    check_samples(settings, len(samples))
    known = {(i, j): p for i, j, p in judgement.matches}
    mismatch = PrefoptError(
        f"prompt {key!r}: found a judgement of {len(judgement.scores)} scores and {len(known)} "
        f"matches, which does not decide {settings} on {len(samples)} samples; judge it again"
    )
    if settings.pairing in SCORED_PAIRINGS and len(judgement.scores) != len(samples):
        raise mismatch
    missing, candidates = _replay(settings, judgement.scores, samples, key, known)
    if missing:
        raise mismatch
    different = [pair for pair in candidates if samples[pair[0]] != samples[pair[1]]]
    decided = [pair for pair in different if pair[2] != 0.5]
    kept = different if settings.ties == "keep" else decided
    hard = not settings.soft_labels
    return PromptPairs(
        pairs=[Pair(i, j, 1.0 if hard and p != 0.5 else p) for i, j, p in kept],
        ties_dropped=len(different) - len(kept),
        ties_kept=len(kept) - len(decided),
        identical=len(candidates) - len(different),
        tied=not decided,
    )


def count_pairs(results: Iterable[PromptPairs]) -> PairingCounts:
    """The counts of many prompts, added up."""
    found = list(results)
    return PairingCounts(
        pairs=sum(len(result.pairs) for result in found),
        ties_dropped=sum(result.ties_dropped for result in found),
        ties_kept=sum(result.ties_kept for result in found),
        identical=sum(result.identical for result in found),
    )


def _replay(
    settings: PairingSettings,
    scores: Sequence[float],
    texts: Sequence[str],
    key: str,
    known: Mapping[Match, float],
) -> tuple[list[Match], list[_Candidate]]:
    """Plays a pairing on known answers: the matches of the first stage that lacks some, or none
    and the candidates.
    """
    if settings.pairing == "tournament":
        play = _tournament(len(texts), settings.soft_labels)
    elif settings.pairing == "independent":
        play = _independent(len(texts))
    else:
        play = _scored(settings, scores, texts, key)
    try:
        stage = next(play)
        while True:
            different = [(i, j) for i, j in stage if texts[i] != texts[j]]
            if missing := [match for match in different if match not in known]:
                return missing, []
            stage = play.send([known[m] if m in different else 0.5 for m in stage])
    except StopIteration as end:
        return [], end.value


def _scored(
    settings: PairingSettings, scores: Sequence[float], texts: Sequence[str], key: str
) -> _Play:
    penalised = [
        score - settings.length_penalty * len(text)
        for score, text in zip(scores, texts, strict=True)
    ]
    indices = range(len(texts))
    best = max(indices, key=penalised.__getitem__)
    if settings.pairing == "best_worst":
        # of equal scores one of another text: a tie must not be lost as a copy of the best
        other = min(reversed(indices), key=lambda n: (penalised[n], texts[n] == texts[best]))
    else:
        other = random.Random(key).choice([n for n in indices if n != best])
    p = 1.0
    if penalised[best] == penalised[other]:
        p = 0.5
    elif settings.soft_labels:
        [p] = yield [(best, other)]
    return [(best, other, p)]


def _independent(count: int) -> _Play:
    stage = _neighbours(range(count))
    answers = yield stage
    return [
        (i, j, p) if p >= 0.5 else (j, i, 1 - p) for (i, j), p in zip(stage, answers, strict=True)
    ]


def _tournament(count: int, soft_labels: bool) -> _Play:
    first = _neighbours(range(count))
    answers = yield first
    met = dict(zip(first, answers, strict=True))
    winners = [i if p >= 0.5 else j for (i, j), p in met.items()]
    losers = [j if p >= 0.5 else i for (i, j), p in met.items()]
    undecided = all(p == 0.5 for p in answers)
    while len(winners) > 1:
        top, bottom = _neighbours(winners), _neighbours(losers)
        answers = yield top + bottom
        undecided = undecided and all(p == 0.5 for p in answers)
        matches = list(zip(top + bottom, answers, strict=True))
        byes = slice(2 * len(top), None)
        winners = [i if p >= 0.5 else j for (i, j), p in matches[: len(top)]] + winners[byes]
        losers = [j if p >= 0.5 else i for (i, j), p in matches[len(top) :]] + losers[byes]
    best, worst = winners[0], losers[0]
    if (best, worst) in met:
        p = met[best, worst]
    elif (worst, best) in met:
        p = 1 - met[worst, best]
    elif soft_labels:
        [p] = yield [(best, worst)]
    else:
        p = 0.5 if undecided else 1.0
    return [(best, worst, p)]


def _neighbours(field: Sequence[int]) -> list[Match]:
    """First against second and so on; the last of an odd number goes without."""
    return list(zip(field[::2], field[1::2], strict=False))
