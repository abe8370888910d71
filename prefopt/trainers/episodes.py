"""From answers and what was read of their tokens to what PPO trains on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prefopt.data.tree import PromptTree
from prefopt.objectives import explained_variance, gae, td_targets, token_rewards, whiten


@dataclass(frozen=True)
class Episode:
    """What is known of an answer.

    Attributes:
        length: Its tokens, without padding.
        score: Its reward.
        forced: How many of its first tokens the policy did not choose.
        log_prob: Of the other tokens, as the sampler saw it; NaN where it does not say.
        offline: Whether it comes from the data set: then the critic alone reads it.
    """

    length: int
    score: float
    forced: int = 0
    log_prob: float = math.nan
    offline: bool = False


@dataclass(frozen=True)
class Numbers:
    """What was read of every completion token as the round began, one tensor [tokens] a tree.

    Attributes:
        policy: Log-probs under the policy.
        reference: Log-probs under the initial policy.
        values: The critic's values.
    """

    policy: Sequence[Tensor]
    reference: Sequence[Tensor]
    values: Sequence[Tensor]


def episode_columns(
    trees: Sequence[PromptTree], episodes: Sequence[Episode], numbers: Numbers, args: Any
) -> tuple[dict[str, list[Tensor]], dict[str, float]]:
    """Rewards, advantages and returns of a whole round, in which whitening takes its statistics.

    Args:
        trees: The trees of the round.
        episodes: Of each completion, tree by tree.
        numbers: Of each completion token.
        args: A ``PPOConfig``.

    Returns:
        Columns, each one tensor [tokens] a tree: ``old``, ``reference``, ``values``,
        ``advantages``, ``returns``, and the masks ``own`` (tokens the policy chose), ``sampled``
        (all of its answers), ``offline`` and ``real`` (no padding); and facts of the round.
    """
    lengths = [len(ids) for tree in trees for ids in tree.completions]

    def padded(flat: Sequence[Tensor]) -> Tensor:
        return pad_sequence(list(torch.cat(list(flat)).split(lengths)), batch_first=True)

    old, reference, values = map(padded, (numbers.policy, numbers.reference, numbers.values))
    position = torch.arange(old.shape[1])
    here = position < torch.tensor(lengths)[:, None]
    real = position < torch.tensor([e.length for e in episodes])[:, None]
    offline = here & torch.tensor([e.offline for e in episodes])[:, None]
    sampled = here & ~offline
    own = sampled & (position >= torch.tensor([e.forced for e in episodes])[:, None])
    scores = torch.tensor([e.score for e in episodes], dtype=old.dtype)

    rewards = token_rewards(old, reference, real, scores, kl_coef=args.kl_coef)
    rewards -= args.kl_coef * (old - reference) * (here & ~real)
    if args.whiten_rewards:
        rewards = whiten(rewards, sampled, shift_mean=False)
    advantages, returns = gae(rewards, values, here, gamma=args.gae_gamma, lam=args.gae_lambda)
    if args.whiten_advantages:
        advantages = whiten(advantages, sampled)
    returns = torch.where(offline, td_targets(values, here, scores), returns)

    table = {
        "old": old,
        "reference": reference,
        "values": values,
        "advantages": advantages,
        "returns": returns,
        "own": own,
        "sampled": sampled,
        "offline": offline,
        "real": real,
    }
    sizes = [sum(map(len, tree.completions)) for tree in trees]
    columns = {name: list(t[here].split(sizes)) for name, t in table.items()}
    facts = {"reward": _mean([e.score for e in episodes if not e.offline])}
    explained = explained_variance(values, returns, sampled)
    if math.isfinite(explained):
        facts["explained_variance"] = explained
    said = torch.tensor([e.log_prob for e in episodes], dtype=old.dtype)
    gaps = ((old * (own & real)).sum(1) - said).abs() / (own & real).sum(1).clamp(min=1)
    if (known := gaps.isfinite()).any():
        facts["sampler_gap"] = gaps[known].mean().item()
    return columns, facts


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
