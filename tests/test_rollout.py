from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import chisquare
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import DynamicLayer

from prefopt.data.tree import PromptTree, collate_trees
from prefopt.errors import PrefoptError
from prefopt.models.forward import enable_trees
from prefopt.models.logprobs import sequence_log_probs
from prefopt.rollout import Completion, SamplingSettings
from prefopt.rollout.engine import make_completion, sample_key, uniforms
from prefopt.rollout.hf_engine import TransformersEngine, draw_tokens
from prefopt.rollout.kv_cache import ROOM, RoomyLayer

VOCABULARY = 24
EOS = 3
CONTEXT = 64
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [3, 3, 8, 0, 20], [5, 6, 8]]
TINY_LM = Path(__file__).parents[2] / "shared" / "data" / "tiny_lm"
needs_tiny_lm = pytest.mark.skipif(not TINY_LM.exists(), reason="needs ../shared/data/tiny_lm")


def make_model(family: str = "llama", *, dropout: float = 0.0) -> PreTrainedModel:
    """A random model whose distributions are neither flat nor peaked."""
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "eos_token_id": EOS, "bos_token_id": 0}
    if family == "gpt2":  # absolute positions: a shift by padding would change the logits
        return GPT2LMHeadModel(
            GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=CONTEXT, **shape)
        )
    shape |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "max_position_embeddings": CONTEXT}
    shape |= {"attention_dropout": dropout, "initializer_range": 0.3}
    if family == "neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**shape))
    if family == "mistral":  # its window is shorter than a sample
        config = MistralConfig(num_key_value_heads=2, sliding_window=8, **shape)
        return MistralForCausalLM(config)
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **shape))


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    vocabulary = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", eos_token=f"w{EOS}", **special
    )


def sample(
    model: PreTrainedModel, prompts: list[list[int]] = PROMPTS, **options: object
) -> list[list[Completion]]:
    engine_options = {k: options.pop(k) for k in ("batch_size", "stop_token_ids") if k in options}
    engine = TransformersEngine(model, make_tokenizer(), **engine_options)
    return engine.generate(prompts, SamplingSettings(**{"max_new_tokens": 12} | options))


def widths_of_calls(model: PreTrainedModel) -> list[int]:
    """A list that grows by the width of the input at every forward pass."""
    widths: list[int] = []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, out: widths.append(args[0].shape[1]))
    return widths


def rows_of_calls(model: PreTrainedModel) -> list[int]:
    """A list that grows by the rows of the input at every forward pass."""
    rows: list[int] = []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, out: rows.append(args[0].shape[0]))
    return rows


def ids(completions: list[list[Completion]]) -> list[list[list[int]]]:
    return [[c.token_ids for c in of_prompt] for of_prompt in completions]


