"""Peak memory of a training run, a device, before any weight is loaded.

Weights, gradients and optimiser are counted. What a step needs beside them is found by taking the
step itself, on tensors that have shapes and no values, and adding up what is alive: so trees, LoRA,
gradient checkpointing and autocast count as they are, for any architecture. All sizes are bytes.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from prefopt.data.tree import Layout, PromptTree, collate_trees
from prefopt.models.forward import enable_trees, unwrap_peft
from prefopt.models.logprobs import CHUNK_ELEMENTS

# 4 bits and, for each block of 64, a scale of 8 bits and its share of the scales' own scales
QUANTISED = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
KEPT_WHOLE = ("lm_head", "score")  # linear layers that are not quantised
REDUCE_BUCKET = 5e8  # DeepSpeed's reduce_bucket_size, in numbers
LIVE_PARAMETERS = 1e9  # ZeRO-3's stage3_max_live_parameters


@dataclass(frozen=True)
class Spread:
    """How a run is spread over devices.

    Attributes:
        strategy: ``ddp`` (every process keeps everything), ``fsdp2``, ``zero2`` or ``zero3``.
        processes: Devices.
    """

    strategy: str = "ddp"
    processes: int = 1

    @property
    def gathers(self) -> bool:
        """Whether weights are spread, and gathered layer by layer."""
        return self.strategy in ("fsdp2", "zero3")


@dataclass(frozen=True)
class Counts:
    """Parameters of a model, adapter included.

    Attributes:
        total: All of them; tied ones once.
        trained: Those that are trained.
        quantised: Those in linear layers that ``model.quantization`` makes small.
        layer: Those of the largest decoder layer.
        ends: Those outside of the layers: embeddings, final norm and head.
    """

    total: int
    trained: int
    quantised: int
    layer: int
    ends: int


def empty_model(
    config: PreTrainedConfig, *, classifier: bool = False, dtype: torch.dtype
) -> PreTrainedModel:
    """A model on the meta device: shapes and no values.

    Args:
        config: Of the model.
        classifier: A sequence classifier with one label instead of a causal LM.
        dtype: Of its weights.
    """
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    config = copy.deepcopy(config)
    if classifier:
        config.num_labels = 1
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(config, dtype=dtype)
    return model


def with_adapter(model: PreTrainedModel, lora: Any) -> nn.Module:
    """A model from :func:`empty_model` under an adapter in float32, if PEFT's configuration of one
    is given.
    """
    if lora is None:
        return model
    from peft import get_peft_model

    with torch.device("meta"):
        return get_peft_model(model, lora)


def count(model: nn.Module) -> Counts:
    """Counts the parameters of a model."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    linear = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(part in name for part in KEPT_WHOLE)
    ]
    layers = [
        sum(p.numel() for p in module.parameters())
        for module in model.modules()
        if type(module).__name__ in (unwrap_peft(model)._no_split_modules or ())
    ]
    return Counts(
        total=sum(sizes.values()),
        trained=trained,
        quantised=sum(w.numel() for w in linear if not w.requires_grad),
        layer=max(layers, default=0),
        ends=sum(sizes.values()) - sum(layers),
    )


def optimiser_bytes(optim: str, parameters: int, each: int) -> int:
    """Moments of an optimiser, named as in transformers; one that is not known counts as AdamW."""
    if "8bit" in optim:
        return 2 * parameters
    if optim in ("sgd", "adafactor"):  # no momentum; rows and columns only
        return 0
    return parameters * each * (1 if "lion" in optim else 2)


