"""Every loss beside a number worked out by hand, its invariants, and TRL's own code."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from prefopt.errors import PrefoptError
from prefopt.objectives import (
    PAIR_LOSSES,
    bradley_terry_loss,
    inpo_loss,
    needs_reference,
    pair_loss,
)
from prefopt.objectives.reward import answer_loss

SORTED = {"aot", "aot_unpaired"}
EXPECTATION = sorted(set(PAIR_LOSSES) - SORTED - {"exo_pair", "sppo_soft"})
LENGTH_NORMALISED = {"ipo", "sigmoid_norm", "simpo"}
IN_TRL_DPO = sorted(set(PAIR_LOSSES) - {"cdpo", "ipo_sum", "sppo_soft", "simpo"})

# One pair: lp(w)=-10, lp(l)=-12, rf(w)=-11, rf(l)=-11.5, so a = 1, c = -0.5, d = 1.5;
# |w| = 20, |l| = 30. With beta = 0.1: beta a = 0.1, beta c = -0.05, beta d = 0.15, 1/(2 beta) = 5.
# -ls(.15) = 0.620957, -ls(-.15) = 0.770957, -ls(.1) = 0.644397, -ls(-.1) = 0.744397,
# -ls(.05) = 0.668460, s(.15) = 0.537430, s(.1) = 0.524979, s(-.05) = 0.487503, s(3) = 0.952574.
PROBE: list[tuple[str, dict[str, Any], float]] = [
    ("sigmoid", {}, 0.620957),  # -ls(.15)
    ("cdpo", {}, 0.635957),  # .9 * 0.620957 + .1 * 0.770957
    ("hinge", {}, 0.850000),  # 1 - .15
    ("ipo", {}, 24.337778),  # (1/20 + .5/30 - 5)^2 = (-4.933333)^2
    ("ipo_sum", {}, 12.250000),  # (1.5 - 5)^2
    ("exo_pair", {}, 0.431388),  # .537430 (-.620957 + .105361) + .462570 (-.770957 + 2.302585)
    ("nca_pair", {}, 1.350825),  # .644397 + .744397/2 + .668460/2
    ("robust", {}, 0.602207),  # (.9 * .620957 - .1 * .770957) / .8
    ("bco_pair", {}, 1.312856),  # .644397 + .668460
    ("bco_pair", {"delta": 0.025}, 1.312700),  # delta = (.1 - .05)/2: -2 ls(.075)
    ("sppo_hard", {}, 36.250000),  # (1 - 5)^2 + (-.5 + 5)^2 = 16 + 20.25
    ("sppo_soft", {"p_chosen": [0.8]}, 10.250000),  # (1 - 3)^2 + (-.5 + 3)^2 = 4 + 6.25
    # (1 - 3)^2 + (-.5 + 1)^2: win rates against the policy need not add to 1
    ("sppo_soft", {"p_chosen": [0.8], "p_rejected": [0.4]}, 4.250000),
    ("aot", {}, 0.635957),  # one pair: nothing to sort, so cDPO
    ("aot_unpaired", {}, 0.635957),
    ("apo_zero", {}, 0.962523),  # 1 - .524979 + .487503
    ("apo_down", {}, 0.987549),  # .524979 + 1 - .537430
    ("discopop", {}, 0.849337),  # m = s(.15/.05): .047426 * .620957 + .952574 * .860708
    ("sigmoid_norm", {}, 0.689819),  # -ls(.1 (1/20 + .5/30)) = -ls(.006667)
    ("simpo", {"beta": 2.0, "gamma": 0.5}, 1.103186),  # -ls(2 (-10/20 + 12/30) - .5) = -ls(-.7)
]


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def loss_at(name: str, a: float, c: float, **settings: Any) -> Tensor:
    """The loss of one pair with these log-ratios; lengths 20 and 30, eps 0.1 unless told."""
    defaults = {"beta": 0.1, "label_smoothing": 0.1}
    lengths = {"chosen_lengths": column(20), "rejected_lengths": column(30)}
    if name == "sppo_soft":
        defaults["p_chosen"] = column(1)
    rf_w, rf_l = column(-11), column(-11.5)
    return pair_loss(name, rf_w + a, rf_l + c, rf_w, rf_l, **{**defaults, **lengths, **settings})


def random_batch(pairs: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Log-probs within about 3 nats of the reference, and lengths from 1 to 39."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(4, pairs, generator=generator, dtype=torch.float64).to(dtype)
    chosen, rejected = -20 + 5 * draw[0], -22 + 5 * draw[1]
    return {
        "policy_chosen": chosen + 2 * draw[2],
        "policy_rejected": rejected + 2 * draw[3],
        "reference_chosen": chosen,
        "reference_rejected": rejected,
        "chosen_lengths": torch.randint(1, 40, (pairs,), generator=generator),
        "rejected_lengths": torch.randint(1, 40, (pairs,), generator=generator),
    }


def swapped(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The opposite label: every chosen tensor becomes the rejected one, and back."""
    sides = {"chosen": "rejected", "rejected": "chosen"}
    flipped = {}
    for name, value in batch.items():
        side = "chosen" if "chosen" in name else "rejected"
        flipped[name.replace(side, sides[side])] = value
    return flipped


