"""A model's trained weights, kept to be put back or lent: one model in memory plays many.

Every process keeps of a weight what it holds of it: all of it, its shard under FSDP2 (a DTensor),
its flat partition under ZeRO-3. All processes call these functions together. Files hold whole
weights, so that they mean the same however many processes wrote or read them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter
from torch.nn.functional import pad

from prefopt.disk import check_space
from prefopt.errors import PrefoptError
from prefopt.models.gathered import is_partitioned, reshard, whole_tensor
from prefopt.rounds.processes import from_main
from prefopt.rounds.storage import atomic_directory
from prefopt.rounds.sums import damage_of, sum_of_file, write_sum

FILE = "trainable.safetensors"

Weights = dict[str, Tensor]  # by the name of the parameter


def trainable_weights(model: nn.Module) -> Weights:
    """A copy of the weights that training changes, where they are."""
    return {name: _held(parameter).clone() for name, parameter in _trainable(model)}


@torch.no_grad()
def put_weights(model: nn.Module, weights: Weights) -> None:
    """Copies kept weights into the model, and into what its optimiser steps from."""
    for name, parameter in _trainable(model):
        _set_held(parameter, weights[name])
        _set_master(parameter, weights[name])


@torch.no_grad()
def follow(weights: Weights, model: nn.Module, rate: float) -> None:
    """Moves kept weights a share of the way to the model's, in place: an exponential average.

    In half precision small moves would be lost: what is kept becomes float32.
    """
    for name, parameter in _trainable(model):
        weights[name] = weights[name].float().lerp_(_held(parameter).float(), rate)


@contextmanager
def exchanged(model: nn.Module, weights: Weights) -> Iterator[None]:
    """The model with other weights inside the block, and with its own again after it.

    Whole weights are not copied where types agree; of shards a copy is made, since FSDP2 and ZeRO-3
    compute with storage of their own. No graph may be open across the block's ends.
    """
    own: list[tuple[Parameter, Tensor]] = []
    try:
        for name, parameter in _trainable(model):
            if _is_sharded(parameter):
                own.append((parameter, _held(parameter).clone()))
                _set_held(parameter, weights[name])
            else:
                own.append((parameter, parameter.data))
                parameter.data = weights[name].to(parameter.dtype)
        yield
    finally:
        reshard(model)
        for parameter, data in own:
            if _is_sharded(parameter):
                _set_held(parameter, data)
            else:
                parameter.data = data


def save_weights(model: nn.Module, weights: Weights, folder: Path) -> None:
    """Writes kept weights of a model, whole; the folder appears complete or not at all.

    It is there for every process when this returns.

    Raises:
        PrefoptError: The disk has no room for it.
    """
    size = sum(weight.numel() * weight.element_size() for weight in weights.values())
    from_main(lambda: check_space(folder, size, f"kept weights ({folder.name})"))
    state, whole = PartialState(), {}
    for name, parameter in _trainable(model):
        weight = _whole(parameter, weights[name])
        if state.is_main_process:
            whole[name] = weight.cpu().contiguous()
    if state.is_main_process:
        with atomic_directory(folder) as partial:
            save_file(whole, partial / FILE)
            write_sum(partial / FILE, sum_of_file(partial / FILE))
    state.wait_for_everyone()


def damage_of_weights(folder: Path) -> str | None:
    """What is wrong with kept weights that are there, in words; reads all of them."""
    path = folder / FILE
    return damage_of(path) if path.exists() else f"{path}: missing"


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
    parameters = dict(_trainable(model))
    device = str(next(model.parameters()).device)
    with safe_open(path, "pt", device=device) as file:
        if missing := parameters.keys() ^ file.keys():
            raise PrefoptError(
                f"{path}: expected the weights of this model, but {sorted(missing)[0]!r} is in "
                "only one of the two; delete the run folder to begin again"
            )
        return {name: _part(p, file.get_tensor(name)) for name, p in parameters.items()}


# --- what a process holds of a weight ------------------------------------------------------------


def _trainable(model: nn.Module) -> list[tuple[str, Parameter]]:
    reshard(model)
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _is_sharded(parameter: Parameter) -> bool:
    return isinstance(parameter, DTensor) or is_partitioned(parameter)


def _held(parameter: Any) -> Tensor:
    """What this process holds of a parameter, itself."""
    if is_partitioned(parameter):
        return parameter.ds_tensor
    return parameter.detach()


def _set_held(parameter: Any, weight: Tensor) -> None:
    _held(parameter).copy_(weight)
    # ZeRO-3 leaves small parameters gathered
    if is_partitioned(parameter) and parameter.ds_status.name == "AVAILABLE":
        parameter.data.copy_(_whole(parameter, parameter.ds_tensor))


def _set_master(parameter: Parameter, weight: Tensor) -> None:
    """Sets the float32 copy that DeepSpeed takes its steps on."""
    if is_partitioned(parameter):
        from deepspeed.utils import safe_set_local_fp32_param

        safe_set_local_fp32_param(parameter, weight)
    elif hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and ZeRO-2
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, weight)


def _whole(parameter: Any, weight: Tensor) -> Tensor:
    """A kept weight as it was before it was sharded."""
    if not is_partitioned(parameter):
        return whole_tensor(weight)
    weight = weight.to(parameter.device)  # partitions may be offloaded
    parts = [torch.empty_like(weight) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, weight)
    return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)


def _part(parameter: Any, whole: Tensor) -> Tensor:
    """What this process holds of a weight that every process has read."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        shard = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        return shard.to(parameter.device)
    if is_partitioned(parameter):
        size = parameter.ds_tensor.numel()
        flat = pad(whole.flatten(), (0, size * dist.get_world_size() - whole.numel()))
        return flat[dist.get_rank() * size :][:size].clone()
    return whole