@torch.no_grad()
def greedy_by_hand(model: PreTrainedModel, prompt: list[int], limit: int) -> list[int]:
    model.eval()
    tokens = list(prompt)
    while len(tokens) < len(prompt) + limit:
        logits = model(torch.tensor([tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


@torch.no_grad()
def next_token_probs(model: PreTrainedModel, tokens: list[int], temperature: float) -> np.ndarray:
    model.eval()
    logits = model(torch.tensor([tokens])).logits[0, -1].double()
    return (logits / temperature).softmax(-1).numpy()


def p_value(counts: Counter, expected: dict, total: int) -> float:
    """Chi-square of observed counts; outcomes expected fewer than 5 times share a cell."""
    assert set(counts) <= {outcome for outcome, p in expected.items() if p > 0}
    common = [outcome for outcome, p in expected.items() if p * total >= 5]
    observed = [counts[outcome] for outcome in common]
    wanted = [expected[outcome] * total for outcome in common]
    rest = total - sum(wanted)
    if rest > 1e-6 * total:
        observed, wanted = [*observed, total - sum(observed)], [*wanted, rest]
    return float(chisquare(observed, np.array(wanted) * sum(observed) / sum(wanted)).pvalue)


@pytest.mark.parametrize("family", ["llama", "neox", "gpt2"])
def test_greedy_is_the_argmax_one_token_at_a_time(family: str) -> None:
    model = make_model(family)
    drawn = ids(sample(model, temperature=0))
    assert drawn == [[greedy_by_hand(model, prompt, 12)] for prompt in PROMPTS]


@pytest.mark.parametrize("family", ["llama", "neox", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 9, "top_p": 0.8}])
def test_a_sample_does_not_depend_on_its_batch(family: str, options: dict) -> None:
    model = make_model(family)
    options = {"samples_per_prompt": 3, "seed": 11, **options}
    together = ids(sample(model, **options))
    assert len({tuple(s) for of_prompt in together for s in of_prompt}) > len(PROMPTS)
    for batch_size in (1, 3):
        assert ids(sample(model, batch_size=batch_size, **options)) == together
    order = [3, 0, 4, 2, 1]
    shuffled = ids(sample(model, [PROMPTS[i] for i in order], batch_size=4, **options))
    assert shuffled == [together[i] for i in order]
    company = [PROMPTS[1], list(range(20)), [4], PROMPTS[0]]
    assert ids(sample(model, company, **options))[::3] == [together[1], together[0]]


def test_later_samples_continue_earlier_ones() -> None:
    model = make_model()
    eight = ids(sample(model, samples_per_prompt=8))
    assert ids(sample(model, samples_per_prompt=4, first_sample=4)) == [s[4:] for s in eight]
    assert all(len({tuple(s) for s in samples}) == 8 for samples in eight)


def test_a_longer_limit_continues_the_same_sample() -> None:
    model = make_model()
    short = ids(sample(model, max_new_tokens=4))
    long = ids(sample(model, max_new_tokens=20))
    assert short == [[s[:4] for s in samples] for samples in long]


def test_the_seed_changes_the_samples_and_greedy_ignores_it() -> None:
    model = make_model()
    assert ids(sample(model, seed=1)) != ids(sample(model, seed=2))
    assert ids(sample(model, seed=1, temperature=0)) == ids(sample(model, seed=2, temperature=0))


def test_first_tokens_follow_the_models_distribution() -> None:
    model, total = make_model(), 4000
    drawn = ids(sample(model, [[5, 6]], samples_per_prompt=total, max_new_tokens=1, batch_size=999))
    counts = Counter(s[0] for s in drawn[0])
    expected = dict(enumerate(next_token_probs(model, [5, 6], 1.0)))
    assert p_value(counts, expected, total) > 0.01
    flat = dict.fromkeys(range(VOCABULARY), 1 / VOCABULARY)
    assert p_value(counts, flat, total) < 1e-6


def test_two_positions_follow_the_joint_distribution_after_temperature_and_top_k() -> None:
    model, total, temperature = make_model(), 4000, 0.6

    def kept(tokens: list[int]) -> dict[int, float]:
        probs = next_token_probs(model, tokens, temperature)
        top = np.argsort(probs)[-4:]
        return {int(token): probs[token] / probs[top].sum() for token in top}

    expected = {
        (first, second): p * q
        for first, p in kept([7]).items()
        for second, q in kept([7, first]).items()
    }
    drawn = sample(
        model,
        [[7]],
        samples_per_prompt=total,
        max_new_tokens=2,
        temperature=temperature,
        top_k=4,
        stop_token_ids=[],
        batch_size=2000,
    )
    counts = Counter(tuple(s) for s in ids(drawn)[0])
    assert len(expected) == 16
    assert p_value(counts, expected, total) > 0.01


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    model, total = make_model(), 2000
    probs = next_token_probs(model, [5, 6], 1.0)
    ranked = np.argsort(-probs)
    size = int(np.searchsorted(probs[ranked].cumsum(), 0.5)) + 1
    assert 1 < size < VOCABULARY
    kept = {int(t): probs[t] / probs[ranked[:size]].sum() for t in ranked[:size]}
    drawn = sample(model, [[5, 6]], samples_per_prompt=total, max_new_tokens=1, top_p=0.5)
    counts = Counter(s[0] for s in ids(drawn)[0])
    assert set(counts) == set(kept)
    assert p_value(counts, kept, total) > 0.01


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"temperature": 1e-6}, {"temperature": 1e-3}, {"top_p": 1e-9}]
)
def test_limits_that_leave_only_the_most_likely_token(options: dict) -> None:
    model = make_model()
    assert ids(sample(model, **options)) == ids(sample(model, temperature=0))


def test_inverse_cdf_by_hand() -> None:
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).expand(7, -1)
    noise = torch.tensor([2**-24, 0.2499999, 0.25, 0.7499999, 0.75, 0.9, 1 - 2**-24])
    assert draw_tokens(probs, noise).tolist() == [1, 1, 3, 3, 4, 4, 4]


