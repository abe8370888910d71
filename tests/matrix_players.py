"""Language models whose answers are actions of a matrix game, and who samples and judges them.

Only the head is trained, and the last token alone decides what comes next, so that the policy is a
free softmax over actions after each token there is, the same for all prompts. What a trainer must
arrive at is then known exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefopt.games.game import Array
from prefopt.rollout.engine import (
    Completion,
    Done,
    SamplingSettings,
    make_completion,
    settings_of_each,
)

ACTIONS = tuple("abcdefghij")
WORDS = [*ACTIONS, "play", "<eos>", "<unk>", *map(str, range(10))]
HIDDEN = 8
MU = np.array([0.5, 0.3, 0.2])
CYCLE = np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]])  # a beats b beats c beats a
REWARDS = np.array([0.0, 0.3, -0.2])


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def differences(values: Array) -> Array:
    """``values[i] - values[j]``, [actions, actions]."""
    return np.subtract.outer(values, values)


BRADLEY_TERRY = sigmoid(differences(REWARDS))


# --- the player ----------------------------------------------------------------------------------


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


def make_policy(logits: dict[str, Array]) -> LlamaForCausalLM:
    """A Llama that goes on after each of some words as its logits say, [actions], with actions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=HIDDEN,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=WORDS.index("<eos>"),
    )
    model = LlamaForCausalLM(config).requires_grad_(False)
    model.model.layers[0].self_attn.o_proj.weight.zero_()  # the last token alone decides
    actions = len(next(iter(logits.values())))
    model.lm_head = nn.Linear(HIDDEN, actions, bias=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(head_of(model, logits))
    return model


@torch.no_grad()
def states(model: Any, words: Sequence[str]) -> torch.Tensor:
    """The hidden state from which each word is gone on from, float64 [words, HIDDEN]."""
    ids = torch.tensor([[WORDS.index(word)] for word in words])
    return model.model(input_ids=ids).last_hidden_state[:, -1].double()


def head_of(model: Any, logits: dict[str, Array]) -> torch.Tensor:
    """The smallest head weight with these logits after these words."""
    wanted = torch.tensor(np.array(list(logits.values())))
    return torch.linalg.lstsq(states(model, list(logits)), wanted).solution.T


def logit_gradient(model: Any, words: Sequence[str]) -> Array:
    """The head's gradient as one in the logits after each word, [words, actions]."""
    inverse = torch.linalg.pinv(states(model, words))
    return (model.lm_head.weight.grad.double() @ inverse).T.numpy()


@torch.no_grad()
def probabilities(model: nn.Module, prompt: Sequence[int]) -> Array:
    """Of what comes next after a prompt, by the model as it is now, [actions]."""
    logits = model(input_ids=torch.tensor([list(prompt)])).logits[0, -1]
    return logits.double().softmax(-1).numpy()


# --- who samples and judges ----------------------------------------------------------------------


class StratifiedEngine:
    """Samples whose pairs (0, 1), (2, 3), ... occur as often as pi x pi says, up to one of each.

    pi, over whole answers of ``max_new_tokens`` actions, is read from the model at the time of the
    call. Where a prompt has one sample, two prompts make a pair.
    """

    continuous = False

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model, self.tokenizer = model, tokenizer

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings | Sequence[SamplingSettings],
        *,
        done: Done | None = None,
    ) -> list[list[Completion]]:
        found: list[list[Completion]] = [[] for _ in prompts]
        each = settings_of_each(settings, len(prompts))
        kinds = [
            (prompt[-1], own.max_new_tokens, own.first_sample)
            for prompt, own in zip(prompts, each, strict=True)
        ]
        for kind in sorted(set(kinds)):
            here = [n for n, other in enumerate(kinds) if other == kind]
            drawn = self._draw(prompts[here[0]], len(here), each[here[0]])
            for n, group in zip(here, drawn, strict=True):
                found[n] = group
                if done is not None:
                    done(n, group)
        return found

    def _draw(
        self, prompt: Sequence[int], prompts: int, settings: SamplingSettings
    ) -> list[list[Completion]]:
        answers, policy = self._answers(prompt, settings.max_new_tokens)
        count = prompts * settings.samples_per_prompt // 2
        cumulative = np.cumsum(np.outer(policy, policy))
        cells = np.searchsorted(cumulative[:-1], (np.arange(count) + 0.5) / count)
        np.random.default_rng(settings.seed).shuffle(cells)
        drawn = np.stack(np.divmod(cells, len(policy)), axis=1).reshape(prompts, -1)
        return [
            [make_completion(answers[answer], [], self.tokenizer) for answer in row]
            for row in drawn.tolist()
        ]

    def _answers(self, prompt: Sequence[int], length: int) -> tuple[list[list[int]], Array]:
        """All answers of a length and their probabilities."""
        answers: list[list[int]] = [[]]
        policy = np.ones(1)
        for _ in range(length):
            after = [probabilities(self.model, [*prompt, *answer]) for answer in answers]
            policy = (policy[:, None] * after).ravel()
            answers = [[*answer, a] for answer in answers for a in range(len(after[0]))]
        return answers, policy


class ProportionalEngine(StratifiedEngine):
    """Samples of each prompt, n of them, in the proportions of pi itself, up to one of each.

    They are no independent samples: what they differ from the mean of the others by is n / (n - 1)
    of what they differ from their mean by.
    """

    def _draw(
        self, prompt: Sequence[int], prompts: int, settings: SamplingSettings
    ) -> list[list[Completion]]:
        answers, policy = self._answers(prompt, settings.max_new_tokens)
        count = settings.samples_per_prompt
        drawn = np.searchsorted(np.cumsum(policy)[:-1], (np.arange(count) + 0.5) / count)
        group = [make_completion(answers[answer], [], self.tokenizer) for answer in drawn]
        return [group] * prompts


class MatrixJudge:
    """``P(a beats b)`` is an entry of a payoff matrix."""

    def __init__(self, payoff: Array) -> None:
        self.payoff = payoff

    def prefer(self, prompts: Any, a: Sequence[str], b: Sequence[str]) -> Array:
        return self.payoff[[ACTIONS.index(x) for x in a], [ACTIONS.index(x) for x in b]]

    def score(self, prompts: Any, completions: Sequence[str]) -> Array:
        raise AssertionError("answers are compared, not scored")