def state_bytes(
    counts: Counts,
    spread: Spread,
    *,
    dtype: torch.dtype,
    lora: bool,
    quantization: str | None = None,
    optim: str = "adamw_torch_fused",
) -> dict[str, int]:
    """Weights, gradients, optimiser and what is gathered or sent, on each device.

    Args:
        counts: Of the model.
        spread: Over devices.
        dtype: Of the weights as they are loaded.
        lora: Whether what is trained is an adapter, in float32.
        quantization: Of frozen linear layers.
        optim: transformers' name of the optimiser.
    """
    n, trained, frozen = spread.processes, counts.trained, counts.total - counts.trained
    small = counts.quantised if quantization else 0
    # what is not quantised is cast to float32 (prefopt.models.load)
    rest = 4 if quantization else dtype.itemsize
    frozen_bytes = (frozen - small) * rest + round(small * QUANTISED.get(quantization or "", 0))
    each = 4 if lora or spread.strategy == "fsdp2" else dtype.itemsize
    if spread.strategy in ("zero2", "zero3"):
        shards = n if spread.gathers else 1
        live = min(counts.total, LIVE_PARAMETERS) * 2 if spread.gathers else 0
        return {
            "weights": 2 * counts.total // shards,
            "gradients": 2 * trained // n,
            # in float32: the weights, their gradients for the step, the moments
            "optimiser": (8 * trained + optimiser_bytes(optim, trained, 4)) // n,
            "gathered": round(live + min(trained, REDUCE_BUCKET) * 2),
        }
    if spread.strategy == "fsdp2":
        whole = round(small * QUANTISED[quantization]) if quantization else 0  # never spread
        return {
            "weights": whole + (trained * each + frozen_bytes - whole) // n,
            "gradients": trained * each // n,
            "optimiser": optimiser_bytes(optim, trained, each) // n,
            # a layer and the next, the ends, and a layer's gradients on their way, in bfloat16
            "gathered": 2 * (2 * counts.layer + counts.ends) + 2 * min(counts.layer, trained),
        }
    return {
        "weights": trained * each + frozen_bytes,
        # DDP sums gradients in buckets of its own
        "gradients": trained * each * (2 if n > 1 else 1),
        "optimiser": optimiser_bytes(optim, trained, each),
        "gathered": 0,
    }


def step_bytes(
    model: nn.Module,
    trees: Sequence[PromptTree],
    *,
    layout: Layout = "tree",
    values: bool = False,
    bf16: bool = False,
    checkpointing: bool = False,
    keep_gradients: bool = True,
    micro_batches: int = 1,
) -> int:
    """The most that is alive at once in a step's passes beside the weights, gradients included.

    Args:
        model: From :func:`empty_model`; it is of no use afterwards.
        trees: The micro-batch; token ids do not matter.
        layout: How it is laid out.
        values: Of a classifier: read a value at each token.
        bf16: Autocast to bfloat16.
        checkpointing: Keep the inputs of layers only and compute the rest again.
        keep_gradients: false: a gradient leaves the device as soon as it is there.
        micro_batches: Passes one after another; from the second on all gradients are there.

    Raises:
        RuntimeError: The model does something that depends on values.
    """
    enable_trees(model.train())
    if checkpointing:
        unwrap_peft(model).gradient_checkpointing_enable()
    batch = collate_trees(trees, layout=layout)
    options = {"values": True} if values else {}
    with FakeTensorMode(allow_non_fake_inputs=True), _shapes_only(model) as tensors:
        for parameter in model.parameters():
            if parameter.requires_grad and not keep_gradients:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        with _LiveBytes(tensors) as live:
            for _ in range(micro_batches):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    (out,) = model(trees=batch, **options).values()
                    loss = out.sum()
                del out
                loss.backward()
                del loss
    return live.peak


def logits_bytes(tokens: int, vocabulary: int, device: str, bf16: bool) -> int:
    """A chunk of logits on its way: float32, in bfloat16 with a copy before and after it."""
    elements = min(CHUNK_ELEMENTS[device], tokens * vocabulary)
    return elements * (8 if bf16 else 4)


def cache_bytes(config: PreTrainedConfig, sequences: int, tokens: int, each: int) -> int:
    """Keys and values of so many sequences while they are sampled."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * size * sequences * tokens * each


@contextmanager
def _shapes_only(model: nn.Module) -> Iterator[list[Tensor]]:
    """Puts tensors that claim to be on the CPU in the place of a meta model's; yields them."""
    put: dict[Tensor, Tensor] = {}  # tied ones stay one
    for module in model.modules():
        slots: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in slots:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in put:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    trained = tensor.requires_grad
                    is_weight = isinstance(tensor, nn.Parameter)
                    put[tensor] = nn.Parameter(empty, trained) if is_weight else empty
                tensors[name] = put[tensor]
    yield list(put.values())


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make, for as long as each is alive."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._add(value)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size