@pytest.mark.parametrize("total", [1 - 2e-6, 1.0, 1 + 2e-6])
def test_extreme_noise_never_draws_an_impossible_token(total: float) -> None:
    generator = torch.Generator().manual_seed(0)
    probs = (torch.randn(200, 5000, generator=generator) * 8).softmax(-1)
    probs[:, :2], probs[:, -2:] = 0, 0
    probs = probs * (torch.rand(200, 5000, generator=generator) < 0.3)
    probs = probs / probs.sum(-1, keepdim=True) * total
    for extreme in (2**-24, 1 - 2**-24):
        tokens = draw_tokens(probs, torch.full((200,), extreme))
        assert (probs.gather(-1, tokens[:, None]) > 0).all()


def test_uniforms_are_inside_the_unit_interval_and_extend() -> None:
    numbers = uniforms(sample_key(0, [1, 2], 0), 100_000)
    assert numbers.dtype == np.float32
    assert numbers.min() > 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 4 / np.sqrt(12 * len(numbers))
    assert (uniforms(sample_key(0, [1, 2], 0), 7) == numbers[:7]).all()


def test_noise_is_the_same_on_every_machine() -> None:
    key = sample_key(7, [1, 2, 3], 4)
    assert key == 254730192577088558171533193735909639961
    assert uniforms(key, 3).tolist() == [
        0.5252818465232849,
        0.48756617307662964,
        0.1694696545600891,
    ]


def test_keys_tell_seed_prompt_and_sample_apart() -> None:
    asked = [(0, [1, 2], 0), (1, [1, 2], 0), (0, [1, 2], 1), (0, [12], 0), (0, [2, 1], 0)]
    asked += [(0, [1, 2, 0], 0), (11, [1], 1), (1, [1], 11)]
    assert len({sample_key(*each) for each in asked}) == len(asked)


def test_stop_tokens_end_a_completion_and_stay_in_it() -> None:
    drawn = sample(make_model(), samples_per_prompt=8, max_new_tokens=20)
    reasons = Counter(c.finish_reason for samples in drawn for c in samples)
    assert reasons["stop"] > 3
    assert reasons["length"] > 3
    for completion in (c for samples in drawn for c in samples):
        if completion.finish_reason == "stop":
            assert completion.token_ids.index(EOS) == len(completion.token_ids) - 1
        else:
            assert EOS not in completion.token_ids
            assert len(completion.token_ids) == 20


def test_stop_ids_of_tokenizer_and_model_add_up_and_given_ones_replace_them() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    model.generation_config.eos_token_id = [9, 5]
    assert TransformersEngine(model, tokenizer).stop_token_ids == [EOS, 5, 9]
    model.generation_config.eos_token_id = 9
    assert TransformersEngine(model, tokenizer).stop_token_ids == [EOS, 9]
    model.generation_config.eos_token_id = None
    assert TransformersEngine(model, tokenizer).stop_token_ids == [EOS]

    free = sample(model, samples_per_prompt=4, max_new_tokens=30, stop_token_ids=[])
    assert any(EOS in c.token_ids for samples in free for c in samples)
    assert {len(c.token_ids) for samples in free for c in samples} == {30}
    stopped = sample(model, samples_per_prompt=4, max_new_tokens=30, stop_token_ids=[7, 8])
    for endless, ended in zip(chain(*free), chain(*stopped), strict=True):
        first = min((i for i, t in enumerate(endless.token_ids) if t in (7, 8)), default=29)
        assert ended.token_ids == endless.token_ids[: first + 1]


