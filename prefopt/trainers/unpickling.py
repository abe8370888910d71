"""What reading a checkpoint may unpickle: numbers and their containers, nothing that runs code.

torch keeps the states of optimisers, schedules and random generators as pickles. transformers reads
them with ``weights_only``. DeepSpeed does not, and neither does PyTorch of sharded checkpoints: the
names in their pickles are looked at before they are read, or as they are read.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from torch._weights_only_unpickler import _get_allowed_globals
from torch.serialization import get_unsafe_globals_in_checkpoint
from transformers.trainer_pt_utils import safe_globals

from prefopt.errors import PrefoptError

SUFFIXES = (".bin", ".pt", ".pth")
UNREAD = "training_args.bin"  # transformers writes it, nothing reads it

OF_DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
# in the files of a sharded checkpoint, and in what processes tell each other while they read them
OF_SHARDS = {
    "_pickle.UnpicklingError",
    "pathlib.PosixPath",
    "torch.distributed._state_dict_utils._TensorInfo",
    "torch.distributed.checkpoint.api.CheckpointException",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.distributed.checkpoint.filesystem._StoragePrefix",
    "torch.distributed.checkpoint.metadata.BytesStorageMetadata",
    "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
    "torch.distributed.checkpoint.metadata.Metadata",
    "torch.distributed.checkpoint.metadata.MetadataIndex",
    "torch.distributed.checkpoint.metadata.StorageMeta",
    "torch.distributed.checkpoint.metadata.TensorProperties",
    "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.planner.LoadItemType",
    "torch.distributed.checkpoint.planner.LoadPlan",
    "torch.distributed.checkpoint.planner.ReadItem",
    "torch.storage._load_from_bytes",  # a pickle within the pickle, which is watched too
    "traceback.FrameSummary",
    "traceback.StackSummary",
}


def check_pickles(folder: Path) -> None:
    """Looks through the pickles of a checkpoint for names of anything but numbers.

    Args:
        folder: The checkpoint's. Tensors are not read.

    Raises:
        PrefoptError: A file names something else, or was not written by ``torch.save``.
    """
    for path in sorted(folder.rglob("*")):
        if path.suffix in SUFFIXES and path.name != UNREAD:
            _check_file(path)


def _check_file(path: Path) -> None:
    try:
        with safe_globals():
            names = {*get_unsafe_globals_in_checkpoint(path)} - OF_DEEPSPEED
    except (ValueError, RuntimeError, EOFError, UnpicklingError) as error:
        raise _refusal(path, "a pickle of a kind that torch.save does not write") from error
    if names:
        raise _refusal(path, f"a pickle that names {', '.join(sorted(names))}")


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Inside the block this process unpickles numbers only, wherever a library reads them from.

    Args:
        folder: The checkpoint that is read.

    Raises:
        PrefoptError: A pickle named something else, of which nothing was run.
    """
    _watch_from_now_on()
    _refused.clear()
    _reading.append(folder)
    try:
        yield
    except BaseException as error:  # PyTorch's CheckpointException is no Exception
        if _refused:
            raise _refusal(folder, f"a pickle that names {_refused[0]}") from error
        raise
    finally:
        _reading.pop()


_reading: list[Path] = []  # one at most; of all threads, since libraries may read in several
_refused: list[str] = []


@cache
def _watch_from_now_on() -> None:
    sys.addaudithook(_on_event)  # for good: Python has no way to take it back


def _on_event(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "pickle.find_class" and _reading:
        module, name = arguments
        if not _is_known(module, name):
            _refused.append(f"{module}.{name}")
            raise UnpicklingError(f"{module}.{name} is not to be unpickled")


def _is_known(module: str, name: str) -> bool:
    whole = f"{module}.{name}"
    if whole in OF_SHARDS or whole in _get_allowed_globals():
        return True
    error = getattr(builtins, name, None) if module == "builtins" else None
    return isinstance(error, type) and issubclass(error, BaseException)


def _refusal(path: Path, found: str) -> PrefoptError:
    return PrefoptError(
        f"{path}: found {found}; expected plain numbers, as prefopt writes them. Loading it could "
        "run any program. Delete this checkpoint to go on from the one before"
    )
