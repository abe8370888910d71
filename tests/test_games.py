"""Algorithms on matrix games: printed reference values, identities, stability and the command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefopt.cli import main
from prefopt.errors import PrefoptError
from prefopt.games import (
    ALGORITHMS,
    Game,
    best_response,
    egpo_step,
    equilibrium,
    exploitability,
    inpo_step,
    kl,
    log_normalise,
    mixture,
    mpo_step,
    nash,
    nash_exploitability,
    nash_mp_ema_step,
    nash_mp_step,
    npg_step,
    play,
    policies,
    policy_gradient,
    prox_step,
    self_play_step,
    value,
    win_rates,
)

CYCLE = [[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]]
REFERENCE = [0.5, 0.3, 0.2]
POLICY = np.log([0.4, 0.35, 0.25])
REGULARISED = [name for name, algorithm in ALGORITHMS.items() if algorithm.regularised]


def toy(beta: float) -> Game:
    return Game(CYCLE, REFERENCE, beta)


def random_game(beta: float, actions: int = 10, seed: int = 0, binary: bool = False) -> Game:
    """Lower triangle uniform, taken from a full square of draws; uniform reference."""
    draws = np.random.default_rng(seed).random((actions, actions))
    lower = np.tril(draws.round() if binary else draws, -1)
    payoff = lower + np.triu(1 - lower.T, 1) + np.eye(actions) / 2
    return Game(payoff, np.full(actions, 1 / actions), beta)


def random_policy(actions: int, seed: int) -> Any:
    return log_normalise(np.random.default_rng(seed).normal(size=actions) * 3)


def agrees(number: float, printed: str) -> bool:
    """Whether `number` rounds to the printed digits; 0 stands for anything below 1e-15."""
    if printed == "0":
        return 0 <= number < 1e-15
    digits = len(printed.split("e")[0].partition(".")[2])
    return float(f"{number:.{digits}e}") == float(printed)


def assert_agrees(numbers: Sequence[float], printed: str) -> None:
    expected = printed.split(" / ")
    assert len(numbers) == len(expected)
    for number, text in zip(numbers, expected, strict=True):
        assert agrees(number, text), f"{number} is not {text}"


def probabilities(log_policy: Any) -> Any:
    return pytest.approx(np.exp(log_policy), abs=5.1e-7)


# ------------------------------------------------------------------------- the game


@pytest.mark.parametrize(
    ("beta", "policy", "divergence"),
    [
        (0.10, (0.400889, 0.211822, 0.387289), "9.365e-2"),
        (0.05, (0.345665, 0.245834, 0.408501), "1.152e-1"),
        (0.01, (0.307447, 0.288095, 0.404458), "1.237e-1"),
    ],
)
def test_equilibrium_of_the_toy_game(
    beta: float, policy: tuple[float, ...], divergence: str
) -> None:
    game = toy(beta)
    solution = equilibrium(game)
    assert policy == probabilities(solution)
    assert agrees(kl(solution, game.log_reference), divergence)
    assert solution == pytest.approx(best_response(game, solution), abs=1e-12)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("actions", [1, 2, 3, 10, 100, 500])
def test_equilibrium_is_certified_down_to_a_small_beta(actions: int, binary: bool) -> None:
    base = random_game(1.0, actions, binary=binary)
    for beta in (100.0, 0.1, 0.01, 1e-3):
        # references as far from uniform as e^-60
        for scale in (0, 1, 20):
            skewed = np.random.default_rng(1).normal(size=actions) * scale
            game = Game(base.payoff, np.exp(log_normalise(skewed)), beta)
            assert exploitability(game, equilibrium(game)) < 1e-13


def test_exploitability_is_the_best_opponents_gain() -> None:
    for seed in range(5):
        game = random_game(0.1, seed=seed)
        policy = random_policy(10, seed)
        gain = value(game, best_response(game, policy), policy) - 0.5
        assert exploitability(game, policy) == pytest.approx(gain, abs=1e-14)
        others = [value(game, random_policy(10, other), policy) - 0.5 for other in range(100)]
        assert max(others) < gain


def test_exploitability_bounds_the_distance_to_the_equilibrium() -> None:
    for seed in range(5):
        game = random_game(0.05, seed=seed)
        policy = random_policy(10, seed)
        distance = game.beta * kl(policy, equilibrium(game))
        assert 0 < distance <= exploitability(game, policy)


def test_values_of_the_two_players_sum_to_one() -> None:
    game = random_game(0.3)
    p, q = random_policy(10, 1), random_policy(10, 2)
    assert value(game, p, q) + value(game, q, p) == pytest.approx(1, abs=1e-14)
    assert value(game, p, p) == pytest.approx(0.5, abs=1e-14)


def test_kl_by_hand_and_at_the_edges() -> None:
    half, pure = np.log([0.5, 0.5]), np.array([0.0, -np.inf])
    assert kl(np.log([0.25, 0.75]), half) == pytest.approx(0.130812035941137, abs=1e-15)
    assert kl(pure, half) == pytest.approx(np.log(2), abs=1e-15)
    assert kl(half, pure) == np.inf
    assert kl(half, half) == 0
    # 1e-9 apart: KL is about eps^2/2, far below the rounding of a plain sum of p log(p/q)
    near = log_normalise(half + np.array([1e-9, -1e-9]))
    assert kl(half, near) == pytest.approx(5e-19, rel=1e-6)


def test_nash_of_the_payoff_alone() -> None:
    assert np.exp(nash(toy(0.1))) == pytest.approx([0.3, 0.3, 0.4], abs=1e-10)
    for actions in (2, 10, 100, 500):
        game = random_game(0.1, actions)
        assert 0 <= nash_exploitability(game, nash(game)) <= 1e-12


def test_where_all_actions_tie_the_reference_is_the_equilibrium() -> None:
    game = Game(np.full((3, 3), 0.5), REFERENCE, 0.1)
    for name in ALGORITHMS:
        for policy in islice(policies(game, name), 20):
            assert np.exp(policy) == pytest.approx(REFERENCE, abs=1e-14)


def test_from_elsewhere_nash_mp_returns_to_the_reference_where_all_tie() -> None:
    game = Game(np.full((3, 3), 0.5), REFERENCE, 0.1)
    policy = np.log([0.01, 0.01, 0.98])
    for _ in range(200):
        policy = nash_mp_step(game, policy, 0.2)
    assert np.exp(policy) == pytest.approx(REFERENCE, abs=1e-14)


def test_a_bradley_terry_game_tilts_by_win_rates_not_by_scores() -> None:
    scores = np.array([1.0, 0.0, -2.0])
    payoff = 1 / (1 + np.exp(scores[None, :] - scores[:, None]))
    game = Game(payoff, REFERENCE, 0.1)
    policy = play(game, "nash_mp", 300).log_policy
    tilted = log_normalise(game.log_reference + payoff @ np.exp(policy) / 0.1)
    assert policy == pytest.approx(tilted, abs=1e-10)
    assert abs(policy - log_normalise(game.log_reference + scores / 0.1)).max() > 1


@pytest.mark.parametrize(
    ("payoff", "reference", "beta", "words"),
    [
        ([[0.5, 0.9], [0.2, 0.5]], [0.5, 0.5], 0.1, "payoff[0][1] + payoff[1][0]: found 0.9 + 0.2"),
        ([[0.6]], [1.0], 0.1, "payoff[0][0] + payoff[0][0]"),
        ([[0.5, 1.5], [-0.5, 0.5]], [0.5, 0.5], 0.1, "payoff[0][1]: found 1.5"),
        ([[0.5, 0.5], [float("nan"), 0.5]], [0.5, 0.5], 0.1, "payoff[1][0]: found nan"),
        ([[0.5, 0.5]], [0.5, 0.5], 0.1, "shape (1, 2), expected a square"),
        ([], [], 0.1, "expected a square"),
        ([[0.5], [0.1, 0.5]], [0.5, 0.5], 0.1, "rows of one length"),
        (CYCLE, [0.5, 0.5], 0.1, "reference: found shape (2,), expected (3,)"),
        (CYCLE, [0.5, 0.5, 0.0], 0.1, "reference[2]: found 0.0, expected a positive"),
        (CYCLE, [0.7, -0.2, 0.5], 0.1, "reference[1]: found -0.2"),
        (CYCLE, [0.5, 0.3, 0.1], 0.1, "sum to 0.9"),
        (CYCLE, [0.5, float("inf"), 0.1], 0.1, "reference[1]: found inf"),
        ([[0.5, 10**400], [0.1, 0.5]], [0.5, 0.5], 0.1, "payoff: expected float64 numbers"),
        (CYCLE, REFERENCE, 0.0, "beta: found 0.0, expected a number in [1e-12, 1e+12]"),
        (CYCLE, REFERENCE, 1e-320, "expected a number in [1e-12, 1e+12]"),
        (CYCLE, REFERENCE, 9.9e-13, "expected a number in [1e-12, 1e+12]"),
        (CYCLE, REFERENCE, 1.1e12, "expected a number in [1e-12, 1e+12]"),
        (CYCLE, REFERENCE, 1e300, "expected a number in [1e-12, 1e+12]"),
        (CYCLE, REFERENCE, float("nan"), "beta: found nan"),
        (CYCLE, REFERENCE, float("inf"), "beta: found inf"),
    ],
)
def test_a_bad_game_is_refused_by_entry(
    payoff: Any, reference: Any, beta: float, words: str
) -> None:
    with pytest.raises(PrefoptError) as caught:
        Game(payoff, reference, beta)
    assert words in str(caught.value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_the_ends_of_betas_range_are_played_without_a_warning(name: str) -> None:
    for beta in (1e-12, 1e12):
        run = play(toy(beta), name, 20)
        assert np.isfinite([*run.log_policy, *run.kl, *run.exploitability]).all()


def test_a_game_cannot_be_changed_after_its_check() -> None:
    payoff = np.array(CYCLE)
    game = Game(payoff, REFERENCE, 0.1)
    payoff[0, 1] = 7
    assert game.payoff[0, 1] == 0.9
    with pytest.raises(ValueError, match="read-only"):
        game.payoff[0, 1] = 7


# ------------------------------------------------------------------------- INPO


def test_inpo_step_and_its_regression() -> None:
    game = toy(0.1)
    p, beats = np.exp(POLICY), game.payoff
    assert win_rates(game, POLICY) == pytest.approx([0.565, 0.415, 0.515], abs=1e-15)
    step = inpo_step(game, POLICY, eta=0.5)
    assert probabilities(step) == (0.472069, 0.283762, 0.244170)

    def loss(policy: Any) -> float:
        # with eta = 1/2 the target 1/(2 eta) is 1
        own = policy - 0.2 * game.log_reference - 0.8 * POLICY
        h = own[:, None] - own[None, :]
        return float(np.einsum("y,z,yz->", p, p, beats * (h - 1) ** 2 + (1 - beats) * (h + 1) ** 2))

    assert loss(step) == pytest.approx(0.965800, abs=5e-7)
    for seed in range(20):
        assert loss(step + 0.01 * np.random.default_rng(seed).normal(size=3)) > loss(step)


def test_inpo_iterates() -> None:
    game = toy(0.1)
    sequence = list(islice(policies(game, "inpo", eta=0.5), 4))[1:]
    expected = [
        (0.554880, 0.223168, 0.221952),
        (0.564462, 0.172251, 0.263287),
        (0.540609, 0.143677, 0.315714),
    ]
    for policy, numbers in zip(sequence, expected, strict=True):
        assert numbers == probabilities(policy)
    gaps = [exploitability(game, policy) for policy in sequence]
    assert_agrees(gaps, "2.2332e-2 / 2.0213e-2 / 1.6808e-2")
    assert play(game, "inpo", 500, eta=0.5).kl[-1] < 1e-25


def test_inpo_converges_with_small_steps_and_cycles_with_large_ones() -> None:
    game = toy(0.1)
    for eta in (0.25, 0.3, 0.5, 1.0):
        assert play(game, "inpo", 2000, eta=eta).exploitability[-1] < 1e-15
    tail = play(game, "inpo", 2000, eta=0.2).exploitability[-100:]
    assert tail.mean() == pytest.approx(2e-2, abs=5e-3)
    assert tail.min() > 0.01
    tail = play(game, "inpo", 2000, eta=0.15).exploitability[-100:]
    assert tail.mean() == pytest.approx(0.1, abs=2e-2)
    assert tail.min() > 0.03


def test_language_model_settings_of_inpo_jump_around_when_taken_exactly() -> None:
    gaps = play(toy(0.0025), "inpo", 100, eta=0.0075).exploitability
    assert gaps[[1, 2, 3, 4, 100]] == pytest.approx([0.21, 0.30, 0.30, 0.40, 0.40], abs=5e-3)


def test_inpo_reduces_to_ipo_and_to_plain_self_play() -> None:
    game = toy(0.5)
    # tau = eta: the policy itself drops out, the reference is tilted by the win rates
    assert inpo_step(game, POLICY, eta=0.5) == pytest.approx(best_response(game, POLICY), abs=1e-15)
    # first iteration, pi = reference: IPO with beta = eta whatever tau is
    for tau in (1e-6, 0.1, 0.3):
        first = inpo_step(toy(tau), game.log_reference, eta=0.5)
        assert first == pytest.approx(best_response(game, game.log_reference), abs=1e-15)


# ------------------------------------------------------------------------- Nash-MP


@pytest.mark.parametrize(
    ("beta", "half", "full"),
    [
        (0.10, (0.546472, 0.234939, 0.218589), (0.529308, 0.234720, 0.235972)),
        (0.05, (0.550332, 0.229536, 0.220133), (0.529854, 0.229234, 0.240911)),
        (0.01, (0.553906, 0.224531, 0.221563), (0.530037, 0.224134, 0.245829)),
    ],
)
def test_first_steps_of_nash_mp(
    beta: float, half: tuple[float, ...], full: tuple[float, ...]
) -> None:
    game = toy(beta)
    mu = game.log_reference
    assert half == probabilities(prox_step(game, mu, mu, 2 * beta))
    assert full == probabilities(nash_mp_step(game, mu, 2 * beta))


@pytest.mark.parametrize(
    ("beta", "printed", "bound"),
    [
        (0.10, "9.365e-2 / 8.273e-4 / 2.760e-12 / 0", "1.1e-9"),
        (0.05, "1.152e-1 / 5.600e-3 / 1.500e-8 / 1.6e-15", "8.4e-6"),
        (0.01, "1.237e-1 / 2.722e-2 / 2.915e-5 / 5.525e-9", "1.7e-2"),
    ],
)
def test_nash_mp_falls_at_least_as_fast_as_its_bound(beta: float, printed: str, bound: str) -> None:
    run = play(toy(beta), "nash_mp", 400)
    assert_agrees(run.kl[[0, 10, 50, 100]], printed)
    bounds = run.kl[0] * (1 + 2 * beta) ** -np.arange(401.0)
    assert agrees(bounds[100], bound)
    # 1e-29 is the floor of float64: squared rounding errors
    assert (run.kl <= bounds * (1 + 1e-12) + 1e-29).all()


def test_a_proximal_step_is_the_argmin_of_its_objective() -> None:
    game, eta = toy(0.1), 0.4
    opponent, centre = random_policy(3, 1), POLICY

    def objective(policy: Any) -> float:
        losing = np.exp(opponent) @ game.payoff @ np.exp(policy)
        near = kl(policy, game.log_reference) + kl(policy, centre) / eta
        return float(losing / game.beta + near)

    step = prox_step(game, centre, opponent, eta)
    for seed in range(50):
        nearby = log_normalise(step + 0.05 * np.random.default_rng(seed).normal(size=3))
        assert objective(nearby) > objective(step)


@pytest.mark.parametrize(
    ("beta", "rounding"), [(0.5, 4e-16), (0.1, 4e-16), (0.05, 4e-16), (0.01, 2e-15)]
)
def test_egpo_with_a_rescaled_step_is_nash_mp(beta: float, rounding: float) -> None:
    game, eta = toy(beta), 2 * beta
    egpo = policies(game, "egpo", eta=eta / (beta * (1 + eta)))
    for first, second in islice(zip(policies(game, "nash_mp"), egpo, strict=True), 400):
        assert np.exp(first) == pytest.approx(np.exp(second), rel=0, abs=rounding)
    for other in (0.02, 1.0):
        policy = random_policy(3, 3)
        one = nash_mp_step(game, policy, other)
        assert one == pytest.approx(
            egpo_step(game, policy, other / (beta * (1 + other))), rel=1e-13
        )


def test_inpo_self_play_and_npg_are_one_step_in_three_notations() -> None:
    game = toy(0.1)
    for step in (0.05, 0.5, 2.0):
        policy = self_play_step(game, POLICY, step)
        eta_npg = step / (1 - step * game.beta)
        q_values = win_rates(game, POLICY)
        npg = npg_step(POLICY, game.log_reference, q_values, eta_npg, game.beta)
        prox = prox_step(game, POLICY, POLICY, eta_npg * game.beta)
        assert inpo_step(game, POLICY, 1 / step) == pytest.approx(policy, abs=4e-15)
        assert npg == pytest.approx(policy, abs=4e-15)
        assert prox == pytest.approx(policy, abs=4e-15)


# ------------------------------------------------------------------------- at equal queries

QUERIES = [10, 100, 200, 800]
STEPS_OF_TWO = [20, 100, 200, 800]


def prox_form(eta: float, beta: float) -> float:
    """The self-play step of a proximal step against the policy itself."""
    return eta / (beta * (1 + eta))


@pytest.mark.parametrize(
    ("name", "beta", "settings", "queries", "printed"),
    [
        ("self_play", 0.1, {"eta": prox_form(0.2, 0.1)}, QUERIES, "7.9e-3 / 3.0e-12 / 0 / 0"),
        ("self_play", 0.1, {}, QUERIES, "6.5e-2 / 2.1e-3 / 4.7e-5 / 5e-15"),
        ("nash_md", 0.1, {"eta": 0.5}, QUERIES, "3.9e-2 / 3.0e-4 / 2.1e-4 / 2.1e-4"),
        ("nash_md", 0.1, {"eta": 0.1}, QUERIES, "7.8e-2 / 1.4e-2 / 2.1e-3 / 8.5e-6"),
        ("egpo", 0.1, {"eta": 1}, STEPS_OF_TWO, "8.3e-3 / 3.8e-7 / 1.4e-12 / 0"),
        ("nash_mp", 0.1, {}, STEPS_OF_TWO, "8.3e-4 / 2.8e-12 / 0 / 0"),
        (
            "self_play",
            0.01,
            {"eta": prox_form(0.02, 0.01)},
            QUERIES,
            "2.1e-1 / 9.8e-1 / 9.5e-1 / 9.6e-1",
        ),
        ("self_play", 0.01, {}, QUERIES, "1.23e-1 / 1.19e-1 / 1.14e-1 / 9.2e-2"),
        ("nash_md", 0.01, {"eta": 0.5}, QUERIES, "1.2e-1 / 9.9e-2 / 7.8e-2 / 2.9e-2"),
        ("nash_md", 0.01, {"eta": 0.1}, QUERIES, "1.2e-1 / 1.05e-1 / 8.9e-2 / 3.3e-2"),
        ("egpo", 0.01, {"eta": 1}, STEPS_OF_TWO, "7.5e-2 / 9.0e-3 / 5.5e-4 / 2.8e-11"),
        ("nash_mp", 0.01, {}, STEPS_OF_TWO, "2.7e-2 / 2.9e-5 / 5.5e-9 / 0"),
    ],
)
def test_distance_after_equal_numbers_of_queries(
    name: str, beta: float, settings: dict[str, float], queries: list[int], printed: str
) -> None:
    run = play(toy(beta), name, queries[-1] // ALGORITHMS[name].queries, **settings)
    rows = [int(np.flatnonzero(run.queries == count)[0]) for count in queries]
    assert_agrees(run.kl[rows], printed)


def test_self_play_in_proximal_form_cycles_at_a_small_beta() -> None:
    run = play(toy(0.01), "self_play", 800, eta=prox_form(0.02, 0.01))
    assert agrees(run.exploitability[-1], "3.3e-1")


def test_nash_md_with_a_constant_step_rests_beside_the_equilibrium() -> None:
    plateaus = []
    for eta in (0.5, 0.1):
        run = play(toy(0.1), "nash_md", 3000, eta=eta)
        assert run.kl[-1] == pytest.approx(run.kl[-500], rel=1e-6)
        plateaus.append(run.kl[-1])
    assert_agrees(plateaus, "2.1e-4 / 8.0e-6")


# The printed table has 1.7e-7 after 1000 steps at beta 0.1. Measured is 1.648e-7, which rounds to
# 1.6e-7; the table's number was probably rounded twice (1.65e-7, 1.7e-7).
@pytest.mark.parametrize(
    ("beta", "printed"),
    [(0.1, "2.8e-3 / 1.1e-5 / 1.65e-7 / 1.6e-9"), (0.01, "3.0e-1 / 2.7e-1 / 5.1e-2 / 5.8e-5")],
)
def test_nash_md_with_a_decreasing_step(beta: float, printed: str) -> None:
    run = play(toy(beta), "nash_md_decreasing", 10_000)
    assert_agrees(run.exploitability[[10, 100, 1000, 10_000]], printed)


def test_optimistic_mirror_descent() -> None:
    assert agrees(play(toy(0.1), "optimistic_md", 100, eta=0.5).exploitability[100], "5.7e-7")
    gaps = play(toy(0.01), "optimistic_md", 1000, eta=0.5).exploitability
    assert_agrees(gaps[[100, 1000]], "4.2e-2 / 2.2e-9")


def test_mpo_finds_the_nash_equilibrium_of_the_payoff() -> None:
    run = play(toy(0.1), "mpo", 2000, eta=1, period=50)
    outer = run.exploitability[[50, 250, 500, 1000, 2000]]
    assert_agrees(outer[:4], "5.8e-2 / 3.4e-3 / 7.6e-5 / 3.7e-8")
    assert 0 <= outer[4] < 1e-14
    assert np.exp(run.log_policy) == pytest.approx([0.3, 0.3, 0.4], abs=1e-7)
    assert run.kl[-1] < 1e-13


def test_mpo_with_a_magnet_that_stays_at_the_reference_is_regularised() -> None:
    game = toy(0.1)
    policy = game.log_reference
    for _ in range(1000):
        policy = mpo_step(game, policy, game.log_reference, eta=1)
    assert policy == pytest.approx(equilibrium(game), abs=1e-12)


@pytest.mark.parametrize(
    ("beta", "printed"),
    [(0.1, "8.0e-4 / 1.7e-10 / 0 / 0"), (0.01, "7.7e-2 / 7.6e-4 / 2.0e-4 / 1.7e-11")],
)
def test_nash_mp_on_the_random_game(beta: float, printed: str) -> None:
    run = play(random_game(beta), "nash_mp", 500)
    assert run.queries[-1] == 1000
    assert_agrees(run.exploitability[[10, 50, 100, 500]], printed)


# ------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    ("beta", "kappa", "printed"),
    [
        (0.1, 1, "9.4e-3 / 7.6e-5 / 6.9e-6 / 1.2e-12"),
        (0.1, 0.1, "2.7e-2 / 1.8e-3 / 1.2e-4 / 9.2e-10"),
        (0.1, 0, "4.4e-2 / 4.4e-2 / 4.4e-2 / 4.4e-2"),
        (0.01, 1, "1.9e-1 / 4.5e-1 / 1.8e-1 / 3.2e-1"),
        (0.01, 0.1, "1.3e-1 / 8.2e-2 / 1.2e-2 / 1.7e-3"),
        (0.01, 0, "1.8e-1 / 1.8e-1 / 1.8e-1 / 1.8e-1"),
    ],
)
def test_a_moving_target_makes_self_play_converge(beta: float, kappa: float, printed: str) -> None:
    run = play(random_game(beta), "nash_mp_ema", 1000, kappa=kappa)
    assert_agrees(run.exploitability[[20, 100, 200, 1000]], printed)


def test_a_frozen_target_is_a_heavier_reference() -> None:
    game = random_game(0.1)
    run = play(game, "nash_mp_ema", 2000, eta=0.2, kappa=0)
    heavier = Game(game.payoff, game.reference, 0.1 + 0.1 / 0.2)
    assert run.log_policy == pytest.approx(equilibrium(heavier), abs=1e-10)


def test_a_target_that_follows_at_once_is_plain_self_play() -> None:
    game = toy(0.1)
    logits, target = nash_mp_ema_step(game, POLICY, POLICY, eta=0.2, kappa=1, lr=0.5)
    gradient = policy_gradient(game, POLICY, POLICY, POLICY, prox=0)
    assert logits == pytest.approx(POLICY + 1.5 * gradient, abs=1e-15)
    assert target == pytest.approx(logits, abs=1e-15)


def test_policy_gradients_by_hand() -> None:
    game = toy(0.1)
    plain = policy_gradient(game, POLICY, POLICY, POLICY, prox=0)
    assert plain == pytest.approx([0.035745, -0.034428, -0.001317], abs=5e-7)
    target = np.log([0.45, 0.32, 0.23])
    near = policy_gradient(game, POLICY, POLICY, target, prox=0.1 / 0.2)
    assert near == pytest.approx([0.060321, -0.049219, -0.011102], abs=5e-7)
    anchored = Game(CYCLE, np.exp(POLICY), 0.1)
    preference = policy_gradient(anchored, POLICY, POLICY, POLICY, prox=0)
    assert preference == pytest.approx([0.026, -0.02975, 0.00375], abs=1e-15)


def test_the_gradient_is_that_of_its_objective() -> None:
    game, target, opponent = toy(0.1), random_policy(3, 4), random_policy(3, 5)

    def objective(logits: Any) -> float:
        policy = log_normalise(logits)
        return value(game, policy, opponent) - 0.3 * kl(policy, target)

    gradient = policy_gradient(game, POLICY, opponent, target, prox=0.3)
    for action, direction in enumerate(np.eye(3) * 1e-6):
        slope = (objective(POLICY + direction) - objective(POLICY - direction)) / 2e-6
        assert gradient[action] == pytest.approx(slope, abs=1e-9)


def test_two_samples_of_the_policy_estimate_its_gradient_without_bias() -> None:
    game, target, p = toy(0.1), np.log([0.45, 0.32, 0.23]), np.exp(POLICY)
    penalty = -0.1 * (POLICY - game.log_reference) - 0.5 * (POLICY - target)
    estimate = np.zeros(3)
    for y, grad_y in enumerate(np.eye(3)):
        for z, grad_z in enumerate(np.eye(3)):
            weight = game.payoff[y, z] - 0.5 + penalty[y] - penalty[z]
            estimate += p[y] * p[z] * weight * (grad_y - grad_z) / 2
    exact = policy_gradient(game, POLICY, POLICY, target, prox=0.5)
    assert estimate == pytest.approx(exact, abs=1e-15)


def test_online_ipo_descends_along_the_self_play_gradient() -> None:
    game, p = toy(0.1), np.exp(POLICY)
    log_ratio = POLICY - game.log_reference
    margin = log_ratio[:, None] - log_ratio[None, :]
    pairs = 2 * np.outer(p, p) * game.payoff * 2 * (margin - 1 / (2 * game.beta))
    # the winner y raises log pi(y) - log pi(z), the normalisation cancels; pairs counts (y, z) and
    # (z, y), because either of the two draws may win
    ipo = pairs.sum(1) - pairs.sum(0)
    assert ipo == pytest.approx([-1.429800, 1.377137, 0.052662], abs=5.1e-7)
    plain = policy_gradient(game, POLICY, POLICY, POLICY, prox=0)
    assert ipo == pytest.approx(-4 / game.beta * plain, abs=1e-14)


def test_nash_md_policy_gradient_against_the_mixture() -> None:
    game = toy(0.1)
    opponent = mixture([(0.875, POLICY), (0.125, game.log_reference)], np.zeros(3), 0)
    assert probabilities(opponent) == (0.412239, 0.344092, 0.243669)
    gradient = policy_gradient(game, POLICY, opponent, POLICY, prox=0)
    assert gradient == pytest.approx([0.036040, -0.036386, 0.000345], abs=5e-7)


def test_natural_policy_gradient_step_of_drpo() -> None:
    step = npg_step(POLICY, np.log(REFERENCE), np.array([1, 0, 0.5]), eta=1, lam=0.5)
    assert probabilities(step) == (0.561142, 0.222296, 0.216562)


# ------------------------------------------------------------------------- play


@pytest.mark.parametrize("name", REGULARISED)
def test_defaults_approach_the_equilibrium(name: str) -> None:
    for game in (toy(0.1), toy(0.5), toy(2.0), random_game(0.1, seed=1)):
        run = play(game, name, 2000)
        assert run.kl[-1] < 1e-5 < run.kl[0]
        assert run.exploitability[-1] < 1e-5


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_five_hundred_actions_stay_finite_and_normalised(name: str) -> None:
    run = play(random_game(0.01, 500), name, 100)
    assert np.isfinite(run.log_policy).all()
    assert np.exp(run.log_policy).sum() == pytest.approx(1, abs=1e-12)
    assert np.isfinite(run.kl).all()
    assert (run.exploitability >= 0).all()


def test_queries_count_evaluations_of_the_payoff(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    original = win_rates

    def counting(game: Game, log_policy: Any) -> Any:
        counted.append(1)
        return original(game, log_policy)

    for module in ("algorithms", "trajectory"):
        monkeypatch.setattr(f"prefopt.games.{module}.win_rates", counting)
    for name, algorithm in ALGORITHMS.items():
        counted.clear()
        list(islice(policies(toy(0.1), name), 11))
        # optimistic mirror descent asks again for what it knows from the step before
        asked = len(counted) // 2 if name == "optimistic_md" else len(counted)
        assert asked == 10 * algorithm.queries
        assert play(toy(0.1), name, 10).queries.tolist() == [
            step * algorithm.queries for step in range(11)
        ]


def test_online_ipo_is_another_name_of_self_play() -> None:
    first, second = (play(toy(0.1), name, 5).log_policy for name in ("online_ipo", "self_play"))
    assert (first == second).all()


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("nash_pm", {}, "did you mean 'nash_mp'"),
        ("nash_mp", {"kappa": 0.1}, "kappa: 'nash_mp' does not use it (its settings: eta)"),
        ("nash_md_decreasing", {"eta": 0.1}, "its settings: none"),
        ("inpo", {"eta": 0.09}, "at least tau"),
        ("self_play", {"eta": 10.1}, "up to 1/beta = 10"),
        ("egpo", {"eta": 0}, "eta: found 0"),
        ("nash_mp", {"eta": -1}, "eta: found -1"),
        ("drpo", {"eta": float("nan")}, "eta: found nan"),
        ("mpo", {"period": 0.5}, "period: found 0.5"),
        ("mpo", {"period": 2.5}, "period: found 2.5"),
        ("mpo", {"period": float("inf")}, "period: found inf, expected a whole number"),
        ("mpo", {"period": float("nan")}, "period: found nan, expected a whole number"),
        ("nash_mp_ema", {"kappa": 1.1}, "kappa: found 1.1"),
        ("nash_mp_ema", {"lr": 0}, "lr: found 0"),
    ],
)
def test_what_an_algorithm_cannot_use_is_refused(
    name: str, settings: dict[str, float], words: str
) -> None:
    with pytest.raises(PrefoptError) as caught:
        play(toy(0.1), name, 1, **settings)
    assert words in str(caught.value)


@pytest.mark.parametrize("steps", [-1, 2.0, 10**8 + 1, 10**22])
def test_a_number_of_steps_that_cannot_be_played_is_refused(steps: Any) -> None:
    with pytest.raises(PrefoptError) as caught:
        play(toy(0.1), "nash_mp", steps)
    assert str(caught.value).startswith(f"steps: found {steps}, expected a whole number from 0 to")


def test_no_steps_leave_the_reference() -> None:
    run = play(toy(0.1), "nash_mp", np.int64(0))
    assert np.exp(run.log_policy) == pytest.approx(REFERENCE, abs=1e-15)
    assert len(run.kl) == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("settings", "step"), [({"lr": 1e308}, 1), ({"eta": 1e-320}, 1), ({"eta": 1e-300}, 3)]
)
def test_a_policy_that_is_not_finite_is_refused(settings: dict[str, float], step: int) -> None:
    words = f"nash_mp_ema: found a policy that is not finite after step {step}, .* lower lr"
    with pytest.raises(PrefoptError, match=words):
        play(toy(0.1), "nash_mp_ema", 100, **settings)


# ------------------------------------------------------------------------- the command


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("P.json").write_text(json.dumps(CYCLE))
    Path("mu.json").write_text(json.dumps(REFERENCE))
    return tmp_path


def command(capsys: pytest.CaptureFixture[str], line: str) -> Any:
    assert main(["game", *line.split(), "--json"]) == 0
    # NaN and Infinity are not JSON, but Python writes and reads them
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def error_of(capsys: pytest.CaptureFixture[str], line: str) -> str:
    assert main(["game", *line.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_the_command_prints_one_result(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "--payoff P.json --reference mu.json --algorithm nash_mp --beta 0.1 --steps 10"
    result = command(capsys, line)
    assert sorted(result) == ["exploitability", "kl_to_equilibrium", "policy", "queries"]
    assert agrees(result["kl_to_equilibrium"], "8.273e-4")
    assert result["queries"] == 20
    assert sum(result["policy"]) == pytest.approx(1, abs=1e-14)
    game = toy(0.1)
    gap = exploitability(game, np.log(result["policy"]))
    assert result["exploitability"] == pytest.approx(gap, rel=1e-9)


def test_the_table_has_each_number_under_its_head(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "--payoff P.json --reference mu.json --algorithm nash_mp --beta 0.1 --steps 10"
    assert main(["game", *line.split()]) == 0
    head, row = capsys.readouterr().out.splitlines()
    cells = {
        name: row[: head.index(name) + len(name)].split()[-1]
        for name in ("queries", "KL", "exploitability")
    }
    assert cells == {"queries": "20", "KL": "8.27e-04", "exploitability": "3.62e-04"}
    assert row.startswith("nash_mp ")
    assert row[head.index("policy") :] == "2: 0.4071, 0: 0.3893, 1: 0.2036"


def test_the_reference_is_uniform_unless_given(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = command(capsys, "--payoff P.json --algorithm egpo --steps 1 --eta 1e-12")
    assert result["policy"] == pytest.approx([1 / 3] * 3, abs=1e-9)


def test_several_algorithms_give_a_mapping_and_one_curve_each(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = list(ALGORITHMS)
    line = f"--payoff P.json --algorithm {','.join(names)} --steps 60 --plot picture.png"
    result = command(capsys, line)
    assert list(result) == names
    assert result["nash_mp"]["queries"] == 2 * result["self_play"]["queries"] == 120
    assert Path("picture.png").read_bytes().startswith(b"\x89PNG")
    assert main(["game", *line.split()]) == 0
    text = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in text] == ["algorithm", *names]


def test_a_plot_of_ties_has_nothing_to_draw_and_is_written(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("P.json").write_text("[[0.5, 0.5], [0.5, 0.5]]")
    result = command(capsys, "--payoff P.json --algorithm nash_mp --plot ties.svg")
    assert result["kl_to_equilibrium"] < 1e-30
    assert "<svg" in Path("ties.svg").read_text()


def test_the_title_of_a_plot_counts_its_actions(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles = []
    monkeypatch.setattr(
        "prefopt.games.plot.plot_trajectories", lambda runs, path, title: titles.append(title)
    )
    line = "--algorithm nash_mp --steps 1 --plot x.pdf"
    for payoff in (CYCLE, [[0.5]]):
        Path("P.json").write_text(json.dumps(payoff))
        assert main(["game", "--payoff", "P.json", *line.split()]) == 0
    assert titles == ["3 actions, beta = 0.1", "1 action, beta = 0.1"]


@pytest.mark.parametrize(
    ("plot", "words"),
    [
        ("nowhere/x.png", "plot: found no folder 'nowhere'"),
        ("x.foo", "plot: found 'x.foo', expected a name that ends in .png, .svg, .pdf"),
        ("picture", "plot: found 'picture', expected a name that ends in"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_a_step(
    plot: str,
    words: str,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("prefopt.games.command.play", lambda *_, **__: pytest.fail("played"))
    assert words in error_of(capsys, f"--payoff P.json --algorithm nash_mp --plot {plot}")


def test_tau_is_inpos_name_of_beta(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = "--payoff P.json --reference mu.json --algorithm inpo --steps 3 --eta 0.5"
    by_tau = command(capsys, f"{start} --tau 0.05")
    assert by_tau == command(capsys, f"{start} --beta 0.05")
    assert by_tau != command(capsys, start)
    assert "INPO's tau is beta" in error_of(capsys, f"{start} --tau 0.05 --beta 0.1")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--algorithm nash_mp --tau 0.1", "tau: 'nash_mp' does not use it"),
        ("--algorithm nash_mp --period 5", "period: 'nash_mp' does not use it"),
        ("--algorithm nash_mp,egpo --eta 1", "expected with a single algorithm"),
        ("--algorithm nash_pm", "did you mean"),
        ("--algorithm nash_mp --beta -1", "beta: found -1"),
        ("--algorithm nash_mp --reference nowhere.json", "nowhere.json: No such file"),
        ("--algorithm nash_mp --steps 10000000000000000000000", "steps: found 1000000"),
        ("--algorithm self_play --beta 1e300", "beta: found 1e+300, expected a number in"),
        ("--algorithm inpo --tau 0", "beta: found 0.0, expected a number in"),
        ("--algorithm mpo --period inf", "period: found inf"),
        ("--algorithm mpo --period nan", "period: found nan"),
        ("--algorithm nash_mp_ema --lr 1e308 --json", "a policy that is not finite"),
    ],
)
def test_bad_options_give_one_line(
    line: str, words: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in error_of(capsys, f"--payoff P.json {line}")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("nonsense", "P.json: not JSON"),
        ("\x00\xff", "P.json: not JSON"),
        ('{"payoff": 1}', "payoff: found an object, expected a list (in P.json)"),
        ("[0.5]", "payoff[0]: found 0.5, expected the payoff as a list of rows"),
        ("[[0.5], 1]", "payoff[1]: found 1.0, expected the payoff as a list of rows"),
        ("[]", "expected a square"),
        ('[[0.5, "a"], [0.1, 0.5]]', 'payoff[0][1]: found "a", expected a number'),
        ("[[0.5, null], [0.1, 0.5]]", "payoff[0][1]: found null"),
        ("[[0.5, true], [false, 0.5]]", "payoff[0][1]: found true"),
        ("[[0.5, 0.9], [0.1]]", "payoff[1]: found a row of 1 entries, expected 2"),
        ("[[0.5, NaN], [0.1, 0.5]]", "payoff[0][1]: found nan"),
        (f"[[0.5, {'9' * 400}], [0.1, 0.5]]", "payoff[0][1]: found inf, expected the probability"),
        (f"[[0.5, {'9' * 5000}], [0.1, 0.5]]", "payoff[0][1]: found inf, expected the probability"),
        ("[" * 900 + "]" * 900, "payoff[0][0]: found a list, expected a number"),
        ("[" * 100_000 + "]" * 100_000, "P.json: lists nested too deeply, expected the payoff"),
        ("[[0.5, 0.9], [0.2, 0.5]]", "payoff[0][1] + payoff[1][0]"),
    ],
)
def test_a_bad_file_gives_one_line(
    content: str, words: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("P.json").write_text(content)
    assert words in error_of(capsys, "--payoff P.json --algorithm nash_mp")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("0.5", "reference: found 0.5, expected a list (in mu.json)"),
        ("[0.5, [0.3], 0.2]", "reference[1]: found a list, expected a number"),
        ("[0.5, 0.3]", "reference: found shape (2,), expected (3,)"),
        ("[" * 100_000, "mu.json: lists nested too deeply, expected the reference"),
    ],
)
def test_a_bad_reference_gives_one_line(
    content: str, words: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mu.json").write_text(content)
    line = "--payoff P.json --reference mu.json --algorithm nash_mp"
    assert words in error_of(capsys, line)
