"""A client of OpenAI-compatible chat APIs that loses nothing: retries, and a cache on disk."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx
from anyio.from_thread import start_blocking_portal
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential_jitter,
)

from prefopt.data.rows import Message
from prefopt.errors import PrefoptError
from prefopt.reward_models.api_key import ApiKey
from prefopt.reward_models.chat_cache import ChatCache
from prefopt.reward_models.chat_response import (
    ChatAnswer,
    FailedAttemptError,
    Response,
    read_answer,
    read_response,
)
from prefopt.rounds.storage import digest

logger = logging.getLogger(__name__)

_OPENAI = "api.openai.com"
_KEY_VARIABLE = "OPENAI_API_KEY"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # seconds; each wait is twice the last one
_LONG_WAIT = 10.0  # seconds from which on a wait is told of
_LONGEST_RETRY_AFTER = 120.0  # seconds of a server's own wish that are granted
_LOST_AFTER = 4  # failures in a row, and no fewer than are in flight: the server is gone


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


@dataclass
class Usage:
    """What was asked, and what it cost.

    Attributes:
        asked: Requests that the server answered to this process.
        cached: Requests answered from the cache, or by an equal request of the same call.
        refused: Requests that the server does not take, though it answers others.
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
    refused: int = 0
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
        key_variable: The environment variable that holds the API key. Where the default one is not
            set no key is sent, which is an error for OpenAI only.
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
        key_variable: str = _KEY_VARIABLE,
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
        self.concurrency, self.timeout, self.attempts = concurrency, timeout, attempts
        self.price = price
        self.usage = Usage(cost=None if price is None else 0.0)
        self._host = httpx.URL(self.base_url).host
        self._cache = ChatCache(Path(cache))
        self._key = ApiKey(key_variable)
        if not self._key and (self._host == _OPENAI or key_variable != _KEY_VARIABLE):
            # what is not in capitals may be the key itself
            name = key_variable if key_variable.isupper() else "that key_variable names"
            raise PrefoptError(
                f"{model} at {self.base_url}: the environment variable {name} is not set; "
                "expected the API key in it"
            )

    def ask(
        self,
        requests: Sequence[ChatRequest],
        done: Callable[[int, ChatAnswer], None] | None = None,
    ) -> list[ChatAnswer]:
        """Answers to requests, in their order; also inside a running event loop.

        A failed attempt is repeated after a wait that doubles, or as long as the server asks for.
        An error in ``done`` or an interrupt ends it at once; what has been answered is kept. Where
        the server answers more requests but refuses one for what it holds (HTTP 400, 413 or 422:
        a content filter, a context that is too short), its answer is an empty one with the finish
        reason "refused"; it is not kept, so another call asks again.

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
            with closing(self._arriving(missing, len(answers))) as arriving:
                for key, answer in arriving:
                    take(key, answer)
        return [answers[index] for index in range(len(requests))]

    def describe(self) -> dict[str, Any]:
        """What a record of an evaluation says of the model: its name and its server."""
        return {"model": self.model, "base_url": self.base_url}

    def __repr__(self) -> str:
        return f"ChatAPI({self.model!r}, base_url={self.base_url!r})"

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
        return digest(parts)

    def _recall(self, key: str) -> ChatAnswer:
        try:
            answer = read_answer(self._cache.responses[key])
        except FailedAttemptError as failure:
            raise PrefoptError(
                f"{self._cache.path}: the line of key {key} has {failure}; remove that line"
            ) from None
        self.usage.cached += 1
        self.usage.cached_prompt_tokens += answer.prompt_tokens
        self.usage.cached_completion_tokens += answer.completion_tokens
        return answer

    def _arriving(
        self, missing: dict[str, ChatRequest], answered: int
    ) -> Generator[tuple[str, ChatAnswer], None, None]:
        """Asks from a thread of its own, since the caller's may already run an event loop."""
        if not missing:
            return
        arrived: SimpleQueue[tuple[str, ChatAnswer] | None] = SimpleQueue()
        with start_blocking_portal() as portal:
            asking = portal.start_task_soon(self._ask_all, missing, answered, arrived.put)
            asking.add_done_callback(lambda _: arrived.put(None))
            yield from iter(arrived.get, None)
            asking.result()

    async def _ask_all(
        self,
        missing: dict[str, ChatRequest],
        answered: int,
        put: Callable[[tuple[str, ChatAnswer]], None],
    ) -> None:
        """Asks what is missing, of a server that has answered so many others before."""
        slots = asyncio.Semaphore(self.concurrency)
        failures: dict[str, FailedAttemptError] = {}
        in_a_row = 0

        async def ask(key: str, request: ChatRequest) -> None:
            nonlocal in_a_row, answered
            async with slots:
                lost = in_a_row >= max(self.concurrency, _LOST_AFTER)
                if lost or any(failure.for_all for failure in failures.values()):
                    return
                try:
                    response, answer = await self._respond(client, request)
                except FailedAttemptError as failure:
                    failures[key] = failure
                    in_a_row += not (failure.refused and answered)
                    return
            in_a_row = 0
            answered += 1
            self._cache.add(key, response)
            self._count(answer)
            put((key, answer))

        client = self._client()
        try:
            async with client, asyncio.TaskGroup() as group:
                for key, request in missing.items():
                    group.create_task(ask(key, request))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        refused = sum(failure.refused for failure in failures.values())
        if refused < len(failures) or refused > answered:
            raise PrefoptError(self._report(list(failures.values()), missing))
        self._pass_over(failures, put)

    def _pass_over(
        self,
        refused: dict[str, FailedAttemptError],
        put: Callable[[tuple[str, ChatAnswer]], None],
    ) -> None:
        """Gives what the server refuses, though it answers other requests, an empty answer."""
        self.usage.refused += len(refused)
        for reason, count in Counter(map(str, refused.values())).most_common(3):
            told = (self.model, self.base_url, count, reason)
            logger.warning("%s at %s: %d requests were refused and are unanswered: %s", *told)
        for key in refused:
            put((key, ChatAnswer("", {}, 0, 0, "refused")))

    def _client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.concurrency)
        try:
            return httpx.AsyncClient(
                headers=self._key.headers(),
                timeout=None,  # ``_post`` has one for the whole of a request
                limits=limits,
                trust_env=self._host not in _LOOPBACK,  # never to this machine through a proxy
            )
        except (ImportError, ValueError, OSError, httpx.InvalidURL) as error:
            # the message of a bad proxy address may hold its password
            raise PrefoptError(
                f"{self.model} at {self.base_url}: {type(error).__name__} from the settings of "
                "proxies or certificates in the environment; expected addresses like "
                "http://proxy:3128 in HTTP_PROXY, HTTPS_PROXY and ALL_PROXY (socks5:// needs `pip "
                "install httpx[socks]`), and a file that is there in SSL_CERT_FILE"
            ) from None

    async def _respond(self, client: httpx.AsyncClient, request: ChatRequest) -> Response:
        def note(state: RetryCallState) -> None:
            self.usage.retries += 1
            failure = state.outcome.exception() if state.outcome else None
            level = logging.WARNING if state.upcoming_sleep >= _LONG_WAIT else logging.INFO
            told = (self.model, self.base_url, failure, state.upcoming_sleep)
            logger.log(level, "%s at %s: %s; sent again in %.1f s", *told)

        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.attempts),
            wait=_wait,
            retry=retry_if_exception(lambda error: getattr(error, "passing", False)),
            before_sleep=note,
            reraise=True,
        )
        return await retrying(self._post, client, request)

    async def _post(self, client: httpx.AsyncClient, request: ChatRequest) -> Response:
        """One attempt.

        Raises:
            FailedAttemptError: There is no answer that can be read.
        """
        try:
            async with asyncio.timeout(self.timeout):
                response = await client.post(
                    f"{self.base_url}/chat/completions",
                    content=json.dumps(self._body(request)),
                    headers={"Content-Type": "application/json"},
                )
        except TimeoutError:
            raise FailedAttemptError(f"no answer within {self.timeout:g} s", passing=True) from None
        except (httpx.TransportError, httpx.DecodingError) as error:
            problem = self._key.redact(f"{type(error).__name__}: {error}".rstrip("."))
            raise FailedAttemptError(problem, passing=True) from None
        return read_response(response, self._key, log_probs=request.top_logprobs > 0)

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

    def _count(self, answer: ChatAnswer) -> None:
        usage = self.usage
        usage.asked += 1
        usage.prompt_tokens += answer.prompt_tokens
        usage.completion_tokens += answer.completion_tokens
        usage.uncounted += not answer.prompt_tokens
        if self.price is not None:
            cost = usage.prompt_tokens * self.price[0] + usage.completion_tokens * self.price[1]
            usage.cost = cost / 1e6

    def _report(self, failures: list[FailedAttemptError], missing: dict[str, ChatRequest]) -> str:
        counted = Counter(map(str, failures)).most_common(3)
        reasons = "; ".join(f"{count} times {reason}" for reason, count in counted)
        left = sum(key not in self._cache.responses for key in missing) - len(failures)
        unasked = f" and {left} were not sent any more" if left else ""
        return (
            f"{self.model} at {self.base_url}: {len(failures)} of {len(missing)} requests failed"
            f"{unasked}: {reasons}. The answers so far are in {self._cache.path}: the same command "
            "goes on from there"
        )