def settings_for(name: str, pairs: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"label_smoothing": 0.1}
    if name == "sppo_soft":
        settings["p_chosen"] = torch.linspace(0.1, 0.9, pairs, dtype=torch.float64)
    return settings


# Values


@pytest.mark.parametrize(("name", "settings", "expected"), PROBE)
def test_value_at_the_probe_point(name: str, settings: dict[str, Any], expected: float) -> None:
    tensors = {k: column(*v) if isinstance(v, list) else v for k, v in settings.items()}
    loss = loss_at(name, a=1.0, c=-0.5, **tensors)
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_every_loss_has_a_value_worked_out_by_hand() -> None:
    assert {name for name, _, _ in PROBE} == set(PAIR_LOSSES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sigmoid", math.log(2)),
        ("cdpo", math.log(2)),
        ("robust", math.log(2)),
        ("sigmoid_norm", math.log(2)),
        ("aot", math.log(2)),
        ("aot_unpaired", math.log(2)),
        ("hinge", 1.0),
        ("ipo", 25.0),  # 1 / (4 * 0.1^2)
        ("ipo_sum", 25.0),
        ("sppo_hard", 50.0),  # 1 / (2 * 0.1^2)
        ("apo_zero", 1.0),
        ("apo_down", 1.0),
        ("nca_pair", 2 * math.log(2)),
        ("bco_pair", 2 * math.log(2)),
        # KL of (1/2, 1/2) from (.9, .1): ln(.5/.9)/2 + ln(.5/.1)/2
        ("exo_pair", 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)),
        ("discopop", 0.5 * math.log(2) + 0.5),  # m = 1/2: half of ln 2 and half of exp(0)
    ],
)
def test_value_when_policy_equals_reference(name: str, expected: float) -> None:
    assert loss_at(name, a=0.0, c=0.0).item() == pytest.approx(expected, abs=1e-12)


def test_dpo_gradient_at_the_probe_point() -> None:
    policy = column(-10).requires_grad_(), column(-12).requires_grad_()
    loss = pair_loss("sigmoid", *policy, column(-11), column(-11.5), beta=0.1)
    chosen, rejected = torch.autograd.grad(loss, policy)
    # -beta s(-beta d) = -0.1 * s(-0.15) = -0.1 * 0.462570
    assert chosen.item() == pytest.approx(-0.046257, abs=1e-6)
    assert rejected.item() == pytest.approx(0.046257, abs=1e-6)


def test_discopop_starts_uphill() -> None:
    # With z = 0, m = 1/2, m' = 1/(4 tau) = 5: slope m' (exp(0) - ln 2) - 1/4 - 1/2 = 0.784264 > 0,
    # so the first step from the reference lowers the margin (docs/objectives.md).
    z, zero = column(0).requires_grad_(), column(0)
    (slope,) = torch.autograd.grad(pair_loss("discopop", z, zero, zero, zero, beta=1.0), z)
    assert slope.item() == pytest.approx(5 * (1 - math.log(2)) - 0.75, abs=1e-12)


# Reductions


