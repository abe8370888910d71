"""The parsers of rows: any columns, any values, conversations with anything in them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from fuzz.target import HUGE, Target, attempt, plain, texts
from prefopt.data.rows import (
    Completion,
    Demonstration,
    PreferencePair,
    Prompt,
    parse_answer,
    parse_demonstrations,
    parse_pair,
    parse_prompt,
    validate,
)
from prefopt.errors import DataError

words = st.sampled_from(["Hi", "1+1?", "It is 2.", "3"]) | texts
roles = st.sampled_from(["user", "assistant"]) | st.sampled_from(["system", "tool", "User", ""])
messages = st.fixed_dictionaries(
    {"role": roles | plain, "content": words | plain},
    optional={"tool_calls": plain, "thinking": plain, "name": plain},
)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Turns in the right order, most of them with text."""
    turns = [{"role": "system", "content": "Be brief."}] if draw(st.booleans()) else []
    for number in range(draw(st.sampled_from([1, 3, 2, 4]))):
        turns.append({"role": ("user", "assistant")[number % 2], "content": draw(words)})
    return turns


transcripts = st.lists(
    st.tuples(st.sampled_from(["\n\nHuman: ", "\n\nAssistant: ", "Human:"]), words).map("".join),
    max_size=4,
).map("".join)
cells = conversations() | words | transcripts | st.lists(messages | plain, max_size=3) | plain
COLUMNS = ("prompt", "chosen", "rejected", "completion", "messages", "p_chosen", "margin")


@st.composite
def pairs(draw: st.DrawFn) -> dict[str, Any]:
    """Rows of the layouts, right or nearly so."""
    prompt = draw(conversations() | conversations() | words)
    answers = [[{"role": "assistant", "content": draw(words)}] for _ in range(2)]
    shape = draw(st.sampled_from(["message", "text", "whole", "transcript"]))
    if shape == "text":
        return {"prompt": prompt, **_two([a[0]["content"] for a in answers])}
    if shape == "message" or isinstance(prompt, str):
        return {"prompt": prompt, **_two(answers)}
    whole = [prompt + answer for answer in answers]
    return _two([_transcript(turns) for turns in whole] if shape == "transcript" else whole)


def _transcript(turns: list[dict[str, Any]]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[t['role']]}: {t['content']}" for t in turns if t["role"] in names)


def _two(answers: list[Any]) -> dict[str, Any]:
    return {"chosen": answers[0], "rejected": answers[1]}


huge = st.sampled_from(HUGE)
probabilities = st.floats(0, 1) | st.sampled_from([0, 1, 0.5]) | huge
rows = st.builds(
    lambda good, odd: {**good, **odd},
    pairs()
    | st.fixed_dictionaries({"messages": cells})
    | st.fixed_dictionaries({"prompt": cells, "completion": cells}),
    st.just({})
    | st.fixed_dictionaries(
        {"p_chosen": probabilities, "margin": st.integers() | st.floats() | huge}
    )
    | st.dictionaries(st.sampled_from(COLUMNS), cells, max_size=3)
    | st.dictionaries(texts, plain, max_size=2),
)


def parse(found: list[dict[str, Any]]) -> None:
    """Each parser returns what its docstring says, or names the row and one of its columns."""
    located = [(f"f.jsonl:{number}", row) for number, row in enumerate(found, start=1)]
    good = 0
    for where, row in located:
        pair = _parsed(parse_pair, row, where)
        if isinstance(pair, PreferencePair):
            good += 1
            check_answer(pair.prompt, pair.chosen)
            check_answer(pair.prompt, pair.rejected)
            assert pair.chosen != pair.rejected
            assert 0 <= pair.p_chosen <= 1
            assert pair.where == where
            assert parse_prompt(row, where) == pair.prompt
            check_side(pair.prompt, pair.chosen, row, "chosen")
            check_side(pair.prompt, pair.rejected, row, "rejected")
        for demonstration in _parsed(parse_demonstrations, row, where) or []:
            check_answer(demonstration.prompt, demonstration.completion)
        for column in ("chosen", "completion", "messages", "other"):
            answer = _parsed(parse_answer, row, where, column)
            if isinstance(answer, Demonstration):
                check_answer(answer.prompt, answer.completion)
        prompt = _parsed(parse_prompt, row, where)
        if prompt is not None:
            check_prompt(prompt)
    kept = attempt(validate, located, parse_pair, invalid="drop")
    if isinstance(kept, tuple):
        assert (len(kept[0]), sum(kept[1].values())) == (good, len(found) - good)
    assert isinstance(attempt(validate, located, parse_pair), tuple) == (good == len(found))


def check_side(prompt: Prompt, answer: Completion, row: dict[str, Any], side: str) -> None:
    """The prompt and the answer are what stands in the row, all of it and in its order."""
    value, asked = row[side], row.get("prompt")
    said = answer if isinstance(answer, str) else answer[0]["content"]
    if isinstance(value, list):
        assert value[-1]["content"] == said
        asked = value[:-1] or asked
    elif "prompt" in row:
        assert value == said
    else:  # a transcript
        assert value.lstrip().startswith("Human:")
        assert value.endswith(said)
        assert _turns(prompt)[0][0] == "user"
        assert all(content in value for _, content in _turns(prompt))
        return
    assert _turns(asked) == _turns(prompt)


def _turns(prompt: Any) -> list[tuple[str, str]]:
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [(turn["role"], turn["content"]) for turn in turns]


def _parsed(parser: Any, row: dict[str, Any], where: str, *more: str) -> Any:
    result = attempt(parser, row, where, *more)
    if not isinstance(result, Exception):
        return result
    assert isinstance(result, DataError)
    assert result.where == where
    assert result.field in {*COLUMNS, *more}
    return None


def check_prompt(prompt: Prompt) -> None:
    """Text, or turns that ask for an answer."""
    if isinstance(prompt, str):
        assert prompt.strip()
        return
    assert prompt[-1]["role"] in ("user", "tool")
    assert all(message.keys() == {"role", "content"} for message in prompt)
    assert all(message["content"].strip() for message in prompt)


def check_answer(prompt: Prompt, completion: Completion) -> None:
    """Text after text, one assistant message after messages."""
    check_prompt(prompt)
    assert isinstance(prompt, str) == isinstance(completion, str)
    if not isinstance(completion, str):
        [message] = completion
        assert message["role"] == "assistant"
        completion = message["content"]
    assert completion.strip()


ROWS = Target(
    st.lists(rows, min_size=1, max_size=3),
    parse,
    {
        "a line break in a column's name": [{"prompt": "a", "chosen": "b", "x\ny": "c"}],
        "a margin of 400 digits": [{**_two(["a", "b"]), "prompt": "c", "margin": 10**400}],
        "a line break in a key of a message": [{"messages": [{"role": "user", "x\ny": "a"}]}],
    },
)
