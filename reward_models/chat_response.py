"""Reading what a chat API sends back: answers, refusals, and what is to be asked again."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from prefopt.reward_models.api_key import ApiKey

_WHAT_TO_DO = {
    400: "the server's message says what it does not take",
    404: "check the model's name, and that base_url ends where /chat/completions begins",
}


@dataclass(frozen=True)
class ChatAnswer:
    """What a chat model answered.

    Attributes:
        text: The answer; empty where the server sent none, for which see ``finish_reason``.
        top_log_probs: Token's text -> log-prob (nats) of the most likely first tokens; empty when
            none were asked for or none came back.
        prompt_tokens: As the server counted; 0 where it did not say.
        completion_tokens: As the server counted; 0 where it did not say.
        finish_reason: Such as "stop", "length" or "content_filter"; "refused" where there is no
            answer, because the server takes other requests but not this one.
    """

    text: str
    top_log_probs: dict[str, float]
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str | None


class FailedAttemptError(Exception):
    """Why an attempt failed.

    Attributes:
        passing: Whether the same request may be answered later.
        for_all: Whether every other request will be refused for the same reason.
        refused: Whether the server does not take what this request holds.
        retry_after: Seconds that the server asks to wait.
    """

    def __init__(
        self,
        problem: str,
        *,
        passing: bool = False,
        for_all: bool = False,
        refused: bool = False,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(problem)
        self.passing, self.for_all, self.refused = passing, for_all, refused
        self.retry_after = retry_after


Response = tuple[dict[str, Any], ChatAnswer]  # the server's JSON, and what it says


def read_response(response: httpx.Response, key: ApiKey, *, log_probs: bool) -> Response:
    """Reads what came back from one attempt.

    Args:
        response: It.
        key: What is kept out of the error, and of the answer.
        log_probs: Whether an answer without log-probs is none.

    Raises:
        FailedAttemptError: There is no answer that can be read.
    """
    if response.status_code != 200:
        raise _refusal(response, key)
    try:
        body = json.loads(key.remove(response.content.decode()))
    except (ValueError, RecursionError):
        raise FailedAttemptError("an answer that is not JSON", passing=True) from None
    try:
        answer = read_answer(body)
    except FailedAttemptError as failure:
        said = key.redact(_message(response))[:200]
        raise FailedAttemptError(f"{failure}: {said}", passing=True) from None
    if log_probs and not answer.top_log_probs and answer.finish_reason != "content_filter":
        raise FailedAttemptError(
            "no log-probs of the first token came back, which this judge weighs (use a model and "
            "server that answer to top_logprobs; reasoning models mostly do not)",
            for_all=True,
        )
    return body, answer


def read_answer(body: Any) -> ChatAnswer:
    """Reads a response.

    Raises:
        FailedAttemptError: It has no choices, or no content and no reason for that.
    """
    try:
        choice = body["choices"][0]
        reason, text = choice.get("finish_reason"), choice["message"]["content"]
        if text is None and reason is not None:  # a refusal, a filter, or only hidden reasoning
            text = choice["message"].get("refusal") or ""
        first = ((choice.get("logprobs") or {}).get("content") or [{}])[0]
        log_probs: dict[str, float] = {}
        for entry in first.get("top_logprobs") or []:
            token, log_prob = entry["token"], float(entry["logprob"])
            # two tokens may read the same, such as parts of one letter
            log_probs[token] = _log_add(log_probs.get(token, -math.inf), log_prob)
        usage = body.get("usage") or {}
        prompt_tokens = int(usage.get("prompt_tokens") or 0)
        completion_tokens = int(usage.get("completion_tokens") or 0)
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError):
        raise FailedAttemptError("an answer of another form", passing=True) from None
    if not isinstance(text, str):
        raise FailedAttemptError("an answer without content", passing=True)
    if not isinstance(reason, str | None) or not all(isinstance(t, str) for t in log_probs):
        raise FailedAttemptError("an answer of another form", passing=True)
    # JSON can hold half of a character, which no file can: an answer may have been cut there
    text = text.encode(errors="replace").decode()
    return ChatAnswer(text, log_probs, prompt_tokens, completion_tokens, reason)


def _refusal(response: httpx.Response, key: ApiKey) -> FailedAttemptError:
    status = response.status_code
    spent = status == 429 and "insufficient_quota" in _text(response)
    problem = f"HTTP {status}: {key.redact(_message(response))[:300]}"
    if status == 401 and not key:
        problem += f" (no key was sent: the environment variable {key.variable} is not set)"
    elif status in (401, 403):
        problem += f" (check that the key in {key.variable} may use this model here)"
    elif spent:
        problem += " (the account has no credit left)"
    elif response.has_redirect_location:
        where = key.redact(response.headers["location"])[:300]
        problem += f"it redirects to {where} (the key is not sent on: correct base_url)"
    elif status in _WHAT_TO_DO:
        problem += f" ({_WHAT_TO_DO[status]})"
    return FailedAttemptError(
        problem,
        passing=not spent and (status in (408, 409, 429) or status >= 500),
        for_all=spent or status in (401, 404) or response.has_redirect_location,
        refused=status in (400, 413, 422),
        retry_after=_seconds(response.headers.get("retry-after", "").strip()),
    )


def _log_add(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def _seconds(header: str) -> float | None:
    """Seconds from a Retry-After header, which holds seconds or a date (RFC 9110, 10.2.3)."""
    if re.fullmatch(r"\d+(\.\d+)?", header):
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def _message(response: httpx.Response) -> str:
    """What a server says of an error, on one line."""
    try:
        body = json.loads(response.content)
    except (RecursionError, ValueError):
        body = None
    error = body.get("error", body) if isinstance(body, dict) else None
    said = error.get("message") if isinstance(error, dict) else error
    return " ".join((said if isinstance(said, str) else _text(response)).split())


def _text(response: httpx.Response) -> str:
    """The body, as UTF-8 whatever charset its header names: that may be no charset of text."""
    return response.content.decode(errors="replace")
