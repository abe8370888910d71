"""What is refused of FSDP and DeepSpeed, before anything is trained; see docs/rounds.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.utils import gather_object
from torch import nn
from transformers import Trainer

from prefopt.errors import PrefoptError
from prefopt.models.gathered import is_partitioned
from prefopt.rounds.log_probs import weights_fingerprint


def shards_weights(trainer: Trainer) -> str:
    """What shards the weights that a trainer computes with: ``FSDP``, ``ZeRO-3``, or nothing."""
    if trainer.is_fsdp_enabled:
        return "FSDP"
    return "ZeRO-3" if _zero(trainer).get("stage") == 3 else ""


def check_saves_whole(trainer: Trainer) -> None:
    """Checks that checkpoints will hold models that can be loaded.

    Raises:
        PrefoptError: ZeRO-3 would save none.
    """
    zero = _zero(trainer)
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise PrefoptError(
            "DeepSpeed: found ZeRO-3 without stage3_gather_16bit_weights_on_model_save, which "
            "would save no model that can be loaded; set it to true under zero_optimization (in a "
            "configuration of accelerate: zero3_save_16bit_model)"
        )


def check_gathers(trainer: Trainer) -> None:
    """Checks that a sharded policy can be made whole to sample from it.

    Raises:
        PrefoptError: It is sharded by FSDP's first version.
    """
    plugin = _fsdp(trainer)
    if plugin is not None and plugin.fsdp_version != 2:
        raise PrefoptError(
            f"{type(trainer).__name__}: found FSDP version {plugin.fsdp_version}, which keeps no "
            "weight by itself; use version 2 (fsdp_config: {version: 2}, the default of "
            "trainer.fsdp)"
        )


def check_rounds(trainer: Trainer, judge: object) -> None:
    """Checks that rounds can go on with the way a trainer shards weights; all processes call this.

    Raises:
        PrefoptError: They cannot.
    """
    check_gathers(trainer)
    name, plugin = type(trainer).__name__, _fsdp(trainer)
    for section in ("optimizer", "scheduler"):
        if section in _deepspeed(trainer):
            raise PrefoptError(
                f"{name}: found the section {section!r} in the configuration of DeepSpeed, but "
                "optimiser and schedule begin afresh in rounds; take it out and set optim, "
                "learning_rate and lr_scheduler_type"
            )
    model = getattr(judge, "model", None)  # a rule has none
    if isinstance(model, nn.Module):
        _check_whole(model, plugin)


def _check_whole(judge: nn.Module, plugin: Any) -> None:
    """Checks that a judge was not loaded as the model that is trained is."""
    found = ""
    if any(map(is_partitioned, judge.parameters())):
        found = "in the parts of ZeRO-3"
    elif plugin is not None and plugin.cpu_ram_efficient_loading:  # others would have zeros
        everywhere = gather_object([weights_fingerprint(judge)])
        found = "in the main process only" if len(set(everywhere)) > 1 else ""
    if found:
        raise PrefoptError(
            f"judge: found its weights {found}, expected them whole in every process; load it "
            "inside `with prefopt.models.load.loaded_whole():`"
        )


def _fsdp(trainer: Trainer) -> Any:
    return trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None


def _deepspeed(trainer: Trainer) -> Mapping[str, Any]:
    if not trainer.is_deepspeed_enabled:
        return {}
    return trainer.accelerator.state.deepspeed_plugin.deepspeed_config


def _zero(trainer: Trainer) -> Mapping[str, Any]:
    return _deepspeed(trainer).get("zero_optimization", {})
