"""An OpenAI-compatible chat server in this process, which misbehaves as it is told."""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SHUT_RDWR
from typing import Any

Body = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """A request: its number from 0 on, which attempt of this content it is, and its JSON."""

    number: int
    attempt: int
    body: Body


# How a request is answered; None: as it should be. See ``_Handler.misbehave`` for the words.
Manners = Callable[[Call], str | None]
# The answer's text, and the probabilities of its first tokens (None: no log-probs)
Reply = Callable[[Body], tuple[str, dict[str, float] | None]]

TROUBLES = ("429", "429 0.01", "500", "503", "malformed", "cut", "drop", "no choices", "slow")


def judge_reply(body: Body) -> tuple[str, dict[str, float] | None]:
    """An opinion on "m" and "M" that depends on the text of the request alone."""
    p = 0.02 + 0.96 * fraction(content_of(body))
    return ("m" if p >= 0.5 else "M"), {"m": 0.98 * p, "M": 0.98 * (1 - p), "Both": 0.01}


def always(*manners: str | None) -> Manners:
    """The first attempts of every content as named, the last of them from then on."""
    return lambda call: manners[min(call.attempt, len(manners) - 1)]


def troubled(call: Call) -> str | None:
    """Up to three troubles, of kinds that depend on the content, before every answer."""
    seed = hashlib.sha256(content_of(call.body).encode()).digest()
    if call.attempt >= seed[0] % 4:
        return "slow" if seed[4] % 2 else None
    return TROUBLES[seed[1 + call.attempt] % len(TROUBLES)]


def content_of(body: Body) -> str:
    """What tells requests apart at this server."""
    return json.dumps([body["model"], body["messages"]])


def fraction(text: str) -> float:
    """A number in [0, 1) from a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) / 2**32


class FakeChatAPI(ThreadingHTTPServer):
    """Answers ``/v1/chat/completions`` by `judge_reply`, from a hash of the messages.

    Attributes:
        url: Its ``base_url``.
        manners: How it behaves.
        reply: What it answers.
        slowness: Seconds that a slow answer takes.
        elsewhere: Where it redirects to.
        requests: Content -> how often it was asked for.
        answered: Content -> how often it was sent whole, with status 200 and a good body.
        bodies: All requests, in their order.
        headers: Their headers.
        times: When they came, in seconds.
        most: Most requests it had at once.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.manners: Manners = lambda call: None
        self.reply: Reply = judge_reply
        self.slowness = 0.05
        self.elsewhere = ""
        self.requests: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.bodies: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.now = self.most = 0
        self.lock = threading.Lock()
        self.gone = threading.Event()
        self.sockets: set[Any] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of connections that were cut."""

    def close(self) -> None:
        self.gone.set()
        self.shutdown()
        self.server_close()
        for each in list(self.sockets):
            _cut(each)


@contextmanager
def serving() -> Iterator[FakeChatAPI]:
    """A fake server that answers until the block ends."""
    server = FakeChatAPI()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join()


def _cut(connection: Any) -> None:
    with suppress(OSError):  # it had ended by itself
        connection.shutdown(SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    server: FakeChatAPI
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        self.server.sockets.add(self.request)
        super().setup()

    def finish(self) -> None:
        self.server.sockets.discard(self.request)
        super().finish()

    def log_message(self, *args: Any) -> None:
        """Says nothing."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server = self.server
        if self.path != "/v1/chat/completions":
            self.send({"error": {"message": "no such path"}}, 404)
            return
        content = content_of(body)
        with server.lock:
            call = Call(len(server.bodies), server.requests[content], body)
            server.requests[content] += 1
            server.bodies.append(body)
            server.headers.append({k.lower(): v for k, v in self.headers.items()})
            server.times.append(time.monotonic())
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            self.act(call, server.manners(call))
        finally:
            with server.lock:
                server.now -= 1

    def act(self, call: Call, manner: str | None) -> None:
        good = self.good(call.body)
        if manner == "slow":
            time.sleep(self.server.slowness)
        elif manner is not None:
            self.misbehave(manner, good)
            return
        with self.server.lock:  # before it is sent: the client may look as soon as it has it
            self.server.answered[content_of(call.body)] += 1
        self.send(good)

    def misbehave(self, manner: str, good: Body) -> None:
        """``hang``, ``drop``, ``cut`` (half a body), ``malformed``, ``no choices``,
        ``no content``, ``null content``, ``deep`` (JSON that no parser follows), ``quota``,
        ``echo`` (401 that repeats the key), ``redirect`` (to ``elsewhere``), or a status with an
        optional Retry-After, such as ``429 0.5``."""
        key = self.headers.get("authorization", "")
        if manner == "hang":
            self.server.gone.wait(60)
        elif manner == "drop":
            self.close_connection = True
            _cut(self.request)
        elif manner == "cut":
            data = json.dumps(good)
            self.send(data[: len(data) // 2], length=len(data))
            self.close_connection = True
            _cut(self.request)
        elif manner == "malformed":
            self.send('{"choices": [{"mess')
        elif manner == "deep":
            self.send("[" * 200_000)
        elif manner == "redirect":
            self.send("", 308, headers={"location": self.server.elsewhere})
        elif manner == "no choices":
            self.send({"error": {"message": "try again", "code": 502}})
        elif manner in ("no content", "null content"):
            message = {"role": "assistant"} | ({"content": None} if "null" in manner else {})
            reason = "content_filter" if "null" in manner else "stop"
            self.send({"choices": [{"message": message, "finish_reason": reason}]})
        elif manner == "quota":
            self.send({"error": {"message": "no credit", "code": "insufficient_quota"}}, 429)
        elif manner == "echo":
            self.send({"error": {"message": f"wrong key: {key} in {self.headers}"}}, 401)
        else:
            status, _, retry_after = manner.partition(" ")
            headers = {"retry-after": retry_after} if retry_after else {}
            self.send({"error": {"message": "this is why"}}, int(status), headers=headers)

    def good(self, body: Body) -> Body:
        text, probabilities = self.server.reply(body)
        log_probs = None
        if body.get("logprobs") and probabilities is not None:
            likely = sorted(probabilities.items(), key=lambda item: -item[1])
            top = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in likely]
            log_probs = {"content": [top[0] | {"top_logprobs": top[: body["top_logprobs"]]}]}
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "logprobs": log_probs,
            "finish_reason": "length" if body.get("max_tokens") == 1 else "stop",
        }
        usage = {"prompt_tokens": 100, "completion_tokens": len(text.split())}
        return {"object": "chat.completion", "model": "fake", "choices": [choice], "usage": usage}

    def send(
        self,
        content: Body | str,
        status: int = 200,
        *,
        length: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(length or len(data)))
        self.end_headers()
        self.wfile.write(data)
