from __future__ import annotations

import doctest
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prefopt.data.rows
import prefopt.data.sources
import prefopt.data.tokenize
from prefopt.data.rows import (
    Demonstration,
    Message,
    PreferencePair,
    parse_answer,
    parse_demonstrations,
    parse_pair,
    parse_prompt,
    validate,
)
from prefopt.data.sources import read_rows
from prefopt.errors import DataError, PrefoptError

SHARED = Path(__file__).parents[2] / "shared" / "data"
HH = SHARED / "hh" / "hh_harmless_1899.jsonl.gz"
needs_hh = pytest.mark.skipif(not HH.exists(), reason="needs ../shared/data/hh")

Q, A, B = "What is 1+1?", "It is 2.", "It is 3."
WHERE = "pairs.jsonl:7"


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def tool(text: str) -> Message:
    return {"role": "tool", "content": text}


TALK = [system("Be brief."), user("Hi"), assistant("Hello!"), user(Q)]
CONVERSATION = PreferencePair([user(Q)], [assistant(A)], [assistant(B)], where=WHERE)
LONG = PreferencePair(TALK, [assistant(A)], [assistant(B)], where=WHERE)
PLAIN = PreferencePair(Q, A, B, where=WHERE)
HH_START = f"\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: {Q}\n\nAssistant: "

