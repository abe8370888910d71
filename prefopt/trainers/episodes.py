"""From answers and what was read of their tokens to what PPO trains on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prefopt.data.tree import PromptTree
from prefopt.objectives import explained_variance, gae, token_rewards, whiten


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
class TokenReads:
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
    trees: Sequence[PromptTree], episodes: Sequence[Episode], reads: TokenReads, args: Any
) -> tuple[dict[str, list[Tensor]], dict[str, float]]:
    """Rewards, advantages and returns of a whole round, in which whitening takes its statistics.

    Args:
        trees: The trees of the round.
        episodes: Of each completion, tree by tree.
        reads: Of each completion token.
        args: A ``PPOConfig``.

    Returns:
        Columns, each one tensor [tokens] a tree: ``old``, ``values``,
        ``advantages``, ``returns``, and the masks ``own`` (tokens the policy chose), ``sampled``
        (all of its answers) and ``offline``; and facts of the round.
    """
    lengths = [len(ids) for tree in trees for ids in tree.completions]

    def padded(flat: Sequence[Tensor]) -> Tensor:
        return pad_sequence(list(torch.cat(list(flat)).split(lengths)), batch_first=True)

    old, reference, values = map(padded, (reads.policy, reads.reference, reads.values))
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
        counted = rewards[sampled]
        # DR-PO's code scales about the mean and keeps it, on answers that are all padded to one
        # length; where lengths differ, what that adds to every token would be a reward for length
        centre = 0.0 if args.mask_padding else counted.mean()
        scale = torch.rsqrt(((counted - centre) ** 2).mean() + 1e-8)
        rewards = centre + (rewards - centre) * scale
    advantages, returns = gae(rewards, values, here, gamma=args.gae_gamma, lam=args.gae_lambda)
    if args.whiten_advantages:
        advantages = whiten(advantages, sampled)
    if offline.any():
        _, one_step = gae(rewards, values, here, gamma=args.gae_gamma, lam=0.0)
        returns = torch.where(offline, one_step, returns)

    table = {
        "old": old,
        "values": values,
        "advantages": advantages,
        "returns": returns,
        "own": own,
        "sampled": sampled,
        "offline": offline,
    }
    sizes = [sum(map(len, tree.completions)) for tree in trees]
    columns = {name: list(t[here].split(sizes)) for name, t in table.items()}
    drawn = own & real
    facts = {
        "explained_variance": explained_variance(values, returns, sampled),
        **_sample_means(episodes, old, old - reference, drawn),
    }
    return columns, {name: value for name, value in facts.items() if math.isfinite(value)}


def _sample_means(
    episodes: Sequence[Episode], log_probs: Tensor, ratios: Tensor, drawn: Tensor
) -> dict[str, float]:
    """Means over the samples of a round as it begins, on the tokens that the policy drew."""
    samples = torch.tensor([not e.offline for e in episodes])
    said = torch.tensor([e.log_prob for e in episodes], dtype=log_probs.dtype)
    gaps = ((log_probs * drawn).sum(1) - said).abs() / drawn.sum(1)
    return {
        "reward": fmean(e.score for e in episodes if not e.offline),
        "kl": (ratios * drawn).sum(1)[samples].mean().item(),
        "entropy": -log_probs[drawn].mean().item(),
        "length/mean": fmean(e.length for e in episodes if not e.offline),
        "sampler_gap": gaps[gaps.isfinite()].mean().item(),
    }