def _checked_url(base_url: str) -> str:
    expected = "expected one like https://api.openai.com/v1 or http://127.0.0.1:8000/v1"
    try:
        url = httpx.URL(base_url)
        host, port = url.host, url.port or 0
    except (httpx.InvalidURL, UnicodeError):  # the latter of names that are no IDNA
        raise PrefoptError(f"chat API: base_url is no address; {expected}") from None
    if "@" in base_url or url.query or url.fragment:  # it would stand in files and logs
        raise PrefoptError(
            f"chat API: base_url has a name, password or query in it; {expected}, and the key in "
            "an environment variable"
        )
    if url.scheme not in ("http", "https") or not host or port > 65535:
        raise PrefoptError(f"chat API: base_url {base_url!r} is no address; {expected}")
    return base_url.rstrip("/")


def _wait(state: RetryCallState) -> float:
    """Seconds until the next attempt; with jitter, so that not all requests come back at once."""
    doubled = wait_exponential_jitter(
        multiplier=_FIRST_WAIT, max=_LONGEST_WAIT, jitter=_FIRST_WAIT
    )(state)
    failure = state.outcome.exception() if state.outcome else None
    if not isinstance(failure, FailedAttemptError) or failure.retry_after is None:
        return doubled
    told = min(failure.retry_after, _LONGEST_RETRY_AFTER) + random.uniform(0, _FIRST_WAIT)
    return max(told, doubled)