LAYOUTS: dict[str, tuple[dict[str, Any], PreferencePair]] = {
    "conversational": (
        {"prompt": TALK, "chosen": [assistant(A)], "rejected": [assistant(B)]},
        LONG,
    ),
    "list and strings": ({"prompt": TALK, "chosen": A, "rejected": B}, LONG),
    "plain": ({"prompt": Q, "chosen": A, "rejected": B}, PLAIN),
    "string and whole conversations": (
        {"prompt": Q, "chosen": [user(Q), assistant(A)], "rejected": [user(Q), assistant(B)]},
        CONVERSATION,
    ),
    "string and longer conversations": (
        {"prompt": Q, "chosen": [*TALK, assistant(A)], "rejected": [*TALK, assistant(B)]},
        LONG,
    ),
    "string and answers as messages": (
        {"prompt": Q, "chosen": [assistant(A)], "rejected": [assistant(B)]},
        CONVERSATION,
    ),
    "implicit": ({"chosen": [*TALK, assistant(A)], "rejected": [*TALK, assistant(B)]}, LONG),
    "transcripts": (
        {"chosen": HH_START + A, "rejected": HH_START + B},
        PreferencePair(TALK[1:], [assistant(A)], [assistant(B)], where=WHERE),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_pair(layout: str) -> None:
    row, expected = LAYOUTS[layout]
    before = json.dumps(row)
    assert parse_pair(row, WHERE) == expected
    assert parse_pair({**row, "source": "x", "score": None}, WHERE) == expected
    assert json.dumps(row) == before
    assert parse_prompt(row, WHERE) == expected.prompt


def test_soft_label_and_margin() -> None:
    pair = parse_pair({"prompt": Q, "chosen": A, "rejected": B, "p_chosen": 1, "margin": -2}, WHERE)
    assert (pair.p_chosen, pair.margin) == (1.0, -2.0)
    assert isinstance(pair.p_chosen, float)
    low = parse_pair({"prompt": Q, "chosen": A, "rejected": B, "p_chosen": 0.2}, WHERE)
    assert (low.chosen, low.rejected, low.p_chosen) == (A, B, 0.2)


def test_message_keeps_role_and_content_only() -> None:
    extra = {**user(Q), "name": "Ann", "tool_calls": None, "weight": 0.5}
    row = {"prompt": [extra], "chosen": A, "rejected": B}
    assert parse_pair(row, WHERE) == CONVERSATION


def test_transcripts_keep_every_character_of_the_contents() -> None:
    text = "Human:  two spaces \n\nAssistant:\n\nnew\n\nHuman: : colon\n\nAssistant: end  "
    pair = parse_pair({"chosen": text, "rejected": text + "."}, WHERE)
    assert pair.prompt == [user(" two spaces "), assistant("\n\nnew"), user(": colon")]
    assert pair.chosen == [assistant("end  ")]


def test_tool_turns() -> None:
    turns = [user(Q), assistant("call: add"), tool("2"), tool("two")]
    pair = parse_pair({"prompt": turns, "chosen": A, "rejected": B}, WHERE)
    assert pair.prompt == turns


PAIR = {"prompt": [user(Q)], "chosen": [assistant(A)], "rejected": [assistant(B)]}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
# name: (change to PAIR, field, kind, words of the rest)
BAD_PAIRS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "no chosen": ({"chosen": ...}, "chosen", "missing column", "columns prompt, rejected;"),
    "no rejected": ({"rejected": ...}, "rejected", "missing column", "columns prompt, chosen;"),
    "prompt null": ({"prompt": None}, "prompt", "wrong type", "null"),
    "prompt number": ({"prompt": 3}, "prompt", "wrong type", "found 3"),
    "chosen null": ({"chosen": None}, "chosen", "wrong type", "null"),
    "chosen object": ({"chosen": assistant(A)}, "chosen", "wrong type", "an object"),
    "message string": ({"prompt": [Q]}, "prompt", "wrong type", "message 1: found a string"),
    "share gpt": (
        {"prompt": [{"from": "human", "value": Q}]},
        "prompt",
        "wrong type",
        "message 1: found the keys from, value, expected an object with role and content",
    ),
    "content null": (
        {"chosen": [{"role": "assistant", "content": None}]},
        "chosen",
        "wrong type",
        "message 1: content is null",
    ),
    "content blocks": (
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": Q}]}]},
        "prompt",
        "wrong type",
        "content is a list",
    ),
    "tool calls": ({"chosen": [CALL]}, "chosen", "unsupported", "'tool_calls' would be lost"),
    "unknown role": (
        {"prompt": [{"role": "human", "content": Q}]},
        "prompt",
        "unknown role",
        "message 1: found 'human', expected system, user, assistant, tool",
    ),
    "role list": ({"prompt": [{"role": [], "content": Q}]}, "prompt", "unknown role", "[]"),
    "empty prompt": ({"prompt": []}, "prompt", "empty prompt", "without messages"),
    "blank prompt": ({"prompt": " \n", "chosen": A, "rejected": B}, "prompt", "empty prompt", ""),
    "blank user": ({"prompt": [user("\t")]}, "prompt", "empty prompt", "message 1 (user)"),
    "blank system": ({"prompt": [system(""), user(Q)]}, "prompt", "empty prompt", "message 1 (sy"),
    "empty answer": ({"rejected": [assistant("")]}, "rejected", "empty completion", ""),
    "blank answer": ({"chosen": " \n "}, "chosen", "empty completion", "whitespace only"),
    "no answer": ({"chosen": []}, "chosen", "empty completion", "without messages"),
    "same answers": ({"rejected": A}, "rejected", "chosen equals rejected", "remove the row"),
    "two users": (
        {"prompt": [user("Hi"), user(Q)]},
        "prompt",
        "roles do not alternate",
        "message 2 (user) comes after user, expected assistant",
    ),
    "assistant first": (
        {"prompt": [assistant("Hi"), user(Q)]},
        "prompt",
        "roles do not alternate",
        "message 1 (assistant) at the start, expected system or user",
    ),
    "late system": ({"prompt": [*TALK, system("x")]}, "prompt", "roles do not alternate", "5"),
    "prompt answered": ({"prompt": TALK[:3]}, "prompt", "no question", "ends with assistant"),
    "only system": ({"prompt": TALK[:1]}, "prompt", "no question", "ends with system"),
    "user answers": ({"chosen": [user(A)]}, "chosen", "not an assistant message", "is user"),
    "two answers": (
        {"chosen": [assistant(A), assistant(A)]},
        "chosen",
        "not an assistant message",
        "is assistant, assistant",
    ),
    "prompt repeated": (
        {"chosen": [user(Q), assistant(A)]},
        "chosen",
        "not an assistant message",
        "with all that precedes it in the prompt",
    ),
    "implicit, other prompts": (
        {"prompt": ..., "chosen": [user(Q), assistant(A)], "rejected": [user("?"), assistant(B)]},
        "rejected",
        "different prompts",
        "differ before their last message",
    ),
    "implicit, early difference": (
        {"prompt": ..., "chosen": HH_START + A, "rejected": HH_START.replace("!", ".") + B},
        "rejected",
        "different prompts",
        "",
    ),
    "prompt not inside": (
        {"prompt": "Other?", "chosen": [*TALK, assistant(A)]},
        "chosen",
        "different prompts",
        "no user message of this conversation is the text in 'prompt'",
    ),
    "implicit, no assistant": (
        {"prompt": ..., "chosen": [user(Q)]},
        "chosen",
        "no assistant turn",
        "",
    ),
    "implicit, ends with user": (
        {"prompt": ..., "chosen": [user(Q), assistant(A), user("Thanks")]},
        "chosen",
        "no question",
        "ends with assistant",
    ),
    "implicit, answer alone": ({"prompt": ..., "chosen": [assistant(A)]}, "chosen", "roles do", ""),
    "implicit, two humans": (
        {"prompt": ..., "chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c"},
        "chosen",
        "roles do not alternate",
        "message 2",
    ),
    "transcript, empty answer": (
        {"prompt": ..., "chosen": HH_START, "rejected": HH_START + B},
        "chosen",
        "empty completion",
        "",
    ),
    "plain without prompt": ({"prompt": ..., "chosen": A}, "chosen", "no prompt", "Human: "),
    "text before transcript": (
        {"prompt": ..., "chosen": "x" + HH_START},
        "chosen",
        "no prompt",
        "",
    ),
    "mixed answers": (
        {"prompt": Q, "chosen": A, "rejected": [assistant(B)]},
        "rejected",
        "wrong type",
        "found a list beside a string in 'chosen'",
    ),
    "p nan": ({"p_chosen": math.nan}, "p_chosen", "not finite", "nan"),
    "p infinite": ({"p_chosen": math.inf}, "p_chosen", "not finite", "inf"),
    "p above 1": ({"p_chosen": 1.01}, "p_chosen", "out of range", "found 1.01"),
    "p below 0": ({"p_chosen": -0.01}, "p_chosen", "out of range", "from 0 to 1"),
    "p string": ({"p_chosen": "0.7"}, "p_chosen", "wrong type", "a string, expected a number"),
    "p null": ({"p_chosen": None}, "p_chosen", "wrong type", "null"),
    "p bool": ({"p_chosen": True}, "p_chosen", "wrong type", "True"),
    "margin infinite": ({"margin": -math.inf}, "margin", "not finite", "-inf"),
    "margin list": ({"margin": [1]}, "margin", "wrong type", "a list"),
}


def changed(row: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**row, **change}.items() if value is not ...}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_bad_pair_names_row_field_and_problem(name: str) -> None:
    change, field, kind, detail = BAD_PAIRS[name]
    with pytest.raises(DataError) as caught:
        parse_pair(changed(PAIR, change), WHERE)
    error = caught.value
    assert (error.where, error.field) == (WHERE, field)
    assert error.problem.startswith(kind)
    assert detail in error.problem
    assert "\n" not in str(error)