@pytest.mark.parametrize("d", [-30.0, -1.5, 0.0, 1.5, 30.0])
@pytest.mark.parametrize("name", ["cdpo", "robust", "aot", "aot_unpaired"])
def test_without_smoothing_the_loss_is_dpo(name: str, d: float) -> None:
    smooth = loss_at(name, a=d, c=0.0, label_smoothing=0.0)
    torch.testing.assert_close(smooth, loss_at("sigmoid", a=d, c=0.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["cdpo", "exo_pair"])
def test_smoothed_losses_rest_at_the_log_odds_of_the_label(name: str) -> None:
    at_rest = math.log(0.9 / 0.1)  # 2.197225
    d, zero = column(at_rest / 0.1).requires_grad_(), column(0)
    loss = pair_loss(name, d, zero, zero, zero, beta=0.1, label_smoothing=0.1)
    (slope,) = torch.autograd.grad(loss, d)
    assert slope.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("d", [-20.0, -1.5, 0.0, 1.5, 20.0])
def test_robust_dpo_averages_to_the_clean_loss(d: float) -> None:
    kept, flipped = loss_at("robust", a=d, c=0.0), loss_at("robust", a=0.0, c=d)
    clean = loss_at("sigmoid", a=d, c=0.0)
    torch.testing.assert_close(0.9 * kept + 0.1 * flipped, clean, rtol=0, atol=1e-12)


def test_soft_dpo_label_is_label_smoothing() -> None:
    soft = loss_at("sigmoid", a=1.0, c=-0.5, p_chosen=column(0.9))
    torch.testing.assert_close(soft, loss_at("cdpo", a=1.0, c=-0.5), rtol=0, atol=1e-12)


def test_soft_ipo_rests_at_a_shrunk_margin() -> None:
    # p (d - t)^2 + (1-p) (d + t)^2 with t = 1/(2 beta) = 5 is least at d = (2p - 1) t = 2.5.
    d, zero = column(2.5).requires_grad_(), column(0)
    loss = pair_loss("ipo_sum", d, zero, zero, zero, beta=0.1, p_chosen=column(0.75))
    (slope,) = torch.autograd.grad(loss, d)
    assert slope.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("p", "settings"), [(1.0, {}), (0.0, {"a": -0.5, "c": 1.0})])
def test_sppo_with_certain_win_rates_is_the_hard_form(p: float, settings: dict[str, float]) -> None:
    hard = loss_at("sppo_hard", **({"a": 1.0, "c": -0.5} | settings))
    torch.testing.assert_close(loss_at("sppo_soft", a=1.0, c=-0.5, p_chosen=column(p)), hard)


# Soft labels


@pytest.mark.parametrize("name", EXPECTATION)
def test_certain_soft_labels_are_the_hard_losses(name: str) -> None:
    batch, settings = random_batch(6), settings_for(name, 6)
    ones, zeros = torch.ones(6), torch.zeros(6)
    as_labelled = pair_loss(name, **batch, **settings)
    assert torch.equal(pair_loss(name, **batch, **settings, p_chosen=ones), as_labelled)
    flipped = pair_loss(name, **swapped(batch), **settings)
    assert torch.equal(pair_loss(name, **batch, **settings, p_chosen=zeros), flipped)
    assert not torch.allclose(as_labelled, flipped)


@pytest.mark.parametrize("name", EXPECTATION)
def test_soft_labels_are_linear_in_the_probability(name: str) -> None:
    batch, settings = random_batch(3), settings_for(name, 3)
    p = column(0.1, 0.5, 0.7)
    expected = p * pair_loss(name, **batch, **settings)
    expected += (1 - p) * pair_loss(name, **swapped(batch), **settings)
    torch.testing.assert_close(pair_loss(name, **batch, **settings, p_chosen=p), expected)


def test_lengths_change_sides_with_the_label() -> None:
    # lp = -10 over 20 tokens against -12 over 30; with the label flipped and beta 2, gamma .5 the
    # logit is 2 (-12/30 + 10/20) - .5 = -.3.
    loss = loss_at("simpo", a=1.0, c=-0.5, beta=2.0, gamma=0.5, p_chosen=column(0))
    assert loss.item() == pytest.approx(math.log1p(math.exp(0.3)), abs=1e-12)


@pytest.mark.parametrize("name", ["exo_pair", "aot", "aot_unpaired"])
def test_soft_labels_are_refused_where_undefined(name: str) -> None:
    with pytest.raises(PrefoptError, match=f"{name}: found soft labels in p_chosen"):
        loss_at(name, a=1.0, c=-0.5, p_chosen=column(0.9))


# Shapes, batches, gradients, extremes


@pytest.mark.parametrize("name", sorted(set(PAIR_LOSSES) - SORTED))
def test_a_pair_does_not_see_its_batch(name: str) -> None:
    batch = random_batch(5) | settings_for(name, 5)
    together = pair_loss(name, **batch)
    for i in range(5):
        row = {k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in batch.items()}
        torch.testing.assert_close(pair_loss(name, **row), together[i : i + 1])


