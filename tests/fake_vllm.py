"""A server in this process that answers like ``vllm serve``, and misbehaves as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SHUT_RDWR
from typing import Any

from safetensors.torch import load_file

# (number of the completion request, from 0 on; its body) -> how to answer it; None: as asked
Manners = Callable[[int, dict[str, Any]], str | None]
CONFIG = {"logprobs_mode": "processed_logprobs", "generation_config": "vllm", "max_model_len": 64}


class FakeVLLM(ThreadingHTTPServer):
    """Its "model" answers the number in its weights, then digits of the seed, then the stop token.

    Attributes:
        manners: How it behaves.
        model_config: What it says of itself.
        number: Its weights.
        version: The name they were given.
        bodies: The completion requests so far.
        loads: Folders it was told to load.
        most: Most requests it had at once.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.manners: Manners = lambda number, body: None
        self.model_config: dict[str, Any] = dict(CONFIG)
        self.number, self.version = 0, "default"
        self.bodies: list[dict[str, Any]] = []
        self.loads: list[str] = []
        self.now = self.most = 0
        self.lock = threading.Lock()
        self.sockets: set[Any] = set()
        self.gone = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of connections that were cut."""

    def kill(self) -> None:
        """Ends at once: what it has not answered is never answered."""
        self.gone.set()
        self.shutdown()
        self.server_close()
        for each in list(self.sockets):
            cut(each)


@contextmanager
def serving(port: int = 0) -> Iterator[FakeVLLM]:
    """A fake server that answers until the block ends."""
    server = FakeVLLM(port)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        if not server.gone.is_set():
            server.kill()
        thread.join()


def cut(connection: Any) -> None:
    with suppress(OSError):  # it had ended by itself
        connection.shutdown(SHUT_RDWR)


def completion(number: int, body: dict[str, Any]) -> list[int]:
    """The tokens of the "model" with this number in its weights."""
    digits = [10 + int(digit) for digit in str(body["seed"])[:3]]
    return [20 + number, *digits, *body["stop_token_ids"][:1]][: body["max_tokens"]]


class _Handler(BaseHTTPRequestHandler):
    server: FakeVLLM

    def setup(self) -> None:
        self.server.sockets.add(self.request)
        super().setup()

    def log_message(self, *args: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        if self.path.startswith("/server_info"):
            config = {"model_config": self.server.model_config, "weight_transfer_config": None}
            self.answer({"vllm_config": config})
        elif self.path == "/weight_info":
            self.answer({"weight_version": self.server.version})
        else:
            self.answer({"detail": "Not Found"}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])) or b"null")
        server = self.server
        if self.path == "/v1/completions":
            with server.lock:
                number = len(server.bodies)
                server.bodies.append(body)
                server.now += 1
                server.most = max(server.most, server.now)
            self.complete(server.manners(number, body), body)
            with server.lock:
                server.now -= 1
        elif self.path == "/collective_rpc":
            folder = body["kwargs"]["weights_path"]
            server.loads.append(folder)
            weights = load_file(Path(folder) / "model-00001.safetensors")
            if "number" not in weights:
                self.answer({"error": {"message": "no module named 'foo'"}}, 500)
                return
            server.number = int(weights["number"])
            self.answer({"results": [None]})
        elif self.path.startswith("/reset_prefix_cache"):
            self.answer({"success": True})
        elif self.path == "/update_weight_version":
            server.version = body["new_version"]
            self.answer({"success": True})

    def complete(self, manner: str | None, body: dict[str, Any]) -> None:
        token_ids = completion(self.server.number, body)
        reason = "length" if len(token_ids) == body["max_tokens"] else "stop"
        log_probs = {"token_logprobs": [-0.5] * len(token_ids)}
        choice = {"token_ids": token_ids, "finish_reason": reason, "logprobs": log_probs}
        if manner == "hang":
            self.server.gone.wait(60)
            return
        elif manner == "slow":
            time.sleep(0.1)
        elif manner == "drop":
            cut(self.request)
            return
        elif manner == "garbage":
            self.answer('{"choices": [{"tok')
            return
        elif manner == "abort":
            choice["finish_reason"] = "abort"
        elif manner == "short":
            choice["token_ids"] = token_ids[:1]
        elif manner == "other form":
            choice = {"text": "w5"}
        elif manner in ("400", "500"):
            self.answer({"error": {"message": "this is why"}}, int(manner))
            return
        self.answer({"choices": [choice]})
        if manner == "twice":
            self.answer({"choices": [choice]})

    def answer(self, content: Any, status: int = 200) -> None:
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
