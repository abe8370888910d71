"""A client of OpenAI-compatible chat APIs that loses nothing: retries, and a cache on disk."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx
from anyio.from_thread import start_blocking_portal
from pydantic import SecretStr
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential_jitter,
)

from prefopt.data.rows import Message
from prefopt.errors import PrefoptError
from prefopt.reward_models.chat_cache import ChatCache

logger = logging.getLogger(__name__)

_Response = tuple[dict[str, Any], "ChatAnswer"]  # the server's JSON, and what it says

_OPENAI = "api.openai.com"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # seconds; each wait is twice the last one
_LONGEST_RETRY_AFTER = 120.0  # seconds of a server's own wish that are granted
_LOST_AFTER = 4  # failures in a row, and no fewer than are in flight: the server is gone
_WHAT_TO_DO = {
    400: "the server's message says what it does not take",
    404: "check the model's name, and that base_url ends where /chat/completions begins",
}


@dataclass(frozen=True)
class ChatRequest:
    """One question to a chat model.

    Attributes:
        messages: ``[{"role": ..., "content": ...}]``.
        max_tokens: Most tokens of the answer.
        temperature: 0 is greedy.
        top_logprobs: How many of the most likely first tokens come with the answer; 0: none.
        sample: Tells equal requests apart that shall be answered separately.
    """

    messages: Sequence[Message]
    max_tokens: int
    temperature: float = 0.0
    top_logprobs: int = 0
    sample: int = 0


@dataclass(frozen=True)
class ChatAnswer:
    """What a chat model answered.

    Attributes:
        text: The answer; empty where the server sent none, for which see ``finish_reason``.
        top_log_probs: Token's text -> log-prob (nats) of the most likely first tokens; empty when
            none were asked for or none came back.
        prompt_tokens: As the server counted; 0 where it did not say.
        completion_tokens: As the server counted; 0 where it did not say.
        finish_reason: Such as "stop", "length" or "content_filter".
    """

    text: str
    top_log_probs: dict[str, float]
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str | None


@dataclass
class Usage:
    """What was asked, and what it cost.

    Attributes:
        asked: Requests that the server answered to this process.
        cached: Requests answered from the cache, or by an equal request of the same call.
        retries: Attempts beyond the first. What a server charges for those is not known here.
        prompt_tokens: Of ``asked``.
        completion_tokens: Of ``asked``.
        cached_prompt_tokens: Of answers that were in the cache.
        cached_completion_tokens: Of answers that were in the cache.
        uncounted: Answers of ``asked`` whose tokens the server did not count.
        cost: Dollars for the tokens of ``asked``; None without a price.
    """

    asked: int = 0
    cached: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_prompt_tokens: int = 0
    cached_completion_tokens: int = 0
    uncounted: int = 0
    cost: float | None = None


class ChatAPI:
    """Asks one model at one server; every answer is on disk before anyone sees it.

    The key is read from the environment. It is in no file, log line, error or ``repr``.

    Args:
        model: The model's name at the server.
        base_url: Where ``/chat/completions`` stands, such as ``http://127.0.0.1:8000/v1``.
        key_variable: The environment variable that holds the API key. Where it is not set no key is
            sent, which is an error for OpenAI only.
        cache: A JSONL file of answers, made where there is none. Requests that it holds are not
            asked again. One process at a time may ask through it.
        concurrency: Most requests in flight.
        timeout: Seconds within which a request is answered.
        attempts: How often one request is sent before it counts as failed.
        price: Dollars per million prompt tokens and per million completion tokens.

    Attributes:
        usage: What has been asked so far.

    Raises:
        PrefoptError: ``base_url`` is no such address or has a name, password or query in it, the
            key is missing or malformed, or a number is out of range.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str = f"https://{_OPENAI}/v1",
        key_variable: str = "OPENAI_API_KEY",
        cache: Path,
        concurrency: int = 16,
        timeout: float = 120.0,
        attempts: int = 8,
        price: tuple[float, float] | None = None,
    ) -> None:
        if min(concurrency, attempts) < 1 or timeout <= 0:
            raise PrefoptError(
                f"chat API: found concurrency {concurrency}, attempts {attempts}, timeout "
                f"{timeout:g}; expected at least 1, at least 1 and more than 0"
            )
        self.model, self.base_url = model, _checked_url(base_url)
        self.key_variable = key_variable
        self.concurrency, self.timeout, self.attempts = concurrency, timeout, attempts
        self.price = price
        self.usage = Usage(cost=None if price is None else 0.0)
        self._host = httpx.URL(self.base_url).host
        self._cache = ChatCache(Path(cache))
        self._secret = self._read_key()

    def ask(
        self,
        requests: Sequence[ChatRequest],
        done: Callable[[int, ChatAnswer], None] | None = None,
    ) -> list[ChatAnswer]:
        """Answers to requests, in their order; also inside a running event loop.

        A failed attempt is repeated after a wait that doubles, or as long as the server asks for.
        An error in ``done`` or an interrupt ends it at once; what has been answered is kept.

        Args:
            requests: Equal ones are asked once.
            done: Told of each answer, (position, answer), in the caller's thread, as it comes.

        Raises:
            PrefoptError: Requests failed for good. The others go on unless the server refuses them
                all or seems gone; those in flight are finished first. Or another process asks
                through the same cache.
        """
        places: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            places.setdefault(self._key_of(request), []).append(index)
        answers: dict[int, ChatAnswer] = {}

        def take(key: str, answer: ChatAnswer) -> None:
            for index in places[key]:
                answers[index] = answer
                if done is not None:
                    done(index, answer)

        with self._cache.opened():
            missing = {}
            for key, (first, *others) in places.items():
                if key in self._cache.responses:
                    take(key, self._recall(key))
                else:
                    missing[key] = requests[first]
                self.usage.cached += len(others)
            with closing(self._arriving(missing)) as arriving:
                for key, answer in arriving:
                    take(key, answer)
        return [answers[index] for index in range(len(requests))]

    def describe(self) -> dict[str, Any]:
        """What a record of an evaluation says of the model: its name and its server."""
        return {"model": self.model, "base_url": self.base_url}

    def __repr__(self) -> str:
        return f"ChatAPI({self.model!r}, base_url={self.base_url!r})"

    def _read_key(self) -> SecretStr:
        key = os.environ.get(self.key_variable, "").strip()
        if not key and self._host == _OPENAI:
            raise PrefoptError(
                f"{self.model} at {self.base_url}: the environment variable {self.key_variable} is "
                "not set; expected the API key in it"
            )
        if re.search(r"[^!-~]", key):
            raise PrefoptError(
                f"the environment variable {self.key_variable} holds spaces, line breaks or "
                "letters that no API key has; set it to the key alone"
            )
        return SecretStr(key)

    def _redact(self, text: str) -> str:
        """The text without the key, or words that begin like it: servers echo it half-masked."""
        key = self._secret.get_secret_value()
        return re.sub(rf"{re.escape(key)}|{re.escape(key[:8])}\S*", "[key]", text) if key else text

    def _without_key(self, text: str) -> str:
        """An answer without the key; what is short, like "EMPTY", is none and may be a word."""
        key = self._secret.get_secret_value()
        return text.replace(key, "[key]") if len(key) >= 16 else text

    def _key_of(self, request: ChatRequest) -> str:
        """A hash of all that an answer depends on."""
        parts = {
            "base_url": self.base_url,
            "model": self.model,
            "messages": list(request.messages),
            "max_tokens": request.max_tokens,
            "temperature": float(request.temperature),
            "top_logprobs": request.top_logprobs,
            "sample": request.sample,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _recall(self, key: str) -> ChatAnswer:
        try:
            answer = _read_answer(self._cache.responses[key])
        except _Failure as failure:
            raise PrefoptError(
                f"{self._cache.path}: the line of key {key} has {failure}; remove that line"
            ) from None
        self.usage.cached += 1
        self.usage.cached_prompt_tokens += answer.prompt_tokens
        self.usage.cached_completion_tokens += answer.completion_tokens
        return answer

    def _arriving(self, missing: dict[str, ChatRequest]) -> Iterator[tuple[str, ChatAnswer]]:
        """Asks from a thread of its own, since the caller's may already run an event loop."""
        if not missing:
            return
        arrived: SimpleQueue[tuple[str, ChatAnswer] | None] = SimpleQueue()
        with start_blocking_portal() as portal:
            asking = portal.start_task_soon(self._ask_all, missing, arrived.put)
            asking.add_done_callback(lambda _: arrived.put(None))
            yield from iter(arrived.get, None)
            asking.result()

    async def _ask_all(
        self, missing: dict[str, ChatRequest], put: Callable[[tuple[str, ChatAnswer]], None]
    ) -> None:
        slots = asyncio.Semaphore(self.concurrency)
        failures: list[_Failure] = []
        in_a_row = 0

        async def ask(key: str, request: ChatRequest) -> None:
            nonlocal in_a_row
            async with slots:
                lost = in_a_row >= max(self.concurrency, _LOST_AFTER)
                if lost or any(failure.for_all for failure in failures):
                    return
                try:
                    response, answer = await self._respond(client, request)
                except _Failure as failure:
                    failures.append(failure)
                    in_a_row += 1
                    return
            in_a_row = 0
            self._cache.add(key, response)
            self._count(answer)
            put((key, answer))

        try:
            async with self._client() as client, asyncio.TaskGroup() as group:
                for key, request in missing.items():
                    group.create_task(ask(key, request))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        if failures:
            raise PrefoptError(self._report(failures, missing))

    def _client(self) -> httpx.AsyncClient:
        key = self._secret.get_secret_value()
        return httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=None,  # ``_post`` has one for the whole of a request
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=self.concurrency),
            trust_env=self._host not in _LOOPBACK,  # never to this machine through a proxy
        )

    async def _respond(self, client: httpx.AsyncClient, request: ChatRequest) -> _Response:
        def note(state: RetryCallState) -> None:
            self.usage.retries += 1
            failure = state.outcome.exception() if state.outcome else None
            logger.info("%s: %s; sent again in %.1f s", self.model, failure, state.upcoming_sleep)

        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.attempts),
            wait=_wait,
            retry=retry_if_exception(lambda error: isinstance(error, _Failure) and error.passing),
            before_sleep=note,
            reraise=True,
        )
        return await retrying(self._post, client, request)

    async def _post(self, client: httpx.AsyncClient, request: ChatRequest) -> _Response:
        """One attempt.

        Raises:
            _Failure: There is no answer that can be read.
        """
        try:
            async with asyncio.timeout(self.timeout):
                response = await client.post(
                    f"{self.base_url}/chat/completions",
                    content=json.dumps(self._body(request)),
                    headers={"Content-Type": "application/json"},
                )
        except TimeoutError:
            raise _Failure(f"no answer within {self.timeout:g} s", passing=True) from None
        except (httpx.TransportError, httpx.DecodingError) as error:
            problem = self._redact(f"{type(error).__name__}: {error}".rstrip("."))
            raise _Failure(problem, passing=True) from None
        if response.status_code != 200:
            raise self._refusal(response)
        try:
            body = json.loads(self._without_key(response.text))
        except ValueError:
            raise _Failure("an answer that is not JSON", passing=True) from None
        try:
            return body, _read_answer(body)
        except _Failure as failure:
            said = self._redact(_message(response))[:200]
            raise _Failure(f"{failure}: {said}", passing=True) from None

    def _body(self, request: ChatRequest) -> dict[str, Any]:
        # OpenAI's newer models refuse max_tokens; other servers may not know its successor.
        limit = "max_completion_tokens" if self._host == _OPENAI else "max_tokens"
        body = {
            "model": self.model,
            "messages": list(request.messages),
            limit: request.max_tokens,
            "temperature": request.temperature,
        }
        if request.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
        return body

    def _refusal(self, response: httpx.Response) -> _Failure:
        status = response.status_code
        spent = status == 429 and "insufficient_quota" in response.text
        problem = f"HTTP {status}: {self._redact(_message(response))[:300]}"
        if status == 401 and not self._secret.get_secret_value():
            problem += (
                f" (the environment variable {self.key_variable} is not set: no key was sent)"
            )
        elif status in (401, 403):
            problem += f" (check that the key in {self.key_variable} may use this model here)"
        elif spent:
            problem += " (the account has no credit left)"
        elif status in _WHAT_TO_DO:
            problem += f" ({_WHAT_TO_DO[status]})"
        return _Failure(
            problem,
            passing=not spent and (status in (408, 409, 429) or status >= 500),
            for_all=spent or status in (401, 404),
            retry_after=_retry_after(response.headers.get("retry-after", "").strip()),
        )

    def _count(self, answer: ChatAnswer) -> None:
        usage = self.usage
        usage.asked += 1
        usage.prompt_tokens += answer.prompt_tokens
        usage.completion_tokens += answer.completion_tokens
        usage.uncounted += not answer.prompt_tokens
        if self.price is not None:
            cost = usage.prompt_tokens * self.price[0] + usage.completion_tokens * self.price[1]
            usage.cost = cost / 1e6

    def _report(self, failures: list[_Failure], missing: dict[str, ChatRequest]) -> str:
        counted = Counter(map(str, failures)).most_common(3)
        reasons = "; ".join(f"{count} times {reason}" for reason, count in counted)
        left = sum(key not in self._cache.responses for key in missing) - len(failures)
        unasked = f" and {left} were not sent any more" if left else ""
        return (
            f"{self.model} at {self.base_url}: {len(failures)} of {len(missing)} requests failed"
            f"{unasked}: {reasons}. The answers so far are in {self._cache.path}: the same command "
            "goes on from there"
        )


