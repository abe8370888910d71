"""On-policy objectives: expected gradients by enumeration of every draw, and numbers by hand.

Where an estimator could be wrong in a way that still trains, the wrong one stands in the test, with
the gradient it would have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from prefopt.errors import PrefoptError
from prefopt.games import Game, equilibrium, log_normalise, policy_gradient
from prefopt.objectives import (
    clipped_value_loss,
    explained_variance,
    gae,
    mean_of_others,
    nash_mp_loss,
    pair_loss,
    ppo_policy_loss,
    reverse_kl_loss,
    score_function_loss,
    token_rewards,
    whiten,
)


def tensor(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# A bandit for the KL divergence: pi = (.461488, .229168, .309344), KL(pi || ref) = .216570.
THETA = tensor(0.5, -0.2, 0.1)
BANDIT = tensor(0.2, 0.5, 0.3).log()
KL_GRADIENT = tensor(0.285923, -0.228417, -0.057506)

# A game without a best action: 1 beats 2, 2 beats 3, 3 beats 1.
CYCLE = tensor([0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5])
REFERENCE = tensor(0.5, 0.3, 0.2).log()
POLICY = tensor(0.4, 0.35, 0.25).log()
TARGET = tensor(0.45, 0.32, 0.23).log()
SELF_PLAY = tensor(0.035745, -0.034428, -0.001317)


def expected_gradient(theta: Tensor, k: int, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Of ``loss(draws, log_policy)``, [prompts], over every way to draw k actions.

    ``draws`` is [prompts, k], each prompt another draw, which counts with its probability; the
    sampler is held constant, as it is in training.
    """
    theta = theta.clone().requires_grad_()
    log_policy = theta.log_softmax(-1)
    draws = torch.tensor(list(product(range(len(theta)), repeat=k)))
    weights = log_policy.detach()[draws].sum(dim=1).exp()
    (gradient,) = torch.autograd.grad((weights * loss(draws, log_policy)).sum(), theta)
    return gradient


