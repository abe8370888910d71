"""What only a CUDA device can show: the variable-length kernel, half precision, and memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from prefopt.data.tree import Layout, PromptTree, collate_trees
from prefopt.models import attention
from prefopt.models.forward import enable_trees
from prefopt.models.logprobs import LogitTransform, sequence_log_probs, token_log_probs
from prefopt.reward_models.rule import RuleJudge
from prefopt.rollout.engine import SamplingSettings
from prefopt.trainers.base import TreeDataset
from prefopt.trainers.dpo import DPOConfig, DPOTrainer
from prefopt.trainers.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from prefopt.world.grammar import draw_prompt
from prefopt.world.tokenizer import world_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDE = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 1024}
EVERY_RUN: dict[str, Any] = {
    "bf16": True,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def answers(
    model: LlamaForCausalLM, trees: Sequence[PromptTree], layout: Layout
) -> tuple[Tensor, Tensor]:
    """Log-probs of the completions, and the gradient of their weighted sum, on the CPU."""
    model.zero_grad()
    log_probs = sequence_log_probs(model, collate_trees(trees, layout=layout).to(model.device))
    weights = torch.arange(1, len(log_probs) + 1, device=log_probs.device)
    (log_probs * weights).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return log_probs.detach().cpu(), gradient.double().cpu()


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_trees_in_one_flash_call_are_separate_rows(tiny_llama, random_trees, monkeypatch) -> None:
    """In bfloat16, trees are no further from float32 than separate rows are."""
    calls: list[int] = []
    flash = attention._varlen
    monkeypatch.setattr(attention, "_varlen", lambda *a: calls.append(1) or flash(*a))
    trees = random_trees([2, 3, 1, 2], prompt=200, completion=150)
    exact = tiny_llama(sharpness=1.5, **WIDE).cuda()
    enable_trees(exact)
    expected, expected_gradient = answers(exact, trees, "tree")
    assert not calls, "float32 has no flash attention"
    model = tiny_llama(sharpness=1.5, **WIDE).bfloat16().cuda()
    enable_trees(model)
    on_trees, tree_gradient = answers(model, trees, "tree")
    assert len(calls) == model.config.num_hidden_layers
    apart, row_gradient = answers(model, trees, "separate")
    assert distance(on_trees, expected) < 2 * distance(apart, expected) + 1e-3
    assert distance(tree_gradient, expected_gradient) < (
        2 * distance(row_gradient, expected_gradient) + 1e-3
    )
    assert distance(tree_gradient, row_gradient) < 0.1


def test_chunks_of_the_head_are_the_whole_head() -> None:
    torch.manual_seed(0)
    head = nn.Linear(64, 5000, bias=False).cuda()
    hidden = torch.randn(700, 64, device="cuda", requires_grad=True)
    targets = torch.randint(5000, (700,), device="cuda")
    found = token_log_probs(hidden, targets, head, LogitTransform(temperature=0.7), chunk=64)
    table = (head(hidden) / 0.7).log_softmax(-1)
    expected = table.gather(-1, targets[:, None])[:, 0]
    assert torch.allclose(found, expected, rtol=0, atol=1e-3)
    parts = [
        torch.autograd.grad(values.square().sum(), (hidden, head.weight))
        for values in (found, expected)
    ]
    for a, b in zip(*parts, strict=True):
        assert distance(a, b) < 1e-3


def test_the_head_never_holds_all_logits() -> None:
    tokens, vocabulary = 8192, 65536
    head = nn.Linear(64, vocabulary, bias=False, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(tokens, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    token_log_probs(hidden, targets, head, LogitTransform()).sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 0.75 * tokens * vocabulary * 4, f"{peak / 2**20:.0f} MiB"


def test_a_dpo_step_under_autocast(tiny_llama, random_trees, tmp_path: Path) -> None:
    model = tiny_llama(sharpness=2.0, **WIDE)
    start = [p.detach().clone() for p in model.parameters()]
    args = DPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=2, **EVERY_RUN
    )
    trainer = DPOTrainer(model, args, TreeDataset(random_trees([2] * 8, prompt=60, completion=40)))
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert trainer.layout == "tree"
    assert losses[0] == pytest.approx(0.6931, abs=0.02), "policy and reference begin as one"
    assert losses[1] != losses[0]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    moved = [not torch.equal(a, b.cpu()) for a, b in zip(start, model.parameters(), strict=True)]
    assert all(moved)


def test_a_round_of_online_dpo(tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> None:
    tokenizer = world_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **WIDE)
    source = Random(0)
    prompts = {str(p): p for p in (draw_prompt(source) for _ in range(40))}
    args = OnlineDPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        rounds=2,
        prompts_per_round=8,
        ties="keep",
        **EVERY_RUN,
    )
    trainer = OnlineDPOTrainer(
        model,
        args,
        [{"prompt": prompt} for prompt in prompts.values()],
        judge=RuleJudge(lambda prompts, completions: [float(len(c)) for c in completions]),
        sampling=SamplingSettings(max_new_tokens=16, samples_per_prompt=2),
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.state.global_step == 4
    assert [report["pairs"] for report in trainer.reports()] == [8, 8]
    assert all(p.isfinite().all() for p in model.parameters())
