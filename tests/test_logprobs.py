"""Chunked log-probs against log_softmax over full logits, values, gradients and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import VOCABULARY
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prefopt.data.tree import PromptTree, collate_trees
from prefopt.models import logprobs
from prefopt.models.forward import enable_trees, logit_transform
from prefopt.models.logprobs import (
    LogitTransform,
    sequence_log_probs,
    token_log_probs,
    token_log_probs_of,
)

TOKENS, HIDDEN = 7, 5
TRANSFORMS = {
    "none": LogitTransform(),
    "scaled": LogitTransform(scale=0.3),
    "capped": LogitTransform(softcap=1.5),
    "both": LogitTransform(scale=2.0, softcap=3.0),
    "hot": LogitTransform(temperature=1.7),
    "all": LogitTransform(scale=2.0, softcap=3.0, temperature=0.6),
}


def inputs(
    bias: bool = True, dtype: torch.dtype = torch.float32, tokens: int = TOKENS
) -> tuple[Tensor, nn.Linear, Tensor]:
    """Hidden states, a head and targets; the first two targets are the same token."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN).to(dtype).requires_grad_()
    head = nn.Linear(HIDDEN, VOCABULARY, bias=bias)
    nn.init.normal_(head.weight)
    targets = torch.randint(0, VOCABULARY, (tokens,))
    targets[1] = targets[0]
    return hidden, head.to(dtype), targets


def expected(
    hidden: Tensor, head: nn.Linear, targets: Tensor, transform: LogitTransform, weights: Tensor
) -> dict[str, Tensor]:
    """Log-probs and the gradients of their weighted sum in float64, from full logits."""
    h, w = (t.detach().double().requires_grad_() for t in (hidden, head.weight))
    b = None if head.bias is None else head.bias.detach().double().requires_grad_()
    logits = nn.functional.linear(h, w, b) * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    logits = logits / transform.temperature
    log_probs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (log_probs * weights.double()).sum().backward()
    grads = {"hidden": h.grad, "weight": w.grad} | ({} if b is None else {"bias": b.grad})
    return {"log_probs": log_probs.detach()} | {k: g for k, g in grads.items() if g is not None}


def found(hidden: Tensor, head: nn.Module, log_probs: Tensor, weights: Tensor) -> dict[str, Tensor]:
    (log_probs * weights).sum().backward()
    grads = {"hidden": hidden.grad} | {name: p.grad for name, p in head.named_parameters()}
    return {"log_probs": log_probs.detach()} | {k: g for k, g in grads.items() if g is not None}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs:
        gap = (ours[name].double() - theirs[name]).norm() / theirs[name].norm()
        assert gap < tolerance, name


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_values_and_gradients_at_every_chunk_size(transform, bias) -> None:
    weights = torch.linspace(-1.0, 2.0, TOKENS)
    theirs = expected(*inputs(bias), transform, weights)
    for chunk in range(1, TOKENS + 4):
        hidden, head, targets = inputs(bias)
        log_probs = token_log_probs(hidden, targets, head, transform, chunk=chunk)
        assert log_probs.dtype == torch.float32
        assert_close(found(hidden, head, log_probs, weights), theirs, 1e-6)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "head"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_keeps_its_own(frozen) -> None:
    weights = torch.ones(TOKENS)
    transform = TRANSFORMS["both"]
    theirs = expected(*inputs(), transform, weights)
    hidden, head, targets = inputs()
    names = ["weight", "bias"] if frozen == "head" else [frozen]
    for name in names:
        (hidden if name == "hidden" else getattr(head, name)).requires_grad_(False)
    log_probs = token_log_probs(hidden, targets, head, transform, chunk=3)
    kept = {name: value for name, value in theirs.items() if name not in names}
    assert_close(found(hidden, head, log_probs, weights), kept, 1e-6)


def test_half_precision_weights_give_float32_log_probs_and_sound_gradients() -> None:
    weights, transform = torch.linspace(-1.0, 2.0, 64), LogitTransform()
    hidden, head, targets = inputs(dtype=torch.bfloat16, tokens=64)
    theirs = expected(hidden, head, targets, transform, weights)
    log_probs = token_log_probs(hidden, targets, head, transform, chunk=1)
    assert log_probs.dtype == torch.float32
    ours = found(hidden, head, log_probs, weights)
    assert ours["weight"].dtype == ours["hidden"].dtype == torch.bfloat16
    assert_close(ours, theirs, 0.01)  # bfloat16 keeps eight bits: 0.004 of rounding each


def test_the_weight_gradient_is_summed_in_float32() -> None:
    """512 equal tokens, one a chunk: a bfloat16 sum would stop growing at 256 times its term."""
    head = nn.Linear(1, 2, bias=False).bfloat16()
    nn.init.zeros_(head.weight)
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    targets = torch.zeros(512, dtype=torch.long)
    token_log_probs(hidden, targets, head, LogitTransform(), chunk=1).sum().backward()
    assert head.weight.grad is not None
    assert head.weight.grad.tolist() == [[256.0], [-256.0]]


