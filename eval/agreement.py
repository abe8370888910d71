"""How far a judge agrees with labels, with itself in the other order, and with another judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

from prefopt.errors import PrefoptError

Verdicts = Sequence[Hashable]


def two_order_accuracy(labels: Verdicts, original: Verdicts, swapped: Verdicts) -> float:
    """Accuracy of a judge that sees each pair in both orders: the mean over the two.

    It is the average accuracy of LLMBar (Zeng et al. 2023, arXiv:2310.07641, section 4).

    Args:
        labels: Shape [pairs], the better answer.
        original: Shape [pairs], the answer the judge names; one it could not be understood on,
            such as None, is never right.
        swapped: Shape [pairs], the same where the answers stood in the other order, named as in
            the first: a judge that always takes the first place has opposite verdicts.

    Returns:
        A fraction in [0, 1].

    Raises:
        PrefoptError: No pairs, or lengths that differ.
    """
    return (_share_equal(labels, original) + _share_equal(labels, swapped)) / 2


def positional_agreement(original: Verdicts, swapped: Verdicts) -> float:
    """Share of pairs on which a judge says the same in both orders, as LLMBar counts it.

    Args:
        original: Shape [pairs], as for `two_order_accuracy`; a pair on which the judge could be
            understood in neither order counts as agreement.
        swapped: Shape [pairs].

    Returns:
        A fraction in [0, 1].

    Raises:
        PrefoptError: No pairs, or lengths that differ.
    """
    return _share_equal(original, swapped)


def cohen_kappa(first: Verdicts, second: Verdicts) -> float:
    """Agreement of two judges beyond chance (Cohen 1960): (p - e) / (1 - e).

    p is the share of equal verdicts and e the share that independent judges with the same
    frequencies of verdicts would have.

    Args:
        first: Shape [items].
        second: Shape [items].

    Returns:
        1 for full agreement, 0 for that of chance; NaN where both always give one and the same
        verdict, so that chance alone would agree fully.

    Raises:
        PrefoptError: No items, or lengths that differ.
    """
    share = _share_equal(first, second)
    theirs = Counter(second)
    chance = sum(count * theirs[verdict] for verdict, count in Counter(first).items())
    chance_share = chance / len(first) ** 2
    return (share - chance_share) / (1 - chance_share) if chance_share < 1 else float("nan")


def _share_equal(a: Verdicts, b: Verdicts) -> float:
    if len(a) != len(b) or not len(a):
        raise PrefoptError(
            f"found {len(a)} and {len(b)} verdicts, expected one of each judge on every pair"
        )
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(a)
