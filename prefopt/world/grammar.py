"""The chat tasks of the generated world and the answers that demonstrators write to them.

A prompt asks for a short list of items ("please name the sound of each : cow dog") that has exactly
one right answer ("moo woof"). Answers differ in independent factors: items may be wrong or missing,
the manner may be polite, plain or rude, and filler may pad the text. All text is lower-case words
and punctuation separated by single spaces, so that words and tokens are the same thing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from prefopt.data.rows import Message
from prefopt.errors import PrefoptError

SOUNDS = {
    "cow": "moo", "dog": "woof", "cat": "meow", "duck": "quack", "sheep": "baa", "pig": "oink",
    "horse": "neigh", "lion": "roar", "bee": "buzz", "snake": "hiss", "owl": "hoot",
    "frog": "croak",
}  # fmt: skip
COLOURS = {
    "snow": "white", "milk": "white", "grass": "green", "leaf": "green", "lemon": "yellow",
    "banana": "yellow", "coal": "black", "night": "black", "tomato": "red", "cherry": "red",
    "sky": "blue", "sea": "blue", "carrot": "orange", "pumpkin": "orange", "chocolate": "brown",
    "bark": "brown",
}  # fmt: skip
_PAIRS = {
    "hot": "cold", "big": "small", "fast": "slow", "high": "low", "light": "dark", "wet": "dry",
    "old": "new", "rich": "poor", "hard": "soft", "loud": "quiet", "full": "empty",
    "early": "late",
}  # fmt: skip
OPPOSITES = _PAIRS | {second: first for first, second in _PAIRS.items()}
NOUNS = (*SOUNDS, *COLOURS)
NUMBERS = tuple(str(number) for number in range(21))

PHRASES = {
    "plain opening": ("answer :", "it is :"),
    "polite opening": ("of course :", "with pleasure :", "here you are :"),
    "polite closing": ("happy to help !", "have a lovely day !", "do ask again !"),
    "rude opening": ("ugh , take this :", "obviously :", "whatever :"),
    "rude closing": ("leave me alone !", "stop wasting my time !", "silly question !"),
    "filler": (
        "well , let me think ,", "as everybody knows ,", "to be honest ,",
        "all things considered ,", "if i may say so ,", "in some sense ,",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of task: how it is asked, what it asks about and how it is solved.

    Attributes:
        phrasings: User messages with ``{}`` where the operands stand.
        operands: The words the operands are drawn from.
        sizes: The possible numbers of operands.
        solve: Maps the operands to the items of the right answer.
        answers: The words that wrong items are drawn from.
        follow_up: The message that asks the same of the previous turn's operands, if any.
    """

    phrasings: tuple[str, ...]
    operands: tuple[str, ...]
    sizes: tuple[int, ...]
    solve: Callable[[list[str]], list[str]]
    answers: tuple[str, ...]
    follow_up: str | None = None

    def read(self, text: str) -> list[str] | None:
        """Returns the operands of a user message of this kind, or None for any other text."""
        for phrasing in self.phrasings:
            before, after = phrasing.split("{}")
            middle = text[len(before) : len(text) - len(after)]
            operands = [word for word in middle.split() if word in self.operands]
            if len(operands) in self.sizes and phrasing.format(" ".join(operands)) == text:
                return operands
        return None


def _sorted(numbers: list[str]) -> list[str]:
    return sorted(numbers, key=int)


def _lookup(table: dict[str, str]) -> Callable[[list[str]], list[str]]:
    return lambda words: [table[word] for word in words]


