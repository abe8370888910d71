"""The gold rule: the true quality of an answer, recomputed from the text alone.

Quality lies in [0, 1]. With ``given`` the items found in the answer and ``needed`` those of the
right answer, ``matched`` the places where both have the same item:

    value   = 0.4 correct + 0.3 complete + 0.3 polite
    quality = value * concise                       (0 when no item is given)

    correct  = matched / number given
    complete = matched / number needed
    polite   = 0 if rude, else 1/3, + 1/3 for a polite opening, + 1/3 for a polite closing
    concise  = max(0, 1 - waste / 24)

``waste`` counts tokens: fillers, stray words and punctuation, repeated phrases and items beyond the
number needed. So a perfect answer scores 1, a right but plain one 0.8, a right but rude one 0.7, a
polite one without any right item 0.3; each filler (4 to 6 tokens) takes about a fifth away, and
text that rambles on scores 0. Longer is never better, except for the two courtesies.

In the intransitive setting the manner is not better or worse but a matter of three styles, of which
each beats the next in a circle, as in rock-paper-scissors (see `gold_preference`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from prefopt.data.rows import Message
from prefopt.world.grammar import PHRASES, right_answer

WEIGHTS = {"correct": 0.4, "complete": 0.3, "polite": 0.3}
WASTE_LIMIT = 24
TEMPERATURE = 0.1
STYLES = ("plain", "chatty", "courteous")  # each beats the next, the last beats the first
STYLE_MARGIN = 0.3

_PHRASES = {
    tuple(phrase.split()): label for label, phrases in PHRASES.items() for phrase in phrases
}
_LONGEST = max(map(len, _PHRASES))


@dataclass(frozen=True)
class Answer:
    """What an answer says and how.

    Attributes:
        items: The words given as the answer, in order.
        labels: The kinds of phrases found, ``"polite opening"`` for instance.
        filler: Tokens of fillers, each counted the first time it is said.
        stray: Tokens that belong nowhere: loose words and punctuation, repeated or misplaced
            phrases.
    """

    items: tuple[str, ...]
    labels: frozenset[str]
    filler: int
    stray: int

    @property
    def well_formed(self) -> bool:
        """Whether the answer follows the grammar: items and whole phrases in their places."""
        return bool(self.items) and self.stray == 0

    @property
    def style(self) -> str:
        """One of `STYLES`: chatty with any filler, else courteous with any courtesy, else plain."""
        if self.filler:
            return "chatty"
        return "courteous" if self.labels & {"polite opening", "polite closing"} else "plain"


def parse_answer(text: str) -> Answer:
    """Takes an answer apart; any text can be parsed.

    The items are the first run of words outside all phrases, closed by a full stop. There is room
    for one opening before them and one closing after them; whatever else is said is stray.
    """
    items: list[str] = []
    labels: set[str] = set()
    said: set[str] = set()
    filler = stray = 0
    ended = False
    for label, words in _segments(text.split()):
        if not label:
            if words[0].isalnum() and not ended:
                items.append(words[0])
            elif words[0] == "." and items and not ended:
                ended = True
            else:
                stray += 1
            continue
        stray += bool(items) and not ended  # the full stop is missing
        ended = bool(items)
        slot = " ".join(words) if label == "filler" else label.split()[1]
        fits = slot not in said and slot != ("opening" if ended else "closing")
        said.add(slot)
        if fits and label == "filler":
            filler += len(words)
        elif not fits:
            stray += len(words)
        if fits or label.startswith("rude"):
            labels.add(label)
    stray += bool(items) and not ended
    return Answer(tuple(items), frozenset(labels), filler, stray)


def _segments(tokens: list[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Splits into whole phrases, each with its label, and single loose tokens, labelled ""."""
    place = 0
    while place < len(tokens):
        sizes = range(min(_LONGEST, len(tokens) - place), 1, -1)
        phrases = (tuple(tokens[place : place + size]) for size in sizes)
        words = next((p for p in phrases if p in _PHRASES), (tokens[place],))
        yield _PHRASES.get(words, ""), words
        place += len(words)


def gold_quality(prompt_messages: list[Message], answer_text: str) -> float:
    """The true quality of an answer, in [0, 1]; the module's docstring states the rule.

    Args:
        prompt_messages: A prompt of this world; its last turn is the user's.
        answer_text: Any text.

    Raises:
        PrefoptError: The messages are not a prompt of this world.
    """
    answer = parse_answer(answer_text)
    rude, courtesies = _manner(answer)
    polite = 0.0 if rude else (1 + courtesies) / 3
    return _quality(prompt_messages, answer, polite, answer.filler + answer.stray)


def gold_preference(
    prompt_messages: list[Message], a: str, b: str, *, intransitive: bool = False
) -> float:
    """The probability that the simulated annotator prefers answer ``a`` to answer ``b``.

    Bradley-Terry: ``sigmoid((quality(a) - quality(b)) / TEMPERATURE)``. In the intransitive setting
    quality knows only rude (0) and not rude (1), fillers cost nothing when said once, and
    between answers of different styles ``STYLE_MARGIN`` is added in a circle: plain beats chatty,
    chatty beats courteous, courteous beats plain. Rude answers and answers without items have no
    style. Always ``P(a, b) + P(b, a) == 1``, exactly.

    Raises:
        PrefoptError: The messages are not a prompt of this world.
    """
    if intransitive:
        margin = _circular_margin(prompt_messages, parse_answer(a), parse_answer(b))
    else:
        margin = gold_quality(prompt_messages, a) - gold_quality(prompt_messages, b)
    favoured = 1 / (1 + math.exp(-abs(margin) / TEMPERATURE))
    return favoured if margin >= 0 else 1 - favoured


def ideal_answer(prompt_messages: list[Message], style: str) -> str:
    """The right answer in one of `STYLES`: the strongest answers of the intransitive setting.

    Raises:
        PrefoptError: The messages are not a prompt of this world.
    """
    items = " ".join(right_answer(prompt_messages)) + " ."
    opening, closing, filler = (
        PHRASES[kind][0] for kind in ("polite opening", "polite closing", "filler")
    )
    return {
        "plain": items,
        "chatty": f"{filler} {items}",
        "courteous": f"{opening} {items} {closing}",
    }[style]


def _quality(prompt: list[Message], answer: Answer, polite: float, waste: int) -> float:
    needed = right_answer(prompt)
    given = answer.items
    if not given:
        return 0.0
    matched = sum(x == y for x, y in zip(given, needed, strict=False))
    value = (
        WEIGHTS["correct"] * matched / len(given)
        + WEIGHTS["complete"] * matched / len(needed)
        + WEIGHTS["polite"] * polite
    )
    waste += max(0, len(given) - len(needed))
    return value * max(0.0, 1 - waste / WASTE_LIMIT)


def _manner(answer: Answer) -> tuple[bool, int]:
    """Whether the answer is rude, and its number of courtesies."""
    rude = any(label.startswith("rude") for label in answer.labels)
    return rude, sum(label.startswith("polite") for label in answer.labels)


def _circular_margin(prompt: list[Message], a: Answer, b: Answer) -> float:
    rude_a, rude_b = _manner(a)[0], _manner(b)[0]
    margin = _quality(prompt, a, 1.0 - rude_a, a.stray) - _quality(prompt, b, 1.0 - rude_b, b.stray)
    if rude_a or rude_b or not (a.items and b.items):
        return margin
    step = (STYLES.index(b.style) - STYLES.index(a.style)) % 3
    return margin + (0.0, STYLE_MARGIN, -STYLE_MARGIN)[step]
