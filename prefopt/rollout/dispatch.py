"""One list of questions, answered by several servers that may be lost and come back.

A question is in one place at a time: waiting, or in flight to one server. It leaves flight by an
answer that was read to its end, or by the loss of its server, which cancels what is in flight
there and puts it back; an answer that comes later has no reader. So each is answered exactly once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread
from typing import Any, Generic, TypeVar

import httpx

from prefopt.errors import PrefoptError

logger = logging.getLogger(__name__)

T = TypeVar("T")
# (client, a server's address) -> nothing; raises ServerLostError unless the server may be asked now
Prepare = Callable[[httpx.AsyncClient, str], Awaitable[None]]

ATTEMPTS = 5  # how often one question may be what a server is lost over
FIRST_WAIT, LONGEST_WAIT = 0.25, 10.0  # seconds between attempts to reach a lost server


class ServerLostError(Exception):
    """A server did not answer as one in order does; what it was asked can be asked again.

    Attributes:
        answered: Whether there was an answer at all.
    """

    def __init__(self, problem: str, *, answered: bool = False) -> None:
        super().__init__(problem)
        self.answered = answered


@dataclass(frozen=True)
class Patience:
    """Attributes:
    request_timeout: Seconds within which a request is answered.
    server_timeout: Seconds for which servers may be away before that is an error.
    concurrency: Most requests in flight to a server.
    """

    request_timeout: float
    server_timeout: float
    concurrency: int


def make_client() -> httpx.AsyncClient:
    """An HTTP client without limits of its own."""
    return httpx.AsyncClient(
        timeout=None,  # ``call`` has one for the whole of a request
        # A connection kept open can turn out to be closed only when it is used.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        trust_env=False,  # servers are neighbours: never through a proxy
    )


async def call(
    client: httpx.AsyncClient, method: str, url: str, body: object = None, *, timeout: float
) -> Any:
    """One request.

    Args:
        client: Sends it.
        method: "GET" or "POST".
        url: Where to.
        body: What is sent as JSON.
        timeout: Seconds for all of it.

    Returns:
        The JSON of the answer.

    Raises:
        ServerLostError: No answer in time, a broken connection, a status of 500 or more, or
            broken JSON.
        PrefoptError: The server refused the request (a status of 400 to 499).
    """
    try:
        async with asyncio.timeout(timeout):
            response = await client.request(method, url, json=body)
    except TimeoutError:
        raise ServerLostError(f"{url} did not answer within {timeout:g} s") from None
    except httpx.RequestError as error:
        raise ServerLostError(f"{url}: {type(error).__name__}: {error}") from error
    if response.status_code >= 500:
        raise ServerLostError(f"{url} answered {_status(response)}", answered=True)
    if response.status_code >= 400:
        raise PrefoptError(f"{url} refused the request with {_status(response)}")
    try:
        return response.json()
    except ValueError:
        raise ServerLostError(f"{url} answered what is not JSON", answered=True) from None


def _status(response: httpx.Response) -> str:
    return f"{response.status_code}: {' '.join(response.text.split())[:500]}"


async def wait_for(
    prepare: Prepare, client: httpx.AsyncClient, url: str, server_timeout: float
) -> None:
    """Waits until a server may be asked.

    Raises:
        ServerLostError: It may not within ``server_timeout`` seconds.
    """
    begun, failures = time.monotonic(), 0
    while True:
        try:
            return await prepare(client, url)
        except ServerLostError:
            failures += 1
            if time.monotonic() - begun > server_timeout:
                raise
        await asyncio.sleep(_back_off(failures))


@asynccontextmanager
async def _task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group out of which its first error comes as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


def _back_off(failures: int) -> float:
    return min(FIRST_WAIT * 2 ** min(failures - 1, 10), LONGEST_WAIT)


def in_background(
    work: Callable[[Callable[[T], None]], Coroutine[Any, Any, None]],
) -> Generator[T, None, None]:
    """What a coroutine puts out, while it runs on an event loop in a thread of its own.

    The thread keeps time-outs and connections going while the caller is busy with what it got.
    Closing the generator cancels the coroutine.

    Args:
        work: Makes the coroutine, given the function it puts out with.
    """
    found: SimpleQueue[tuple[T] | None] = SimpleQueue()
    loop = asyncio.new_event_loop()
    task = loop.create_task(work(lambda each: found.put((each,))))
    task.add_done_callback(lambda _: found.put(None))

    async def until_it_ends() -> None:
        await asyncio.wait([task])
        await loop.shutdown_default_executor()  # it looks up host names

    thread = Thread(target=loop.run_until_complete, args=(until_it_ends(),), daemon=True)
    thread.start()
    try:
        while (each := found.get()) is not None:
            yield each[0]
        task.result()  # raises what it ended with
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        loop.close()


def on_each(urls: Sequence[str], work: Callable[[httpx.AsyncClient, str], Awaitable[None]]) -> None:
    """Awaits ``work(client, url)`` for all servers at once; the first error ends it."""

    async def all_of_them(put: Callable[[None], None]) -> None:
        async def one(url: str) -> None:
            await work(client, url)

        async with make_client() as client, _task_group() as group:
            for url in urls:
                group.create_task(one(url))

    for _ in in_background(all_of_them):
        pass


def answers(
    urls: Sequence[str],
    count: int,
    ask: Callable[[httpx.AsyncClient, str, int], Awaitable[T]],
    prepare: Prepare,
    patience: Patience,
) -> Generator[tuple[int, T], None, None]:
    """Asks ``count`` questions, in their order, of whichever server may have one more.

    Neighbours tend to go to one server, whose prefix cache serves samples of one prompt. A server
    has at most its share of what is left: one that is faster answers more.

    Args:
        urls: The servers' addresses.
        count: How many questions there are.
        ask: ``ask(client, url, number)`` puts a question to a server; raises ``ServerLostError`` to
            have it put again.
        prepare: Awaited before a server is asked for the first time, and again whenever it may
            have been restarted: after its loss, and after it had nothing in flight.
        patience: The limits.

    Returns:
        (number of the question, its answer), each once, in the order in which they come. Close it
        to give up the rest.

    Raises:
        PrefoptError: All servers have been away for ``server_timeout``, or one question has lost
            ``ATTEMPTS`` servers; and whatever ``ask`` and ``prepare`` raise themselves.
    """

    async def work(put: Callable[[tuple[int, T]], None]) -> None:
        async with make_client() as client:
            await _Dispatcher(urls, count, ask, prepare, patience, client, put).run()

    return in_background(work)


@dataclass
class _Server:
    url: str
    ready: bool = False
    preparing: asyncio.Task[None] | None = None
    in_flight: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    failures: int = 0  # since it last answered a question
    lost_since: float | None = None  # time of the first of them
    problem: str = ""  # what is wrong with it now


class _Dispatcher(Generic[T]):
    """The state of one call of ``answers``. Everything happens in one thread, between awaits."""

    def __init__(
        self,
        urls: Sequence[str],
        count: int,
        ask: Callable[[httpx.AsyncClient, str, int], Awaitable[T]],
        prepare: Prepare,
        patience: Patience,
        client: httpx.AsyncClient,
        put: Callable[[tuple[int, T]], None],
    ) -> None:
        self.servers = [_Server(url) for url in urls]
        self.waiting = deque(range(count))
        self.unanswered = count
        self.losses: Counter[int] = Counter()
        self.ask, self.prepare, self.patience = ask, prepare, patience
        self.client, self.put = client, put
        self.finished = asyncio.Event()

    async def run(self) -> None:
        if not self.unanswered:
            return
        async with _task_group() as self.group:
            self._hand_out()
            await self.finished.wait()
            for server in self.servers:
                if server.preparing is not None:
                    server.preparing.cancel()

    def _hand_out(self) -> None:
        """Gives out as much of what waits as may be; called whenever something has changed."""
        # No server takes more than its share of what is left, also not the first that is ready.
        expected = sum(not server.problem for server in self.servers)
        share = math.ceil(self.unanswered / max(expected, 1))
        most = min(share, self.patience.concurrency)
        for server in self.servers:
            while self.waiting and server.ready and len(server.in_flight) < most:
                number = self.waiting.popleft()
                server.in_flight[number] = self.group.create_task(self._send(server, number))
        for server in self.servers:
            # One that is killed with requests in flight is noticed, an idle one is not.
            server.ready = server.ready and bool(server.in_flight)
            if self.waiting and not server.ready and server.preparing is None:
                server.preparing = self.group.create_task(self._make_ready(server))

    async def _make_ready(self, server: _Server) -> None:
        while not server.ready:
            if server.failures:
                await asyncio.sleep(_back_off(server.failures))
            try:
                await self.prepare(self.client, server.url)
            except ServerLostError as loss:
                self._note(server, loss)
            else:
                server.ready, server.problem = True, ""
        server.preparing = None
        self._hand_out()

    async def _send(self, server: _Server, number: int) -> None:
        try:
            answer = await self.ask(self.client, server.url, number)
        except ServerLostError as loss:
            if self._in_flight(server, number):
                self._lose(server, number, loss)
            return
        if not self._in_flight(server, number):
            return
        del server.in_flight[number]
        server.failures, server.lost_since = 0, None
        self.put((number, answer))
        self.unanswered -= 1
        if not self.unanswered:
            self.finished.set()
        self._hand_out()

    def _in_flight(self, server: _Server, number: int) -> bool:
        """Whether the task that calls this still is the one that asks the question."""
        return server.in_flight.get(number) is asyncio.current_task()

    def _lose(self, server: _Server, number: int, loss: ServerLostError) -> None:
        """Puts back all that is in flight to a server."""
        logger.warning("%s; its %d requests are sent again", loss, len(server.in_flight))
        self.losses[number] += 1
        if self.losses[number] == ATTEMPTS:
            raise PrefoptError(f"the same request failed {ATTEMPTS} times, the last time: {loss}")
        self.waiting.extendleft(server.in_flight)
        for task in server.in_flight.values():
            if task is not asyncio.current_task():
                task.cancel()
        server.in_flight.clear()
        server.ready = False
        self._note(server, loss)

    def _note(self, server: _Server, loss: ServerLostError) -> None:
        now = time.monotonic()
        server.failures += 1
        server.lost_since = server.lost_since or now
        server.problem = str(loss)
        limit = self.patience.server_timeout
        if all(s.problem and now - (s.lost_since or now) > limit for s in self.servers):
            problems = "; ".join(server.problem for server in self.servers)
            raise PrefoptError(
                f"no server has answered for {limit:g} s: {problems}; start them again and go on "
                "from the last checkpoint"
            )
        self._hand_out()
