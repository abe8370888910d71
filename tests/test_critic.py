"""The critic of PPO: values of states on trees, and what a critic is made from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, sharpen
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from prefopt.data.tree import PromptTree, collate_trees
from prefopt.errors import PrefoptError
from prefopt.models.critic import make_critic, reads_same_tokens, token_values
from prefopt.models.forward import enable_trees, trunk
from prefopt.reward_models.preference_model import PreferenceModel
from prefopt.reward_models.reward_model import RewardModel
from prefopt.reward_models.rule import RuleJudge

TinyLlama = Callable[..., LlamaForCausalLM]
ABOVE_ZERO = 1e-3


def make_reward_model(policy: PreTrainedModel, seed: int = 3) -> PreTrainedModel:
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
    return sharpen(model.eval(), 6.0)


def make_tokenizer(tokens: list[str], **special: str) -> PreTrainedTokenizerFast:
    model = models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), unk_token=tokens[0], **special
    )


def test_no_critic_is_made_from_quantised_weights(tiny_llama: TinyLlama) -> None:
    policy = tiny_llama()
    policy.is_quantized = True  # as transformers marks it
    with pytest.raises(PrefoptError, match=r"model\.quantization: .* reward model"):
        make_critic(policy)
    assert make_critic(policy, make_reward_model(tiny_llama()))


@pytest.mark.parametrize("layout", ["tree", "separate"])
def test_a_value_is_the_score_of_the_text_before_its_token(
    layout, tiny_llama: TinyLlama, random_trees
) -> None:
    """The classifier's plain forward on a text that ends there says the same."""
    critic = make_reward_model(tiny_llama())
    enable_trees(critic)
    trees = random_trees([3, 1, 2])
    values = token_values(critic, collate_trees(trees, layout=layout))
    assert values.dtype == torch.float32
    before = [
        [*tree.prompt, *answer[:i]]
        for tree in trees
        for answer in tree.completions
        for i in range(len(answer))
    ]
    expected = torch.cat([critic(torch.tensor([ids])).logits[0] for ids in before])
    assert expected.std() > ABOVE_ZERO
    assert torch.allclose(values, expected, atol=1e-4, rtol=1e-4)


def test_without_values_a_classifier_scores_completions_as_ever(
    tiny_llama: TinyLlama, random_trees
) -> None:
    model = make_reward_model(tiny_llama())
    enable_trees(model)
    trees = random_trees([2, 1])
    answer = model(trees=collate_trees(trees))
    assert answer.keys() == {"scores"}
    texts = [[*tree.prompt, *answer] for tree in trees for answer in tree.completions]
    expected = torch.cat([model(torch.tensor([ids])).logits[0] for ids in texts])
    assert torch.allclose(answer["scores"], expected, atol=1e-4, rtol=1e-4)


def test_completions_of_a_prompt_begin_at_one_value(tiny_llama: TinyLlama) -> None:
    critic = make_reward_model(tiny_llama())
    enable_trees(critic)
    values = token_values(critic, collate_trees([PromptTree([5, 6], [[7, 8], [9], [10]])]))
    assert values[0] == values[2] == values[3] != values[1]


def test_a_new_critic_is_the_policys_trunk_and_says_zero_everywhere(
    tiny_llama: TinyLlama, random_trees
) -> None:
    policy = tiny_llama().bfloat16()
    enable_trees(policy)
    policy.requires_grad_(False)
    critic = make_critic(policy)
    enable_trees(critic)
    weights = trunk(policy).state_dict()
    for name, weight in trunk(critic).state_dict().items():
        assert torch.equal(weight, weights[name].float()), name
    batch = collate_trees(random_trees([2, 3]))
    assert token_values(critic, batch).eq(0).all()
    assert {p.dtype for p in critic.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in critic.parameters())
    assert policy.config.num_labels != 1, "the policy's own config is left alone"
    assert not any(module.training for module in critic.modules())


def test_a_critic_shares_no_weights_with_what_it_is_made_from(tiny_llama: TinyLlama) -> None:
    policy = tiny_llama()
    judge = make_reward_model(policy)
    enable_trees(judge)
    for source, critic in ((policy, make_critic(policy)), (judge, make_critic(policy, judge))):
        theirs = {p.data_ptr() for p in source.parameters()}
        assert not theirs & {p.data_ptr() for p in critic.parameters()}


def test_a_critic_from_a_reward_model_answers_with_weights_of_its_own(
    tiny_llama: TinyLlama, random_trees
) -> None:
    policy = tiny_llama()
    judge = make_reward_model(policy).bfloat16()
    enable_trees(judge)
    judge.requires_grad_(False)
    critic = make_critic(policy, judge)
    enable_trees(critic)
    batch = collate_trees(random_trees([2, 1]))
    reference = copy.deepcopy(judge).float()
    assert torch.equal(critic(trees=batch)["scores"], reference(trees=batch)["scores"])
    assert {p.dtype for p in judge.parameters()} == {torch.bfloat16}
    before = judge(trees=batch)["scores"]
    token_values(critic, batch).sum().backward()
    assert all(p.grad is not None for p in critic.parameters())
    nn.init.zeros_(critic.score.weight)
    assert token_values(critic, batch).eq(0).all()
    assert torch.equal(judge(trees=batch)["scores"], before)


def test_one_step_moves_the_values_towards_their_targets(
    tiny_llama: TinyLlama, random_trees
) -> None:
    critic = make_critic(tiny_llama(sharpness=2.0))
    enable_trees(critic)
    batch = collate_trees(random_trees([2, 2]))
    (token_values(critic, batch) - 1.0).square().mean().backward()
    with torch.no_grad():
        critic.score.weight -= 1e-3 * critic.score.weight.grad
        values = token_values(critic, batch)
    assert ((values - 1.0).square().mean() < 1.0).item()
    assert (values > 0).any()


def test_an_adapter_is_merged_into_the_trunk(tiny_llama: TinyLlama) -> None:
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    policy: Any = get_peft_model(tiny_llama(), lora)
    enable_trees(policy)
    ids = torch.tensor([[5, 6, 7, 8]])
    adapted = policy(ids, output_hidden_states=True).hidden_states[-1]
    with policy.disable_adapter():
        plain = policy(ids, output_hidden_states=True).hidden_states[-1]
    hidden = trunk(make_critic(policy))(ids).last_hidden_state
    assert torch.allclose(hidden, adapted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(hidden, plain, atol=0.1)
    assert torch.equal(policy(ids, output_hidden_states=True).hidden_states[-1], adapted)


def test_a_policy_without_a_classifier_is_refused_by_name() -> None:
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    policy = GraniteForCausalLM(GraniteConfig(**shape, **heads))
    with pytest.raises(PrefoptError, match="GraniteForCausalLM cannot be given a value head"):
        make_critic(policy)


def test_tokens_are_the_same_where_every_id_is_whatever_else_the_other_has() -> None:
    policy = make_tokenizer(["<unk>", "a", "b"])
    padded = make_tokenizer(["<unk>", "a", "b"], pad_token="<pad>")
    swapped = make_tokenizer(["<unk>", "b", "a"])
    assert len(padded) == 4
    assert reads_same_tokens(policy, policy)
    assert reads_same_tokens(policy, padded)
    assert not reads_same_tokens(padded, policy)
    assert not reads_same_tokens(policy, swapped)


def test_only_the_preference_model_needs_company_to_score() -> None:
    assert PreferenceModel.compares_only
    assert not RewardModel.compares_only
    assert not RuleJudge.compares_only
