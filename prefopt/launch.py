"""``prefopt train --accelerate NAME``: the same command in several processes."""

from __future__ import annotations

import difflib
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yaml import YAMLError

import prefopt.recipes
from prefopt.errors import PrefoptError


def accelerate_config(name: str) -> Path:
    """The accelerate configuration of a name that ships with prefopt, or of a path.

    Raises:
        PrefoptError: It is neither.
    """
    shipped = shipped_configs()
    if name in shipped:
        return shipped[name]
    if Path(name).is_file():
        return Path(name)
    near = difflib.get_close_matches(name.lower(), shipped, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise PrefoptError(
        f"--accelerate: found {name!r}; {hint}expected {', '.join(shipped)} or the path of an "
        "accelerate configuration in YAML"
    )


def shipped_configs() -> dict[str, Path]:
    """Path by name, sorted."""
    folder = Path(prefopt.recipes.__path__[0]) / "accelerate"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def strategy_of(path: Path) -> tuple[str, bool]:
    """How an accelerate configuration spreads a run, and whether it computes in bfloat16.

    Returns:
        ``ddp``, ``fsdp2``, ``zero2`` or ``zero3``; and whether mixed_precision is bf16.

    Raises:
        PrefoptError: It cannot be read, or says something else.
    """
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        config: Any = load_config_from_file(str(path))
    except (OSError, ValueError, TypeError, AttributeError, YAMLError) as error:
        raise PrefoptError(f"{path}: no accelerate configuration ({error})") from error
    kind = config.distributed_type.value
    if kind == "DEEPSPEED":
        kind = f"ZERO-{config.deepspeed_config.get('zero_stage')}"
    strategies = {
        "NO": "ddp",
        "MULTI_GPU": "ddp",
        "FSDP": "fsdp2",
        "ZERO-2": "zero2",
        "ZERO-3": "zero3",
    }
    if kind not in strategies:
        raise PrefoptError(f"{path}: found {kind}, expected one of {', '.join(strategies)}")
    return strategies[kind], config.mixed_precision == "bf16"


def launch_command(
    arguments: Sequence[str], config: str, num_processes: int | None, devices: int
) -> list[str]:
    """The command line that runs ``prefopt`` with these arguments in several processes.

    Args:
        arguments: What ``prefopt`` is told, such as ``["train", "recipe.yaml", "--json"]``.
        config: A name that ships with prefopt, or a path.
        num_processes: Processes; None: as many as devices for a name, what the file at a path says.
        devices: Accelerators of this machine. Without any, torchrun starts the processes on CPUs:
            accelerate's ``--cpu`` starts one only where there is no mpirun.

    Raises:
        PrefoptError: The configuration is unknown, or not for this machine.
    """
    path = accelerate_config(config)
    command = ["-m", "prefopt", *arguments]
    if config == "multinode":
        raise PrefoptError(
            "--accelerate multinode: found one command, expected one on every machine, which says "
            f"who it is: accelerate launch --config_file {path} --machine_rank 0 --main_process_ip "
            f"HOST {' '.join(command)} (see recipes/slurm/online_dpo.sbatch)"
        )
    if devices == 0:
        if config != "ddp" or num_processes is None:
            raise PrefoptError(
                f"--accelerate {config}: found no GPU on this machine, expected some; on CPUs only "
                "--num-processes N with ddp works"
            )
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
        return [sys.executable, "-m", *launcher, *command]
    if num_processes is None and config in shipped_configs():
        num_processes = devices
    launcher = ["accelerate.commands.launch", "--config_file", str(path)]
    if num_processes is not None:
        launcher += ["--num_processes", str(num_processes)]
    return [sys.executable, "-m", *launcher, *command]


def launch_environment(devices: int) -> dict[str, str]:
    """What the processes to be launched find in their environment besides.

    On CPUs they talk by the loopback device: of themselves they would listen on whatever address
    the host's name stands for.

    Args:
        devices: Accelerators of this machine.
    """
    loopback = {"lo", "lo0"} & {name for _, name in socket.if_nameindex()}
    if devices or not loopback or "GLOO_SOCKET_IFNAME" in os.environ:
        return {}
    return {"GLOO_SOCKET_IFNAME": loopback.pop()}
