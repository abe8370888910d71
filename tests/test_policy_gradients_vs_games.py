"""HyPO, Nash-MP and PPO follow the gradients, and arrive at the policies, that are known exactly.

The real trainers, on language models whose answers are actions (``matrix_players``): what a step
is taken with is read from the head's gradient just before the optimiser uses it. Samples are in
exact proportion, so that the error is that of whole numbers of samples and no test is left to luck.
Where an algorithm can be wrong in a way that still trains, the wrong one stands beside it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matrix_players import (
    ACTIONS,
    BRADLEY_TERRY,
    CYCLE,
    MU,
    REWARDS,
    MatrixJudge,
    ProportionalEngine,
    StratifiedEngine,
    head_of,
    logit_gradient,
    make_policy,
    make_tokenizer,
    states,
)
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerFast, TrainerCallback

from prefopt.data.tokenize import PromptedAnswers, PromptedPairs, Ragged
from prefopt.games import (
    Game,
    equilibrium,
    exploitability,
    log_normalise,
    nash_mp_ema_step,
    nash_mp_step,
    prox_step,
)
from prefopt.games.game import Array
from prefopt.models.logprobs import token_log_probs_of
from prefopt.reward_models import RuleJudge
from prefopt.rollout.engine import SamplingSettings
from prefopt.rounds.weights import put_weights
from prefopt.trainers.drpo import DRPOConfig, DRPOTrainer
from prefopt.trainers.hypo import HyPOConfig, HyPOTrainer
from prefopt.trainers.nash_mp import NashMPConfig, NashMPTrainer
from prefopt.trainers.ppo import PPOConfig, PPOTrainer
from prefopt.trainers.sample_rounds import SampleRoundTrainer

Logits = dict[str, Array]  # after each word, [actions]

POLICY = np.array([0.4, 0.35, 0.25])
TARGET = np.array([0.45, 0.32, 0.23])
# Pairs of answers of POLICY, and of MU, are whole numbers in 400: there the samples are exact and
# what is left is float32.
EXACT = {"prompts": 400, "samples": 2}
FLOAT32 = 1e-6

CONFIGS = {
    HyPOTrainer: HyPOConfig,
    NashMPTrainer: NashMPConfig,
    PPOTrainer: PPOConfig,
    DRPOTrainer: DRPOConfig,
}


class Notes(TrainerCallback):
    """Begins a run at other weights than the reference's; notes gradients and policies of steps.

    The weights are put in place once the reference is known and before anything is sampled, as if
    the run had gone on so far.
    """

    def __init__(
        self, trainer: SampleRoundTrainer, words: list[str], start: Any, target: Any
    ) -> None:
        self.trainer, self.words, self.start, self.target = trainer, words, start, target
        self.gradients: list[Array] = []
        self.policies: list[Array] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        name = "lm_head.weight"
        if self.target is not None:
            self.trainer.kept["target"] = {name: head_of(self.trainer.model, self.target).float()}
        if self.start is not None:
            put_weights(self.trainer.policy, {name: head_of(self.trainer.model, self.start)})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradients.append(logit_gradient(self.trainer.model, self.words))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model: Any = self.trainer.model
        with torch.no_grad():
            logits = states(model, self.words).float() @ model.lm_head.weight.T
        self.policies.append(logits.double().softmax(-1).numpy())


Train = Callable[..., Notes]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Trains with SGD, a round a step (or a pass), all prompts in it.

    ``step`` is that of the logits after "play". The reference is ``reference``; ``start`` and
    ``target`` are where policy and target are at first, if not there.
    """
    runs = 0

    def run(
        trainer_class: type[SampleRoundTrainer],
        *,
        reference: Logits,
        start: Logits | None = None,
        target: Logits | None = None,
        judge: Any = None,
        data: Any = None,
        prompts: int = 400,
        samples: int = 2,
        tokens: int = 1,
        step: float = 1.0,
        engine: Callable[..., Any] | None = StratifiedEngine,
        **options: Any,
    ) -> Notes:
        nonlocal runs
        runs += 1
        tokenizer, model = make_tokenizer(), make_policy(reference)
        length = states(model, ["play"]).square().sum().item()
        base = next(c for c in trainer_class.__mro__ if c in CONFIGS)
        config: dict[str, Any] = {
            "output_dir": str(tmp_path / str(runs)),
            "rounds": 1,
            "prompts_per_shard": prompts,
            "layout": "separate",
            "per_device_train_batch_size": prompts,
            "per_device_eval_batch_size": prompts,
            "optim": "sgd",
            "learning_rate": step / length,
            "lr_scheduler_type": "constant",
            "num_train_epochs": 1,
            "max_grad_norm": 0,
            "logging_steps": 1000,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
        }
        trainer = trainer_class(
            model,
            CONFIGS[base](**config | options),
            [{"prompt": prompt_text(n)} for n in range(prompts)] if data is None else data,
            judge=judge,
            sampling=SamplingSettings(samples_per_prompt=samples, max_new_tokens=tokens),
            engine=engine(model, tokenizer) if engine else None,
            processing_class=tokenizer,
        )
        notes = Notes(trainer, list(reference), start, target)
        trainer.add_callback(notes)
        trainer.train()
        return notes

    return run


