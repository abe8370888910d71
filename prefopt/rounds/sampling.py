"""The samples of a round: what engines are asked for, and how their answers become shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from prefopt.data.tokenize import TokenizedPrompts, occurrences
from prefopt.rollout.engine import Completion, Engine, SamplingSettings
from prefopt.rounds.plan import PlannedRound
from prefopt.rounds.resets import Resets
from prefopt.rounds.store import Sample


@dataclass(frozen=True)
class Player:
    """A policy that samples.

    Attributes:
        engine: What draws its samples.
        ready: Makes the engine sample from this policy's weights inside the block; all processes
            enter and leave it together.
    """

    engine: Engine
    ready: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Sampler:
    """What the prompts of every round are sampled with.

    Attributes:
        prompts: The rows whose prompts are sampled for.
        players: The policies that sample, each as many samples of a prompt, one after another.
        parts: The settings of each part of a player's samples of a prompt; their
            ``samples_per_prompt`` add up, ``seed`` and ``first_sample`` are set here.
        resets: Begins samples with a part of an offline answer.
    """

    prompts: TokenizedPrompts
    players: Sequence[Player]
    parts: Sequence[SamplingSettings]
    resets: Resets | None = None


@dataclass(frozen=True)
class _Request:
    """A prompt to continue, for samples of one position that begin alike."""

    shard: int
    position: int
    prompt: list[int]
    forced: list[int]
    settings: SamplingSettings


def sample_shards(
    sampler: Sampler,
    seed: str,
    planned: PlannedRound,
    shards: Mapping[int, Sequence[int]],
    keep: Callable[[int, dict[int, list[Sample]]], None],
) -> None:
    """Draws all samples of some shards; all processes call this, each with shards of its own.

    Args:
        sampler: Who samples, and how.
        seed: Of the noise.
        planned: The prompts of the round.
        shards: The positions of each shard.
        keep: Told of each shard and of the samples of its positions, as soon as they are complete.
    """
    samples: dict[int, list[Sample]] = {p: [] for shard in shards.values() for p in shard}

    def complete(shard: int) -> None:
        keep(shard, {position: samples[position] for position in shards[shard]})

    last = sampler.players[-1]
    requests = [_requests(sampler, n, seed, planned, shards) for n in range(len(sampler.players))]
    if len(sampler.players) > 1 and not last.engine.continuous:
        # a shard at a time, so that it is kept before the next; two players on one live model are
        # never sharded, and need no other process to be ready
        for shard in shards:
            for player, asked in zip(sampler.players, requests, strict=True):
                with player.ready():
                    call = [request for request in asked if request.shard == shard]
                    _play(sampler, player, call, samples, complete if player is last else None)
        return
    for player, asked in zip(sampler.players, requests, strict=True):
        one_by_one = [[r for r in asked if r.shard == shard] for shard in shards]
        with player.ready():
            for call in [asked] if player.engine.continuous else one_by_one:
                _play(sampler, player, call, samples, complete if player is last else None)


def _play(
    sampler: Sampler,
    player: Player,
    requests: Sequence[_Request],
    samples: dict[int, list[Sample]],
    complete: Callable[[int], None] | None,
) -> None:
    """One call of a player's engine; its answers are added to the samples shard by shard."""
    if not requests:
        return
    answers: dict[int, list[Completion]] = {}
    waiting = Counter(request.shard for request in requests)

    def done(number: int, completions: list[Completion]) -> None:
        answers[number] = completions
        shard = requests[number].shard
        waiting[shard] -= 1
        if waiting[shard]:
            return
        for n, request in enumerate(requests):
            if request.shard == shard:
                samples[request.position] += _samples(sampler, request, answers.pop(n))
        if complete is not None:
            complete(shard)

    player.engine.generate(
        [request.prompt + request.forced for request in requests],
        [request.settings for request in requests],
        done=done,
    )


def _samples(
    sampler: Sampler, request: _Request, completions: Sequence[Completion]
) -> list[Sample]:
    temperature, forced = request.settings.temperature, request.forced
    if sampler.resets is not None:
        completions = [sampler.resets.whole(forced, answer) for answer in completions]
    return [Sample(answer, temperature, len(forced)) for answer in completions]


def _requests(
    sampler: Sampler,
    player: int,
    seed: str,
    planned: PlannedRound,
    shards: Mapping[int, Sequence[int]],
) -> list[_Request]:
    """What a player is asked for, in the order of shards, positions and samples."""
    # equal prompts of a round differ in this: an engine gives them equal samples
    again = occurrences(sampler.prompts.prompt_ids[row] for row in planned.prompts)
    requests = []
    for shard, positions in shards.items():
        for position in positions:
            row = planned.prompts[position]
            first = player * sum(part.samples_per_prompt for part in sampler.parts)
            prompt = list(sampler.prompts.prompt_ids[row])
            for part in sampler.parts:
                settings = replace(
                    part, seed=_number(f"{seed}/{again[position]}"), first_sample=first
                )
                first += part.samples_per_prompt
                begun: list[tuple[list[int], SamplingSettings]] = [([], settings)]
                if sampler.resets is not None:
                    begun = sampler.resets.begin(row, settings)
                requests += [_Request(shard, position, prompt, *each) for each in begun]
    return requests


def _number(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "little")
