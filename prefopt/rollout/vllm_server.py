"""Generation on stock ``vllm serve`` endpoints, over HTTP: one request a sample.

A server that is lost is tried again, and what it had not answered is asked again; see
``dispatch``. Every push has a version of its own, which a server forgets when it is restarted:
one that does not name the last version gets the weights once more before it is asked anything.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from uuid import uuid4

import httpx
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from prefopt.errors import PrefoptError
from prefopt.rollout import dispatch, transfer
from prefopt.rollout.dispatch import Patience, ServerLostError
from prefopt.rollout.engine import (
    Completion,
    Done,
    SamplingSettings,
    check_prompts,
    make_completion,
    settings_of_each,
)
from prefopt.rollout.vllm_requests import (
    Gathered,
    check_temperatures,
    sampling_options,
    whole_distribution,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

T = TypeVar("T")

SERVED_WITH = {"logprobs_mode": "processed_logprobs", "generation_config": "vllm"}
OF_ITS_OWN = {  # what a request leaves open, a server fills in from its own defaults
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_p": 0.0,
    "watermarking": False,
}


class VLLMServerEngine:
    """Draws completions on vLLM servers that hold the policy's weights of the last push.

    Until the first push the weights are whatever the servers have.

    Args:
        servers: Addresses such as "http://127.0.0.1:8000".
        tokenizer: Decodes completions.
        stop_token_ids: Tokens that end a completion.
        context_length: Tokens of the longest prompt and completion together.
        weights_dir: Where pushed weights are written: a folder that the servers see under the same
            path.
        transfer: "disk" writes the weights to ``weights_dir``, for the servers to read; "nccl"
            sends them from this process's CUDA device.
        request_timeout: Seconds within which a request is answered, or the server is lost.
        server_timeout: Seconds for which all servers may be away before that is an error.
        concurrency: Most requests that this process has in flight to a server.

    Raises:
        PrefoptError: A server cannot be reached within ``server_timeout``, was not started as
            it has to be, or holds sequences shorter than ``context_length`` only.
    """

    continuous = True
    elsewhere = True

    def __init__(
        self,
        servers: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_token_ids: Sequence[int],
        context_length: int,
        weights_dir: Path,
        transfer: Literal["disk", "nccl"] = "disk",
        request_timeout: float = 600.0,
        server_timeout: float = 600.0,
        concurrency: int = 64,
    ) -> None:
        self.servers = [_check_url(url) for url in servers]
        if not self.servers:
            raise PrefoptError("vllm: no servers, expected at least one address")
        if transfer == "nccl" and not torch.cuda.is_available():
            raise PrefoptError("vllm: transfer is nccl, which needs a CUDA device; choose disk")
        self.tokenizer = tokenizer
        self.stop_token_ids = list(stop_token_ids)
        self.context_length = context_length
        self.weights_dir = weights_dir.resolve()
        self.transfer = transfer
        self.patience = Patience(request_timeout, server_timeout, concurrency)
        self.version: str | None = None  # of the last push
        self.nccl_clients: list[Any] = []
        dispatch.on_each(self.servers, self._await_server)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings | Sequence[SamplingSettings],
        *,
        done: Done | None = None,
    ) -> list[list[Completion]]:
        """Draws completions; see ``Engine.generate``.

        ``Completion.log_prob`` is NaN where top_p or top_k cut anything off.

        Raises:
            PrefoptError: If a prompt is empty or too long, a temperature is one that vLLM does not
                take, a server refuses a request, or none answers any more.
        """
        each = settings_of_each(settings, len(prompts))
        check_prompts(prompts, each, self.context_length)
        check_temperatures(each)
        asked = [(i, k) for i, one in enumerate(each) for k in range(one.samples_per_prompt)]

        async def ask(client: httpx.AsyncClient, url: str, number: int) -> _Answer:
            index, sample = asked[number]
            body = request_body(prompts[index], each[index], sample, self.stop_token_ids)
            answer = await self._call(client, "POST", f"{url}/v1/completions", body)
            return _read_answer(url, answer, each[index], self.stop_token_ids)

        gathered = Gathered(each, done)
        with closing(self._answers(len(asked), ask)) as answers:
            for number, (token_ids, log_probs) in answers:
                completion = make_completion(
                    token_ids, self.stop_token_ids, self.tokenizer, log_probs
                )
                gathered.add(*asked[number], completion)
        return gathered.completions

    def log_probs(self, sequences: Sequence[Sequence[int]]) -> list[list[list[float]]]:
        """What every server says of the tokens but the first; see ``PushedEngine.log_probs``.

        A server that is lost at the moment is left out, unless all are: then they are waited for.

        Raises:
            PrefoptError: If a sequence is as long as a server's ``--max-model-len``, or none
                answers any more.
        """

        async def ask(client: httpx.AsyncClient, url: str, number: int) -> list[float]:
            body = {
                "prompt": list(sequences[number]),
                "max_tokens": 1,
                "temperature": 0.0,
                "prompt_logprobs": 0,
            }
            answer = await self._call(client, "POST", f"{url}/v1/completions", body)
            return _read_prompt_log_probs(url, answer, sequences[number])

        said: dict[str, list[list[float]]] = {}

        async def ask_all(client: httpx.AsyncClient, url: str) -> None:
            try:
                await self._prepare(client, url)
                said[url] = [await ask(client, url, n) for n in range(len(sequences))]
            except ServerLostError as loss:
                logger.warning("%s; its weights are not looked at", loss)

        dispatch.on_each(self.servers, ask_all)
        if said:
            return list(said.values())
        with closing(self._answers(len(sequences), ask)) as answers:
            found = dict(answers)
        return [[found[number] for number in range(len(sequences))]]

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Sends weights to all servers; all processes call this. See ``PushedEngine.push``.

        A server that is lost at that moment gets them before it is asked again.

        Raises:
            PrefoptError: They cannot be written, or a server cannot load them.
        """
        remaining = iter(weights)
        state = PartialState()
        version, problem = uuid4().hex, ""
        state.wait_for_everyone()  # nobody samples from the old weights any more
        if state.is_main_process:
            try:
                self._send(version, remaining, state.device)
            except Exception as error:  # noqa: BLE001 - TRL's client raises it bare
                problem = f"weights were not taken over: {error}"
        for _ in remaining:
            pass  # other processes take part in making them
        version, problem = broadcast_object_list([version, problem])
        if problem:
            raise PrefoptError(problem)
        self.version = version

    def release(self) -> None:
        """Does nothing: servers have devices of their own."""

    def _send(
        self, version: str, weights: Iterator[tuple[str, Tensor]], device: torch.device
    ) -> None:
        self.version = version
        if self.transfer == "disk":
            for old in self.weights_dir.glob("pushed-*"):
                shutil.rmtree(old)
            transfer.write_weights(self._pushed(), weights)
            dispatch.on_each(self.servers, self._try_to_prepare)
        else:
            self.nccl_clients = self.nccl_clients or transfer.connect_nccl(self.servers, device)
            transfer.send_nccl(self.nccl_clients, weights, device)
            dispatch.on_each(self.servers, self._name_version)

    def _pushed(self) -> Path:
        return self.weights_dir / f"pushed-{self.version}"

    def _answers(
        self, count: int, ask: Callable[[httpx.AsyncClient, str, int], Awaitable[T]]
    ) -> Generator[tuple[int, T], None, None]:
        return dispatch.answers(self.servers, count, ask, self._prepare, self.patience)

    async def _call(
        self, client: httpx.AsyncClient, method: str, url: str, body: object = None
    ) -> Any:
        return await dispatch.call(client, method, url, body, timeout=self.patience.request_timeout)

    async def _await_server(self, client: httpx.AsyncClient, url: str) -> None:
        try:
            await dispatch.wait_for(self._check, client, url, self.patience.server_timeout)
        except ServerLostError as loss:
            raise PrefoptError(
                f"vllm: {loss}; expected a server there within {self.patience.server_timeout:g} "
                f"s: {self._how_to_start(url)}"
            ) from None

    async def _check(self, client: httpx.AsyncClient, url: str) -> None:
        """Checks that a server was started as it has to be."""
        how = self._how_to_start(url)
        try:
            info = await self._call(client, "GET", f"{url}/server_info?config_format=json")
        except PrefoptError as error:
            raise PrefoptError(f"vllm: no development endpoints: {error}; {how}") from None
        config = _part(url, info, "vllm_config")
        for key, expected in SERVED_WITH.items():
            found = _part(url, config, "model_config", key)
            if found != expected:
                raise PrefoptError(f"vllm: {url} has {key} {found}, not {expected}; {how}")
        held = _part(url, config, "model_config", "max_model_len")
        if held < self.context_length:
            raise PrefoptError(
                f"vllm: {url} holds {held} tokens, prompts with completions have up to "
                f"{self.context_length}; {how}, or lower the lengths"
            )
        if self.transfer == "nccl" and _part(url, config, "weight_transfer_config") is None:
            raise PrefoptError(f"vllm: {url} does not take weights over NCCL; {how}")

    def _how_to_start(self, url: str) -> str:
        address = httpx.URL(url)
        nccl_flag = ' --weight-transfer-config \'{"backend": "nccl"}\''
        return (
            f"start it with: VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --host {address.host} "
            f"--port {address.port or 80} --generation-config vllm "
            f"--logprobs-mode processed_logprobs --max-model-len {self.context_length}"
            + (nccl_flag if self.transfer == "nccl" else "")
        )

    async def _prepare(self, client: httpx.AsyncClient, url: str) -> None:
        """Makes sure that a server is alive and has the weights of the last push."""
        info = await self._call(client, "GET", f"{url}/weight_info")
        if self.version is None or _part(url, info, "weight_version") == self.version:
            return
        await self._check(client, url)
        if self.transfer == "nccl":
            raise PrefoptError(
                f"vllm: {url} was restarted and has lost its weights, which NCCL brings only with "
                "the next push: go on from the last checkpoint, or use transfer disk"
            )
        await self._load(client, url)
        await self._name_version(client, url)

    async def _try_to_prepare(self, client: httpx.AsyncClient, url: str) -> None:
        try:
            await self._prepare(client, url)
        except ServerLostError as loss:
            logger.warning("%s; it gets the new weights when it is back", loss)

    async def _load(self, client: httpx.AsyncClient, url: str) -> None:
        path = self._pushed()
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
        try:
            await self._call(client, "POST", f"{url}/collective_rpc", body)
        except ServerLostError as loss:
            if not loss.answered:
                raise
            # An engine that died is lost; one that is alive will refuse the same weights again.
            await self._call(client, "GET", f"{url}/weight_info")
            raise PrefoptError(
                f"vllm: {loss}; expected it to load {path}: make sure that it sees this folder "
                "under this path and serves the model that is trained"
            ) from None
        # otherwise a block that is in use would be kept
        await self._call(client, "POST", f"{url}/reset_prefix_cache?reset_running_requests=true")

    async def _name_version(self, client: httpx.AsyncClient, url: str) -> None:
        await self._call(
            client, "POST", f"{url}/update_weight_version", {"new_version": self.version}
        )