@pytest.mark.parametrize("name", sorted(SORTED))
def test_sorted_losses_ignore_the_order_of_the_batch(name: str) -> None:
    batch = random_batch(6)
    shuffle = torch.tensor([3, 0, 5, 1, 4, 2])
    gradients = []
    for order in (torch.arange(6), shuffle):
        rows = {k: v[order] for k, v in batch.items()}
        rows["policy_chosen"].requires_grad_()
        loss = pair_loss(name, **rows, label_smoothing=0.1)
        loss.sum().backward()
        gradients.append((loss.detach(), rows["policy_chosen"].grad))
    (loss, gradient), (shuffled_loss, shuffled_gradient) = gradients
    assert torch.equal(loss, shuffled_loss)
    assert torch.equal(gradient[shuffle], shuffled_gradient)


def test_aot_compares_sorted_margins() -> None:
    # Margins lp(w) - lp(l): (2, -1), sorted (-1, 2). rf(w) - rf(l): (0, 1), sorted (0, 1).
    # Their difference is (-1, 1); beta 0.1 gives -ls(-.1) and -ls(.1). DPO would see (2, -2).
    policy = column(-8, -11), column(-10, -10)
    reference = column(-10, -9), column(-10, -10)
    loss = pair_loss("aot", *policy, *reference, beta=0.1)
    assert loss.tolist() == pytest.approx([0.744397, 0.644397], abs=1e-6)


def test_aot_unpaired_compares_sorted_rewards() -> None:
    # a = (2, -2), sorted (-2, 2); c = (1, -3), sorted (-3, 1); the difference is (1, 1).
    policy = column(-8, -11), column(-9, -13)
    reference = column(-10, -9), column(-10, -10)
    loss = pair_loss("aot_unpaired", *policy, *reference, beta=0.1)
    assert loss.tolist() == pytest.approx([0.644397, 0.644397], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "soft"),
    [(name, False) for name in PAIR_LOSSES] + [(name, True) for name in EXPECTATION],
)
def test_gradients_match_finite_differences(name: str, soft: bool) -> None:
    batch, settings = random_batch(4), settings_for(name, 4)
    if soft:
        settings["p_chosen"] = column(0.0, 0.3, 0.8, 1.0)
    inputs = batch.pop("policy_chosen"), batch.pop("policy_rejected")

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return pair_loss(name, policy_chosen=chosen, policy_rejected=rejected, **batch, **settings)

    assert torch.autograd.gradcheck(loss, tuple(x.requires_grad_() for x in inputs))


@pytest.mark.parametrize("margin", [-1e4, 1e4])
@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_far_from_the_reference_nothing_overflows(name: str, margin: float) -> None:
    batch = {k: v[:1] for k, v in random_batch(1, torch.float32).items()}
    batch["policy_chosen"] = (batch["reference_chosen"] + margin).requires_grad_()
    settings = settings_for(name, 1)
    if name in EXPECTATION:
        settings["p_chosen"] = torch.tensor([1.0])
    loss = pair_loss(name, **batch, **settings)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    assert batch["policy_chosen"].grad.isfinite().all()


# What a loss needs


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_only_simpo_does_without_a_reference(name: str) -> None:
    batch = random_batch(2) | settings_for(name, 2)
    batch |= {"reference_chosen": None, "reference_rejected": None}
    assert needs_reference(name) == (name != "simpo")
    if not needs_reference(name):
        assert pair_loss(name, **batch).shape == (2,)
    else:
        with pytest.raises(PrefoptError, match=f"{name}: .*reference_chosen"):
            pair_loss(name, **batch)


