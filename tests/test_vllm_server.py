"""The engine on ``vllm serve`` endpoints, against servers in this process that misbehave."""

from __future__ import annotations

import asyncio
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import FakeVLLM, completion, serving
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from prefopt.errors import PrefoptError
from prefopt.rollout import Completion, SamplingSettings
from prefopt.rollout.dispatch import Patience, ServerLostError, answers
from prefopt.rollout.transfer import write_weights
from prefopt.rollout.vllm_server import VLLMServerEngine, request_body

EOS = 2
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
SETTINGS = SamplingSettings(max_new_tokens=8, samples_per_prompt=4, seed=3)


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token=f"w{EOS}")


@pytest.fixture
def two() -> Iterator[tuple[FakeVLLM, FakeVLLM]]:
    with serving() as first, serving() as second:
        yield first, second


@pytest.fixture
def one() -> Iterator[FakeVLLM]:
    with serving() as server:
        yield server


def make_engine(folder: Path, *servers: FakeVLLM | str, **options: Any) -> VLLMServerEngine:
    defaults = {"request_timeout": 5.0, "server_timeout": 5.0, "context_length": 64}
    return VLLMServerEngine(
        [server if isinstance(server, str) else server.url for server in servers],
        make_tokenizer(),
        stop_token_ids=[EOS],
        weights_dir=folder,
        **{**defaults, **options},
    )


def expected(number: int = 0, settings: SamplingSettings = SETTINGS) -> list[list[list[int]]]:
    """What a server with these weights answers to PROMPTS."""
    samples = range(settings.samples_per_prompt)
    return [
        [completion(number, request_body(p, settings, k, [EOS])) for k in samples] for p in PROMPTS
    ]


def ids(completions: list[list[Completion]]) -> list[list[list[int]]]:
    return [[each.token_ids for each in group] for group in completions]


def asked(*servers: FakeVLLM) -> Counter[int]:
    """How often each sample was asked for: its seed tells it from all others."""
    return Counter(body["seed"] for server in servers for body in server.bodies)


def wait_until(true: Callable[[], object]) -> None:
    """Waits up to ten seconds."""
    end = time.monotonic() + 10
    while not true() and time.monotonic() < end:
        time.sleep(0.01)


def weights(number: int) -> list[tuple[str, Tensor]]:
    return [("number", torch.tensor(float(number)))]


def test_completions_come_in_order_and_each_prompt_is_told_of_once(
    two: tuple[FakeVLLM, FakeVLLM], tmp_path: Path
) -> None:
    engine = make_engine(tmp_path, *two)
    told: dict[int, Any] = {}

    def done(index: int, group: list[Completion]) -> None:
        assert threading.current_thread() is threading.main_thread()
        assert index not in told
        told[index] = group

    found = engine.generate(PROMPTS, SETTINGS, done=done)
    assert ids(found) == expected()
    assert told == dict(enumerate(found))
    assert {each.finish_reason for each in chain(*found)} == {"stop"}
    assert {each.log_prob for each in chain(*found)} == {-2.5}
    assert set(asked(*two).values()) == {1}
    assert engine.generate([], SETTINGS) == []


def test_settings_of_its_own_for_each_prompt(one: FakeVLLM, tmp_path: Path) -> None:
    each = [
        SamplingSettings(max_new_tokens=2, samples_per_prompt=3),
        SamplingSettings(max_new_tokens=8, temperature=0.5, top_k=3, seed=9),
        SamplingSettings(max_new_tokens=8, temperature=0, top_p=0.5, samples_per_prompt=2),
    ]
    found = make_engine(tmp_path, one).generate(PROMPTS, each)
    assert [len(group) for group in found] == [3, 1, 2]
    assert [{len(c.token_ids) for c in group} for group in found] == [{2}, {5}, {5}]
    assert {c.finish_reason for c in found[0]} == {"length"}
    assert math.isnan(found[1][0].log_prob), "what top_k cuts off changes the log-prob"
    assert [c.log_prob for c in found[2]] == [-2.5, -2.5], "greedy completions are not cut"


