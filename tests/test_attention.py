"""Tree attention: one packed row of trees gives the numbers of one completion a row."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from conftest import VOCABULARY, sharpen
from torch import Tensor, nn
from torch.nn.attention import varlen
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from prefopt.data.tree import PromptTree, Segment, TreeBatch, collate_trees
from prefopt.errors import PrefoptError
from prefopt.models import attention
from prefopt.models.forward import enable_trees, supports_tree_attention
from prefopt.models.logprobs import sequence_log_probs

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2}
WINDOW = {"head_dim": 8, "sliding_window": 6}  # shorter than the longest prompts and completions
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": GROUPED,
    "Qwen2": GROUPED,
    "Qwen3": GROUPED | {"head_dim": 8},
    "Gemma": GROUPED | {"head_dim": 8},
    "Gemma2": GROUPED | WINDOW | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "Gemma3Text": GROUPED | WINDOW,
    "Mistral": GROUPED | WINDOW,
    "GPTNeoX": {},
    "Phi": GROUPED,
    "Phi3": GROUPED,
    "Cohere": GROUPED | {"logit_scale": 0.5},
    "Granite": GROUPED | {"logits_scaling": 4.0},
    "JetMoe": {"num_experts": 4, "kv_channels": 8, "num_key_value_heads": 2},
}


def make(family: str, **settings: Any) -> PreTrainedModel:
    """A random model with its own eager attention, as a user would load it."""
    config = getattr(transformers, f"{family}Config")(**SHAPE | FAMILIES.get(family, {}) | settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    return sharpen(model, 6.0)


def plain_log_probs(model: torch.nn.Module, trees: list[PromptTree]) -> Tensor:
    """Sums per completion from the ordinary logits of one completion at a time."""
    sums = []
    for tree in trees:
        for completion in tree.completions:
            ids = torch.tensor([[*tree.prompt, *completion]])
            log_probs = model(ids).logits[0, len(tree.prompt) - 1 : -1].log_softmax(-1)
            sums.append(log_probs.gather(1, torch.tensor(completion)[:, None]).sum())
    return torch.stack(sums)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        gap = (found[name] - expected[name]).norm()
        assert gap <= 1e-4 * expected[name].norm() + 1e-6, name


def let_second_see_first(batch: TreeBatch) -> TreeBatch:
    """A wrong tree: a completion after the first sees the one before it in place of the prompt."""
    wrong = [batch.segments[0]]
    for before, s in pairwise(batch.segments):
        astray = bool(s.prefix_length and before.prefix_length)
        moved = replace(s, prefix_start=before.start, prefix_length=before.length)
        wrong.append(moved if astray else s)
    return replace(batch, segments=tuple(wrong))


LAYOUTS: dict[str, dict[str, Any]] = {
    "one row": {},
    "rows": {"max_row_tokens": 40},
    "rows padded left": {
        "max_row_tokens": 40,
        "padding_side": "left",
        "pad_to_multiple_of": 16,
    },
    "a tree a row": {"max_row_tokens": 1, "pad_to_multiple_of": 8},
    "separate": {"layout": "separate"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_separate_rows(family, random_trees) -> None:
    trees = random_trees([1, 2, 3, 8])
    model = make(family)
    with torch.no_grad():
        expected = plain_log_probs(model, trees)
        enable_trees(model)
        for name, layout in LAYOUTS.items():
            found = sequence_log_probs(model, collate_trees(trees, **layout))
            assert found.dtype == torch.float32
            assert torch.allclose(found, expected, rtol=0, atol=1e-4), (family, name)
        wrong = sequence_log_probs(model, let_second_see_first(collate_trees(trees)))
    error = (wrong - expected).abs()
    first = torch.tensor([i == 0 for t in trees for i in range(len(t.completions))])
    assert error[first].max() < 1e-4, "a tree's first completion has none before it"
    assert error[~first].min() > 1e-3, "this test would not notice a wrong tree"
    assert error[~first].mean() > 0.1, "this test would not notice a wrong tree"


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Mistral", "GPTNeoX"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_gradients_are_those_of_separate_rows(family, checkpointing, random_trees) -> None:
    trees = random_trees([2, 3, 1], seed=1)
    weights = torch.linspace(-1.0, 2.0, 6)
    model = make(family)
    (plain_log_probs(model, trees) * weights).sum().backward()
    expected = gradients(model)
    enable_trees(model)
    model.train()  # checkpointing is for training only
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layout in ({}, {"max_row_tokens": 30, "padding_side": "left"}, {"layout": "separate"}):
        found = sequence_log_probs(model, collate_trees(trees, **layout))
        (found * weights).sum().backward()
        assert_same_gradients(gradients(model), expected)


def test_an_adapter_sees_trees_and_its_base_model_too(tiny_llama, random_trees) -> None:
    from peft import LoraConfig, get_peft_model

    trees = random_trees([2, 3])
    targets = ["q_proj", "v_proj", "down_proj", "lm_head"]
    model = tiny_llama()
    with torch.no_grad():
        base = plain_log_probs(model, trees)
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(model, config)
    expected = plain_log_probs(model, trees)
    expected.sum().backward()
    expected_gradients = gradients(model)
    enable_trees(model)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = sequence_log_probs(model, collate_trees(trees))
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)
    found.sum().backward()
    assert_same_gradients(gradients(model), expected_gradients)
    assert any("lm_head" in name for name in expected_gradients)
    with torch.no_grad(), model.disable_adapter():
        off = sequence_log_probs(model, collate_trees(trees))
    assert torch.allclose(off, base, rtol=0, atol=1e-4)
    assert (expected - base).abs().min() > 1e-2


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_order_and_company_never_change_a_number(family, random_trees) -> None:
    trees = random_trees([3, 1, 8, 2, 4], seed=3)
    model = make(family)
    enable_trees(model)
    with torch.no_grad():
        together = sequence_log_probs(model, collate_trees(trees))
        alone = [sequence_log_probs(model, collate_trees([tree])) for tree in trees]
        order = [3, 0, 4, 2, 1]
        shuffled = sequence_log_probs(
            model, collate_trees([trees[i] for i in order], max_row_tokens=64)
        )
        turned = [PromptTree(t.prompt, t.completions[::-1]) for t in trees]
        reversed_ = sequence_log_probs(model, collate_trees(turned))
    assert torch.allclose(together, torch.cat(alone), rtol=0, atol=3e-5)
    assert torch.allclose(shuffled, torch.cat([alone[i] for i in order]), rtol=0, atol=3e-5)
    expected = torch.cat([values.flip(0) for values in alone])
    assert torch.allclose(reversed_, expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Mistral"])
def test_without_trees_a_model_answers_as_before(family) -> None:
    model = make(family)
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # left-padded, as for generation
    mask[1, :1] = 0

    def answers() -> tuple[Tensor, Tensor, Tensor]:
        options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 9}
        with torch.no_grad():
            logits = model(ids, attention_mask=mask).logits
            return model(ids).logits, logits[mask.bool()], model.generate(ids, **options)

    plain, masked, generated = answers()
    enable_trees(model)
    assert model.config._attn_implementation == attention.TREE_ATTENTION
    plain_after, masked_after, generated_after = answers()
    assert torch.allclose(plain_after, plain, rtol=0, atol=1e-5)
    assert torch.allclose(masked_after, masked, rtol=0, atol=1e-5)
    assert torch.equal(generated_after, generated)
    assert not torch.equal(generated[0, 12:], generated[2, 12:])


def test_without_trees_the_attention_is_sdpa_to_the_bit(tiny_llama) -> None:
    model, patched = tiny_llama(), tiny_llama()
    model.set_attn_implementation("sdpa")
    enable_trees(patched)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, patched(ids).logits)


@pytest.mark.parametrize("masked", [False, True])
def test_one_new_token_sees_what_sdpa_shows_it(masked: bool, monkeypatch) -> None:
    """Two query heads share a key head; rows, heads and keys differ in number."""
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(3, 4, 1, 8, generator=draw)
    key, value = torch.randn(2, 3, 2, 7, 8, generator=draw)
    module = nn.Module()
    module.num_key_value_groups = 2
    mask = None
    if masked:
        mask = torch.ones(3, 1, 1, 7, dtype=torch.bool)
        mask[0, ..., :4] = False
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.5)
    monkeypatch.delattr(attention, "sdpa_attention_forward")
    found, _ = attention.tree_attention(module, query, key, value, mask, scaling=0.5)
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)


def test_a_deep_copy_answers_with_its_own_weights(tiny_llama, random_trees) -> None:
    trees = random_trees([2])
    model = tiny_llama()
    enable_trees(model)
    duplicate = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        expected = plain_log_probs(duplicate, trees)
        found = sequence_log_probs(duplicate, collate_trees(trees))
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)
    tokens = torch.tensor([len(c) for c in trees[0].completions])
    uniform = -tokens * torch.log(torch.tensor(float(VOCABULARY)))
    with torch.no_grad():
        assert torch.allclose(sequence_log_probs(model, collate_trees(trees)), uniform)
    assert (expected - uniform).abs().min() > 0.1


@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "adapter"])
def test_a_saved_model_is_a_plain_model(wrapped, tiny_llama, random_trees, tmp_path) -> None:
    trees = random_trees([2])
    model = tiny_llama()
    if wrapped:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, config)
    enable_trees(model)
    enable_trees(model)  # the second time does nothing
    with torch.no_grad():
        expected = sequence_log_probs(model, collate_trees(trees))
    plain = model.merge_and_unload() if wrapped else model
    plain.save_pretrained(tmp_path)
    assert attention.TREE_ATTENTION not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.allclose(plain_log_probs(loaded, trees), expected, rtol=0, atol=1e-4)


def test_gpt_oss_keeps_its_attention_with_sinks(random_trees) -> None:
    """SDPA has no sinks: with it plain forwards would be wrong too, and every check would agree."""
    settings = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8} | GROUPED
    trees = random_trees([2])
    model = make("GptOss", **settings)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(2.0)
        expected = plain_log_probs(model, trees)
        enable_trees(model)
        assert not supports_tree_attention(model)
        assert torch.equal(plain_log_probs(model, trees), expected)
        separate = sequence_log_probs(model, collate_trees(trees, layout="separate"))
        assert torch.allclose(separate, expected, rtol=0, atol=1e-4)
        with pytest.raises(PrefoptError, match=r"GptOssForCausalLM.*separate"):
            sequence_log_probs(model, collate_trees(trees))


def test_a_model_without_a_fitting_head_is_refused() -> None:
    config = transformers.LlamaConfig(**SHAPE | GROUPED, num_labels=3)
    for kind in (transformers.AutoModel, transformers.AutoModelForSequenceClassification):
        with pytest.raises(PrefoptError, match="num_labels=1"):
            enable_trees(kind.from_config(config))


def test_a_classifier_scores_each_completion_at_its_last_token(random_trees) -> None:
    trees = random_trees([1, 2, 5])
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**SHAPE | GROUPED, num_labels=1)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    sharpen(model, 6.0)
    with torch.no_grad():
        rows = [[*t.prompt, *c] for t in trees for c in t.completions]
        expected = torch.cat([model(torch.tensor([row])).logits[:, 0] for row in rows])
        enable_trees(model)
        for layout in LAYOUTS.values():
            found = model(trees=collate_trees(trees, **layout))["scores"]
            assert torch.allclose(found, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.1


# Variable-length flash attention runs on CUDA only: here a plain loop with its documented meaning
# stands in, so that what we hand it is tested everywhere.

Kernel = Callable[..., Tensor]


@pytest.fixture
def kernel_calls(monkeypatch) -> list[dict[str, Any]]:
    """Sends tree attention down the CUDA path, into the loop; holds each call's arguments."""
    calls: list[dict[str, Any]] = []
    real = signature(varlen.varlen_attn)

    def varlen_attn(*args: Any, scale=None, window_size=(-1, -1), enable_gqa=False) -> Tensor:
        options = {"scale": scale, "window_size": window_size, "enable_gqa": enable_gqa}
        calls.append(dict(real.bind(*args, **options).arguments))
        query, key = args[:2]
        assert enable_gqa or query.shape[1] == key.shape[1]
        return varlen_loop(*args, scale=scale, window_size=window_size)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "_flash_takes", lambda query, value: True)
    return calls