def test_simpo_ignores_a_reference_it_is_given() -> None:
    batch = random_batch(3)
    without = batch | {"reference_chosen": None, "reference_rejected": None}
    assert torch.equal(pair_loss("simpo", **batch), pair_loss("simpo", **without))


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_missing_lengths_are_named(name: str) -> None:
    batch = random_batch(2) | settings_for(name, 2)
    del batch["chosen_lengths"], batch["rejected_lengths"]
    if name in LENGTH_NORMALISED:
        with pytest.raises(PrefoptError, match=f"{name}: .*chosen_lengths and rejected_lengths"):
            pair_loss(name, **batch)
    else:
        assert pair_loss(name, **batch).shape == (2,)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("simoid", {}, "did you mean 'sigmoid'"),
        ("robust", {"label_smoothing": 0.5}, "robust: found label_smoothing=0.5, .*below 1/2"),
        ("robust", {"label_smoothing": -0.1}, "robust: found label_smoothing=-0.1"),
        ("exo_pair", {"label_smoothing": 0.0}, "exo_pair: .*expected a value above 0"),
        ("cdpo", {"label_smoothing": 1.5}, "cdpo: found label_smoothing=1.5"),
        ("sigmoid", {"beta": 0.0}, "sigmoid: found beta=0.0"),
        ("discopop", {"tau": 0.0}, "discopop: found tau=0.0"),
        ("sppo_soft", {"p_chosen": None}, "sppo_soft: found p_chosen=None"),
        ("sigmoid", {"p_chosen": column(1.2)}, "p_chosen: found values from 1.2 to 1.2"),
        ("sigmoid", {"p_chosen": column(math.nan)}, "p_chosen: found values from nan"),
        ("sigmoid", {"p_chosen": column(0.5, 0.5)}, r"p_chosen: found shape \[2\], expected \[1\]"),
        ("sppo_soft", {"p_rejected": column(-0.1)}, "p_rejected: found values from -0.1"),
    ],
)
def test_errors_say_what_to_put_right(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PrefoptError, match=message) as error:
        loss_at(name, a=1.0, c=-0.5, **settings)
    assert "\n" not in str(error.value)


def test_a_column_of_scores_cannot_broadcast() -> None:
    flat, tall = torch.zeros(3), torch.zeros(3, 1)
    with pytest.raises(PrefoptError, match=r"reference_chosen: found shape \[3, 1\]"):
        pair_loss("sigmoid", flat, flat, tall, flat)
    with pytest.raises(PrefoptError, match=r"chosen_scores: found shape \[3, 1\]"):
        bradley_terry_loss(tall, tall)


# Reward model


def test_bradley_terry_values() -> None:
    chosen, rejected = column(2.0), column(0.5)
    # -ls(1.5) = ln(1 + e^-1.5) = 0.201413; with margin 1: -ls(.5) = 0.474077
    assert bradley_terry_loss(chosen, rejected).item() == pytest.approx(0.201413, abs=1e-6)
    with_margin = bradley_terry_loss(chosen, rejected, margin=column(1.0))
    assert with_margin.item() == pytest.approx(0.474077, abs=1e-6)
    # + 0.01 (2 + .5)^2 = 0.0625
    centred = bradley_terry_loss(chosen, rejected, centering=0.01)
    assert centred.item() == pytest.approx(0.263913, abs=1e-6)
    # .8 (-ls(.5)) + .2 (-ls(-2.5)) = .8 * .474077 + .2 * 2.578890: the margin is the winner's
    soft = bradley_terry_loss(chosen, rejected, margin=column(1.0), p_chosen=column(0.8))
    assert soft.item() == pytest.approx(0.895040, abs=1e-6)


def test_bradley_terry_soft_labels_rest_at_their_log_odds() -> None:
    chosen = column(math.log(0.7 / 0.3)).requires_grad_()
    loss = bradley_terry_loss(chosen, column(0.0), p_chosen=column(0.7))
    (slope,) = torch.autograd.grad(loss, chosen)
    assert slope.item() == pytest.approx(0.0, abs=1e-12)


def test_bradley_terry_certain_labels_and_gradients() -> None:
    chosen, rejected = column(2.0, -1.0, 0.3), column(0.5, 0.5, 0.2)
    rest = {"margin": column(0.0, 1.0, 0.5), "centering": 0.01}
    hard = bradley_terry_loss(chosen, rejected, **rest)
    flipped = bradley_terry_loss(rejected, chosen, **rest)
    assert torch.equal(bradley_terry_loss(chosen, rejected, p_chosen=torch.ones(3), **rest), hard)
    zeros = torch.zeros(3)
    assert torch.equal(bradley_terry_loss(chosen, rejected, p_chosen=zeros, **rest), flipped)
    inputs = chosen.requires_grad_(), rejected.requires_grad_()
    assert torch.autograd.gradcheck(lambda w, r: bradley_terry_loss(w, r, **rest).sum(), inputs)


# TRL's own code, fed with log-probs in place of a model


