"""Score-function policy gradients over groups of completions of one prompt.

The gradient of ``E_{y ~ pi}[f(y)]`` is ``E_{y ~ pi}[f(y) grad lp(y)]``: it holds for completions
drawn from the policy itself, whole (``lp`` summed over tokens, EOS included), at the temperature
of ``lp``, and for an ``f`` held constant. Token by token, each with its own coefficient, it would
miss what a token does to those after it.
"""

from __future__ import annotations

from torch import Tensor

from prefopt.errors import PrefoptError


def mean_of_others(values: Tensor) -> Tensor:
    """The leave-one-out baseline of RLOO: for each entry the mean over the rest of its row.

    REINFORCE leave-one-out (Kool et al., "Buy 4 REINFORCE samples, get a baseline for free!",
    2019; for language models Ahmadian et al., arXiv 2402.14740). It does not depend on the sample
    it is subtracted from, so that it lowers the variance and leaves the mean alone; the mean over
    the whole row would shrink the gradient by (k-1)/k.

    Args:
        values: [groups, k], k >= 2, such as rewards of k completions of each prompt.

    Returns:
        [groups, k].

    Raises:
        PrefoptError: A row has fewer than two entries, or ``values`` is not [groups, k].

    Examples:
        >>> import torch
        >>> mean_of_others(torch.tensor([[1.0, 2.0, 6.0]]))
        tensor([[4.0000, 3.5000, 1.5000]])
    """
    check_layout("groups, k", values=values)
    k = values.shape[1]
    if k < 2:
        raise PrefoptError(
            f"values: found {k} completion(s) a prompt, expected at least 2, as each is compared "
            "with the others; sample more completions a prompt"
        )
    return (values.sum(dim=1, keepdim=True) - values) / (k - 1)


def score_function_loss(log_probs: Tensor, advantages: Tensor) -> Tensor:
    """One loss per group, ``-(1/k) sum_i sg(adv_i) lp_i``, sg being the stop-gradient.

    Its gradient, not its value, means something: minus the gradient of the expected advantage
    (REINFORCE, Williams 1992), if the completions are samples of the policy.

    Args:
        log_probs: [groups, k], nats, summed over completion tokens including EOS.
        advantages: [groups, k], held constant.

    Returns:
        [groups].

    Raises:
        PrefoptError: Shapes differ or are not [groups, k].

    Examples:
        >>> import torch
        >>> score_function_loss(torch.tensor([[-2.0, -3.0]]), torch.tensor([[0.5, -0.5]]))
        tensor([-0.2500])
    """
    check_layout("groups, k", log_probs=log_probs, advantages=advantages)
    return -(advantages.detach() * log_probs).mean(dim=1)


def check_layout(layout: str, **tensors: Tensor | None) -> None:
    """Every tensor given must have as many dimensions as ``layout`` and one shape in common.

    Args:
        layout: Names of the dimensions, such as ``"groups, k"``.
        tensors: What to check, by the name for the message; None is skipped.

    Raises:
        PrefoptError: A shape differs, so that broadcasting would mix completions.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, shape = next((name, tensor.shape) for name, tensor in given.items())
    if len(shape) != len(layout.split(",")):
        raise PrefoptError(f"{first}: found shape {list(shape)}, expected [{layout}]; reshape it")
    for name, tensor in given.items():
        if tensor.shape != shape:
            raise PrefoptError(
                f"{name}: found shape {list(tensor.shape)}, expected {list(shape)} = [{layout}] "
                f"like {first}; give one value for each"
            )