@pytest.mark.parametrize("family", ["llama", "neox", "gpt2"])
@pytest.mark.parametrize(
    ("options", "temperature"),
    [
        ({}, 1.0),
        ({"temperature": 0.7}, 0.7),
        ({"temperature": 1.6, "top_k": 5, "top_p": 0.8}, 1.6),
        ({"temperature": 0}, 1.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("batch_size", [3, 64])
def test_log_probs_of_samples_are_those_of_the_trainer_at_the_samplers_temperature(
    family, options, temperature, batch_size
) -> None:
    model = make_model(family).eval()
    options = options | {"samples_per_prompt": 4, "max_new_tokens": 20, "batch_size": batch_size}
    drawn = sample(model, stop_token_ids=[EOS, 0, 21], **options)
    assert len({len(completion.token_ids) for completion in chain(*drawn)}) > 1
    assert {completion.finish_reason for completion in chain(*drawn)} == {"stop", "length"}
    enable_trees(model)
    trees = [PromptTree(p, of_prompt) for p, of_prompt in zip(PROMPTS, ids(drawn), strict=True)]
    expected = sequence_log_probs(model, collate_trees(trees, layout="separate"), temperature)
    found = torch.tensor([completion.log_prob for completion in chain(*drawn)])
    assert (found < -0.1).any()
    assert torch.allclose(found, expected, atol=1e-4, rtol=0)


def test_log_probs_are_summed_up_to_the_stop_token() -> None:
    tokenizer, log_probs = make_tokenizer(), [-0.5, -0.25, -2.0, -16.0]
    assert make_completion([5, 6, EOS, 7], [EOS], tokenizer, log_probs).log_prob == -2.75
    assert make_completion([5, 6, 8, 7], [EOS], tokenizer, log_probs).log_prob == -18.75
    assert math.isnan(make_completion([5, 6, EOS, 7], [EOS], tokenizer).log_prob)


def test_completions_are_compared_by_what_they_say() -> None:
    """Batches change a log-prob by rounding, and NaN is not even itself."""
    first, second = (Completion([5], "w5", "length", x) for x in (-1.0, -1.000001))
    assert first == second == Completion([5], "w5", "length", float("nan"))
    assert first != Completion([6], "w6", "length", -1.0)


def test_a_batch_ends_when_all_its_completions_have_ended() -> None:
    model = make_model()
    widths = widths_of_calls(model)
    sample(model, max_new_tokens=20, stop_token_ids=range(VOCABULARY))
    assert widths == [9]


def test_prompts_of_like_length_share_a_batch_and_the_longest_come_first() -> None:
    model = make_model()
    widths = widths_of_calls(model)
    sample(model, max_new_tokens=1, batch_size=2)
    assert widths == [9, 3, 1]


def test_pad_equal_to_eos_or_absent_changes_nothing() -> None:
    model = make_model()
    settings = SamplingSettings(max_new_tokens=20, samples_per_prompt=4)
    tokenizers = [make_tokenizer(), make_tokenizer(pad_token=f"w{EOS}")]
    assert [t.pad_token_id for t in tokenizers] == [None, EOS]
    first, second = (TransformersEngine(model, t).generate(PROMPTS, settings) for t in tokenizers)
    assert first == second


def test_text_skips_special_tokens() -> None:
    tokenizer = make_tokenizer()
    completion = make_completion([5, 6, EOS, 7, 8], [EOS], tokenizer)
    assert completion == Completion([5, 6, EOS], "w5 w6", "stop")
    assert make_completion([5, 6], [EOS], tokenizer) == Completion([5, 6], "w5 w6", "length")


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_the_checkpoints_generation_config_does_not_leak(temperature: float) -> None:
    model = make_model()
    plain = ids(sample(model, temperature=temperature, stop_token_ids=[EOS]))
    config = GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_k=2,
        top_p=0.3,
        repetition_penalty=2.0,
        no_repeat_ngram_size=1,
        suppress_tokens=[plain[0][0][0]],
        bad_words_ids=[[4], [5]],
        max_length=5,
        min_length=40,
        eos_token_id=[11, 12],
        num_beams=2,
    )
    model.generation_config = config
    assert ids(sample(model, temperature=temperature, stop_token_ids=[EOS])) == plain
    assert model.generation_config is config


def test_training_mode_and_checkpointing_are_left_as_found_and_the_cache_is_used() -> None:
    model = make_model(dropout=0.5)
    model.eval()
    expected = ids(sample(model, stop_token_ids=[]))
    model.train()
    model.model.layers[0].eval()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.config.use_cache = False
    modes = [module.training for module in model.modules()]
    widths = widths_of_calls(model)
    state = torch.get_rng_state()

    assert ids(sample(model, stop_token_ids=[])) == expected
    assert widths == [9] + [1] * 11
    assert [module.training for module in model.modules()] == modes
    assert model.is_gradient_checkpointing
    assert model.config.use_cache is False
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_are_an_error_and_the_mode_is_restored(
    temperature: float,
) -> None:
    model = make_model().train()
    with torch.no_grad():
        model.lm_head.weight[4, 0] = float("nan")
    with pytest.raises(PrefoptError, match="not finite at generated token 1"):
        sample(model, temperature=temperature)
    assert model.training


def test_peft_models_generate_with_their_adapter() -> None:
    base = make_model()
    before = ids(sample(base, temperature=0))
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(base, lora)
    plain = ids(sample(model, temperature=0, stop_token_ids=[EOS]))
    assert plain == [[greedy_by_hand(model, prompt, 12)] for prompt in PROMPTS]
    assert plain != before

    config = GenerationConfig(repetition_penalty=2.0, suppress_tokens=[plain[0][0][0]])
    model.generation_config = config
    assert ids(sample(model, temperature=0, stop_token_ids=[EOS])) == plain
    assert model.generation_config is config
    with model.disable_adapter():
        assert ids(sample(model, temperature=0)) == before


def test_every_prompt_is_told_of_once_with_all_its_completions() -> None:
    engine = TransformersEngine(make_model(), make_tokenizer(), batch_size=3)
    told: dict[int, list[Completion]] = {}

    def done(index: int, completions: list[Completion]) -> None:
        assert index not in told
        told[index] = list(completions)

    settings = SamplingSettings(max_new_tokens=2, samples_per_prompt=2)
    found = engine.generate(PROMPTS, settings, done=done)
    assert [told[index] for index in range(len(PROMPTS))] == found
    assert all(len(group) == 2 for group in found)


def test_prompts_with_settings_of_their_own_are_answered_as_alone() -> None:
    engine = TransformersEngine(make_model(), make_tokenizer(), batch_size=4)
    common = {"max_new_tokens": 9, "seed": 3}
    each = [
        SamplingSettings(temperature=0, **common),
        SamplingSettings(temperature=0.7, samples_per_prompt=3, **common),
        SamplingSettings(top_k=5, **common),
        SamplingSettings(temperature=0.7, first_sample=2, **common),
        SamplingSettings(samples_per_prompt=2, **common | {"seed": 4, "max_new_tokens": 5}),
    ]
    together = engine.generate(PROMPTS, each)
    alone = [engine.generate([p], own)[0] for p, own in zip(PROMPTS, each, strict=True)]
    assert together == alone
    with pytest.raises(PrefoptError, match="found 4 settings for 5 prompts"):
        engine.generate(PROMPTS, each[:4])


def test_no_prompts_give_no_completions() -> None:
    assert sample(make_model(), []) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected a whole number of at least 1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
        ({"samples_per_prompt": 0}, "samples_per_prompt is 0"),
        ({"samples_per_prompt": True}, "samples_per_prompt is True"),
        ({"top_k": -1}, "top_k is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"first_sample": -1}, "first_sample is -1"),
        ({"temperature": -0.1}, r"temperature is -0.1, expected 0 \(greedy\)"),
        ({"temperature": 1e-9}, "temperature is 1e-09"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"top_p": 0}, "top_p is 0, expected a number above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": None}, "top_p is None"),
    ],
)
def test_settings_out_of_range_are_named(options: dict, message: str) -> None:
    with pytest.raises(PrefoptError, match=message):
        SamplingSettings(**options)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prompt_must_leave_room_for_the_completion(family: str) -> None:
    model = make_model(family)
    fits = [[5], [6] * (CONTEXT - 12)]
    assert [len(s) for s in sample(model, fits)] == [1, 1]
    with pytest.raises(PrefoptError, match=r"prompt 1 has 53 tokens.*context of 64"):
        sample(model, [[5], [6] * (CONTEXT - 11)])