def test_a_request_leaves_nothing_to_the_servers_defaults() -> None:
    settings = SamplingSettings(max_new_tokens=7, temperature=0.5, top_p=0.9, top_k=4, seed=1)
    body = request_body([5, 6], settings, 0, [2, 3])
    assert 0 <= body.pop("seed") < 2**63
    assert body == {
        "prompt": [5, 6],
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": [2, 3],
        "ignore_eos": True,
        "watermarking": False,
        "return_token_ids": True,
        "logprobs": 0,
    }


def test_a_sample_has_a_seed_of_its_own() -> None:
    eight = SamplingSettings(samples_per_prompt=8)
    later = SamplingSettings(samples_per_prompt=4, first_sample=4)
    seeds = [request_body([5], eight, k, [])["seed"] for k in range(8)]
    assert [request_body([5], later, k, [])["seed"] for k in range(4)] == seeds[4:]
    others = [
        request_body([5, 5], eight, 0, []),
        request_body([5], SamplingSettings(seed=1), 0, []),
    ]
    assert len({*seeds, *(body["seed"] for body in others)}) == 10


@pytest.mark.parametrize("manner", ["500", "drop", "garbage", "abort", "hang", "twice", "slow"])
def test_every_sample_is_answered_once_whatever_a_server_does(
    manner: str, two: tuple[FakeVLLM, FakeVLLM], tmp_path: Path
) -> None:
    engine = make_engine(tmp_path, *two, request_timeout=1.0)
    for server in two:
        server.manners = lambda number, body: manner if number in (1, 3) else None
    told: list[int] = []
    begun = time.perf_counter()
    found = engine.generate(PROMPTS, SETTINGS, done=lambda index, group: told.append(index))
    assert time.perf_counter() - begun < 20, "a time-out is kept"
    assert ids(found) == expected()
    assert sorted(told) == [0, 1, 2]
    again = sum(asked(*two).values()) - 12
    assert again == 0 if manner in ("twice", "slow") else again > 0


def test_the_only_server_is_lost_and_comes_back(one: FakeVLLM, tmp_path: Path) -> None:
    one.manners = lambda number, body: "drop" if number < 3 else None
    assert ids(make_engine(tmp_path, one).generate(PROMPTS, SETTINGS)) == expected()


def test_what_a_lost_server_had_goes_to_the_others_however_long_it_is_away(
    two: tuple[FakeVLLM, FakeVLLM], tmp_path: Path
) -> None:
    engine = make_engine(tmp_path, *two, server_timeout=0.2, concurrency=1)
    two[0].manners = lambda number, body: "hang"
    two[1].manners = lambda number, body: wait_until(lambda: two[0].bodies) or "slow"
    killer = threading.Thread(target=lambda: wait_until(lambda: two[0].bodies) or two[0].kill())
    killer.start()
    found = engine.generate(PROMPTS, SETTINGS)
    killer.join()
    assert ids(found) == expected()
    assert two[0].bodies
    assert len(asked(two[1])) == 12


def test_load_is_spread_and_bounded(two: tuple[FakeVLLM, FakeVLLM], tmp_path: Path) -> None:
    settings = SamplingSettings(max_new_tokens=8, samples_per_prompt=8)
    for server in two:
        server.manners = lambda number, body: wait_until(lambda: len(asked(*two)) == 24)
    make_engine(tmp_path, *two).generate(PROMPTS, settings)
    assert [server.most for server in two] == [12, 12]
    for server in two:
        server.bodies.clear()
        server.most = 0
    two[0].manners = lambda number, body: "slow"
    two[1].manners = lambda number, body: wait_until(lambda: len(two[0].bodies) > 2)
    make_engine(tmp_path, *two, concurrency=3).generate(PROMPTS, settings)
    assert two[0].most == 3
    assert two[1].most <= 3
    assert len(two[1].bodies) > len(two[0].bodies) > 0, "the faster one answers more"


def test_a_refusal_ends_the_call_at_once_with_the_servers_words(
    two: tuple[FakeVLLM, FakeVLLM], tmp_path: Path
) -> None:
    two[0].manners = lambda number, body: "hang"
    two[1].manners = lambda number, body: "400" if number == 2 else None
    begun = time.perf_counter()
    with pytest.raises(PrefoptError, match=rf"{two[1].url}/v1/completions .* 400: .*this is why"):
        make_engine(tmp_path, *two).generate(PROMPTS, SETTINGS)
    assert time.perf_counter() - begun < 2, "nobody waits for what hangs"