KINDS = {
    "repeat": Kind(
        ("repeat these words : {}", "please say again : {}", "can you repeat {} ?"),
        NOUNS, (2, 3), list, NOUNS, "now repeat the same list",
    ),
    "reverse": Kind(
        ("reverse these words : {}", "please say backwards : {}", "can you reverse {} ?"),
        NOUNS, (2, 3), lambda words: words[::-1], NOUNS, "now reverse the same list",
    ),
    "sort": Kind(
        ("sort these numbers : {}", "please put in order : {}", "can you sort {} ?"),
        NUMBERS, (2, 3, 4), _sorted, NUMBERS, "now sort the same list",
    ),
    "extremes": Kind(
        ("lowest and highest of : {}", "please give the minimum and the maximum of : {}",
         "which are the lowest and the highest in {} ?"),
        NUMBERS, (3, 4), lambda numbers: _sorted(numbers)[:: len(numbers) - 1], NUMBERS,
        "now lowest and highest of the same list",
    ),
    "next": Kind(
        ("add one to each : {}", "please name the number after each : {}",
         "which numbers follow {} ?"),
        NUMBERS[:20], (2, 3), lambda numbers: [str(int(n) + 1) for n in numbers], NUMBERS,
    ),
    "opposite": Kind(
        ("what are the opposites of {} ?", "please name the opposite of each : {}",
         "say the contrary of : {}"),
        tuple(OPPOSITES), (2, 3), _lookup(OPPOSITES), tuple(OPPOSITES),
    ),
    "sound": Kind(
        ("what sounds do these make : {}", "please name the sound of each : {}",
         "how do {} sound ?"),
        tuple(SOUNDS), (2, 3), _lookup(SOUNDS), tuple(SOUNDS.values()),
    ),
    "colour": Kind(
        ("what colours are these : {}", "please name the colour of each : {}",
         "which colours have {} ?"),
        tuple(COLOURS), (2, 3), _lookup(COLOURS), tuple(dict.fromkeys(COLOURS.values())),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Mixture:
    """The probabilities with which a demonstrator's answers show each factor, independently.

    Attributes:
        wrong: Some items are wrong.
        partial: Items at the end are missing.
        polite: There is a polite opening, a polite closing, or both.
        rude: The same, rude. Otherwise the manner is plain.
        padded: One to three fillers are added.
    """

    wrong: float
    partial: float
    polite: float
    rude: float
    padded: float


DEMONSTRATIONS = Mixture(wrong=0.15, partial=0.2, polite=0.4, rude=0.3, padded=0.35)
CANDIDATES = Mixture(wrong=0.25, partial=0.2, polite=0.5, rude=0.25, padded=0.35)
# For preferences that go round in a circle of styles: the three styles equally often, little else.
STYLED = Mixture(wrong=0.15, partial=0.1, polite=0.45, rude=0.1, padded=0.33)


def draw_prompt(rng: Random) -> list[Message]:
    """Draws a prompt: one user turn or, one time in ten where possible, a task and a follow-up."""
    kind = rng.choice(list(KINDS.values()))
    operands = rng.sample(kind.operands, rng.choice(kind.sizes))
    prompt = [_user(rng.choice(kind.phrasings).format(" ".join(operands)))]
    if kind.follow_up is None or rng.random() >= 0.1:
        return prompt
    again = rng.choice([other for other in _same_lists(kind) if other is not kind])
    reply = {"role": "assistant", "content": " ".join(kind.solve(operands)) + " ."}
    return [*prompt, reply, _user(str(again.follow_up))]


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _same_lists(kind: Kind) -> list[Kind]:
    """The kinds that can be asked, as a follow-up, of the same operands."""
    return [k for k in KINDS.values() if k.follow_up and k.operands == kind.operands]


def read_prompt(prompt: list[Message]) -> tuple[Kind, list[str]]:
    """Finds the kind and the operands of the task in the last user turn.

    Raises:
        PrefoptError: The messages are not a prompt of this world.
    """
    turns = [message["content"] for message in prompt if message["role"] == "user"]
    for kind in KINDS.values():
        asked = [(kind, turns[-1])] if turns else []
        if len(turns) > 1 and turns[-1] == kind.follow_up:
            asked = [(first, turns[-2]) for first in _same_lists(kind)]
        for reader, text in asked:
            operands = reader.read(text)
            if operands:
                return kind, operands
    raise PrefoptError(
        f"prompt {turns[-1:]}: not a task of the generated world, whose rule can judge only the "
        "prompts written by prefopt.world; use another judge for this data"
    )


def right_answer(prompt: list[Message]) -> list[str]:
    """Solves the task: the items of the one right answer, in order.

    Raises:
        PrefoptError: The messages are not a prompt of this world.
    """
    kind, operands = read_prompt(prompt)
    return kind.solve(operands)


def draw_answer(prompt: list[Message], mixture: Mixture, rng: Random) -> str:
    """Writes an answer whose factors are drawn independently from ``mixture``."""
    kind, operands = read_prompt(prompt)
    items = kind.solve(operands)
    if rng.random() < mixture.partial:
        items = items[: rng.randrange(1, len(items))]
    if rng.random() < mixture.wrong:
        for place in rng.sample(range(len(items)), rng.randint(1, len(items))):
            items[place] = rng.choice([word for word in kind.answers if word != items[place]])
    opening, closing = _draw_manner(mixture, rng)
    parts = [opening, " ".join(items) + " .", closing]
    if rng.random() < mixture.padded:
        for filler in rng.sample(PHRASES["filler"], rng.randint(1, 3)):
            parts.insert(rng.choice((0, len(parts) - 1)), filler)  # first, or after the items
    return " ".join(part for part in parts if part)


def _draw_manner(mixture: Mixture, rng: Random) -> tuple[str, str]:
    """Draws an opening and a closing, each possibly empty."""
    draw = rng.random()
    if draw >= mixture.polite + mixture.rude:
        return rng.choice((*PHRASES["plain opening"], "")), ""
    manner = "polite" if draw < mixture.polite else "rude"
    opening = rng.choice(PHRASES[f"{manner} opening"])
    closing = rng.choice(PHRASES[f"{manner} closing"])
    return rng.choice(((opening, closing), (opening, ""), ("", closing)))