def test_empty_prompts_and_empty_batches_are_errors() -> None:
    with pytest.raises(PrefoptError, match="prompt 1 is empty"):
        sample(make_model(), [[5], []])
    with pytest.raises(PrefoptError, match="batch_size is 0"):
        sample(make_model(), batch_size=0)


@needs_tiny_lm
def test_stories260k_tells_its_published_story_alone_and_in_a_batch() -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY_LM / "stories260K-hf")
    tokenizer = AutoTokenizer.from_pretrained(TINY_LM / "stories260K-hf")
    engine = TransformersEngine(model, tokenizer, stop_token_ids=[])
    settings = SamplingSettings(max_new_tokens=256, temperature=0)
    published = json.loads((TINY_LM / "greedy_sample_ids.json").read_text())
    text = (TINY_LM / "greedy_sample.txt").read_text()

    [[alone]] = engine.generate([[1]], settings)
    assert [1, *alone.token_ids] == published
    assert alone.text == text
    assert alone.finish_reason == "length"

    prompts = [published[:40], [1], published[:7], published[100:200]]
    batched = engine.generate(prompts, settings)
    assert batched[1] == [alone]
    assert batched[0][0].token_ids[:217] == published[40:]


def test_limits_of_their_own_cut_what_a_common_limit_gives() -> None:
    engine = TransformersEngine(make_model(), make_tokenizer(), batch_size=3)
    settings = SamplingSettings(max_new_tokens=12, samples_per_prompt=2)
    limits = [1, 12, 4, 2, 7]
    whole = engine.generate(PROMPTS, settings)
    cut = engine.generate(PROMPTS, [replace(settings, max_new_tokens=n) for n in limits])
    assert {len(c.token_ids) for group in whole for c in group} > {12}, "some end by themselves"
    for limit, all_of_it, part in zip(limits, whole, cut, strict=True):
        assert [c.token_ids for c in part] == [c.token_ids[:limit] for c in all_of_it]
        for completion in part:
            ended = completion.token_ids[-1] == EOS
            assert completion.finish_reason == ("stop" if ended else "length")


