"""The whole weights of a policy, however training wraps, shards or adapts it.

FSDP2 holds a parameter as a DTensor, of which every process has a shard; ZeRO-3 holds it empty,
with a flat partition beside it. Both gather a layer in hooks around its forward, where processes
must be in step; what is here needs them in step at its ends only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from prefopt.errors import PrefoptError
from prefopt.models.forward import unwrap_peft


def gathered_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its name in a plain checkpoint, one at a time.

    All processes iterate, to the end. Parameters and persistent buffers come as the state dict of
    the transformers model has them, tied ones under each of their names. A LoRA is added to a copy
    of what it adapts, and a module that is trained beside it stands for the one it replaces.

    Args:
        model: The policy, PEFT-wrapped or not, wrapped by DDP, DeepSpeed or FSDP2 or not.

    Yields:
        A name and its weight: whole, detached, on the policy's device. Where nothing is sharded it
        may be the live weight itself: to be read only, and before the next training step.

    Raises:
        PrefoptError: An adapter is of a kind that is not a sum of weights.
    """
    policy = extract_model_from_parallel(model, keep_torch_compile=False)
    base = unwrap_peft(policy)
    adapted = {} if base is policy else _adapted_modules(base)
    reshard(model)
    for name, weight in base.state_dict(keep_vars=True).items():
        parents = accumulate(name.split(".")[:-1], "{}.{}".format)
        at = next((parent for parent in parents if parent in adapted), None)
        if at is None:
            yield name, whole_tensor(weight)
            continue
        held_in, module = _stands_for(adapted[at]), adapted[at]
        if name.startswith(f"{at}.{held_in}"):
            plain = name.removeprefix(f"{at}.{held_in}")
            yield f"{at}.{plain}", _with_deltas(module, plain, whole_tensor(weight))


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Every process has the whole model inside the block and computes with it by itself.

    Processes enter and leave together. Inside, each runs ``generate`` or forward passes without
    gradients as often as it likes; weights are not to be changed. Where nothing is sharded this
    does nothing.

    Args:
        model: The policy as training wraps it, by DeepSpeed or FSDP2.
    """
    policy = extract_model_from_parallel(model)
    if isinstance(policy, FSDPModule):
        with _unsharded(policy):
            yield
    elif any(map(is_partitioned, policy.parameters())):
        with _unpartitioned(model, list(policy.parameters())):
            yield
    else:
        yield


def whole_tensor(weight: Tensor) -> Tensor:
    """A weight without its gradient, gathered where it is sharded; all processes call this."""
    if isinstance(weight, DTensor):
        # with FSDP2's CPU offload the shards are not where the processes can exchange them
        shard: Any = weight.detach().to(weight.device_mesh.device_type)
        return shard.full_tensor()
    if is_partitioned(weight):
        with _gathered([weight]):
            return weight.detach().clone()
    return weight.detach()


def reshard(model: nn.Module) -> None:
    """Has FSDP2 put its shards in place of what a forward pass may have left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_partitioned(weight: Tensor) -> bool:
    """Whether ZeRO-3 holds a parameter in partitions."""
    return hasattr(weight, "ds_id")


# --- FSDP2 and ZeRO-3 ----------------------------------------------------------------------------


@contextmanager
def _unsharded(policy: FSDPModule) -> Iterator[None]:
    """Gathers all units of FSDP2 and keeps them gathered after their forward passes."""
    assert isinstance(policy, nn.Module)
    units = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    policy._get_fsdp_state()._lazy_init()  # else the first unit to run would take itself for root
    groups = {group for unit in units for group in unit._get_fsdp_state()._fsdp_param_groups}
    after_forward = {group: group.post_forward_mesh_info for group in groups}
    try:
        for unit in units:
            unit.unshard()
        for group in groups:
            group.post_forward_mesh_info = None  # as set_reshard_after_forward(False) does
        yield
    finally:
        for group, mesh_info in after_forward.items():
            group.post_forward_mesh_info = mesh_info
        # besides sharding again it forgets the forward passes, of which processes ran different
        # numbers: the next backward would prefetch after them, each process its own
        policy.reset_iter_state()


@contextmanager
def _unpartitioned(engine: Any, parameters: Sequence[Any]) -> Iterator[None]:
    """Gathers all parameters of ZeRO-3, and takes the hooks away that would part them again."""
    offload = engine.optimizer.parameter_offload
    with _gathered(parameters):
        for parameter in parameters:
            parameter.ds_active_sub_modules.clear()
        offload._remove_module_hooks()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            offload.setup_zero_stage3_hooks()


def _gathered(parameters: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """ZeRO-3's parameters whole inside the block; others are left alone."""
    held = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not held:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(held)


# --- PEFT ----------------------------------------------------------------------------------------


def _adapted_modules(base: nn.Module) -> dict[str, Any]:
    """The modules that PEFT has put in place of others, by name."""
    from peft.tuners.lora import Embedding, Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    adapted = {name: m for name, m in base.named_modules() if isinstance(m, kinds)}
    for name, module in adapted.items():
        lora = isinstance(module, (Linear, Embedding))
        plain = lora and not module.lora_variant and not any(module.lora_bias.values())
        if not plain and not isinstance(module, ModulesToSaveWrapper):
            raise PrefoptError(
                f"{name}: found {type(module).__name__} with settings that are not a plain LoRA, "
                "expected one that adds B A to the weights of linear layers or embeddings (no "
                "DoRA, no lora_bias, no quantised weights); change peft_config"
            )
    return adapted


def _stands_for(module: Any) -> str:
    """The prefix of the weights in such a module that a plain model has in its place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(module, BaseTunerLayer):
        return "base_layer."
    if module.disable_adapters or not module.active_adapters:
        return "original_module."
    return f"modules_to_save.{module.active_adapters[0]}."


@torch.no_grad()
def _with_deltas(module: Any, name: str, weight: Tensor) -> Tensor:
    """A weight with what its active adapters add to it."""
    if name != "weight" or not hasattr(module, "lora_A") or module.disable_adapters:
        return weight
    for adapter in module.active_adapters:
        if adapter in module.r and adapter not in module.merged_adapters:
            own = [p for n, p in module.named_parameters() if not n.startswith("base_layer.")]
            with _gathered(own):
                weight = weight + whole_tensor(module.get_delta_weight(adapter)).to(weight.dtype)
    return weight