def test_demonstrations_from_messages() -> None:
    turns = [*TALK, assistant(A), user("Thanks")]
    assert parse_demonstrations({"messages": turns}, WHERE) == [
        Demonstration(TALK[:2], [assistant("Hello!")], WHERE),
        Demonstration(TALK, [assistant(A)], WHERE),
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": Q, "completion": A}, Demonstration(Q, A, WHERE)),
        ({"prompt": TALK, "completion": A}, Demonstration(TALK, [assistant(A)], WHERE)),
        (
            {"prompt": TALK, "completion": [assistant(A)]},
            Demonstration(TALK, [assistant(A)], WHERE),
        ),
        (
            {"prompt": Q, "completion": [assistant(A)]},
            Demonstration([user(Q)], [assistant(A)], WHERE),
        ),
    ],
)
def test_demonstration_from_prompt_and_completion(row: dict, expected: Demonstration) -> None:
    assert parse_demonstrations(row, WHERE) == [expected]


@pytest.mark.parametrize(
    ("row", "field", "kind"),
    [
        ({"text": "x"}, "messages", "missing column: found the columns text; expected messages"),
        ({}, "messages", "missing column: found the columns none"),
        ({"messages": [user(Q)]}, "messages", "no assistant turn"),
        ({"messages": []}, "messages", "empty completion"),
        ({"messages": [user(Q), assistant(" ")]}, "messages", "empty completion"),
        ({"messages": [user(Q), assistant(A), assistant(B)]}, "messages", "roles do not"),
        ({"messages": [user(" "), assistant(A)]}, "messages", "empty prompt"),
        ({"prompt": Q, "completion": ""}, "completion", "empty completion"),
        ({"prompt": TALK, "completion": [user(A)]}, "completion", "not an assistant message"),
    ],
)
def test_bad_demonstration(row: dict, field: str, kind: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_demonstrations(row, WHERE)
    assert caught.value.field == field
    assert caught.value.problem.startswith(kind)


@pytest.mark.parametrize("column", ["chosen", "completion", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_offline_answer_has_every_layout_of_chosen_in_any_column(
    layout: str, column: str
) -> None:
    row, expected = LAYOUTS[layout]
    row = {key: row[key] for key in ("prompt", "chosen") if key in row}
    row[column] = row.pop("chosen")
    before = json.dumps(row)
    answer = Demonstration(expected.prompt, expected.chosen, WHERE)
    assert parse_answer(row, WHERE, column) == answer
    assert parse_answer({**row, "rejected": None, "score": 1}, WHERE, column) == answer
    assert json.dumps(row) == before


def test_the_offline_answer_stands_beside_a_pair() -> None:
    row = {"prompt": TALK, "chosen": "no", "rejected": "never", "reference": A}
    assert parse_answer(row, WHERE, "reference") == Demonstration(TALK, [assistant(A)], WHERE)


@pytest.mark.parametrize("after", [[], [user("Thanks")]])
def test_the_offline_answer_of_a_conversation_is_its_last(after: list[Message]) -> None:
    turns = [*TALK, assistant(A), *after]
    row = {"prompt": "ignored", "messages": turns}
    assert parse_answer(row, WHERE, "messages") == Demonstration(TALK, [assistant(A)], WHERE)
    assert len(turns) == 5 + len(after)


@pytest.mark.parametrize(
    ("row", "column", "problem"),
    [
        (
            {"prompt": Q, "chosen": A},
            "reference",
            "missing column: found the columns prompt, chosen; expected offline answers in "
            "'reference'; name the column that holds them in trainer.reset_column",
        ),
        ({"messages": TALK}, "chosen", "missing column: found the columns messages; expected off"),
        ({"prompt": Q}, "messages", "missing column: found the columns prompt; expected offline"),
        ({}, "chosen", "missing column: found the columns none"),
        ({"prompt": Q, "reference": None}, "reference", "wrong type: found null"),
        ({"prompt": Q, "reference": " "}, "reference", "empty completion: found whitespace"),
        ({"reference": A}, "reference", "no prompt: found a plain string and no 'prompt' column"),
        ({"prompt": TALK, "summary": [user(A)]}, "summary", "not an assistant message"),
        ({"prompt": "?", "chosen": [user(Q), assistant(A)]}, "chosen", "different prompts"),
        ({"messages": None}, "messages", "wrong type: found null"),
        ({"messages": [user(Q)]}, "messages", "no assistant turn"),
        ({"messages": [assistant(A)]}, "messages", "roles do not alternate"),
        ({"messages": [user(" "), assistant(A)]}, "messages", "empty prompt: message 1 (user)"),
        ({"messages": [user(Q), assistant("\n")]}, "messages", "empty completion"),
    ],
)
def test_bad_offline_answer_names_row_column_and_problem(
    row: dict, column: str, problem: str
) -> None:
    with pytest.raises(DataError) as caught:
        parse_answer(row, WHERE, column)
    assert (caught.value.where, caught.value.field) == (WHERE, column)
    assert caught.value.problem.startswith(problem)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": Q}, Q),
        ({"prompt": TALK}, TALK),
        ({"prompt": TALK, "chosen": None}, TALK),  # answers do not matter beside a conversation
        ({"prompt": Q, "chosen": A}, Q),
        ({"prompt": Q, "completion": A}, Q),
        ({"messages": TALK}, TALK),
        ({"messages": [*TALK, assistant(A)]}, TALK),
        ({"chosen": [*TALK, assistant(A)]}, TALK),
        ({"chosen": HH_START + A}, TALK[1:]),
    ],
)
def test_prompts(row: dict, expected: object) -> None:
    assert parse_prompt(row, WHERE) == expected


@pytest.mark.parametrize(
    ("row", "field", "kind"),
    [
        ({"text": "x"}, "messages", "missing column"),
        ({"prompt": ""}, "prompt", "empty prompt"),
        ({"prompt": TALK[:3]}, "prompt", "no question"),
        ({"messages": [assistant(A)]}, "messages", "roles do not alternate"),
        ({"messages": [system(A)]}, "messages", "no question"),
        ({"chosen": A}, "chosen", "no prompt"),
    ],
)
def test_bad_prompt(row: dict, field: str, kind: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_prompt(row, WHERE)
    assert caught.value.field == field
    assert caught.value.problem.startswith(kind)


ROWS = [
    ("a:1", PAIR),
    ("a:2", {**PAIR, "rejected": A}),
    ("a:3", {**PAIR, "chosen": ""}),
    ("a:4", {**PAIR, "rejected": A}),
    ("a:5", PAIR),
]


def test_invalid_rows_are_an_error_that_counts_them_all() -> None:
    with pytest.raises(DataError) as caught:
        validate(iter(ROWS), parse_pair)
    error = caught.value
    assert (error.where, error.field) == ("a:2", "rejected")
    assert error.problem.startswith("chosen equals rejected: ")
    assert "(bad rows: 3 of 5: 2 chosen equals rejected, 1 empty completion;" in error.problem
    assert "data.invalid_rows=drop" in error.problem


def test_invalid_rows_are_dropped_and_counted() -> None:
    pairs, dropped = validate(iter(ROWS), parse_pair, invalid="drop")
    assert [pair.where for pair in pairs] == ["a:1", "a:5"]
    assert dropped == {"chosen equals rejected": 2, "empty completion": 1}


def test_nothing_left_is_an_error_even_when_dropping() -> None:
    with pytest.raises(DataError, match=r"bad rows: 1 of 1: .*nothing is left"):
        validate(ROWS[1:2], parse_pair, invalid="drop")


def test_unknown_way_to_treat_invalid_rows() -> None:
    with pytest.raises(PrefoptError, match="found 'skip', expected 'error' or 'drop'"):
        validate(ROWS, parse_pair, invalid="skip")  # type: ignore[arg-type]


@pytest.mark.parametrize("parse", [parse_demonstrations, parse_prompt])
def test_validate_does_not_flatten(parse: Callable) -> None:
    rows = [("a:1", {"messages": [*TALK, assistant(A)]})] * 2
    good, _ = validate(rows, parse)
    assert good == [parse(row, where) for where, row in rows]


def transcript(turns: list[Message]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns)


@needs_hh
def test_hh_rows_all_parse_and_survive_as_transcripts() -> None:
    pairs, dropped = validate(read_rows(HH), parse_pair)
    assert (len(pairs), dropped) == (1899, {})
    implicit = [
        (
            pair.where,
            {
                "chosen": transcript(pair.prompt + pair.chosen),
                "rejected": transcript(pair.prompt + pair.rejected),
            },
        )
        for pair in pairs
    ]
    assert validate(implicit, parse_pair)[0] == pairs


@needs_hh
@pytest.mark.parametrize("folder", ["pref", "sft"])
def test_every_shared_set_parses(folder: str) -> None:
    parse: Callable = parse_pair if folder == "pref" else parse_demonstrations
    files = sorted((SHARED / folder).glob("*.jsonl.gz"))
    assert files
    for file in files:
        # one LLMBar row has an empty rejected answer
        known = {"empty completion": 1} if file.name.startswith("llmbar") else {}
        good, dropped = validate(read_rows(file), parse, invalid="drop")
        assert good
        assert dropped == known
        assert len(validate(read_rows(file), parse_prompt)[0]) == len(good) + sum(known.values())


def test_examples_in_the_documentation() -> None:
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", page, re.DOTALL)]
    assert len(rows) == 6
    for row in rows:
        if "chosen" in row:
            assert "2" in str(parse_pair(row, WHERE).chosen)
        elif "summary" in row:
            assert parse_answer(row, WHERE, "summary").completion == " It is 2."
        else:
            assert len(parse_demonstrations(row, WHERE)) == 1
        parse_prompt(row, WHERE)


@pytest.mark.parametrize("module", [prefopt.data.rows, prefopt.data.sources, prefopt.data.tokenize])
def test_examples_in_docstrings(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