def trl_stub(**attributes: Any) -> SimpleNamespace:
    """What TRL's loss methods read of their trainer."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    return SimpleNamespace(
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


def token_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token log-probs [2, 4, 12] (chosen, rejected), their mask, their sums, reference sums."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([[3, 7, 12, 1], [5, 2, 9, 12]])
    mask = torch.arange(12) < lengths[..., None]
    tokens = -2 * torch.rand(2, 4, 12, generator=generator) * mask
    reference = tokens.sum(-1) + torch.randn(2, 4, generator=generator)
    return tokens, mask, lengths, reference


def trl_dpo_loss(name: str, tokens: Tensor, mask: Tensor, reference: Tensor) -> Tensor:
    """The batch mean of ``DPOTrainer._compute_loss`` on these token log-probs."""
    from trl import DPOTrainer

    trainer = trl_stub(
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        beta=0.1,
        label_smoothing=0.1,
        loss_types=[name],
        loss_weights=[1.0],
        args=SimpleNamespace(discopop_tau=0.05),
    )
    outputs = SimpleNamespace(
        log_probs=tokens.flatten(0, 1),
        entropy=torch.zeros(8, 12),
        mean_logits=torch.zeros(8, 12),
        is_top1=torch.zeros(8, 12, dtype=torch.bool),
    )
    prompt = torch.zeros(8, 1, dtype=torch.bool)
    inputs = {
        "input_ids": torch.zeros(8, 13, dtype=torch.long),
        "attention_mask": torch.ones(8, 13, dtype=torch.long),
        "completion_mask": torch.cat([prompt, mask.flatten(0, 1)], dim=1).long(),
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
    }
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)


@pytest.mark.parametrize("name", IN_TRL_DPO)
def test_parity_with_trl_dpo_trainer(name: str) -> None:
    tokens, mask, lengths, reference = token_batch()
    theirs_in, ours_in = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    theirs = trl_dpo_loss(name, theirs_in, mask, reference)
    ours = pair_loss(
        name,
        *ours_in.sum(-1),
        *reference,
        beta=0.1,
        label_smoothing=0.1,
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
    ).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    theirs.backward()
    ours.backward()
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["simpo", "cdpo", "ipo_sum"])
def test_parity_with_trl_cpo_trainer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's CPO losses are those of log-probs alone; log-ratios in their place give DPO's."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer

    tokens, _, lengths, reference = token_batch()
    sums, zero = tokens.sum(-1), torch.zeros(4)
    eps = 0.1 if name == "cdpo" else 0.0
    trainer = trl_stub(
        alpha=0.0,
        beta=0.5,
        simpo_gamma=0.3,
        label_smoothing=eps,
        loss_type={"simpo": "simpo", "cdpo": "sigmoid", "ipo_sum": "ipo"}[name],
    )
    inputs = sums / lengths if name == "simpo" else sums - reference
    theirs, _, _ = CPOTrainer.cpo_loss(trainer, *inputs)
    ours = pair_loss(
        name,
        *sums,
        *((zero, zero) if name == "simpo" else reference),
        beta=0.5,
        gamma=0.3,
        label_smoothing=eps,
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("centering", [None, 0.01])
@pytest.mark.parametrize("margin", [None, torch.tensor([0.5, 0.0, 1.0])])
def test_parity_with_trl_reward_trainer(margin: Tensor | None, centering: float | None) -> None:
    from trl import RewardTrainer

    scores = torch.tensor([[2.0, -1.0, 0.3], [0.5, 0.5, 0.2]])
    trainer = trl_stub(args=SimpleNamespace(center_rewards_coefficient=centering))
    inputs: dict[str, Any] = {"attention_mask": torch.ones(6, 4, dtype=torch.long)}
    if margin is not None:
        inputs["margin"] = margin
    outputs = SimpleNamespace(logits=scores.reshape(6, 1))
    theirs = RewardTrainer.compute_loss(trainer, lambda **_: outputs, inputs)
    ours = bradley_terry_loss(*scores, margin=margin, centering=centering or 0.0).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


# INPO: iterative Nash policy optimisation

# A game of three answers, each beaten by another (row beats column), and its reference.
BEATS = torch.tensor([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]], dtype=torch.float64)
GAME_REFERENCE, ITERATE = column(0.5, 0.3, 0.2), column(0.4, 0.35, 0.25)


def inpo_batch() -> dict[str, Tensor]:
    batch = {k: v for k, v in random_batch(5).items() if "lengths" not in k}
    drift = torch.linspace(-2, 2, 5, dtype=torch.float64)
    batch["previous_chosen"] = batch["reference_chosen"] + drift
    batch["previous_rejected"] = batch["reference_rejected"] + drift**2
    return batch


def game_pairs(policy: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of the first and the second answer of all nine pairs, [9] each."""
    log_probs = policy.log()
    return log_probs.repeat_interleave(3), log_probs.repeat(3)