def test_an_error_of_the_caller_ends_the_call_at_once(
    two: tuple[FakeVLLM, FakeVLLM], tmp_path: Path
) -> None:
    two[0].manners = lambda number, body: "hang" if number > 1 else None

    def done(index: int, group: list[Completion]) -> None:
        raise KeyError(index)

    begun = time.perf_counter()
    with pytest.raises(KeyError):
        make_engine(tmp_path, *two).generate([*PROMPTS, [7]], SETTINGS, done=done)
    assert time.perf_counter() - begun < 2


def test_a_request_that_always_fails_is_an_error(one: FakeVLLM, tmp_path: Path) -> None:
    poison = request_body(PROMPTS[1], SETTINGS, 2, [EOS])["seed"]
    one.manners = lambda number, body: "500" if body["seed"] == poison else None
    with pytest.raises(PrefoptError, match=r"same request failed 5 times.*this is why"):
        make_engine(tmp_path, one, server_timeout=60).generate(PROMPTS, SETTINGS)
    assert asked(one)[poison] == 5


def test_no_server_left_is_an_error_that_names_all_of_them(
    two: tuple[FakeVLLM, FakeVLLM], tmp_path: Path
) -> None:
    engine = make_engine(tmp_path, *two, server_timeout=0.5)
    for server in two:
        server.kill()
    with pytest.raises(PrefoptError, match=rf"for 0.5 s: {two[0].url}.*{two[1].url}.*checkpoint"):
        engine.generate(PROMPTS, SETTINGS)


@pytest.mark.parametrize(
    ("manner", "message"),
    [
        ("short", "ended a completion after 1 tokens, expected one of 8"),
        ("other form", r"answered without \('finish_reason',\), which vLLM 0.31 has"),
    ],
)
def test_completions_of_another_shape_are_refused(
    manner: str, message: str, one: FakeVLLM, tmp_path: Path
) -> None:
    one.manners = lambda number, body: manner
    with pytest.raises(PrefoptError, match=message):
        make_engine(tmp_path, one).generate(PROMPTS, SETTINGS)


@pytest.mark.parametrize("temperature", [0.009, 2.1])
def test_temperatures_that_vllm_changes_or_refuses(
    temperature: float, one: FakeVLLM, tmp_path: Path
) -> None:
    engine = make_engine(tmp_path, one)
    with pytest.raises(
        PrefoptError, match=f"temperature is {temperature}, expected 0 .* 0.01 to 2"
    ):
        engine.generate(PROMPTS, [SETTINGS, SETTINGS, SamplingSettings(8, temperature)])
    assert not one.bodies


def test_prompts_are_checked_before_anything_is_asked(one: FakeVLLM, tmp_path: Path) -> None:
    engine = make_engine(tmp_path, one, context_length=12)
    with pytest.raises(PrefoptError, match="prompt 1 has 5 tokens"):
        engine.generate([[5], [5] * 5], SETTINGS)
    with pytest.raises(PrefoptError, match="prompt 0 is empty"):
        engine.generate([[]], SETTINGS)
    assert not one.bodies


def test_pushed_weights_are_loaded_by_all_and_only_the_last_stay_on_disk(
    two: tuple[FakeVLLM, FakeVLLM], tmp_path: Path
) -> None:
    engine = make_engine(tmp_path, *two)
    for number in (1, 2):
        engine.push(iter(weights(number)))
        assert [server.number for server in two] == [number, number]
        assert ids(engine.generate(PROMPTS, SETTINGS)) == expected(number)
    assert [len(server.loads) for server in two] == [2, 2], "what is in place is not loaded again"
    [folder] = tmp_path.iterdir()
    assert load_file(folder / "model-00001.safetensors")["number"] == 2


