"""A model's trained weights on disk, to be put back for a while: one model in memory plays two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from prefopt.errors import PrefoptError
from prefopt.rounds.storage import atomic_directory

FILE = "trainable.safetensors"


def save_trainable(model: nn.Module, folder: Path) -> None:
    """Writes the weights that training changes; the folder appears complete or not at all.

    Raises:
        PrefoptError: The weights are sharded over processes.
    """
    tensors = {name: p.detach().cpu().contiguous() for name, p in _trainable(model)}
    with atomic_directory(folder) as partial:
        save_file(tensors, partial / FILE)


def load_trainable(model: nn.Module, folder: Path) -> None:
    """Puts saved weights back, in place.

    Raises:
        PrefoptError: Nothing readable is there, or it belongs to another model.
    """
    path = folder / FILE
    if not path.exists():
        raise PrefoptError(
            f"{path}: the weights this run began with are gone; restore the file, or delete the "
            "run folder to begin again"
        )
    with safe_open(path, framework="pt") as stored, torch.no_grad():
        missing = {name for name, _ in _trainable(model)} ^ set(stored.keys())
        if missing:
            raise PrefoptError(
                f"{path}: expected the weights of this model, but {sorted(missing)[0]!r} is in "
                "only one of the two; delete the run folder to begin again"
            )
        for name, parameter in _trainable(model):
            parameter.copy_(stored.get_tensor(name))


@contextmanager
def weights_of(model: nn.Module, folder: Path) -> Iterator[None]:
    """The model with saved weights inside the block, and with its own again after it."""
    own = {name: p.detach().to("cpu", copy=True) for name, p in _trainable(model)}
    try:
        load_trainable(model, folder)
        yield
    finally:
        with torch.no_grad():
            for name, parameter in _trainable(model):
                parameter.copy_(own[name])


def _trainable(model: nn.Module) -> Iterator[tuple[str, Parameter]]:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) or hasattr(parameter, "ds_id"):
            raise PrefoptError(
                "rounds need whole weights in every process, but these are sharded (FSDP or "
                "ZeRO-3); use DDP, or train a LoRA adapter with DDP"
            )
        if parameter.requires_grad:
            yield name, parameter