_Answer = tuple[list[int], list[float] | None]  # token ids, their log-probs


def request_body(
    prompt: Sequence[int], settings: SamplingSettings, sample: int, stop_token_ids: Sequence[int]
) -> dict[str, Any]:
    """What is posted to ``/v1/completions`` for one sample.

    Args:
        prompt: Token ids.
        settings: How to draw it.
        sample: Which of the prompt's samples, from 0 on; ``first_sample`` is added.
        stop_token_ids: Tokens that end a completion.
    """
    options = sampling_options(prompt, settings, settings.first_sample + sample, stop_token_ids)
    return OF_ITS_OWN | options | {"prompt": list(prompt), "return_token_ids": True}


def _read_answer(
    url: str, answer: Any, settings: SamplingSettings, stop_token_ids: Sequence[int]
) -> _Answer:
    choice = _part(url, answer, "choices", 0)
    reason = _part(url, choice, "finish_reason")
    token_ids = list(_part(url, choice, "token_ids"))
    log_probs = list(_part(url, choice, "logprobs", "token_logprobs"))
    if reason not in ("stop", "length"):
        raise ServerLostError(f"{url} ended a completion with {reason!r}", answered=True)
    stopped = bool(token_ids) and token_ids[-1] in stop_token_ids
    if not (stopped or len(token_ids) == settings.max_new_tokens):
        raise PrefoptError(
            f"vllm: {url} ended a completion after {len(token_ids)} tokens, expected one of "
            f"{settings.max_new_tokens} or a stop token at its end: it has limits of its own"
        )
    return token_ids, log_probs if whole_distribution(settings) else None


def _read_prompt_log_probs(url: str, answer: Any, sequence: Sequence[int]) -> list[float]:
    found = _part(url, answer, "choices", 0, "prompt_logprobs")
    return [
        _part(url, found, position, str(token), "logprob")
        for position, token in enumerate(sequence)
        if position > 0
    ]


def _part(url: str, answer: Any, *path: str | int) -> Any:
    """What an answer has at a path."""
    try:
        for key in path:
            answer = answer[key]
    except (KeyError, IndexError, TypeError):
        raise PrefoptError(
            f"vllm: {url} answered without {path}, which vLLM 0.31 has: serve the model with a "
            "vLLM of about that version"
        ) from None
    return answer


def _check_url(url: str) -> str:
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise PrefoptError(f"vllm: {url!r} is no address ({error})") from None
    if address.scheme not in ("http", "https") or not address.host:
        raise PrefoptError(f"vllm: {url!r} is no address: expected one like http://127.0.0.1:8000")
    return url.rstrip("/")