def test_a_restarted_server_gets_the_last_weights_before_it_is_asked(
    one: FakeVLLM, tmp_path: Path
) -> None:
    with ExitStack() as servers:
        first = servers.enter_context(serving())
        engine = make_engine(tmp_path, first)
        engine.push(weights(1))
        first.kill()
        second = servers.enter_context(serving(first.server_port))
        assert ids(engine.generate(PROMPTS, SETTINGS)) == expected(1)  # between two calls

        second.manners = lambda number, body: "hang" if number >= 15 else None

        def restart() -> None:
            wait_until(lambda: second.bodies[15:])
            second.kill()
            servers.enter_context(serving(first.server_port))

        restarting = threading.Thread(target=restart)
        restarting.start()
        assert ids(engine.generate(PROMPTS, SETTINGS)) == expected(1)  # within one
        restarting.join()


def test_a_restarted_server_is_checked_like_a_new_one(one: FakeVLLM, tmp_path: Path) -> None:
    engine = make_engine(tmp_path, one)
    engine.push(weights(1))
    one.kill()
    with serving(one.server_port) as restarted:
        restarted.model_config["logprobs_mode"] = "raw_logprobs"
        with pytest.raises(PrefoptError, match="logprobs_mode raw_logprobs"):
            engine.generate(PROMPTS, SETTINGS)
        assert not restarted.bodies


def test_a_server_that_is_lost_at_a_push_gets_the_weights_when_it_is_back(
    two: tuple[FakeVLLM, FakeVLLM], tmp_path: Path
) -> None:
    engine = make_engine(tmp_path, *two)
    two[0].kill()
    engine.push(weights(4))
    with serving(two[0].server_port) as back:
        assert ids(engine.generate(PROMPTS, SETTINGS)) == expected(4)
        assert len(back.bodies) + len(two[1].bodies) == 12


def test_weights_that_a_server_cannot_load_are_an_error(one: FakeVLLM, tmp_path: Path) -> None:
    engine = make_engine(tmp_path, one)
    with pytest.raises(PrefoptError, match=r"500: .*'foo'.*expected it to load .*pushed-"):
        engine.push([("foo", torch.zeros(2))])


def test_weights_are_iterated_over_to_the_end_even_where_they_cannot_be_written(
    one: FakeVLLM, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    engine = make_engine(tmp_path / "file", one)
    remaining = iter([*weights(1), ("more", torch.zeros(2))])
    with pytest.raises(PrefoptError, match=r"not taken over: .*Not a directory"):
        engine.push(remaining)
    assert list(remaining) == []


WORKER = """
import json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from accelerate import PartialState
from test_vllm_server import PROMPTS, SETTINGS, ids, make_engine
from prefopt.errors import PrefoptError

PartialState(cpu=True)
engine = make_engine(Path(sys.argv[1]), sys.argv[2])

def weights(name, number):
    for _ in range(3):
        part = torch.tensor(number / 2)
        dist.all_reduce(part)  # as FSDP: it takes both processes
        yield name, part

engine.push(weights("number", 6.0))
found = ids(engine.generate(PROMPTS, SETTINGS))
try:
    engine.push(weights("foo", 7.0))
    problem = ""
except PrefoptError as error:
    problem = str(error)
(Path(sys.argv[1]) / f"found-{os.environ['RANK']}").write_text(json.dumps([found, problem]))
dist.destroy_process_group()
"""


@pytest.mark.slow  # two interpreters that import torch and transformers
def test_one_of_two_processes_sends_and_both_know(one: FakeVLLM, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = str(Path(__file__).parent)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, tmp_path, one.url],
            env=os.environ
            | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "PYTHONPATH": here}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
        )
        for rank in ("0", "1")
    ]
    try:
        assert [worker.wait(120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    for rank in (0, 1):
        found, problem = json.loads((tmp_path / f"found-{rank}").read_text())
        assert found == expected(6)
        assert "expected it to load" in problem
    assert len(one.loads) == 2
    assert set(asked(one).values()) == {2}


def test_weights_are_written_in_shards_and_tied_ones_under_both_names(tmp_path: Path) -> None:
    tied = torch.randn(4, 3)
    state = {"a": tied, "head": tied, "b": torch.randn(3, 4).T, "c": torch.randn(5)}
    state["large"] = torch.randn(99)
    write_weights(tmp_path / "new", state.items(), shard_bytes=100)
    files = sorted((tmp_path / "new").iterdir())
    assert [sorted(load_file(file)) for file in files] == [["a", "head"], ["b", "c"], ["large"]]
    for name, tensor in chain(*(load_file(file).items() for file in files)):
        assert torch.equal(tensor, state[name])


def test_a_server_that_is_not_there_is_named_with_the_command_that_starts_it(
    one: FakeVLLM, tmp_path: Path
) -> None:
    one.kill()
    command = rf"VLLM_SERVER_DEV_MODE=1 vllm serve MODEL .*--port {one.server_port} "
    with pytest.raises(PrefoptError, match=rf"{one.url}.*within 0.3 s: start it with: {command}"):
        make_engine(tmp_path, one, server_timeout=0.3)


def test_a_server_may_come_late(one: FakeVLLM, tmp_path: Path) -> None:
    one.kill()
    with ExitStack() as servers:
        late = threading.Timer(0.4, lambda: servers.enter_context(serving(one.server_port)))
        late.start()
        assert ids(make_engine(tmp_path, one).generate(PROMPTS, SETTINGS)) == expected()
        late.join()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"logprobs_mode": "raw_logprobs"}, "logprobs_mode raw_logprobs, not processed_logprobs"),
        ({"generation_config": "auto"}, "generation_config auto, not vllm; start it with"),
        ({"max_model_len": 63}, "holds 63 tokens, .* have up to 64; .*--max-model-len 64"),
    ],
)
def test_servers_started_otherwise_are_refused(
    config: dict[str, Any], message: str, one: FakeVLLM, tmp_path: Path
) -> None:
    one.model_config |= config
    with pytest.raises(PrefoptError, match=message):
        make_engine(tmp_path, one)