def prompt_text(number: int) -> str:
    return " ".join([*str(number), "play"])


def after_play(policy: Array) -> Logits:
    return {"play": np.log(policy)}


def rule(values: dict[str, float]) -> RuleJudge:
    """Scores an answer by its text."""
    return RuleJudge(lambda prompts, completions: [values[text] for text in completions])


def offline_pairs(prompts: int, *pairs: tuple[list[int], list[int]]) -> PromptedPairs:
    """Pairs of action numbers, chosen first, in turn, as many as there are prompts."""
    chosen, rejected = zip(*(pairs[n % len(pairs)] for n in range(prompts)), strict=True)
    return PromptedPairs(
        **tokenized_prompts(prompts),
        chosen_ids=Ragged(chosen),
        rejected_ids=Ragged(rejected),
        p_chosen=array("d", [1.0] * prompts),
        margin=array("d", [0.0] * prompts),
    )


def tokenized_prompts(prompts: int) -> dict[str, Any]:
    texts = [prompt_text(n) for n in range(prompts)]
    ids = make_tokenizer()(texts)["input_ids"]
    return {"prompt_ids": Ragged(ids), "where": texts, "prompt": texts}


def distance(found: Any, exact: Any) -> float:
    return float(np.abs(np.asarray(found) - np.asarray(exact)).max())


def less_the_others(values: Array) -> Array:
    """Each value less the mean of the others of its row."""
    count = values.shape[1]
    return (values - values.mean(1, keepdims=True)) * count / (count - 1)


def estimates(
    policy: Array, k: int, advantages: Callable[[Array], Array], prompts: int
) -> tuple[Array, Array]:
    """Mean and standard error of ``mean_i advantage_i grad lp_i`` with k samples a prompt.

    By enumeration of all draws: ``advantages`` is called with [draws, k] action numbers.
    """
    draws = np.array(list(product(range(len(policy)), repeat=k)))
    shares = policy[draws].prod(1)
    scores = np.eye(len(policy))[draws] - policy
    each = (advantages(draws)[..., None] * scores).mean(1)
    mean = shares @ each
    return mean, np.sqrt(shares @ (each - mean) ** 2 / prompts)


# --- HyPO ----------------------------------------------------------------------------------------

# The bandit of policy softmax(THETA) and reference BANDIT. Of 1,000 pairs of samples each pair of
# actions has its share to within 1/1000; that moves a gradient of the KL by 1/1000 of a sum of
# four differences of log-ratios, 2.4 in all, at most.
THETA = np.array([0.5, -0.2, 0.1])
BANDIT = np.array([0.2, 0.5, 0.3])
KL_GRADIENT = np.array([0.285923, -0.228417, -0.057506])
HYBRID_GRADIENT = np.array([-0.031672, 0.034547, -0.002875])
BANDIT_PROMPTS = 1000
BANDIT_ERROR = 2.4 / BANDIT_PROMPTS


def hypo_on_the_bandit(train: Train, **options: Any) -> Array:
    prompts = options.get("prompts", BANDIT_PROMPTS)
    notes = train(
        HyPOTrainer,
        reference=after_play(BANDIT),
        start={"play": THETA},
        data=offline_pairs(prompts, ([0], [1])),
        **{"prompts": prompts, "beta": 0.1} | options,
    )
    return notes.gradients[0][0]