def exact_gradient(theta: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(objective(theta.log_softmax(-1)), theta)[0]


def kl(log_policy: Tensor) -> Tensor:
    return (log_policy.exp() * (log_policy - BANDIT)).sum()


def assert_near(actual: Tensor, expected: Tensor, atol: float = 1e-13) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def assert_prints(actual: Tensor, printed: Tensor) -> None:
    """Equal to the six digits printed."""
    assert_near(actual, printed, atol=5.1e-7)


# ------------------------------------------------------------------- leave one out


def test_mean_of_others_by_hand() -> None:
    values = tensor([1.0, 2.0, 6.0], [0.0, 0.0, 3.0])
    assert torch.equal(mean_of_others(values), tensor([4.0, 3.5, 1.5], [1.5, 1.5, 0.0]))


def test_a_baseline_does_not_see_its_own_sample() -> None:
    jacobian = torch.autograd.functional.jacobian(
        lambda row: mean_of_others(row[None])[0], tensor(3.0, -1.0, 2.0, 5.0)
    )
    assert_near(jacobian, (torch.ones(4, 4).double() - torch.eye(4)) / 3)


def test_a_row_of_one_has_no_others() -> None:
    with pytest.raises(PrefoptError, match=r"found 1 completion\(s\) a prompt, expected at least"):
        mean_of_others(tensor([1.0], [2.0]))


def test_score_function_loss_by_hand_and_its_gradient() -> None:
    log_probs = tensor([-2.0, -3.0], [-1.0, -4.0]).requires_grad_()
    advantages = tensor([0.5, -0.5], [2.0, 1.0]).requires_grad_()
    loss = score_function_loss(log_probs, advantages)
    assert loss.tolist() == [-(0.5 * -2 + -0.5 * -3) / 2, -(2 * -1 + 1 * -4) / 2]
    loss.sum().backward()
    assert torch.equal(log_probs.grad, -advantages.detach() / 2)
    assert advantages.grad is None


# ------------------------------------------------------------------- HyPO


def test_the_bandit_is_the_one_its_numbers_are_of() -> None:
    log_policy = THETA.log_softmax(-1)
    assert_prints(log_policy.exp(), tensor(0.461488, 0.229168, 0.309344))
    assert kl(log_policy).item() == pytest.approx(0.216570, abs=5.1e-7)
    assert_prints(exact_gradient(THETA, kl), KL_GRADIENT)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_the_expected_gradient_is_that_of_the_reverse_kl(k: int) -> None:
    gradient = expected_gradient(
        THETA, k, lambda draws, log_policy: reverse_kl_loss(log_policy[draws], BANDIT[draws])
    )
    assert_near(gradient, exact_gradient(THETA, kl))


def over_the_row(lp: Tensor, rf: Tensor) -> Tensor:
    """A baseline that contains the sample itself."""
    kappa = (lp - rf).detach()
    return ((kappa - kappa.mean(dim=1, keepdim=True)) * lp).mean(dim=1)


@pytest.mark.parametrize(
    ("name", "loss", "expected"),
    [
        ("reinforce", lambda lp, rf: ((lp - rf).detach() * lp).mean(1), KL_GRADIENT),
        ("k2", lambda lp, rf: (0.5 * (lp - rf) ** 2).mean(1), KL_GRADIENT),
        ("k1", lambda lp, rf: (lp - rf).mean(1), tensor(0, 0, 0)),
        (
            "k3",
            lambda lp, rf: ((rf - lp).exp() - 1 + lp - rf).mean(1),
            tensor(0.261488, -0.270832, 0.009344),
        ),
        ("baseline with itself", over_the_row, KL_GRADIENT / 2),
    ],
)
def test_estimators_that_are_the_same_and_that_are_not(
    name: str, loss: Callable[[Tensor, Tensor], Tensor], expected: Tensor
) -> None:
    gradient = expected_gradient(
        THETA, 2, lambda draws, log_policy: loss(log_policy[draws], BANDIT[draws])
    )
    assert_prints(gradient, expected)
    told_apart = (gradient - KL_GRADIENT).abs().max() > 1e-2
    assert told_apart == (name not in {"reinforce", "k2"})


def test_k3_as_a_loss_follows_the_forward_kl() -> None:
    forward = exact_gradient(THETA, lambda log_policy: -(BANDIT.exp() * log_policy).sum())
    assert_prints(forward, tensor(0.261488, -0.270832, 0.009344))


def test_the_baseline_lowers_the_variance() -> None:
    log_policy = THETA.log_softmax(-1)
    draws = torch.tensor(list(product(range(3), repeat=4)))
    weights = log_policy[draws].sum(1).exp()
    kappa = 5 + log_policy[draws] - BANDIT[draws]  # as if every answer were 5 nats away
    scores = torch.eye(3).double()[draws] - log_policy.exp()

    def variance(coefficients: Tensor) -> float:
        estimates = (coefficients[:, :, None] * scores).mean(1)
        mean = weights @ estimates
        return (weights @ ((estimates - mean) ** 2).sum(1)).item()

    assert variance(kappa - mean_of_others(kappa)) < 0.05 * variance(kappa)


def test_at_the_reference_the_gradient_is_zero_for_every_draw() -> None:
    log_probs = tensor([-10.3, -27.1, -4.7]).requires_grad_()
    loss = reverse_kl_loss(log_probs, log_probs.detach())
    loss.sum().backward()
    assert loss.item() == 0
    assert torch.equal(log_probs.grad, torch.zeros(1, 3).double())


def test_identical_completions_pull_nowhere() -> None:
    log_probs = torch.full((1, 4), -10.25, dtype=torch.float64, requires_grad=True)
    reverse_kl_loss(log_probs, torch.full((1, 4), -12.5).double()).sum().backward()
    assert torch.equal(log_probs.grad, torch.zeros(1, 4).double())


def test_hybrid_loss_and_gradient_on_the_bandit() -> None:
    # Pair w = action 0, l = action 1: d = .7 + ln(.5/.2) = 1.616291; beta .1, lambda .05.
    def dpo(log_policy: Tensor) -> Tensor:
        pair = log_policy[[0]], log_policy[[1]], BANDIT[[0]], BANDIT[[1]]
        return pair_loss("sigmoid", *pair, beta=0.1)

    log_policy = THETA.log_softmax(-1)
    loss = dpo(log_policy).item() + 0.05 * kl(log_policy).item()
    assert loss == pytest.approx(0.626423, abs=5.1e-7)
    assert 0.7 + math.log(2.5) == pytest.approx(1.616291, abs=5.1e-7)

    def hybrid(weight: float) -> Tensor:
        return expected_gradient(
            THETA,
            2,
            lambda draws, lp: dpo(lp) + weight * reverse_kl_loss(lp[draws], BANDIT[draws]),
        )

    assert_prints(hybrid(0.05), tensor(-0.031672, 0.034547, -0.002875))
    assert_near(hybrid(0.0), exact_gradient(THETA, lambda lp: dpo(lp).sum()), atol=1e-16)


# A tree of two binary tokens: the logits of 1 for the first and for the second after 0 and 1.
TREE = tensor(0.3, -0.5, 0.8)
TREE_REFERENCE = tensor(0.5, 0.6, 0.3).logit()
TREE_GRADIENT = tensor(0.127559, -0.090553, 0.202418)


def token_log_probs(logits: Tensor) -> Tensor:
    """[4 sequences, 2 tokens], of 00, 01, 10, 11."""
    no, yes = torch.nn.functional.logsigmoid(-logits), torch.nn.functional.logsigmoid(logits)
    first = torch.stack([no[0], no[0], yes[0], yes[0]])
    return torch.stack([first, torch.stack([no[1], yes[1], no[2], yes[2]])], dim=1)


def tree_gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Of ``loss`` of [4, 2] token log-probs and [4, 2] reference ones, one loss a sequence."""
    theta = TREE.clone().requires_grad_()
    tokens = token_log_probs(theta)
    weights = tokens.detach().sum(1).exp()
    expected = (weights * loss(tokens, token_log_probs(TREE_REFERENCE))).sum()
    return torch.autograd.grad(expected, theta)[0]


def test_whole_sequences_have_the_exact_gradient_and_single_tokens_do_not() -> None:
    def exact(theta: Tensor) -> Tensor:
        lp = token_log_probs(theta).sum(1)
        return (lp.exp() * (lp - token_log_probs(TREE_REFERENCE).sum(1))).sum()

    true = torch.autograd.functional.jacobian(exact, TREE)
    assert_prints(true, TREE_GRADIENT)
    whole = tree_gradient(lambda lp, rf: (lp - rf).sum(1).detach() * lp.sum(1))
    assert_near(whole, true)
    tokenwise = tree_gradient(lambda lp, rf: ((lp - rf).detach() * lp).sum(1))
    assert_prints(tokenwise, tensor(0.073337, -0.090553, 0.202418))


def test_pairs_of_sequences_of_the_tree_have_the_exact_gradient() -> None:
    theta = TREE.clone().requires_grad_()
    lp, rf = token_log_probs(theta).sum(1), token_log_probs(TREE_REFERENCE).sum(1)
    draws = torch.tensor(list(product(range(4), repeat=2)))
    weights = lp.detach()[draws].sum(1).exp()
    (weights * reverse_kl_loss(lp[draws], rf[draws])).sum().backward()
    assert_prints(theta.grad, TREE_GRADIENT)


@pytest.mark.parametrize(
    ("lam", "expected"), [(1.0, TREE_GRADIENT), (0.0, tensor(0.073337, -0.090553, 0.202418))]
)
def test_rewards_to_go_are_exact_and_one_step_rewards_are_not(lam: float, expected: Tensor) -> None:
    # PPO's own KL reward, without a critic: lam = 1 counts a token's effect on later tokens.
    def ppo(lp: Tensor, rf: Tensor) -> Tensor:
        mask = torch.ones(4, 2, dtype=torch.bool)
        rewards = token_rewards(lp, rf, mask, torch.zeros(4), kl_coef=1.0)
        advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, lam=lam)
        losses = ppo_policy_loss(
            lp.flatten(), lp.detach().flatten(), advantages.flatten(), clip=0.2
        )
        return losses.view(4, 2).sum(1)

    assert_prints(tree_gradient(ppo), expected)


# ------------------------------------------------------------------- Nash-MP


def win_rates_of(draws: Tensor, payoff: Tensor = CYCLE) -> Tensor:
    """Self-play: of each sample against the mean of the others."""
    n = draws.shape[1]
    matches = payoff[draws[:, :, None], draws[:, None, :]]
    return (matches.sum(2) - matches.diagonal(dim1=1, dim2=2)) / (n - 1)


def nash_mp_gradient(
    n: int,
    *,
    payoff: Tensor = CYCLE,
    policy: Tensor = POLICY,
    target: Tensor | None = TARGET,
    prox: float = 0.0,
    beta: float = 0.1,
    win_rates: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Minus the expected gradient of the loss: the direction of ascent."""

    def loss(draws: Tensor, log_policy: Tensor) -> Tensor:
        rates = win_rates_of(draws, payoff) if win_rates is None else win_rates(draws)
        lt = None if target is None else target[draws]
        lp, rf = log_policy[draws], REFERENCE[draws]
        return nash_mp_loss(lp, rf, lt, rates, beta=beta, prox=prox)

    return -expected_gradient(policy, n, loss)


def exact(
    *, payoff: Tensor = CYCLE, policy: Tensor = POLICY, beta: float = 0.1, prox: float = 0.0
) -> Tensor:
    game = Game(payoff.numpy(), REFERENCE.exp().numpy(), beta)
    log_policy = policy.numpy()
    return torch.tensor(policy_gradient(game, log_policy, log_policy, TARGET.numpy(), prox=prox))


@pytest.mark.parametrize("n", [2, 3, 4])
def test_samples_of_the_policy_estimate_its_gradient_without_bias(n: int) -> None:
    assert_prints(nash_mp_gradient(n), SELF_PLAY)
    assert_near(nash_mp_gradient(n), exact())
    # beta / eta = .1 / .2
    near = nash_mp_gradient(n, prox=0.5)
    assert_prints(near, tensor(0.060321, -0.049219, -0.011102))
    assert_near(near, exact(prox=0.5))


@pytest.mark.parametrize("n", [2, 3])
def test_the_preference_part_alone_keeps_its_scale(n: int) -> None:
    preference = tensor(0.026, -0.02975, 0.00375)
    assert_near(nash_mp_gradient(n, target=None, beta=0.0), preference)

    def left_out(draws: Tensor) -> Tensor:
        rates = win_rates_of(draws)
        return rates - mean_of_others(rates)

    def gradient(advantages: Callable[[Tensor], Tensor]) -> Tensor:
        return -expected_gradient(
            POLICY, n, lambda draws, lp: score_function_loss(lp[draws], advantages(draws))
        )

    # A leave-one-out baseline of the win rates: n/(n-1) times too large, twice at n = 2.
    assert_near(gradient(left_out), n / (n - 1) * preference)

    # A match against itself counted as a draw: (n-1)/n times, half at n = 2.
    def with_itself(draws: Tensor) -> Tensor:
        return CYCLE[draws[:, :, None], draws[:, None, :]].mean(2) - 0.5

    assert_near(gradient(with_itself), (n - 1) / n * preference)


def test_two_samples_by_hand() -> None:
    # kappa = (1, -.5), lp - lt = (.5, .5): k = -.1 kappa - .5 * .5 = (-.35, -.2);
    # adv = (.3 - .35 + .2, -.3 - .2 + .35) = (.15, -.15).
    log_probs = tensor([-10.0, -12.0]).requires_grad_()
    reference, target = tensor([-11.0, -11.5]), tensor([-10.5, -12.5])
    loss = nash_mp_loss(log_probs, reference, target, tensor([0.8, 0.2]), beta=0.1, prox=0.5)
    assert loss.item() == pytest.approx(-(0.15 * -10 - 0.15 * -12) / 2, abs=1e-12)
    loss.sum().backward()
    assert_near(log_probs.grad, tensor([-0.075, 0.075]))


def test_online_ipo_descends_along_the_self_play_gradient() -> None:
    def ipo(draws: Tensor, log_policy: Tensor) -> Tensor:
        y, z = draws.unbind(1)
        policy, reference = (log_policy[y], log_policy[z]), (REFERENCE[y], REFERENCE[z])
        return pair_loss("ipo_sum", *policy, *reference, beta=0.1, p_chosen=CYCLE[y, z])

    gradient = expected_gradient(POLICY, 2, ipo)
    assert_prints(gradient, tensor(-1.429800, 1.377137, 0.052662))
    assert_near(gradient, -40 * nash_mp_gradient(2))


def test_a_target_that_is_the_policy_is_plain_self_play() -> None:
    at_once = nash_mp_gradient(3, target=POLICY, prox=7.0)
    assert_prints(at_once, SELF_PLAY)
    assert_near(at_once, nash_mp_gradient(3))


def test_a_target_that_is_the_reference_is_a_heavier_beta() -> None:
    frozen = nash_mp_gradient(3, target=REFERENCE, prox=0.5)
    assert_near(frozen, nash_mp_gradient(3, target=None, beta=0.6))
    assert_near(frozen, exact(beta=0.6))


def test_without_a_proximal_weight_the_target_is_not_read() -> None:
    unread = torch.full((3,), torch.nan, dtype=torch.float64)
    assert torch.equal(nash_mp_gradient(2, target=unread), nash_mp_gradient(2, target=None))


def test_an_opponent_policy_instead_of_self_play() -> None:
    # Nash-MD's opponent: 7/8 of the policy's logits and 1/8 of the reference's.
    opponent = (0.875 * POLICY + 0.125 * REFERENCE).softmax(-1)
    assert_prints(opponent, tensor(0.412239, 0.344092, 0.243669))
    gradient = nash_mp_gradient(2, win_rates=lambda draws: (CYCLE @ opponent)[draws])
    assert_prints(gradient, tensor(0.036040, -0.036386, 0.000345))


def test_where_all_tie_the_reference_is_at_rest_and_all_else_returns_to_it() -> None:
    ties = torch.full((3, 3), 0.5, dtype=torch.float64)
    log_probs = REFERENCE[None].clone().requires_grad_()
    loss = nash_mp_loss(log_probs, REFERENCE[None], None, ties[:1], beta=0.1, prox=0.0)
    loss.sum().backward()
    assert torch.equal(log_probs.grad, torch.zeros(1, 3).double())
    returning = nash_mp_gradient(2, payoff=ties)
    assert_near(returning, exact(payoff=ties))
    assert returning @ (REFERENCE - POLICY) > 0


def test_at_rest_in_the_equilibrium_of_a_bradley_terry_game() -> None:
    scores = tensor(1.0, 0.0, -0.5)
    payoff = torch.sigmoid(scores[:, None] - scores[None, :])
    rest = torch.tensor(equilibrium(Game(payoff.numpy(), REFERENCE.exp().numpy(), 0.2)))
    assert_near(nash_mp_gradient(2, payoff=payoff, policy=rest, beta=0.2), torch.zeros(3).double())
    by_scores = torch.tensor(log_normalise((REFERENCE + scores / 0.2).numpy()))
    elsewhere = nash_mp_gradient(2, payoff=payoff, policy=by_scores, beta=0.2)
    assert elsewhere.abs().max() > 1e-3


def test_at_rest_in_the_equilibrium_of_the_cycle() -> None:
    rest = torch.tensor(equilibrium(Game(CYCLE.numpy(), REFERENCE.exp().numpy(), 0.1)))
    assert_near(nash_mp_gradient(3, policy=rest), torch.zeros(3).double())


def test_identical_completions_that_tie_pull_nowhere() -> None:
    log_probs = torch.full((1, 4), -10.25, dtype=torch.float64, requires_grad=True)
    other = torch.full((1, 4), -12.5, dtype=torch.float64)
    rates = torch.full((1, 4), 0.5, dtype=torch.float64)
    nash_mp_loss(log_probs, other, other, rates, beta=0.1, prox=0.5).sum().backward()
    assert_near(log_probs.grad, torch.zeros(1, 4).double(), atol=1e-15)


def test_neither_prompts_nor_order_mix() -> None:
    generator = torch.Generator().manual_seed(0)
    lp, rf, lt = -20 + 3 * torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    rates = torch.rand(5, 4, generator=generator, dtype=torch.float64)
    rows, columns = torch.randperm(5, generator=generator), torch.randperm(4, generator=generator)

    def shuffled(values: Tensor) -> Tensor:
        return values[rows][:, columns]

    inputs = lp, rf, lt, rates
    together = nash_mp_loss(*inputs, beta=0.1, prox=0.5)
    apart = [nash_mp_loss(*(x[[i]] for x in inputs), beta=0.1, prox=0.5) for i in range(5)]
    assert_near(torch.cat(apart), together)
    assert_near(nash_mp_loss(*map(shuffled, inputs), beta=0.1, prox=0.5), together[rows])
    assert_near(reverse_kl_loss(shuffled(lp), shuffled(rf)), reverse_kl_loss(lp, rf)[rows])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": -0.1}, "found beta=-0.1, expected a value of 0 or above"),
        ({"beta": math.nan}, "found beta=nan"),
        ({"prox": -1.0}, "found prox=-1.0, expected a value of 0 or above"),
        ({"target": None}, "found prox=0.5 and no target"),
        ({"win_rates": tensor([0.5, 1.1])}, "win_rates: found values from 0.5 to 1.1"),
        ({"win_rates": tensor([0.5, math.nan])}, "win_rates: found values from nan"),
        (
            {"win_rates": tensor([0.5], [0.5])},
            r"win_rates: found shape \[2, 1\], expected \[1, 2\]",
        ),
        ({"log_probs": tensor(-1.0, -2.0)}, r"log_probs: found shape \[2\], expected \[prompts, n"),
    ],
)
def test_what_nash_mp_cannot_use_is_refused(changes: dict[str, Any], message: str) -> None:
    pair = tensor([-1.0, -2.0])
    good: dict[str, Any] = {"log_probs": pair, "reference": pair, "target": pair}
    good |= {"win_rates": tensor([0.5, 0.5]), "beta": 0.1, "prox": 0.5}
    nash_mp_loss(**good)
    with pytest.raises(PrefoptError, match=message):
        nash_mp_loss(**good | changes)