def test_a_server_without_development_endpoints_is_refused(one: FakeVLLM, tmp_path: Path) -> None:
    with pytest.raises(PrefoptError, match=r"no development endpoints: .*404.*DEV_MODE=1"):
        make_engine(tmp_path, f"{one.url}/other")


@pytest.mark.parametrize("url", ["localhost:8000", "127.0.0.1", "ftp://host", "http://[::1"])
def test_addresses_are_checked(url: str, tmp_path: Path) -> None:
    with pytest.raises(PrefoptError, match="is no address"):
        make_engine(tmp_path, url)
    with pytest.raises(PrefoptError, match="no servers"):
        make_engine(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_nccl_needs_a_cuda_device(one: FakeVLLM, tmp_path: Path) -> None:
    with pytest.raises(PrefoptError, match="nccl, which needs a CUDA device"):
        make_engine(tmp_path, one, transfer="nccl")


def test_an_answer_that_comes_after_its_question_was_given_up_is_not_read() -> None:
    """The first question hangs on to its answer; the second loses the server they both are at."""
    questions: list[int] = []
    cancelled: list[int] = []

    async def ask(client: Any, url: str, number: int) -> str:
        questions.append(number)
        if len(questions) > 2:
            return "in time"
        if number == 1:
            await asyncio.sleep(0.05)
            raise ServerLostError("lost")
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            cancelled.append(number)
            return "late"
        return "never"

    async def prepare(client: Any, url: str) -> None:
        """There is nothing to do."""

    found = list(answers(["a"], 2, ask, prepare, Patience(5, 5, 5)))
    assert sorted(found) == [(0, "in time"), (1, "in time")]
    assert sorted(questions) == [0, 0, 1, 1]
    assert cancelled == [0], "the server need not go on with it"


def test_a_server_that_had_nothing_to_do_is_prepared_again_before_it_is_asked() -> None:
    """It may have been restarted meanwhile, and no connection told of it."""
    events: list[str] = []

    async def ask(client: Any, url: str, number: int) -> int:
        events.append(f"ask {url}")
        await asyncio.sleep(0.3 if url == "b" else 0.05)
        if events.count("ask b") == 1 and url == "b":
            raise ServerLostError("lost")
        return number

    async def prepare(client: Any, url: str) -> None:
        if events.count("ask b") and url == "b":
            raise ServerLostError("still lost")
        events.append(f"prepare {url}")

    found = dict(answers(["a", "b"], 2, ask, prepare, Patience(5, 5, 5)))
    assert found == {0: 0, 1: 1}
    assert events == ["prepare a", "prepare b", "ask a", "ask b", "prepare a", "ask a"]