def test_a_row_that_has_ended_does_not_outgrow_a_table_of_positions() -> None:
    engine = TransformersEngine(make_model("gpt2"), make_tokenizer(), stop_token_ids=[])
    prompts = [[5] * (CONTEXT - 6), [5] * (CONTEXT - 2)]
    settings = SamplingSettings(max_new_tokens=6)
    found = engine.generate(prompts, [settings, replace(settings, max_new_tokens=2)])
    assert [len(group[0].token_ids) for group in found] == [6, 2]
    with pytest.raises(PrefoptError, match=f"prompt 1 has {CONTEXT - 2} tokens"):
        engine.generate(prompts, settings)


@pytest.mark.parametrize("family", ["llama", "neox", "gpt2", "mistral"])
def test_rows_that_have_ended_leave_the_batch(family: str) -> None:
    model = make_model(family)
    prompts = [prompt for prompt in PROMPTS if len(prompt) > 1]
    options: dict[str, Any] = {"samples_per_prompt": 4, "max_new_tokens": 40}
    rows = rows_of_calls(model)
    found = sample(model, prompts, **options)
    lengths = sorted(len(c.token_ids) for group in found for c in group)
    read, *decoding = rows
    assert read == len(prompts), "a prompt is read once for all its samples"
    assert decoding == sorted(decoding, reverse=True)
    assert len(decoding) == max(lengths)
    for step, carried in enumerate(decoding):
        alive = sum(length > step for length in lengths)
        assert alive <= carried
        assert carried - alive < max(1, 0.25 * carried), "a quarter of a batch at most has ended"
    alone = sample(model, prompts, batch_size=1, **options)
    assert ids(alone) == ids(found)
    for a, b in zip(chain(*alone), chain(*found), strict=True):
        assert a.log_prob == pytest.approx(b.log_prob, abs=1e-4)


def test_prompts_of_one_token_share_nothing() -> None:
    model = make_model()
    rows = rows_of_calls(model)
    found = sample(model, [[5], [6, 7]], samples_per_prompt=2, stop_token_ids=[], max_new_tokens=3)
    assert rows == [4, 4, 4]
    assert all(len(c.token_ids) == 3 for group in found for c in group)


def test_a_model_that_keeps_more_than_keys_and_values_reads_all_rows_again() -> None:
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4, eos_token_id=EOS
    )
    model = MambaForCausalLM(config)
    prompts = [[5, 6, 7], [8, 9, 10]]  # of one length: padding moves a recurrent state
    found = sample(model, prompts, samples_per_prompt=4, max_new_tokens=30)
    assert {c.finish_reason for group in found for c in group} == {"stop", "length"}
    alone = sample(model, prompts, samples_per_prompt=4, max_new_tokens=30, batch_size=1)
    assert ids(found) == ids(alone)


def test_a_roomy_cache_is_a_dynamic_cache() -> None:
    generator = torch.Generator().manual_seed(0)
    plain, roomy = DynamicLayer(), RoomyLayer()
    for rows, new in ((3, 5), (3, 1), (3, 2 * ROOM), (3, 1), (2, 1), (4, ROOM - 1), (4, 2), (4, 1)):
        kept = torch.arange(rows) % 2
        for layer in (plain, roomy):
            if layer.get_seq_length():
                layer.reorder_cache(kept)
        states = torch.randn(2, rows, 2, new, 4, generator=generator)
        expected = plain.update(*states)
        found = roomy.update(*states)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert roomy.get_seq_length() == plain.get_seq_length()