def test_inpo_values() -> None:
    pairs = [column(x) for x in (-10, -12, -11, -11.5, -10.5, -11.5)]
    # h = 2 - (0.3) .5 - (0.7) 1 = 1.15 with tau/eta = .3; target 1/(2 * .1) = 5: (1.15 - 5)^2
    hard = inpo_loss(*pairs, eta=0.1, tau=0.03)
    assert hard.item() == pytest.approx(14.8225, abs=1e-12)
    # .8 * 14.8225 + .2 * (1.15 + 5)^2 = 11.858 + 7.5645
    soft = inpo_loss(*pairs, eta=0.1, tau=0.03, p_chosen=column(0.8))
    assert soft.item() == pytest.approx(19.4225, abs=1e-12)


@pytest.mark.parametrize(
    ("tau", "anchor"), [(0.2, "reference"), (0.0, "previous")], ids=["tau=eta", "tau=0"]
)
def test_inpo_ends_in_ipo_on_sums(tau: float, anchor: str) -> None:
    batch = inpo_batch()
    chosen, rejected = batch[f"{anchor}_chosen"], batch[f"{anchor}_rejected"]
    d = batch["policy_chosen"] - chosen - (batch["policy_rejected"] - rejected)
    loss = inpo_loss(**batch, eta=0.2, tau=tau)
    torch.testing.assert_close(loss, (d - 1 / (2 * 0.2)) ** 2)
    policy = batch["policy_chosen"], batch["policy_rejected"]
    torch.testing.assert_close(loss, pair_loss("ipo_sum", *policy, chosen, rejected, beta=0.2))
    assert not torch.allclose(loss, inpo_loss(**batch, eta=0.2, tau=0.1))


def test_inpo_in_its_first_iteration_does_not_depend_on_tau() -> None:
    batch = inpo_batch()
    for side in ("chosen", "rejected"):
        batch[f"previous_{side}"] = batch[f"reference_{side}"]
    at_zero = inpo_loss(**batch, eta=0.2, tau=0.0)
    for tau in (0.05, 0.1, 0.2):
        torch.testing.assert_close(inpo_loss(**batch, eta=0.2, tau=tau), at_zero)


def test_inpo_minimiser_of_a_game_is_the_mirror_descent_step() -> None:
    eta, tau = 0.5, 0.1
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], tolerance_grad=1e-12, tolerance_change=1e-15)
    weights = torch.outer(ITERATE, ITERATE).flatten()
    fixed = *game_pairs(GAME_REFERENCE), *game_pairs(ITERATE)

    def loss() -> Tensor:
        optimizer.zero_grad()
        policy = game_pairs(logits.softmax(0))
        pairs = inpo_loss(*policy, *fixed, eta=eta, tau=tau, p_chosen=BEATS.flatten())
        total = (weights * pairs).sum()
        total.backward()
        return total

    optimizer.step(loss)
    step = GAME_REFERENCE ** (tau / eta) * ITERATE ** (1 - tau / eta)
    step = step * (BEATS @ ITERATE / eta).exp()
    torch.testing.assert_close(logits.detach().softmax(0), step / step.sum(), atol=1e-8, rtol=0)
    assert logits.softmax(0).tolist() == pytest.approx([0.472069, 0.283762, 0.244170], abs=1e-6)
    assert loss().item() == pytest.approx(0.965800, abs=1e-6)


def test_inpo_soft_loss_ignores_which_side_is_called_chosen() -> None:
    batch, p = inpo_batch(), torch.linspace(0, 1, 5, dtype=torch.float64)
    settings = {"eta": 0.2, "tau": 0.05}
    as_named = inpo_loss(**batch, **settings, p_chosen=p)
    torch.testing.assert_close(inpo_loss(**swapped(batch), **settings, p_chosen=1 - p), as_named)
    certain = inpo_loss(**batch, **settings, p_chosen=torch.ones(5))
    assert torch.equal(certain, inpo_loss(**batch, **settings))


