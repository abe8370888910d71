"""The check that decides between trees and separate rows, and what it must notice."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from conftest import VOCABULARY, sharpen
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from prefopt.data.tree import PromptTree
from prefopt.errors import PrefoptError
from prefopt.models import attention
from prefopt.models.forward import enable_trees
from prefopt.models.layout_check import layout_for

SHORT = PromptTree([3, 4], [[5, 6], [7]])


def decide(model: nn.Module, trees: list[PromptTree], dtype: torch.dtype = torch.float32) -> str:
    enable_trees(model)
    return layout_for(model, trees, dtype)


def score_model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=1,
        pad_token_id=0,
    )
    return sharpen(transformers.AutoModelForSequenceClassification.from_config(config).eval(), 6.0)


def test_a_sound_model_runs_on_trees_without_a_word(tiny_llama, random_trees, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        assert decide(tiny_llama(), random_trees([2, 2, 3])) == "tree"
        assert decide(score_model(), random_trees([2, 2, 3])) == "tree"
    assert not caplog.records


def test_rounding_of_half_precision_is_no_reason_to_fall_back(tiny_llama, random_trees) -> None:
    model = tiny_llama(sharpness=1.0).bfloat16()
    assert decide(model, random_trees([2, 4]), torch.bfloat16) == "tree"


def test_scores_of_one_token_completions_are_not_taken_for_log_probs() -> None:
    assert decide(score_model(), [PromptTree([3, 4, 5], [[6], [7]])]) == "tree"


def leak_between_neighbours(model: LlamaForCausalLM) -> None:
    """A convolution over the row: the first token of a completion sees the one before it."""

    def mix(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + 0.5 * nn.functional.pad(output, (0, 0, 1, 0))[:, :-1]

    model.model.layers[0].mlp.register_forward_hook(mix)


def test_a_layer_that_mixes_positions_falls_back(tiny_llama, random_trees, caplog) -> None:
    model = tiny_llama()
    leak_between_neighbours(model)
    with caplog.at_level(logging.WARNING):
        assert decide(model, random_trees([3])) == "separate"
    (record,) = caplog.records
    assert "layout=separate" in record.getMessage()


def test_positions_that_a_model_ignores_fall_back(tiny_llama, random_trees, monkeypatch) -> None:
    model = tiny_llama()
    original = model.model.rotary_emb.forward

    def count_along_the_row(x: Tensor, position_ids: Tensor) -> Any:
        return original(x, torch.arange(position_ids.shape[1])[None])

    monkeypatch.setattr(model.model.rotary_emb, "forward", count_along_the_row)
    assert decide(model, random_trees([3])) == "separate"


def test_an_attention_without_the_prompt_falls_back(tiny_llama, random_trees, monkeypatch) -> None:
    original = attention._segments

    def forget_the_prompt(q: Tensor, k: Tensor, v: Tensor, tree_map: Any, *args: Any) -> Tensor:
        for segment in tree_map.segments:
            object.__setattr__(segment, "prefix_length", 0)
        return original(q, k, v, tree_map, *args)

    monkeypatch.setattr(attention, "_segments", forget_the_prompt)
    assert decide(tiny_llama(), random_trees([3])) == "separate"


def test_a_window_the_attention_is_not_told_of_shows_on_the_longest_tree() -> None:
    """PhiMoE puts its window into the mask alone; a tree shorter than the window looks fine."""
    config = transformers.PhimoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        sliding_window=8,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    sharpen(model, 6.0)
    long = PromptTree(range(3, 23), [range(30, 40), range(50, 60)])
    assert decide(model, [SHORT]) == "tree"
    assert decide(model, [SHORT, long, SHORT]) == "separate"


class Doubled(LlamaForCausalLM):
    """Does something to its logits that no config says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def test_logits_that_change_in_an_unknown_way_are_refused(tiny_llama, random_trees) -> None:
    model = tiny_llama()
    model.__class__ = Doubled
    with pytest.raises(PrefoptError, match=r"Doubled: log-probs .* nats a token") as caught:
        decide(model, random_trees([2]))
    assert "\n" not in str(caught.value)
