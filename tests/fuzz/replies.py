"""What chat APIs may send back: any status, headers and bytes."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
from hypothesis import strategies as st

from fuzz.target import DEEP, HUGE, JSON_PIECES, Target, edited, plain, texts
from prefopt.reward_models.api_key import ApiKey
from prefopt.reward_models.chat_response import (
    ChatAnswer,
    FailedAttemptError,
    Response,
    read_response,
)

KEY = ApiKey("PREFOPT_FUZZ_NO_SUCH_KEY")
texts_ = texts | st.none() | plain
counts = st.sampled_from(HUGE) | plain
top = st.lists(
    st.fixed_dictionaries({"token": texts_, "logprob": st.floats() | st.floats(-9, 0) | counts})
    | plain,
    max_size=3,
)
log_probs = st.fixed_dictionaries(
    {"content": st.lists(st.fixed_dictionaries({"top_logprobs": top | plain}) | plain, max_size=2)}
)
choices = st.fixed_dictionaries(
    {"message": st.fixed_dictionaries({"content": texts_}, optional={"refusal": texts_}) | plain},
    optional={"finish_reason": texts_, "logprobs": log_probs | plain},
)
usage = st.fixed_dictionaries({"prompt_tokens": counts, "completion_tokens": counts})
bodies = st.fixed_dictionaries(
    {"choices": st.lists(choices | plain, max_size=2) | plain},
    optional={"usage": usage | plain, "error": texts_ | st.fixed_dictionaries({"message": texts_})},
)
ascii_text = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12)
waits = st.sampled_from(
    ["1", "0.5", "9" * 400, "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 0000 07:28:00 GMT", "-1"]
)
charsets = st.sampled_from(["utf-8", "utf-16", "base64", "idna", "rot13", "nowhere", "punycode"])
headers = st.fixed_dictionaries(
    {},
    optional={
        "retry-after": waits | ascii_text,
        "location": ascii_text,
        "content-type": charsets.map("application/json; charset={}".format) | ascii_text,
    },
)
replies = st.tuples(
    st.just(200) | st.sampled_from([301, 400, 401, 403, 404, 408, 422, 429, 500, 503, 599]),
    headers,
    edited(bodies.map(json.dumps).map(str.encode), JSON_PIECES) | st.binary(max_size=20),
    st.booleans(),
)


def read(case: tuple[int, dict[str, str], bytes, bool]) -> None:
    """A reply is an answer, or a failed attempt that says in one line what it was."""
    status, fields, content, wanted = case
    response = httpx.Response(status, headers=fields, content=content)
    result = _attempt(response, wanted)
    if isinstance(result, FailedAttemptError):
        assert len(str(result).splitlines()) == 1
        assert result.retry_after is None or result.retry_after >= 0
        return
    body, answer = result
    assert isinstance(body, dict)
    check_answer(answer)


def _attempt(response: httpx.Response, wanted: bool) -> Response | FailedAttemptError:
    try:
        return read_response(response, KEY, log_probs=wanted)
    except FailedAttemptError as failure:
        return failure


def check_answer(answer: ChatAnswer) -> None:
    """The fields have the types that the class states, and the text can be written to a file."""
    answer.text.encode()
    assert isinstance(answer.finish_reason, str | None)
    for key, value in answer.top_log_probs.items():
        assert isinstance(key, str)
        assert isinstance(value, float)
    assert isinstance(answer.prompt_tokens, int)
    assert isinstance(answer.completion_tokens, int)


def read_bytes(content: bytes) -> None:
    """A reply of any bytes."""
    for status in (200, 429):
        read((status, {}, content, False))


def _reply(changed: dict[str, Any]) -> tuple[int, dict[str, str], bytes, bool]:
    choice = {"message": {"content": "a"}, "finish_reason": "stop"} | changed
    return 200, {}, json.dumps({"choices": [choice]} | changed).encode(), False


def _top(entry: dict[str, Any]) -> dict[str, Any]:
    return {"content": [{"top_logprobs": [entry]}]}


REPLIES = Target(
    replies,
    read,
    {
        "infinitely many tokens": _reply({"usage": {"prompt_tokens": math.inf}}),
        "a log-prob of 400 digits": _reply({"logprobs": _top({"token": "a", "logprob": 10**400})}),
        "a token that is a number": _reply({"logprobs": _top({"token": 3, "logprob": -1})}),
        "a list of reasons": _reply({"finish_reason": ["stop"]}),
        "brackets": (500, {}, DEEP, False),
        "a charset that is none of text": (
            (500, {"content-type": "application/json; charset=base64"}, b"\x00", False)
        ),
    },
)
REPLY_BYTES = Target(
    edited(bodies.map(json.dumps).map(str.encode), JSON_PIECES), read_bytes, raw=True
)