def test_inpo_soft_loss_is_a_regression_on_the_probability_up_to_a_constant() -> None:
    batch, p = inpo_batch(), torch.linspace(0, 1, 5, dtype=torch.float64)
    eta, tau = 0.2, 0.05
    policy = batch["policy_chosen"].requires_grad_()
    lp, rf, lp_t = (
        batch[f"{model}_chosen"] - batch[f"{model}_rejected"]
        for model in ("policy", "reference", "previous")
    )
    regression = (lp - tau / eta * rf - (1 - tau / eta) * lp_t - (p - 0.5) / eta) ** 2
    loss = inpo_loss(**batch, eta=eta, tau=tau, p_chosen=p)
    torch.testing.assert_close(loss - regression, p * (1 - p) / eta**2)
    (ours,) = torch.autograd.grad(loss.mean(), policy, retain_graph=True)
    (theirs,) = torch.autograd.grad(regression.mean(), policy)
    torch.testing.assert_close(ours, theirs)


def test_online_ipo_descends_the_self_play_gradient() -> None:
    # With pairs drawn from the policy itself, the expected IPO gradient is -4/beta times that of
    # the win rate against a frozen copy less beta KL to the reference.
    beta = 0.1
    logits = ITERATE.log().requires_grad_()
    policy = logits.softmax(0)
    pairs = inpo_loss(
        *game_pairs(policy),
        *game_pairs(GAME_REFERENCE),
        *game_pairs(ITERATE),
        eta=beta,
        tau=beta,
        p_chosen=BEATS.flatten(),
    )
    loss = (torch.outer(ITERATE, ITERATE).flatten() * pairs).sum()
    divergence = (policy * (policy / GAME_REFERENCE).log()).sum()
    value = policy @ BEATS @ ITERATE - beta * divergence
    (loss_slope,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (self_play,) = torch.autograd.grad(value, logits)
    assert self_play.tolist() == pytest.approx([0.035745, -0.034428, -0.001317], abs=1e-6)
    torch.testing.assert_close(loss_slope, -4 / beta * self_play)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta": 0.0}, "inpo: found eta=0.0, expected a value above 0"),
        ({"eta": math.nan}, "inpo: found eta=nan"),
        ({"tau": -0.01}, "inpo: found tau=-0.01, expected a value from 0 to eta=0.2"),
        ({"tau": 0.21}, "inpo: found tau=0.21, expected a value from 0 to eta=0.2"),
        ({"p_chosen": torch.full((5,), 1.2)}, "p_chosen: found values from 1.2 to 1.2"),
        ({"previous_chosen": torch.zeros(5, 1)}, r"previous_chosen: found shape \[5, 1\]"),
    ],
)
def test_inpo_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PrefoptError, match=message):
        inpo_loss(**{**inpo_batch(), "eta": 0.2, "tau": 0.1, **settings})


def test_answer_loss_value_and_slope() -> None:
    """Logits 2.0 ("A"), 0.5 ("B") and 0.0: ln(e^2 + e^0.5 + 1) = 2.306355.

    So log pi is -0.306355 and -1.806355, and 0.8 * 0.306355 + 0.2 * 1.806355 = 0.606355.
    """
    logits = torch.tensor([[2.0, 0.5, 0.0]], requires_grad=True)
    a, b, _ = logits.log_softmax(-1).T
    loss = answer_loss(a, b, column(0.8))
    assert loss.item() == pytest.approx(0.606355, abs=1e-6)
    assert answer_loss(a, b, column(1.0)).item() == pytest.approx(0.306355, abs=1e-6)
    assert answer_loss(a, b, column(0.0)).item() == pytest.approx(1.806355, abs=1e-6)
    loss.backward()
    found = logits.softmax(-1) - torch.tensor([[0.8, 0.2, 0.0]])
    torch.testing.assert_close(logits.grad, found.detach())


def test_answer_loss_rests_at_the_label() -> None:
    label = torch.tensor([0.8, 0.2])
    loss = answer_loss(*label.log().split(1), column(0.8))
    entropy = -(label * label.log()).sum().item()
    assert loss.item() == pytest.approx(entropy)
    for p in (0.7, 0.9):
        other = torch.tensor([p, 1 - p]).log()
        assert answer_loss(*other.split(1), column(0.8)).item() > entropy


def test_answer_loss_refuses() -> None:
    with pytest.raises(PrefoptError, match=r"p_a: found values from 1\.5 to 1\.5"):
        answer_loss(column(0.0), column(0.0), column(1.5))
    with pytest.raises(PrefoptError, match=r"log_prob_b: found shape \[2\]"):
        answer_loss(column(0.0), torch.zeros(2), column(1.0))
