"""Fixtures that the tests of the core share: a tiny random model and random prompt trees."""

from __future__ import annotations

import os

# before transformers or trl are imported: no test may wait for a network or send telemetry
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TRL_EXPERIMENTAL_SILENCE="1")

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from prefopt.data.tree import PromptTree

VOCABULARY = 97


@pytest.fixture(scope="module")
def frozen_heap() -> Iterator[None]:
    """Every run begins with a garbage collection, a third of a second with all that is imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """Makes a random Llama of two layers in float32 whose attention is far from uniform."""

    def make(seed: int = 0, sharpness: float = 6.0, **config: Any) -> LlamaForCausalLM:
        shape = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape | config)).eval()
        return sharpen(model, sharpness)

    return make


@pytest.fixture
def random_trees() -> Callable[..., list[PromptTree]]:
    """Makes one tree of random ids and ragged lengths for each number of completions asked for."""

    def make(counts: Sequence[int], seed: int = 0, prompt: int = 14, completion: int = 11) -> Any:
        source = random.Random(seed)

        def ids(longest: int) -> list[int]:
            return [source.randrange(3, VOCABULARY) for _ in range(source.randint(1, longest))]

        return [PromptTree(ids(prompt), [ids(completion) for _ in range(n)]) for n in counts]

    return make


def sharpen(model: PreTrainedModel, factor: float) -> PreTrainedModel:
    """Scales all matrices up, so that a wrong attention pattern moves the numbers by nats."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(factor)
    return model
