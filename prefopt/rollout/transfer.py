"""How weights get to vLLM servers: as files, or over NCCL.

The NCCL half is all the contact there is with TRL's client. It is written after TRL 1.16's
``trl/generation/vllm_client.py`` and untested, for it needs CUDA devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from trl.generation.vllm_client import VLLMClient

SHARD_BYTES = 4 * 2**30
FIRST_PORT = 51216  # of the process groups, one for each server


def write_weights(
    folder: Path, weights: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes weights as the safetensors files of a checkpoint.

    Args:
        folder: A new folder.
        weights: Names and whole tensors; tied ones are written once for each name.
        shard_bytes: Most bytes in a file, if its first tensor is not larger.
    """
    folder.mkdir(parents=True)
    shard: dict[str, Tensor] = {}
    count = 0

    def flush() -> None:
        nonlocal shard, count
        count += 1
        save_file(shard, folder / f"model-{count:05d}.safetensors", metadata={"format": "pt"})
        shard = {}

    for name, tensor in weights:
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_bytes:
            flush()
        # a copy, because safetensors refuses tensors that share memory, as tied ones do
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
    flush()


def connect_nccl(servers: Sequence[str], device: torch.device) -> list[VLLMClient]:
    """Opens a process group with the workers of each server.

    Args:
        servers: Their addresses; started with ``--weight-transfer-config '{"backend": "nccl"}'``.
        device: The CUDA device weights are sent from, none that a server uses.
    """
    from trl.generation.vllm_client import VLLMClient

    clients = []
    for number, url in enumerate(servers):
        client = VLLMClient(base_url=url, group_port=FIRST_PORT + number)
        client.init_communicator(device)
        clients.append(client)
    return clients


def send_nccl(
    clients: Sequence[VLLMClient], weights: Iterable[tuple[str, Tensor]], device: torch.device
) -> None:
    """Sends every weight to every server, which then forgets what it cached of older ones.

    Args:
        clients: Made by ``connect_nccl``.
        weights: Names and whole tensors.
        device: That of ``connect_nccl``.
    """
    with ExitStack() as updates:
        for client in clients:
            updates.enter_context(client.weight_update())
        for name, tensor in weights:
            for client in clients:
                client.update_named_param(name, tensor.detach().to(device))
    for client in clients:
        client.reset_prefix_cache()