class _Failure(Exception):  # noqa: N818 - an attempt's outcome; users see a PrefoptError
    """Why an attempt failed.

    Attributes:
        passing: Whether the same request may be answered later.
        for_all: Whether every other request will be refused for the same reason.
        retry_after: Seconds that the server asks to wait.
    """

    def __init__(
        self,
        problem: str,
        *,
        passing: bool = False,
        for_all: bool = False,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(problem)
        self.passing, self.for_all, self.retry_after = passing, for_all, retry_after


def _checked_url(base_url: str) -> str:
    expected = "expected one like https://api.openai.com/v1 or http://127.0.0.1:8000/v1"
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL:
        raise PrefoptError(f"chat API: base_url is no address; {expected}") from None
    if "@" in base_url or url.query or url.fragment:  # it would stand in files and logs
        raise PrefoptError(
            f"chat API: base_url has a name, password or query in it; {expected}, and the key in "
            "an environment variable"
        )
    if url.scheme not in ("http", "https") or not url.host:
        raise PrefoptError(f"chat API: base_url {base_url!r} is no address; {expected}")
    return base_url.rstrip("/")


def _wait(state: RetryCallState) -> float:
    """Seconds until the next attempt; with jitter, so that not all requests come back at once."""
    doubled = wait_exponential_jitter(
        multiplier=_FIRST_WAIT, max=_LONGEST_WAIT, jitter=_FIRST_WAIT
    )(state)
    failure = state.outcome.exception() if state.outcome else None
    if not isinstance(failure, _Failure) or failure.retry_after is None:
        return doubled
    told = min(failure.retry_after, _LONGEST_RETRY_AFTER) + random.uniform(0, _FIRST_WAIT)
    return max(told, doubled)


def _retry_after(header: str) -> float | None:
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
    except ValueError:
        body = None
    error = body.get("error", body) if isinstance(body, dict) else None
    said = error.get("message") if isinstance(error, dict) else error
    return " ".join((said if isinstance(said, str) else response.text).split())


def _read_answer(body: Any) -> ChatAnswer:
    """Reads a response.

    Raises:
        _Failure: It has no choices, or no content and no reason for that.
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
        counts = [int(usage.get(f"{part}_tokens") or 0) for part in ("prompt", "completion")]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise _Failure("an answer of another form", passing=True) from None
    if not isinstance(text, str):
        raise _Failure("an answer without content", passing=True)
    return ChatAnswer(text, log_probs, *counts, finish_reason=reason)


def _log_add(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
