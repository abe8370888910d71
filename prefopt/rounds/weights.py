"""A model's trained weights, kept to be put back or lent: one model in memory plays many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from prefopt.errors import PrefoptError
from prefopt.rounds.storage import atomic_directory

FILE = "trainable.safetensors"

Weights = dict[str, Tensor]  # by the name of the parameter


def trainable_weights(model: nn.Module) -> Weights:
    """A copy of the weights that training changes, where they are.

    Raises:
        PrefoptError: The weights are sharded over processes.
    """
    return {name: p.detach().clone() for name, p in _trainable(model)}


def put_weights(model: nn.Module, weights: Weights) -> None:
    """Copies kept weights into the model.

    Raises:
        PrefoptError: The weights are sharded over processes.
    """
    with torch.no_grad():
        for name, parameter in _trainable(model):
            parameter.copy_(weights[name])


def follow(weights: Weights, model: nn.Module, rate: float) -> None:
    """Moves kept weights a share of the way to the model's, in place: an exponential average.

    In half precision small moves would be lost: what is kept becomes float32.
    """
    for name, parameter in _trainable(model):
        weights[name] = weights[name].float().lerp_(parameter.detach().float(), rate)


@contextmanager
def exchanged(model: nn.Module, weights: Weights) -> Iterator[None]:
    """The model with other weights inside the block, and with its own again after it.

    Nothing is copied where types agree. No graph may be open across the block's ends.

    Raises:
        PrefoptError: The weights are sharded over processes.
    """
    own = [(parameter, parameter.data, weights[name]) for name, parameter in _trainable(model)]
    try:
        for parameter, data, lent in own:
            parameter.data = lent.to(data.dtype)
        yield
    finally:
        for parameter, data, _ in own:
            parameter.data = data


def save_weights(weights: Weights, folder: Path) -> None:
    """Writes weights; the folder appears complete or not at all."""
    with atomic_directory(folder) as partial:
        save_file({name: w.cpu().contiguous() for name, w in weights.items()}, partial / FILE)


def read_weights(model: nn.Module, folder: Path) -> Weights:
    """Reads the weights that :func:`save_weights` wrote, to where those of the model are.

    Raises:
        PrefoptError: Nothing is there, or it belongs to another model.
    """
    path = folder / FILE
    if not path.exists():
        raise PrefoptError(
            f"{path}: weights this run goes on with are gone; restore the file, or delete the "
            "run folder to begin again"
        )
    names = {name for name, _ in _trainable(model)}
    stored = load_file(path, device=str(next(model.parameters()).device))
    if missing := names ^ stored.keys():
        raise PrefoptError(
            f"{path}: expected the weights of this model, but {sorted(missing)[0]!r} is in "
            "only one of the two; delete the run folder to begin again"
        )
    return stored


def _trainable(model: nn.Module) -> Iterator[tuple[str, Parameter]]:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) or hasattr(parameter, "ds_id"):
            raise PrefoptError(
                "rounds need whole weights in every process, but these are sharded (FSDP or "
                "ZeRO-3); use DDP, or train a LoRA adapter with DDP"
            )
        if parameter.requires_grad:
            yield name, parameter