def test_hidden_states_wider_than_the_head_are_cast_to_its_type() -> None:
    hidden, head, targets = inputs(dtype=torch.bfloat16)
    wide = hidden.detach().float().requires_grad_()
    log_probs = token_log_probs(wide, targets, head, LogitTransform())
    assert torch.equal(log_probs, token_log_probs(hidden, targets, head, LogitTransform()))
    log_probs.sum().backward()
    assert wide.grad is not None
    assert wide.grad.dtype == torch.float32


@pytest.mark.parametrize("transform", [TRANSFORMS["none"], TRANSFORMS["both"]])
def test_autocast_multiplies_in_half_and_normalises_in_float32(transform) -> None:
    weights = torch.linspace(-1.0, 2.0, TOKENS)
    hidden, head, targets = inputs()
    theirs = expected(hidden, head, targets, transform, weights)
    with torch.autocast("cpu", torch.bfloat16):
        log_probs = token_log_probs(hidden, targets, head, transform, chunk=2)
    assert log_probs.dtype == torch.float32
    ours = found(hidden, head, log_probs, weights)
    assert {g.dtype for g in ours.values()} == {torch.float32}
    assert_close(ours, theirs, 0.02)
    halves = head.weight.bfloat16(), head.bias.bfloat16()
    logits = transform(nn.functional.linear(hidden.bfloat16(), *halves).float())
    same = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(ours["log_probs"], same, atol=1e-6)


class Doubling(nn.Linear):
    """Stands for any head that is more than its weight (an adapter, a quantised layer)."""

    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * super().forward(hidden)


@pytest.mark.parametrize("chunk", [None, 1, 3, TOKENS + 2])
def test_any_other_head_is_called_as_a_module(chunk) -> None:
    weights = torch.linspace(-1.0, 2.0, TOKENS)
    hidden, plain, targets = inputs()
    head = Doubling(HIDDEN, VOCABULARY)
    head.load_state_dict(plain.state_dict())
    theirs = expected(hidden, plain, targets, LogitTransform(scale=2 * 0.3), weights)
    log_probs = token_log_probs(hidden, targets, head, LogitTransform(scale=0.3), chunk=chunk)
    assert_close(found(hidden, head, log_probs, weights), theirs, 1e-6)


def test_a_head_whose_weight_is_gathered_in_hooks() -> None:
    """As ZeRO and FSDP do: the weight is there only during the head's own forward or backward."""
    weights = torch.linspace(-1.0, 2.0, TOKENS)
    hidden, head, targets = inputs()
    theirs = expected(hidden, head, targets, LogitTransform(), weights)
    full, events = head.weight.data.clone(), []

    def gather(module: nn.Linear, *_: Any) -> None:
        events.append("gather")
        module.weight.data = full

    def release(module: nn.Linear, *_: Any) -> None:
        events.append("release")
        module.weight.data = torch.empty(0)

    release(head)
    head.register_forward_pre_hook(gather)
    head.register_forward_hook(release)
    head.register_full_backward_pre_hook(gather)
    log_probs = token_log_probs(hidden, targets, head, LogitTransform(), chunk=2)
    assert events == ["release", "gather", "release"], "once for all chunks"
    assert_close(found(hidden, head, log_probs, weights), theirs, 1e-6)
    assert "forward" not in vars(head)
    head(hidden)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.parametrize("kind", [nn.Linear, Doubling])
@pytest.mark.parametrize("transform", [TRANSFORMS["none"], TRANSFORMS["both"]])
def test_no_more_than_a_chunk_of_logits_exists(kind, transform) -> None:
    tokens, vocabulary, chunk = 256, 1024, 16
    head = kind(HIDDEN, vocabulary)
    hidden = torch.randn(tokens, HIDDEN, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,))
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = token_log_probs(hidden, targets, head, transform, chunk=chunk).sum()
        kept_for_backward = sum(kept)
        loss.backward()
    assert largest.elements == chunk * vocabulary
    assert kept_for_backward < tokens * vocabulary / 4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_never_holds_logits_of_a_batch(
    checkpointing, tiny_llama, random_trees, monkeypatch
) -> None:
    vocabulary = 8192
    monkeypatch.setitem(logprobs.CHUNK_ELEMENTS, "cpu", 4 * vocabulary)
    model = tiny_llama(vocab_size=vocabulary, hidden_size=8)
    enable_trees(model)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = collate_trees(random_trees([8, 8]))
    with Largest() as largest:
        sequence_log_probs(model, batch).sum().backward()
    assert len(batch.targets) > 50
    assert largest.elements == 8 * vocabulary  # the head's own gradient; a chunk is half of it


