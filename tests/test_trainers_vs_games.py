"""Language models whose answers are single tokens play matrix games through the real trainers.

Only the head is trained, and every prompt ends in the same hidden state, so the policy is a free
softmax over three actions that all prompts share. What a round must arrive at is then known
exactly: a wrong sign, a wrong anchor or a stale policy gives other iterates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matrix_players import (
    ACTIONS,
    BRADLEY_TERRY,
    CYCLE,
    HIDDEN,
    MU,
    REWARDS,
    MatrixJudge,
    StratifiedEngine,
    differences,
    make_policy,
    make_tokenizer,
    probabilities,
    sigmoid,
)
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, TrainerCallback

from prefopt.games import Game, mixture, policies
from prefopt.games.game import Array
from prefopt.objectives import inpo_loss, pair_loss
from prefopt.reward_models import RuleJudge
from prefopt.rollout.engine import SamplingSettings
from prefopt.rollout.hf_engine import TransformersEngine
from prefopt.trainers.inpo import INPOConfig, INPOTrainer
from prefopt.trainers.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from prefopt.trainers.rounds import RoundTrainer

# With samples in exact proportion: 400 pairs hold each pair of actions to within 1/400, which moves
# an iterate by about 1e-3; a wrong anchor or sign moves it by 0.024 to 0.37.
TOLERANCE = 3e-3


class AtRoundEnds(TrainerCallback):
    """Notes the policy at the end of every round."""

    def __init__(self, trainer: RoundTrainer) -> None:
        self.trainer = trainer
        self.policies = [self.policy()]

    def policy(self) -> Array:
        return probabilities(self.trainer.model, self.trainer.prompts.prompt_ids[0])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        current = self.trainer.current
        if current is not None and state.global_step == current.end:
            self.policies.append(self.policy())


Play = Callable[..., tuple[Array, RoundTrainer]]


@pytest.fixture
def play(tmp_path: Path) -> Play:
    """Trains from mu; returns the policy before and after every round, and the trainer.

    Full batches (equal pairs, which give no gradient, are left out, so a batch is a pass and a
    part of the next) of SGD whose ``step`` is one of logits: the norm before the head gives states
    of squared length HIDDEN.
    """

    def run(
        trainer_class: type[RoundTrainer],
        judge: Any,
        *,
        step: float,
        prompts: int = 25,
        samples: int = 32,
        engine: Callable[..., Any] | None = StratifiedEngine,
        **options: Any,
    ) -> tuple[Array, RoundTrainer]:
        tokenizer = make_tokenizer()
        model = make_policy({"play": np.log(MU)})
        config: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "prompts_per_round": prompts,
            "prompts_per_shard": prompts,
            "pairing": "independent",
            "soft_labels": True,
            "ties": "keep",
            "layout": "separate",
            "per_device_train_batch_size": prompts * samples // 2,
            "optim": "sgd",
            "learning_rate": step / HIDDEN,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0,
            "max_grad_norm": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
        }
        config_class = INPOConfig if trainer_class is INPOTrainer else OnlineDPOConfig
        trainer = trainer_class(
            model,
            config_class(**config | options),
            [{"prompt": " ".join([*str(n), "play"])} for n in range(prompts)],
            judge=judge,
            sampling=SamplingSettings(samples_per_prompt=samples, max_new_tokens=1),
            engine=engine(model, tokenizer) if engine else None,
            processing_class=tokenizer,
        )
        notes = AtRoundEnds(trainer)
        trainer.add_callback(notes)
        trainer.train()
        return np.array(notes.policies), trainer

    return run


def first_of_rounds(trainer: RoundTrainer, name: str) -> list[float]:
    """A metric at the first step of each round."""
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [next(line for line in lines if line["round"] == k)[name] for k in range(3)]


# --- INPO ----------------------------------------------------------------------------------------

# A step of 2 / (sum of both curvatures): in the logits, those of the mean squared error over pairs
# of different actions add up to 4, whatever the shares of the pairs.
INPO: dict[str, Any] = {"eta": 0.5, "step": 0.5, "num_train_epochs": 40}
FEWER_PAIRS: dict[str, Any] = {"prompts": 12, "num_train_epochs": 30}  # iterates to within 5e-3


def first(count: int, iterates: Iterable[Array]) -> Array:
    return np.exp(list(islice(iterates, count)))


def test_inpo_plays_the_exact_iterates(play: Play) -> None:
    found, trainer = play(INPOTrainer, MatrixJudge(CYCLE), tau=0.1, **INPO)
    by_hand = [
        [0.500000, 0.300000, 0.200000],
        [0.554880, 0.223168, 0.221952],
        [0.564462, 0.172251, 0.263287],
        [0.540609, 0.143677, 0.315714],
    ]
    exact = first(4, policies(Game(CYCLE, MU, beta=0.1), "inpo", eta=0.5))
    assert exact == pytest.approx(np.array(by_hand), abs=1e-6)
    assert found == pytest.approx(exact, abs=TOLERANCE)
    assert first_of_rounds(trainer, "loss")[0] == pytest.approx(1.0, abs=1e-5), "1 / (4 eta^2)"
    margins = first_of_rounds(trainer, "rewards/margins")
    assert margins[0] == pytest.approx(0, abs=1e-6)
    assert min(margins[1:]) > 5e-3, "the reference stays where the run began"


def test_inpo_with_tau_0_is_anchored_to_the_last_iterate_alone(play: Play) -> None:
    found, _ = play(INPOTrainer, MatrixJudge(CYCLE), tau=0.0, **INPO)
    exact = [MU]
    for _ in range(3):
        exact.append(np.exp(mixture([(1, np.log(exact[-1]))], CYCLE @ exact[-1], 1 / 0.5)))
    assert found == pytest.approx(np.array(exact), abs=TOLERANCE)


def test_inpo_with_tau_eta_is_anchored_to_the_reference_alone(play: Play) -> None:
    found, _ = play(INPOTrainer, MatrixJudge(CYCLE), tau=0.5, **INPO)
    exact = first(4, policies(Game(CYCLE, MU, beta=0.5), "inpo", eta=0.5))
    assert found == pytest.approx(exact, abs=TOLERANCE)


def test_inpo_with_hard_labels_plays_the_game_of_certain_winners(play: Play) -> None:
    certain = np.where(CYCLE == 0.5, 0.5, (CYCLE > 0.5).astype(float))
    found, _ = play(INPOTrainer, MatrixJudge(CYCLE), tau=0.1, **INPO | {"soft_labels": False})
    exact = first(4, policies(Game(certain, MU, beta=0.1), "inpo", eta=0.5))
    assert found == pytest.approx(exact, abs=TOLERANCE)
    soft = first(4, policies(Game(CYCLE, MU, beta=0.1), "inpo", eta=0.5))
    assert np.abs(exact - soft).max() > 6 * TOLERANCE, "which is another game"


def exchanged(policy: Any, reference: Any, previous: Any, p: Tensor) -> Tensor:
    return inpo_loss(*policy, *previous, *reference, eta=0.5, tau=0.1, p_chosen=p)


def moving_reference(policy: Any, reference: Any, previous: Any, p: Tensor) -> Tensor:
    return inpo_loss(*policy, *previous, *previous, eta=0.5, tau=0.1, p_chosen=p)


def fixed_previous(policy: Any, reference: Any, previous: Any, p: Tensor) -> Tensor:
    return inpo_loss(*policy, *reference, *reference, eta=0.5, tau=0.1, p_chosen=p)


def flipped_label(policy: Any, reference: Any, previous: Any, p: Tensor) -> Tensor:
    return inpo_loss(*policy, *reference, *previous, eta=0.5, tau=0.1, p_chosen=1 - p)


@pytest.mark.parametrize("fault", [exchanged, moving_reference, fixed_previous, flipped_label])
def test_the_comparison_finds_a_wrong_anchor_or_sign(
    fault: Callable[..., Tensor], play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(*log_probs: Tensor, eta: float, tau: float, p_chosen: Any = None) -> Tensor:
        if p_chosen is None:  # the configuration asks whether eta and tau are in their range
            return inpo_loss(*log_probs, eta=eta, tau=tau)
        return fault(log_probs[0:2], log_probs[2:4], log_probs[4:6], p_chosen)

    monkeypatch.setattr("prefopt.trainers.inpo.inpo_loss", faulty)
    found, _ = play(INPOTrainer, MatrixJudge(CYCLE), tau=0.1, **INPO | FEWER_PAIRS)
    exact = first(4, policies(Game(CYCLE, MU, beta=0.1), "inpo", eta=0.5))
    assert np.abs(found - exact).max() > 6 * TOLERANCE


def test_the_comparison_finds_a_stale_sampler(play: Play) -> None:
    def stale(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> StratifiedEngine:
        return StratifiedEngine(make_policy({"play": np.log(MU)}), tokenizer)

    judge = MatrixJudge(CYCLE)
    found, _ = play(INPOTrainer, judge, tau=0.1, engine=stale, **INPO | FEWER_PAIRS)
    exact = first(4, policies(Game(CYCLE, MU, beta=0.1), "inpo", eta=0.5))
    assert np.abs(found - exact).max() > 6 * TOLERANCE


def test_inpo_on_its_own_random_samples(play: Play) -> None:
    """Trees, mini-batches and the trainer's own engine.

    The standard errors are those of the exact minimisers on 2,000 random pairs a round, from 2,000
    such runs in NumPy; mini-batches add a little.
    """
    found, trainer = play(
        INPOTrainer,
        MatrixJudge(CYCLE),
        tau=0.1,
        engine=None,
        prompts=125,
        samples=32,
        layout="auto",
        per_device_train_batch_size=125,
        generation_batch_size=2000,
        **INPO | {"num_train_epochs": 3},
    )
    assert isinstance(trainer.engine, TransformersEngine)
    assert trainer.layout == "tree"
    standard_errors = np.array(
        [[0.0041, 0.0038, 0.0052], [0.0061, 0.0045, 0.0072], [0.0073, 0.0050, 0.0083]]
    )
    exact = first(4, policies(Game(CYCLE, MU, beta=0.1), "inpo", eta=0.5))
    assert (np.abs(found - exact)[1:] <= 3.5 * standard_errors).all()


# --- online DPO ----------------------------------------------------------------------------------

# Under Bradley-Terry one policy fits all pairs, so neither the share of a pair nor batches matter.
# The curvatures of the loss in the logits add up to beta^2 / 2 at most.
BETA = 0.5
DPO: dict[str, Any] = {
    "beta": BETA,
    "step": 4 / BETA**2,
    "lr_scheduler_type": "constant",
    "prompts": 10,
    "num_train_epochs": 40,
}


def tilted(times: float) -> Array:
    """``mu exp(times r / beta)``, normalised."""
    return np.exp(mixture([(1, np.log(MU))], REWARDS, times / BETA))


@pytest.mark.parametrize(
    "options",
    [{}, {"initial_policy": "initial"}, {"data_window": "all_so_far", "num_train_epochs": 20}],
    ids=["newest-data", "from-the-start", "all-data"],
)
def test_online_dpo_stays_at_the_tilted_reference(options: dict[str, Any], play: Play) -> None:
    found, trainer = play(OnlineDPOTrainer, MatrixJudge(BRADLEY_TERRY), **DPO | options)
    assert found == pytest.approx(np.array([MU, *[tilted(1)] * 3]), abs=1e-4)
    assert first_of_rounds(trainer, "loss")[0] == pytest.approx(0.693147, abs=1e-6)
    begins_anew = "initial_policy" in options
    zero = [
        margin == pytest.approx(0, abs=1e-6)
        for margin in first_of_rounds(trainer, "rewards/margins")
    ]
    assert zero == [True, begins_anew, begins_anew]


def test_online_dpo_against_the_previous_policy_tilts_every_round(play: Play) -> None:
    found, trainer = play(OnlineDPOTrainer, MatrixJudge(BRADLEY_TERRY), reference="previous", **DPO)
    assert found == pytest.approx(np.array([tilted(t) for t in range(4)]), abs=1e-3)
    assert first_of_rounds(trainer, "rewards/margins") == pytest.approx([0, 0, 0], abs=1e-6)
    assert first_of_rounds(trainer, "loss") == pytest.approx([0.693147] * 3, abs=1e-6)


def test_online_dpo_with_flipped_labels_tilts_the_other_way(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flipped(*args: Any, p_chosen: Tensor | None, **kwargs: Any) -> Tensor:
        return pair_loss(*args, p_chosen=p_chosen if p_chosen is None else 1 - p_chosen, **kwargs)

    monkeypatch.setattr("prefopt.trainers.dpo.pair_loss", flipped)
    found, _ = play(OnlineDPOTrainer, MatrixJudge(BRADLEY_TERRY), rounds=1, **DPO)
    assert found[1] == pytest.approx(tilted(-1), abs=1e-4)
    assert np.abs(found[1] - tilted(1)).max() > 0.1


def test_online_dpo_on_a_cycle_comes_to_rest_where_its_gradient_is_zero(play: Play) -> None:
    beta = 2.0

    def gradient(policy: Array, sampler: Array) -> Array:
        """Of the expected log-likelihood per unit of beta in each logit, y and y' ~ sampler."""
        implied = sigmoid(beta * differences(np.log(policy / MU)))
        return (np.outer(sampler, sampler) * (CYCLE - implied)).sum(1)

    found, _ = play(
        OnlineDPOTrainer,
        MatrixJudge(CYCLE),
        beta=beta,
        step=4 / beta**2,
        rounds=5,
        num_train_epochs=40,
    )
    assert np.abs(gradient(MU, MU)).max() > 0.02
    for sampler, policy in pairwise(found):
        assert gradient(policy, sampler) == pytest.approx(np.zeros(3), abs=1e-3)
    assert gradient(found[-1], found[-1]) == pytest.approx(np.zeros(3), abs=1e-3)
    assert found[-1] == pytest.approx([0.52702, 0.22812, 0.24486], abs=TOLERANCE)


def test_best_against_worst_of_two_moves_to_the_best_action(play: Play) -> None:
    judge = RuleJudge(
        lambda prompts, completions: [REWARDS[ACTIONS.index(text)] for text in completions]
    )
    found, trainer = play(
        OnlineDPOTrainer,
        judge,
        pairing="best_worst",
        soft_labels=False,
        ties="drop",
        beta=BETA,
        step=2.0,
        rounds=5,
        prompts=100,
        samples=2,
        num_train_epochs=4,
    )
    best, worst = REWARDS.argmax(), REWARDS.argmin()
    assert (np.diff(found[:, best]) > 0.01).all()
    assert (np.diff(found[:, worst]) < 0).all()
    scores = [report["judge/score"] for report in trainer.reports()]
    assert scores == sorted(scores)
    assert scores == pytest.approx((found[:-1] @ REWARDS).tolist(), abs=0.01), "of live samples"