def varlen_loop(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> Tensor:
    """Query i of m sees keys i + n - m - left to i + n - m + right of n; -1 means no bound."""
    assert (query_bounds.dtype, key_bounds.dtype) == (torch.int32, torch.int32)
    assert query_bounds[-1] == len(query)
    assert key_bounds[-1] == len(key) == len(value)
    assert longest_query == query_bounds.diff().max()
    assert longest_key == key_bounds.diff().max()
    left, right = (float("inf") if bound < 0 else bound for bound in window_size)
    out = torch.empty_like(query)
    groups = query.shape[1] // key.shape[1]
    for s in range(len(query_bounds) - 1):
        start, end = key_bounds[s : s + 2].tolist()
        first, last = query_bounds[s : s + 2].tolist()
        for position in range(first, last):
            at = position - first + (end - start) - (last - first)
            keys = [start + j for j in range(end - start) if at - left <= j <= at + right]
            for head in range(query.shape[1]):
                weights = (key[keys, head // groups] @ query[position, head] * scale).softmax(0)
                out[position, head] = weights @ value[keys, head // groups]
    return out


def attend(batch: TreeBatch, window: int | None, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Tree attention of random grouped queries, zero on padding, and the gradients."""
    torch.manual_seed(seed)
    rows, width = batch.input_ids.shape
    inputs = [torch.randn(rows, h, width, 8, requires_grad=True) for h in (4, 2, 2)]
    tree_map = attention.TreeMap(batch)
    out, _ = attention.tree_attention(
        torch.nn.Module(), *inputs, None, sliding_window=window, tree_map=tree_map
    )
    assert out.shape == (rows, width, 4, 8)
    assert out.is_contiguous(), "some models take a view of the output"
    (out * torch.randn_like(out)).sum().backward()
    return out.detach(), [t.grad for t in inputs if t.grad is not None]


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("layout", ["one row", "rows padded left", "a tree a row"])
def test_varlen_and_segments_agree(window, layout, random_trees, request) -> None:
    batch = collate_trees(random_trees([2, 1, 3]), **LAYOUTS[layout])
    expected, expected_gradients = attend(batch, window)
    calls = request.getfixturevalue("kernel_calls")
    found, found_gradients = attend(batch, window)
    assert len(calls) == 1
    assert torch.allclose(found, expected, atol=1e-5)
    for ours, theirs in zip(found_gradients, expected_gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    padding = batch.input_ids == 0
    assert found[padding].abs().sum() == 0
    assert padding.any() == (layout != "one row")


def test_a_window_of_w_sees_w_tokens_with_the_token_itself() -> None:
    """transformers counts the token itself, flash attention how far it looks back."""
    batch = collate_trees([PromptTree([1] * 4, [[1] * 3])])
    mask = attention.TreeMap(batch).mask(Segment(4, 3, 0, 4), window=3)
    assert mask.int().tolist() == [
        [0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 1, 1, 1],
    ]
    theirs = transformers.masking_utils.sliding_window_causal_mask_function(3)
    positions = torch.arange(7)
    wanted = [[bool(theirs(0, 0, q, k)) for k in positions] for q in positions[4:]]
    assert mask.tolist() == wanted


@pytest.mark.parametrize(("family", "window"), [("Llama", (-1, 0)), ("Mistral", (5, 0))])
def test_a_whole_model_through_varlen(family, window, random_trees, kernel_calls) -> None:
    trees = random_trees([2, 3])
    model = make(family)
    with torch.no_grad():
        expected = plain_log_probs(model, trees)
        enable_trees(model)
        batch = collate_trees(trees, max_row_tokens=1, padding_side="left")
        found = sequence_log_probs(model, batch)
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)
    assert [call["window_size"] for call in kernel_calls] == [window] * 2
    assert all(call["enable_gqa"] for call in kernel_calls)


def test_varlen_as_it_was_in_torch_2_11(random_trees, monkeypatch, kernel_calls) -> None:
    """That version groups queries by itself and knows no flag for it."""
    batch = collate_trees(random_trees([2]))
    expected, _ = attend(batch, None)

    def varlen_attn(*args: Any, return_aux=None, scale=None, window_size=(-1, -1)) -> Tensor:
        return varlen_loop(*args, scale=scale, window_size=window_size)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    found, _ = attend(batch, None)
    assert torch.equal(found, expected)
    assert len(kernel_calls) == 1, "the first attention only went to the newer kernel"


def test_autocast_reaches_the_kernel_in_half_precision(
    tiny_llama, random_trees, kernel_calls
) -> None:
    """Under autocast rotary embeddings turn queries to float32, which flash attention refuses."""
    model = tiny_llama(num_hidden_layers=1)
    enable_trees(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        sequence_log_probs(model, collate_trees(random_trees([2])))
    (call,) = kernel_calls
    assert [call[name].dtype for name in ("query", "key", "value")] == [torch.bfloat16] * 3


def test_which_tensors_flash_attention_takes() -> None:
    def takes(dtype: torch.dtype, size: int, value_size: int, device: str = "cuda") -> bool:
        class Like:
            is_cuda = device == "cuda"

            def __init__(self, last: int) -> None:
                self.dtype, self.shape = dtype, (1, 4, 10, last)

        return attention._flash_takes(Like(size), Like(value_size))

    assert takes(torch.bfloat16, 128, 128)
    assert takes(torch.float16, 256, 256)
    assert not takes(torch.float32, 128, 128)
    assert not takes(torch.bfloat16, 192, 128), "latent attention: keys wider than values"
    assert not takes(torch.bfloat16, 512, 512)
    assert not takes(torch.bfloat16, 12, 12)
    assert not takes(torch.bfloat16, 128, 128, device="cpu")