def test_one_sample_a_prompt_is_refused() -> None:
    one = tensor([-1.0])
    with pytest.raises(PrefoptError, match=r"found 1 completion\(s\) a prompt"):
        reverse_kl_loss(one, one)
    with pytest.raises(PrefoptError, match=r"found 1 completion\(s\) a prompt"):
        nash_mp_loss(one, one, None, tensor([0.5]), beta=0.1, prox=0.0)


# ------------------------------------------------------------------- PPO: rewards, advantages

MASK = torch.tensor([[True, True, True, False], [True, False, False, False]])


def rollouts(rows: int = 6, width: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(3, rows, width, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    return {
        "log_probs": draw[0] - 2,
        "reference": draw[1] - 2,
        "values": draw[2],
        "mask": torch.arange(width) < lengths[:, None],
        "scores": torch.randn(rows, generator=generator, dtype=torch.float64),
    }


def advantages_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything that is computed from a batch of rollouts, by name."""
    mask, values, scores = batch["mask"], batch["values"], batch["scores"]
    rewards = token_rewards(batch["log_probs"], batch["reference"], mask, scores, kl_coef=0.05)
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    return {
        "rewards": rewards,
        "advantages": advantages,
        "returns": returns,
        "whitened": whiten(advantages, mask),
        "scaled": whiten(rewards, mask, shift_mean=False),
    }


def test_token_rewards_by_hand() -> None:
    log_probs = tensor([-1.0, -2.0, -3.0, 9.0], [-1.0, 9.0, 9.0, 9.0])
    reference = tensor([-1.5, -2.0, -2.0, 4.0], [-2.0, 4.0, 4.0, 4.0])
    rewards = token_rewards(log_probs, reference, MASK, tensor(1.0, -1.0), kl_coef=0.1)
    # -.1 (.5, 0, -1) with 1 more at the end; -.1 * 1 - 1
    assert_near(rewards, tensor([-0.05, 0.0, 1.1, 0.0], [-1.1, 0.0, 0.0, 0.0]))


def test_the_rewards_of_an_answer_add_up_to_its_score_less_its_log_ratio() -> None:
    batch = rollouts()
    log_ratio = torch.where(batch["mask"], batch["log_probs"] - batch["reference"], 0).sum(1)
    rewards = advantages_of(batch)["rewards"]
    assert_near(rewards.sum(1), batch["scores"] - 0.05 * log_ratio)


def test_rewards_and_advantages_are_constants() -> None:
    batch = rollouts()
    for name in ("log_probs", "reference", "values"):
        batch[name].requires_grad_()
    assert not any(result.requires_grad for result in advantages_of(batch).values())


def test_generalised_advantages_by_hand() -> None:
    # deltas (.09, .08, .6): .6; .08 + .95 * .6 = .65; .09 + .95 * .65 = .7075
    rewards, values = tensor([-0.01, -0.02, 1.0, 7.0]), tensor([0.2, 0.3, 0.4, 7.0])
    advantages, returns = gae(rewards, values, MASK[:1], gamma=1.0, lam=0.95)
    assert_near(advantages, tensor([0.7075, 0.65, 0.6, 0.0]))
    assert_near(returns, tensor([0.9075, 0.95, 1.0, 0.0]))
    # With padding taken for a token, the last advantage would be 1 + 7 - .4.
    wrong, _ = gae(rewards, values, torch.ones_like(MASK[:1]), gamma=1.0, lam=0.95)
    assert wrong[0, 2].item() == pytest.approx(7.6)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.7, 1.0), (1.0, 0.0)])
def test_advantages_are_their_definition(gamma: float, lam: float) -> None:
    batch = rollouts()
    rewards = advantages_of(batch)["rewards"]
    advantages, returns = gae(rewards, batch["values"], batch["mask"], gamma=gamma, lam=lam)
    for row, length in enumerate(batch["mask"].sum(1).tolist()):
        value = [*batch["values"][row, :length].tolist(), 0.0]
        reward = rewards[row].tolist()
        delta = [reward[t] + gamma * value[t + 1] - value[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, length))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[row, t].item() == pytest.approx(expected + value[t], abs=1e-12)


def test_with_lambda_one_the_returns_are_the_rewards_to_come() -> None:
    batch = rollouts()
    rewards = advantages_of(batch)["rewards"]
    _, returns = gae(rewards, batch["values"], batch["mask"], lam=1.0)
    to_come = rewards.flip(1).cumsum(1).flip(1)
    assert_near(returns, torch.where(batch["mask"], to_come, 0))


def test_a_perfect_critic_leaves_no_advantage() -> None:
    batch = rollouts()
    perfect = batch["scores"][:, None].expand_as(batch["mask"])
    batch |= {"reference": batch["log_probs"], "values": perfect}
    rewards = advantages_of(batch)["rewards"]
    advantages, returns = gae(rewards, perfect, batch["mask"], lam=0.95)
    at_tokens = torch.where(batch["mask"], perfect, 0)
    assert_near(advantages, torch.zeros_like(rewards))
    assert_near(returns, at_tokens)


@pytest.mark.parametrize("garbage", [1e6, math.inf, math.nan])
def test_what_stands_on_the_padding_is_never_read(garbage: float) -> None:
    batch = rollouts()
    filled, wider = dict(batch), dict(batch)
    for name in ("log_probs", "reference", "values"):
        filled[name] = batch[name].masked_fill(~batch["mask"], garbage)
        wider[name] = torch.nn.functional.pad(filled[name], (0, 3), value=garbage)
    wider["mask"] = torch.nn.functional.pad(batch["mask"], (0, 3))
    expected, same, padded = advantages_of(batch), advantages_of(filled), advantages_of(wider)
    for name, result in expected.items():
        assert torch.equal(result[~batch["mask"]], torch.zeros_like(result[~batch["mask"]]))
        assert torch.equal(same[name], result)
        assert_near(padded[name], torch.nn.functional.pad(result, (0, 3)))


def test_the_order_of_sequences_does_not_matter() -> None:
    batch = rollouts()
    rows = torch.tensor([3, 0, 5, 1, 4, 2])
    expected = advantages_of(batch)
    shuffled = advantages_of({name: values[rows] for name, values in batch.items()})
    for name, result in expected.items():
        assert_near(shuffled[name], result[rows])


# ------------------------------------------------------------------- PPO: whitening


def test_whitened_numbers_by_hand() -> None:
    values, mask = tensor(1, 2, 3, 4), torch.ones(4, dtype=torch.bool)
    expected = tensor(-1.341641, -0.447214, 0.447214, 1.341641)  # 1.5 / sqrt(1.25)
    assert_prints(whiten(values, mask), expected)
    assert_prints(whiten(values, mask, shift_mean=False), expected + 2.5)
    sample = (values - values.mean()) / values.std()  # divides by n - 1: another number
    assert (whiten(values, mask) - sample).abs().max() > 0.1


def test_whitening_counts_the_mask_alone() -> None:
    values = tensor([1.0, 2.0, math.nan], [3.0, math.inf, 4.0])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    whitened = whiten(values, mask)
    assert torch.equal(whitened[mask], whiten(tensor(1, 2, 3, 4), torch.ones(4, dtype=torch.bool)))
    assert torch.equal(whitened[~mask], tensor(0, 0))


def test_equal_values_whiten_to_zero_or_to_themselves() -> None:
    values, mask = tensor(0.25, 0.25, 0.25), torch.ones(3, dtype=torch.bool)
    assert torch.equal(whiten(values, mask), torch.zeros(3).double())
    assert torch.equal(whiten(values, mask, shift_mean=False), values)


# ------------------------------------------------------------------- PPO: losses

# Advantage, ratio, loss and whether there is a gradient, with clip .2.
CLIPPED = [
    (1.0, 1.0, -1.0, True),
    (1.0, 1.5, -1.2, False),  # has risen enough
    (1.0, 0.5, -0.5, True),  # has fallen although it should rise
    (-1.0, 1.5, 1.5, True),  # has risen although it should fall
    (-1.0, 0.5, 0.8, False),  # has fallen enough
    (2.0, 1.1, -2.2, True),
    (0.0, 3.0, 0.0, False),
]


def test_clipped_policy_losses_by_hand() -> None:
    advantages = tensor(*(row[0] for row in CLIPPED)).requires_grad_()
    old = torch.linspace(-5, -1, len(CLIPPED), dtype=torch.float64).requires_grad_()
    ratios = tensor(*(row[1] for row in CLIPPED))
    log_probs = (old.detach() + ratios.log()).requires_grad_()
    losses = ppo_policy_loss(log_probs, old, advantages, clip=0.2)
    assert_near(losses.detach(), tensor(*(row[2] for row in CLIPPED)))
    losses.sum().backward()
    moves = torch.tensor([row[3] for row in CLIPPED])
    assert_near(log_probs.grad, torch.where(moves, -advantages.detach() * ratios, 0))
    assert old.grad is None
    assert advantages.grad is None


def test_the_first_step_is_a_plain_policy_gradient() -> None:
    log_probs = tensor(-1.0, -3.0, -0.5).requires_grad_()
    advantages = tensor(0.7, -1.3, 2.0)
    ppo_policy_loss(log_probs, log_probs.detach(), advantages, clip=0.2).sum().backward()
    assert torch.equal(log_probs.grad, -advantages)


# Value, old value, return, loss and gradient, with clip .2.
VALUE_CLIPPED = [
    (0.1, 0.0, 1.0, 0.5 * 0.9**2, -0.9),  # within the clip
    (0.5, 0.0, 1.0, 0.5 * 0.8**2, 0.0),  # nearer than the clip allows
    (-0.5, 0.0, 1.0, 0.5 * 1.5**2, -1.5),  # has moved away
    (2.0, 0.0, 1.0, 0.5 * 1.0**2, 1.0),  # overshot by more than the clipped value falls short
    (1.0, 1.0, 1.0, 0.0, 0.0),
]


def test_clipped_value_losses_by_hand() -> None:
    values, old, returns, expected, slopes = (tensor(*c) for c in zip(*VALUE_CLIPPED, strict=True))
    values.requires_grad_()
    losses = clipped_value_loss(values, old.requires_grad_(), returns.requires_grad_(), clip=0.2)
    assert_near(losses.detach(), expected)
    losses.sum().backward()
    assert_near(values.grad, slopes)
    assert old.grad is None
    assert returns.grad is None


def test_a_wide_value_clip_is_the_squared_error() -> None:
    values, old, returns = tensor(0.1, -3.0), tensor(2.0, 2.0), tensor(1.0, 1.0)
    wide = clipped_value_loss(values, old, returns, clip=100)
    assert_near(wide, 0.5 * (values - returns) ** 2)


# ------------------------------------------------------------------- dataset reset


def test_forced_tokens_are_left_out_of_the_mean() -> None:
    forced, log_probs = torch.tensor([True, False, False]), tensor(-1.0, -2.0, -3.0)
    losses = ppo_policy_loss(log_probs, log_probs, tensor(-1.0, -2.0, -3.0), clip=0.2)
    assert losses.tolist() == [1, 2, 3]
    assert losses[~forced].mean().item() == 2.5
    assert (losses * ~forced).mean().item() == pytest.approx(5 / 3)  # divides by all tokens


def test_forced_positions_have_no_gradient_in_their_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 7, (2, 4, 1), generator=generator)
    log_probs = logits.log_softmax(-1).gather(-1, tokens)[..., 0]
    forced = torch.tensor([[True, True, False, False], [True, False, False, False]])
    advantages = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    inputs = log_probs[~forced], log_probs.detach()[~forced], advantages[~forced]
    ppo_policy_loss(*inputs, clip=0.2).mean().backward()
    assert torch.equal(logits.grad[forced], torch.zeros(3, 7).double())
    assert (logits.grad[~forced].abs().sum(-1) > 0).all()


def test_the_prefix_changes_no_later_advantage() -> None:
    batch = rollouts() | {"mask": torch.ones(6, 5, dtype=torch.bool)}
    changed = dict(batch)
    changed["reference"] = batch["reference"].clone()
    changed["reference"][:, :2] += 10
    before, after = advantages_of(batch), advantages_of(changed)
    assert torch.equal(before["advantages"][:, 2:], after["advantages"][:, 2:])
    assert torch.equal(before["returns"][:, 2:], after["returns"][:, 2:])
    # It does reach them through the statistics of whitening, and the returns of the prefix.
    assert not torch.allclose(before["whitened"][:, 2:], after["whitened"][:, 2:])
    assert not torch.allclose(before["returns"][:, :2], after["returns"][:, :2])


# ------------------------------------------------------------------- the critic


def test_one_step_targets_by_hand() -> None:
    values = tensor([0.2, 0.3, 0.4, 9.0], [0.7, 9.0, 9.0, 9.0])
    rewards = tensor([0.0, 0.0, 1.0, 9.0], [-1.0, 9.0, 9.0, 9.0])
    _, targets = gae(rewards, values, MASK, lam=0.0)
    assert_near(targets, tensor([0.3, 0.4, 1.0, 0.0], [-1.0, 0.0, 0.0, 0.0]))


def test_explained_variance_by_hand() -> None:
    returns, mask = tensor(0.0, 2.0, math.nan), torch.tensor([True, True, False])
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(tensor(5, 5, 0), returns, mask) == 0
    assert explained_variance(tensor(0.5, 1.5, 0), returns, mask) == 0.75
    assert explained_variance(tensor(2, 0, 0), returns, mask) == -3  # errors (-2, 2), variance 4
    assert explained_variance(returns + 7, returns, mask) == 1  # a shift is no variance


@pytest.mark.parametrize(
    "mask", [torch.ones(7, dtype=torch.bool), torch.zeros(7, dtype=torch.bool)]
)
def test_equal_or_no_returns_have_no_variance_to_explain(mask: Tensor) -> None:
    assert math.isnan(explained_variance(torch.arange(7.0), torch.full((7,), 0.1), mask))


# ------------------------------------------------------------------- what PPO refuses


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[True, False, True]], "a row that is not real tokens, then padding"),
        ([[False, True, True]], "a row that is not real tokens, then padding"),
        ([[False, False, False]], "expected at least one token"),
        ([[1, 1, 0]], "found torch.int64, expected torch.bool"),
        ([[True, True]], r"mask: found shape \[1, 2\], expected \[1, 3\]"),
    ],
)
def test_a_mask_that_is_no_prefix_is_refused(mask: Any, message: str) -> None:
    row, mask, score = tensor([1.0, 2.0, 3.0]), torch.tensor(mask), tensor(1.0)
    for call in (
        lambda: token_rewards(row, row, mask, score, kl_coef=0.1),
        lambda: gae(row, row, mask),
    ):
        with pytest.raises(PrefoptError, match=message):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, m: token_rewards(x, x, m, tensor(1.0), kl_coef=-1.0), "found kl_coef=-1.0"),
        (
            lambda x, m: token_rewards(x, x, m, tensor(1, 2), kl_coef=0.1),
            r"scores: found shape \[2",
        ),
        (lambda x, m: gae(x, x[:, :1], m), r"values: found shape \[1, 1\], expected \[1, 2\]"),
        (lambda x, m: gae(x, x, m, gamma=1.5), "found gamma=1.5"),
        (lambda x, m: gae(x, x, m, lam=-0.1), "found lam=-0.1"),
        (lambda x, m: whiten(x, m.long()), "mask: found torch.int64, expected torch.bool"),
        (lambda x, m: explained_variance(x, x[:, :1], m), r"mask: found shape \[1, 2\]"),
        (lambda x, m: whiten(x, m[0]), r"mask: found shape \[2\], expected \[1, 2\]"),
        (lambda x, m: ppo_policy_loss(x[0], x[0], x[0], clip=0.0), "found clip=0.0"),
        (lambda x, m: ppo_policy_loss(x, x, x, clip=0.2), r"found shape \[1, 2\], expected \[tok"),
        (lambda x, m: ppo_policy_loss(x[0], x[0], x[0, :1], clip=0.2), "advantages: found shape"),
        (lambda x, m: clipped_value_loss(x[0], x[0], x[0], clip=-1.0), "found clip=-1.0"),
        (
            lambda x, m: clipped_value_loss(x[0], x[0, :1], x[0], clip=0.2),
            "old_values: found shape",
        ),
    ],
)
def test_what_ppo_cannot_use_is_refused(
    call: Callable[[Tensor, Tensor], Any], message: str
) -> None:
    with pytest.raises(PrefoptError, match=message):
        call(tensor([1.0, 2.0]), torch.tensor([[True, True]]))
