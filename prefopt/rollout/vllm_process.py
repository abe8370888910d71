"""vLLM inside this process, which it would change in many ways if it were let.

It reads its settings from the environment as it is imported, seeds all random generators, takes
torch's threads, hides objects from the garbage collector, and ends with all process groups. All of
that is undone here, for the policy's engine and for judges.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import PreTrainedConfig

from prefopt.errors import PrefoptError

CPU_CACHE = 2**28  # bytes of keys and values, unless VLLM_CPU_KVCACHE_SPACE says more (in GiB)
INSTALL = "pip install 'prefopt[vllm]', or see docs/vllm.md for machines without a GPU"


def check_installed(key: str) -> None:
    """Checks that vLLM is installed, without importing it.

    Args:
        key: The key of the recipe that asks for it.

    Raises:
        PrefoptError: It is not.
    """
    if not _installed():
        raise PrefoptError(
            f"{key}: found vllm, but the package is not installed; {INSTALL}, or use {key} "
            "transformers"
        )


def cannot_run() -> str | None:
    """Why vLLM cannot run here; None if it can."""
    if not _installed():
        return f"vLLM is not installed ({INSTALL})"
    vllm_environment()
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and torch.cuda.is_available():
        return "the installed vLLM is a build for CPUs, but there is a GPU; install vllm instead"
    if not current_platform.is_cpu() and not torch.cuda.is_available():
        return "the installed vLLM is a build for GPUs, but there is none; see docs/vllm.md"
    return None


def cannot_serve(config: PreTrainedConfig) -> str | None:
    """What about a model vLLM has no code for; None if there is nothing, as far as can be told."""
    from vllm import ModelRegistry

    known = set(ModelRegistry.get_supported_archs())
    architectures = config.architectures or []
    if architectures and not known & set(architectures):
        return f"it does not know {architectures[0]}"
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    size = getattr(text, "head_dim", None) or (heads and text.hidden_size // heads)
    if heads and not torch.cuda.is_available():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        sizes = CPUAttentionBackend.get_supported_head_sizes()
        if size not in sizes:
            return f"on a CPU its heads have one of {sizes} dimensions, and this model's {size}"
    return None


def vllm_environment() -> None:
    """Settings that vLLM reads from the environment, where the user has not said otherwise.

    To be called before anything of vLLM is imported: the engine runs in this process, where weights
    can be handed over as they are.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    defaults = {"VLLM_LOGGING_LEVEL": "ERROR"}
    if not torch.cuda.is_available():
        defaults |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # training keeps its threads where they are
            "TORCHDYNAMO_DISABLE": "1",  # what it compiles takes longer than it saves on a CPU
        }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if "torch._dynamo" in sys.modules:  # which has read the environment already
        torch._dynamo.config.disable = os.environ.get("TORCHDYNAMO_DISABLE") == "1"


def _installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


def start(model: str, *, called: str = "", **options: Any) -> Any:
    """A vLLM engine in this process that leaves the process's own things alone.

    Args:
        model: A folder with a configuration, and with weights unless ``load_format`` is dummy.
        called: What an error calls it; by default the folder.
        **options: What else ``vllm.LLM`` takes.

    Raises:
        PrefoptError: vLLM cannot run here, or cannot run this model.
    """
    if problem := cannot_run():
        raise PrefoptError(f"the engine vllm cannot be had: {problem}")
    from vllm import LLM

    if not torch.cuda.is_available():
        options = {"enforce_eager": True, **options}
        if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            options |= {"kv_cache_memory_bytes": CPU_CACHE}
    if PartialState().num_processes > 1:  # they are there already: each takes the rank it has
        options["distributed_executor_backend"] = "external_launcher"
    try:
        with _process_kept():
            llm = LLM(model=model, enable_prefix_caching=True, disable_log_stats=True, **options)
    except (ValueError, RuntimeError, AssertionError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]  # these are how vLLM refuses models
        raise PrefoptError(
            f"vLLM cannot serve {called or model} ({type(error).__name__}: {reason}); use the "
            "engine transformers, or change gpu_memory if memory is short"
        ) from error
    # vLLM's own way to end would take all process groups along, those of training too
    llm.llm_engine.engine_core._finalizer.detach()
    core = llm.llm_engine.engine_core.engine_core
    weakref.finalize(llm, core.model_executor.shutdown)
    gc.unfreeze()  # vLLM hides all there is from the collector, its own memory too
    return llm


def _own_device() -> list[int]:
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


@contextmanager
def _process_kept() -> Iterator[None]:
    """Gives back the states of the random generators and torch's threads."""
    python, numpy = random.getstate(), np.random.get_state()
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    try:
        with torch.random.fork_rng(_own_device()):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_num_threads = set_threads  # on a CPU vLLM puts nothing in its place
        torch.set_num_threads(threads)