def test_a_temperature_by_hand() -> None:
    """Logits ln 4 and 0: probabilities 4/5 and 1/5, at temperature 2 two thirds and one third."""
    head = nn.Linear(1, 2, bias=False)
    head.weight.data = torch.tensor([[4.0], [1.0]]).log()
    hidden, targets = torch.ones(2, 1), torch.tensor([0, 1])
    for temperature, probs in ((1.0, [4 / 5, 1 / 5]), (2.0, [2 / 3, 1 / 3])):
        transform = LogitTransform(temperature=temperature)
        log_probs = token_log_probs(hidden, targets, head, transform)
        assert log_probs.exp().tolist() == pytest.approx(probs)


@pytest.mark.parametrize("layout", ["tree", "separate"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
def test_a_models_tokens_at_a_temperature_are_those_of_its_plain_forward(
    temperature, layout, tiny_llama, random_trees
) -> None:
    model, trees = tiny_llama(sharpness=2.0), random_trees([2, 1, 3])
    enable_trees(model)
    found = token_log_probs_of(model, collate_trees(trees, layout=layout), temperature)
    assert found.dtype == torch.float32
    rows = [(tree.prompt, answer) for tree in trees for answer in tree.completions]
    for (prompt, answer), ours in zip(rows, found.split([len(a) for _, a in rows]), strict=True):
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        theirs = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
        assert torch.allclose(ours, theirs[:, 0], atol=1e-4)


def test_sequences_are_sums_of_their_tokens(tiny_llama, random_trees) -> None:
    model, batch = tiny_llama(), collate_trees(random_trees([2, 1, 3]))
    enable_trees(model)
    for temperature in (1.0, 0.7):
        tokens = token_log_probs_of(model, batch, temperature)
        sums = sequence_log_probs(model, batch, temperature)
        by_hand = [part.sum() for part in tokens.split(batch.lengths.tolist())]
        assert torch.allclose(sums, torch.stack(by_hand), atol=1e-4)


def test_a_soft_cap_comes_before_the_temperature() -> None:
    """With cap 1, logits lie within 1 of 0: at temperature 1/2 two tokens differ by 4 at most."""
    head = nn.Linear(1, 2, bias=False)
    head.weight.data = torch.tensor([[1000.0], [-1000.0]])
    transform = LogitTransform(softcap=1.0, temperature=0.5)
    targets = torch.tensor([0, 1])
    log_probs = token_log_probs(torch.ones(2, 1), targets, head, transform)
    assert (log_probs[0] - log_probs[1]).item() == pytest.approx(4.0)


def test_temperature_one_changes_no_bit(tiny_llama, random_trees) -> None:
    batch = collate_trees(random_trees([2, 3]))
    answers = []
    for options in ({}, {"temperature": 1.0}):
        model = tiny_llama(final_logit_softcapping=5.0)
        enable_trees(model)
        log_probs = model(trees=batch, **options)["log_probs"]
        log_probs.sum().backward()
        answers.append([log_probs, *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *answers))


def test_the_temperature_reaches_a_model_inside_peft(tiny_llama) -> None:
    plain, model = tiny_llama(), tiny_llama()
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    enable_trees(plain)
    enable_trees(wrapped)
    batch = collate_trees([PromptTree([5, 6], [[7, 8, 9], [10]])])
    hot = sequence_log_probs(wrapped, batch, 3.0)
    assert torch.allclose(hot, sequence_log_probs(plain, batch, 3.0))
    assert not torch.allclose(hot, sequence_log_probs(plain, batch), atol=0.1)


def test_chunks_shrink_with_the_vocabulary_and_never_vanish() -> None:
    cpu = torch.device("cpu")
    assert logprobs._chunk_size(2**15, cpu) == 256
    assert logprobs._chunk_size(2**30, cpu) == 1
    assert logprobs._chunk_size(2**17, torch.device("cuda")) == 512


def test_the_transform_is_read_from_the_config() -> None:
    from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

    class Model:
        def __init__(self, config: Any) -> None:
            self.config = config

    def read(config: Any) -> tuple[float, float | None]:
        transform = logit_transform(Model(config))
        return transform.scale, transform.softcap

    assert read(LlamaConfig()) == (1.0, None)
    assert read(CohereConfig(logit_scale=0.25)) == (0.25, None)
    assert read(GraniteConfig(logits_scaling=8.0)) == (0.125, None)
    assert read(Gemma2Config(final_logit_softcapping=30.0)) == (1.0, 30.0)


def test_the_derivative_is_that_of_the_transform() -> None:
    for transform in TRANSFORMS.values():
        logits = torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True)
        out = transform(logits)
        (slope,) = torch.autograd.grad(out.sum(), logits)
        ours = torch.as_tensor(transform.derivative(out.detach())).double().expand(9)
        assert torch.allclose(ours, slope)