def k1_as_a_loss(log_probs: Tensor, reference: Tensor) -> Tensor:
    return (log_probs - reference).mean(1)


@pytest.mark.parametrize("layout", ["tree", "separate"])
def test_hypo_has_the_gradient_of_pairs_and_reverse_kl(layout: str, train: Train) -> None:
    found = hypo_on_the_bandit(train, kl_weight=0.05, layout=layout)
    assert distance(found, HYBRID_GRADIENT) < 0.05 * BANDIT_ERROR
    pairs_alone = hypo_on_the_bandit(train, kl_weight=0.0, prompts=4)
    by_hand = np.array([-1, 1, 0]) * 0.1 / (1 + np.exp(0.1 * (0.7 + np.log(2.5))))
    assert distance(pairs_alone, by_hand) < FLOAT32


def test_the_comparison_finds_k1_as_a_loss(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = KL_GRADIENT + hypo_on_the_bandit(train, kl_weight=0.0, prompts=4)
    assert distance(hypo_on_the_bandit(train, kl_weight=1.0), exact) < BANDIT_ERROR
    monkeypatch.setattr("prefopt.trainers.hypo.reverse_kl_loss", k1_as_a_loss)
    found = hypo_on_the_bandit(train, kl_weight=1.0)
    assert distance(found, exact - KL_GRADIENT) < BANDIT_ERROR, "no regularisation at all"
    assert distance(found, exact) > 100 * BANDIT_ERROR


def test_hypo_on_its_own_random_samples(train: Train) -> None:
    """The trainer's own engine and four samples a prompt, within four standard errors."""
    prompts, k = 500, 4
    policy = np.exp(log_normalise(THETA))
    kappa = np.log(policy / BANDIT)
    mean, errors = estimates(policy, k, lambda draws: less_the_others(kappa[draws]), prompts)
    assert distance(mean, KL_GRADIENT) < 5.1e-7
    assert errors.max() < 0.02
    options: dict[str, Any] = {"prompts": prompts, "samples": k, "engine": None}
    found = hypo_on_the_bandit(train, kl_weight=1.0, generation_batch_size=500, **options)
    found -= hypo_on_the_bandit(train, kl_weight=0.0, prompts=4)
    assert (np.abs(found - KL_GRADIENT) < 4 * errors).all()


# --- answers of two tokens -----------------------------------------------------------------------

# A tree of two binary tokens: logits of 1 for the first, and for the second after 0 and after 1.
TREE = (0.3, -0.5, 0.8)
TREE_REFERENCE = tuple(np.log(p / (1 - p)) for p in (0.5, 0.6, 0.3))
TREE_KL_GRADIENT = np.array([0.127559, -0.090553, 0.202418])
TOKENWISE = np.array([0.073337, -0.090553, 0.202418])
# 16 pairs of answers with shares to within 1/1000, log-ratios up to 1.4 apart
TREE_PROMPTS = 1000
TREE_ERROR = 16 * 1.4 / 2 / TREE_PROMPTS


def on_a_tree(logits: Sequence[float]) -> Logits:
    words = ("play", *ACTIONS[:2])
    return {word: np.array([0.0, z]) for word, z in zip(words, logits, strict=True)}


TWO_TOKENS: dict[str, Any] = {
    "reference": on_a_tree(TREE_REFERENCE),
    "start": on_a_tree(TREE),
    "tokens": 2,
}


def tree_log_probs(logits: Tensor) -> Tensor:
    """[4 answers, 2 tokens], of 00, 01, 10, 11."""
    no, yes = logsigmoid(-logits), logsigmoid(logits)
    first = torch.stack([no[0], no[0], yes[0], yes[0]])
    return torch.stack([first, torch.stack([no[1], yes[1], no[2], yes[2]])], dim=1)


def hypo_on_the_tree(trainer_class: type[HyPOTrainer], train: Train) -> Array:
    notes = train(
        trainer_class,
        **TWO_TOKENS,
        prompts=TREE_PROMPTS,
        data=offline_pairs(TREE_PROMPTS, ([0, 1], [1, 1])),
        beta=0.1,
        kl_weight=1.0,
    )
    return notes.gradients[0][:, 1]


class TokenWise(HyPOTrainer):
    """Every token with a coefficient of its own, which says nothing of the tokens after it."""

    def tree_losses(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        _, metrics = super().tree_losses(model, inputs)
        trees, pairs = inputs["trees"], metrics["dpo_loss"]
        with torch.no_grad(), self.weights_of("initial"):
            reference = token_log_probs_of(model, trees)
        log_probs = token_log_probs_of(model, trees)
        each = trees.sum_per_completion((log_probs - reference).detach() * log_probs)
        return pairs + each.view(trees.num_trees, -1)[:, 2:].mean(1), metrics


def test_hypo_is_exact_on_two_tokens_and_token_wise_coefficients_are_not(train: Train) -> None:
    theta = torch.tensor(TREE, dtype=torch.float64, requires_grad=True)
    reference = tree_log_probs(torch.tensor(TREE_REFERENCE)).sum(1)
    log_policy = tree_log_probs(theta).sum(1)
    ratios = log_policy - reference
    loss = -logsigmoid(0.1 * (ratios[1] - ratios[3])) + (log_policy.exp() * ratios).sum()
    exact = torch.autograd.grad(loss, theta)[0].numpy()

    assert distance(hypo_on_the_tree(HyPOTrainer, train), exact) < TREE_ERROR
    wrong = hypo_on_the_tree(TokenWise, train)
    assert wrong[0] - exact[0] == pytest.approx((TOKENWISE - TREE_KL_GRADIENT)[0], abs=TREE_ERROR)
    assert distance(wrong, exact) > 4 * TREE_ERROR


@pytest.mark.parametrize(("lam", "exact"), [(1.0, TREE_KL_GRADIENT), (0.0, TOKENWISE)])
def test_ppo_is_exact_on_two_tokens_with_rewards_to_come(
    lam: float, exact: Array, train: Train
) -> None:
    # all rewards are those of the KL; the loss is a mean over tokens, two an answer
    notes = train(
        PPOTrainer,
        **TWO_TOKENS,
        prompts=TREE_PROMPTS,
        judge=rule(dict.fromkeys(["a a", "a b", "b a", "b b"], 0.0)),
        gae_lambda=lam,
        kl_coef=1.0,
        **PLAIN,
    )
    assert distance(2 * notes.gradients[0][:, 1], exact) < TREE_ERROR
    assert distance(TREE_KL_GRADIENT, TOKENWISE) > 4 * TREE_ERROR


# --- Nash-MP by its gradient ---------------------------------------------------------------------

SELF_PLAY = [0.035745, -0.034428, -0.001317]
PROX = [0.060321, -0.049219, -0.011102]
PREFERENCE = [0.026, -0.02975, 0.00375]


def nash_mp_gradient(train: Train, **options: Any) -> Array:
    """Minus that of the loss: the policy ascends."""
    given: dict[str, Any] = {
        "reference": after_play(MU),
        "start": after_play(POLICY),
        "target": after_play(TARGET),
        "judge": MatrixJudge(CYCLE),
        "beta": 0.1,
    }
    return -train(NashMPTrainer, **EXACT | given | options).gradients[0][0]


@pytest.mark.parametrize(
    ("options", "exact"),
    [
        ({}, PROX),
        ({"kappa": 1.0}, SELF_PLAY),
        ({"prox": 0.0}, SELF_PLAY),
        ({"beta": 0.0, "prox": 0.0}, PREFERENCE),
    ],
    ids=["target", "kappa-1", "prox-0", "preferences-alone"],
)
def test_nash_mp_has_the_gradient_of_the_game(
    options: dict[str, Any], exact: list[float], train: Train
) -> None:
    assert distance(nash_mp_gradient(train, **options), exact) < FLOAT32


def test_nash_mp_with_a_frozen_target_is_a_heavier_beta(train: Train) -> None:
    frozen = nash_mp_gradient(train, kappa=0.0, prox=0.5)
    heavier = nash_mp_gradient(train, kappa=1.0, beta=0.6)
    assert distance(frozen, heavier) < FLOAT32
    assert distance(frozen, PROX) > 0.01


def test_nash_mp_on_its_own_random_samples(train: Train) -> None:
    """The trainer's own engine and four samples a prompt, within four standard errors."""
    prompts, k = 500, 4
    penalty = -0.1 * np.log(POLICY / MU) - 0.5 * np.log(POLICY / TARGET)

    def advantages(draws: Array) -> Array:
        against = CYCLE[draws[:, :, None], draws[:, None, :]].sum(2) - 0.5
        return against / (k - 1) - 0.5 + less_the_others(penalty[draws])

    mean, errors = estimates(POLICY, k, advantages, prompts)
    assert distance(mean, PROX) < 5.1e-7
    assert errors.max() < 0.01
    options: dict[str, Any] = {"engine": None, "generation_batch_size": 500}
    found = nash_mp_gradient(train, prompts=prompts, samples=k, **options)
    assert (np.abs(found - mean) < 4 * errors).all()


# --- PPO by its gradient -------------------------------------------------------------------------

PLAIN: dict[str, Any] = {
    "whiten_rewards": False,
    "whiten_advantages": False,
    "missing_eos_score": None,
    "critic_learning_rate": 0.0,  # the critic stays at 0
}
SCORES = dict(zip(ACTIONS, REWARDS, strict=False))


def ppo_reward(policy: Array, kl_coef: float) -> Array:
    return REWARDS - kl_coef * np.log(policy / MU)


def ascent(policy: Array, advantages: Array) -> Array:
    return policy * (advantages - policy @ advantages)


def ppo(train: Train, trainer_class: type[PPOTrainer] = PPOTrainer, **options: Any) -> Notes:
    given: dict[str, Any] = {
        "reference": after_play(MU),
        "start": after_play(POLICY),
        "judge": rule(SCORES),
        "gae_lambda": 1.0,
        "kl_coef": 0.2,
    }
    return train(trainer_class, **EXACT | PLAIN | given | options)


def test_ppo_has_the_gradient_of_the_regularised_reward(train: Train) -> None:
    by_hand = [-0.002510, 0.076393, -0.073883]
    exact = ascent(POLICY, ppo_reward(POLICY, 0.2))
    assert distance(exact, by_hand) < 5.1e-7
    assert distance(-ppo(train).gradients[0][0], exact) < FLOAT32


def test_whitening_divides_the_gradient_by_the_deviation(train: Train) -> None:
    reward = ppo_reward(POLICY, 0.2)
    deviation = np.sqrt(POLICY @ (reward - POLICY @ reward) ** 2)
    size = np.sqrt(POLICY @ reward**2)  # masked rewards are not shifted
    for name, scale in (("whiten_advantages", deviation), ("whiten_rewards", size)):
        found = -ppo(train, **{name: True}).gradients[0][0]
        assert distance(found, ascent(POLICY, reward) / scale) < 5e-6


def test_a_second_pass_counts_by_its_ratio_and_stops_at_the_clip(train: Train) -> None:
    advantages = ppo_reward(POLICY, 0.2)
    step, clip = 2.0, 0.1
    moved = np.exp(log_normalise(np.log(POLICY) + step * ascent(POLICY, advantages)))
    assert (np.abs(moved / POLICY - 1) > clip).tolist() == [False, True, True]
    assert (np.sign(moved / POLICY - 1) == np.sign(advantages)).tolist() == [False, True, True]
    for limit, counted in ((10.0, [1, 1, 1]), (clip, [1, 0, 0])):
        notes = ppo(train, num_train_epochs=2, step=step, clip=limit)
        assert distance(notes.policies[0][0], moved) < FLOAT32
        exact = ascent(moved, advantages * counted)
        assert distance(-notes.gradients[1][0], exact) < FLOAT32


def test_without_resets_the_gradient_is_ppos_bit_for_bit(train: Train) -> None:
    answers = PromptedAnswers(**tokenized_prompts(400), completion_ids=Ragged([[0, 1]] * 400))
    never = ppo(train, DRPOTrainer, data=answers, reset_probability=0.0)
    assert np.array_equal(never.gradients, ppo(train).gradients)


def test_a_forced_token_is_not_learned_and_the_next_one_is(train: Train) -> None:
    prompts, with_a = 1000, 0.75
    begun = [[0, 1]] * int(with_a * prompts) + [[1, 0]] * int((1 - with_a) * prompts)
    scores = {"a a": 0.3, "a b": -0.5, "b a": 1.0, "b b": 0.4}
    notes = train(
        DRPOTrainer,
        **TWO_TOKENS,
        prompts=prompts,
        data=PromptedAnswers(**tokenized_prompts(prompts), completion_ids=Ragged(begun)),
        judge=rule(scores),
        reset_probability=1.0,
        gae_lambda=1.0,
        kl_coef=0.2,
        **PLAIN,
    )
    found = notes.gradients[0][:, 1]
    assert abs(found[0]) < 1e-5, "the head's gradient tells the three logits apart to within this"
    for n, (word, share) in enumerate({"a": with_a, "b": 1 - with_a}.items(), start=1):
        p, q = (1 / (1 + np.exp(-logits[n])) for logits in (TREE, TREE_REFERENCE))
        yes = scores[f"{word} b"] - 0.2 * np.log(p / q)
        no = scores[f"{word} a"] - 0.2 * np.log((1 - p) / (1 - q))
        assert -found[n] == pytest.approx(share * p * (1 - p) * (yes - no), abs=2e-3)


# --- Nash-MP by its iterates: self-play near a moving target -------------------------------------


def play(train: Train, game: Game, **options: Any) -> Array:
    """The policies after each step, [rounds, actions]; 100 prompts, two samples each."""
    given: dict[str, Any] = {
        "trainer_class": NashMPTrainer,
        "reference": after_play(game.reference),
        "judge": MatrixJudge(game.payoff),
        "beta": game.beta,
        "prompts": 100,
        "step": 0.5 * len(game.reference),
    }
    given |= options
    notes = train(prompts_per_round=given["prompts"], **given)
    return np.array(notes.policies)[:, 0]


def exact_play(game: Game, rounds: int, kappa: float, prox: float = 0.5) -> Array:
    logits = target = game.log_reference
    policies = []
    for _ in range(rounds):
        logits, target = nash_mp_ema_step(game, logits, target, game.beta / prox, kappa, lr=0.5)
        policies.append(np.exp(log_normalise(logits)))
    return np.array(policies)


# 100 pairs of samples a step; runs with other seeds stay within 0.005
STEPS: dict[str, Any] = {"rounds": 20, "kappa": 0.2, "prox": 1.0}
STEPS_ERROR = 0.01


def test_nash_mp_takes_the_exact_steps(train: Train) -> None:
    game = Game(CYCLE, MU, beta=0.1)
    found = play(train, game, **STEPS)
    assert distance(found, exact_play(game, **STEPS)) < STEPS_ERROR


class TargetThatNeverMoves(NashMPTrainer):
    def after_step(self) -> None:
        pass


class TargetThatIsThePolicy(NashMPTrainer):
    def after_step(self) -> None:
        self.args.kappa = 1.0
        super().after_step()


class StaleEngine(StratifiedEngine):
    """Samples from the policy as it was at first."""

    def __init__(self, _: nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(make_policy(after_play(MU)), tokenizer)


@pytest.mark.parametrize(
    "fault",
    [
        {"trainer_class": TargetThatNeverMoves},
        {"trainer_class": TargetThatIsThePolicy},
        {"engine": StaleEngine},
        {"judge": MatrixJudge(CYCLE.T)},
    ],
    ids=["target-never-moves", "target-is-the-policy", "stale-sampler", "flipped-win-rates"],
)
def test_the_comparison_finds_a_wrong_step(fault: dict[str, Any], train: Train) -> None:
    game = Game(CYCLE, MU, beta=0.1)
    found = play(train, game, **STEPS | fault)
    assert distance(found, exact_play(game, **STEPS)) > 3 * STEPS_ERROR


def random_game(beta: float) -> Game:
    """Ten actions, the lower triangle uniform, a uniform reference."""
    lower = np.tril(np.random.default_rng(0).random((10, 10)), -1)
    return Game(lower + np.triu(1 - lower.T, 1) + np.eye(10) / 2, np.full(10, 0.1), beta)


def test_a_slow_target_converges_where_plain_self_play_does_not(train: Train) -> None:
    """The gaps of exact gradients after 20, 100 and 200 equal steps, which take about 15 s."""
    game = random_game(beta=0.01)

    def gaps(kappa: float) -> list[float]:
        policies = play(train, game, kappa=kappa, rounds=200)
        return [exploitability(game, np.log(policies[step - 1])) for step in (20, 100, 200)]

    slow, plain = gaps(0.1), gaps(1.0)
    assert slow == pytest.approx([0.134, 0.082, 0.0123], abs=0.01)
    assert plain[:2] == pytest.approx([0.187, 0.452], abs=0.01)
    assert min(plain) > 5 * slow[2], "where it is on its way round is left to rounding"


# --- Nash-MP by its iterates: mirror prox --------------------------------------------------------


# 80 samples of the policy against 80 of the opponent, in proportion to within 1/160: those of MU
# are exact, so the first half step is. The others err by 1/160 of a win rate over beta + prox.
SAMPLES = 80
HALF_STEP_ERROR = 0.001


def mirror_prox(train: Train, game: Game, prox: float, steps: int, **options: Any) -> Array:
    """The policies after each phase of six steps, [2 x steps, actions].

    Each of the six shrinks the distance to the phase's solution by 4 or so.
    """
    phase, independent = 6, (SAMPLES - 1) / SAMPLES  # see ProportionalEngine
    given: dict[str, Any] = {
        "mode": "mirror_prox",
        "engine": ProportionalEngine,
        "prompts": 1,
        "samples": SAMPLES,
        "beta": game.beta * independent,
        "prox": prox * independent,
        "step": 3.2 / (game.beta + prox),
        "phase_rounds": phase,
        "rounds": 2 * steps * phase,
    }
    return play(train, game, **given | options)[phase - 1 :: phase]


def exact_mirror_prox(game: Game, prox: float, steps: int) -> Array:
    policy, eta, phases = game.log_reference, game.beta / prox, []
    for _ in range(steps):
        half = prox_step(game, policy, policy, eta)
        policy = nash_mp_step(game, policy, eta)
        phases += [np.exp(half), np.exp(policy)]
    return np.array(phases)


@pytest.mark.parametrize(
    ("beta", "half", "whole"),
    [
        (0.1, [0.546472, 0.234939, 0.218589], [0.529308, 0.234720, 0.235972]),
        (0.01, [0.553906, 0.224531, 0.221563], [0.530037, 0.224134, 0.245829]),
    ],
)
def test_two_phases_are_a_step_of_mirror_prox(
    beta: float, half: list[float], whole: list[float], train: Train
) -> None:
    found = mirror_prox(train, Game(CYCLE, MU, beta), prox=0.5, steps=1)
    assert distance(found[0], half) < HALF_STEP_ERROR
    assert distance(found[1], whole) < 0.004
    assert distance(half, whole) > 0.016


LONG_STEPS: dict[str, Any] = {"prox": 0.1, "steps": 2}
LONG_STEPS_ERROR = 0.012


def test_steps_of_mirror_prox_follow_each_other(train: Train) -> None:
    game = Game(CYCLE, MU, beta=0.1)
    found = mirror_prox(train, game, **LONG_STEPS)
    assert distance(found, exact_mirror_prox(game, **LONG_STEPS)) < LONG_STEPS_ERROR


class LiveOpponent(NashMPTrainer):
    """In the second phase the policy plays itself, not the half step."""

    def before_sampling(self, index: int) -> None:
        super().before_sampling(index)
        if self.opponent == "half":
            self.kept["half"] = {name: p.detach() for name, p in self.policy.named_parameters()}


class OpponentOfTheFirstPhase(NashMPTrainer):
    def before_sampling(self, index: int) -> None:
        super().before_sampling(index)
        self.opponent = "target"


class MovedCentre(NashMPTrainer):
    """In the second phase the proximal term is centred at the half step."""

    def before_sampling(self, index: int) -> None:
        super().before_sampling(index)
        if self.opponent == "half":
            self.kept["target"] = self.kept["half"]


@pytest.mark.parametrize("fault", [LiveOpponent, OpponentOfTheFirstPhase, MovedCentre])
def test_the_comparison_finds_a_wrong_second_phase(
    fault: type[NashMPTrainer], train: Train
) -> None:
    game = Game(CYCLE, MU, beta=0.1)
    once = LONG_STEPS | {"steps": 1}
    found = mirror_prox(train, game, trainer_class=fault, **once)
    exact = exact_mirror_prox(game, **once)
    assert distance(found[0], exact[0]) < LONG_STEPS_ERROR, "the first phase is as it should be"
    assert distance(found[1], exact[1]) > 3 * LONG_STEPS_ERROR


# --- where nothing moves -------------------------------------------------------------------------

TIES = np.full((3, 3), 0.5)
FEW: dict[str, Any] = {"rounds": 4, "prompts": 20, "prompts_per_round": 20}


@pytest.mark.parametrize("mode", ["ema", "mirror_prox"])
def test_where_all_tie_the_reference_stays(mode: str, train: Train) -> None:
    notes = train(
        NashMPTrainer,
        reference=after_play(MU),
        judge=MatrixJudge(TIES),
        mode=mode,
        phase_rounds=1,
        **FEW,
    )
    assert np.abs(notes.gradients).max() < FLOAT32
    assert distance(notes.policies, MU) < FLOAT32


@pytest.mark.parametrize("trainer_class", [PPOTrainer, DRPOTrainer])
def test_ppo_without_differences_in_reward_stays(
    trainer_class: type[PPOTrainer], train: Train
) -> None:
    answers = PromptedAnswers(**tokenized_prompts(20), completion_ids=Ragged([[0]] * 20))
    notes = train(
        trainer_class,
        reference=after_play(MU),
        data=answers,
        judge=rule(dict.fromkeys(ACTIONS, 0.0)),
        missing_eos_score=None,
        **FEW,
    )
    assert np.abs(notes.gradients).max() < FLOAT32


def test_hypo_stays_where_labels_tie_and_nothing_diverges(train: Train) -> None:
    data = offline_pairs(20, ([0], [1]), ([1], [0]))
    notes = train(HyPOTrainer, reference=after_play(MU), data=data, kl_weight=1.0, **FEW)
    assert np.abs(notes.gradients).max() < FLOAT32


@pytest.mark.parametrize("payoff", [BRADLEY_TERRY, CYCLE], ids=["bradley-terry", "cycle"])
def test_nash_mp_rests_in_the_equilibrium(payoff: Array, train: Train) -> None:
    game = Game(payoff, MU, beta=0.2)
    rest = np.exp(equilibrium(game))
    tilted = MU * np.exp(payoff @ rest / 0.2)
    assert rest == pytest.approx(tilted / tilted.sum(), abs=1e-12)
    at_rest = {"start": after_play(rest), "target": after_play(rest)}
    assert distance(play(train, game, rounds=10, **at_rest), rest) < 0.01
    found = play(train, game, rounds=10, kappa=1.0)
    assert distance(found[-1], MU) > 0.03, "from elsewhere as many steps lead away"


def test_a_bradley_terry_game_does_not_end_in_the_policy_tilted_by_its_scores(
    train: Train,
) -> None:
    game = Game(BRADLEY_TERRY, MU, beta=0.2)
    by_scores = np.exp(log_normalise(np.log(MU) + REWARDS / 0.2))
    rest = np.exp(equilibrium(game))
    found = play(train, game, rounds=20, kappa=1.0, start=after_play(by_scores), step=6.0)
    assert distance(by_scores, rest) > 0.3
    assert distance(found[-1], rest) < 0.02


def test_ppo_rests_in_the_reference_tilted_by_the_reward(train: Train) -> None:
    rest = np.exp(log_normalise(np.log(MU) + REWARDS / 0.2))
    notes = ppo(train, start=after_play(rest), step=5.0, rounds=5, prompts=100)
    assert distance(np.array(notes.policies)[:, 0], rest) < 0.005
    assert distance(rest, MU) > 0.1


# --- samples of another policy than the one that is trained --------------------------------------


def test_the_comparison_finds_samples_of_the_reference(train: Train) -> None:
    def sampling_from(policy: Array) -> dict[str, Any]:
        other = make_policy(after_play(policy))
        return {"engine": lambda _, tokenizer: StratifiedEngine(other, tokenizer)}

    stale = sampling_from(MU)
    assert distance(nash_mp_gradient(train, **stale), PROX) > 0.01
    exact = ascent(POLICY, ppo_reward(POLICY, 0.2))
    assert distance(-ppo(train, **stale).gradients[0][0], exact) > 0.01
    found = hypo_on_the_bandit(train, kl_weight=0.05, **sampling_from(BANDIT))
    assert distance(found, HYBRID_GRADIENT) > 20 * 0.05 * BANDIT_ERROR
