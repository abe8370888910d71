"""Loading of policies, reward models and their tokenizers, with errors that say what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from httpx import HTTPError
from huggingface_hub import model_info, snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed

from prefopt.errors import PrefoptError

RAM_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # as transformers reads it

T = TypeVar("T")


def load_tokenizer(
    path: str,
    *,
    revision: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Loads a tokenizer.

    Args:
        path: A local folder or a Hub id.
        revision: A branch, tag or commit on the Hub.
        chat_template: A Jinja file that replaces the tokenizer's chat template.
        trust_remote_code: Run code that comes with the model.

    Raises:
        PrefoptError: Nothing can be loaded from ``path``, or the template file cannot be read.
    """
    tokenizer = _load(
        AutoTokenizer.from_pretrained,
        path,
        "tokenizer",
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text()
        except OSError as error:
            raise PrefoptError(
                f"model.chat_template: {chat_template} cannot be read ({error.strerror}); "
                "expected a Jinja file"
            ) from error
    return tokenizer


def checkpoint_folder(path: str) -> Path:
    """The local folder of a checkpoint; one on the Hub is downloaded.

    Args:
        path: A local folder or a Hub id.

    Raises:
        PrefoptError: There is nothing at ``path``.
    """
    return Path(path if Path(path).is_dir() else _load(snapshot_download, path, "checkpoint"))


def load_config(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Loads the configuration of a model, and no weights.

    Args:
        path: A local folder or a Hub id.
        revision: A branch, tag or commit on the Hub.
        trust_remote_code: Run code that comes with the model.

    Raises:
        PrefoptError: Nothing can be loaded from ``path``.
    """
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    return _load(AutoConfig.from_pretrained, path, "configuration", **options)


def load_policy(
    path: str,
    *,
    dtype: str = "auto",
    quantization: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Loads a causal LM.

    Args:
        path: A local folder or a Hub id.
        dtype: ``auto`` keeps the checkpoint's type; else float32, bfloat16 or float16.
        quantization: None, or nf4 or int8 for linear layers that are frozen under an adapter.
        revision: A branch, tag or commit on the Hub.
        trust_remote_code: Run code that comes with the model.

    Raises:
        PrefoptError: Nothing can be loaded from ``path``, or this machine cannot quantise.
    """
    model = _load(
        AutoModelForCausalLM.from_pretrained,
        path,
        "causal language model",
        dtype=_dtype(dtype),
        revision=revision,
        trust_remote_code=trust_remote_code,
        **_quantized(quantization),
    )
    return _prepared(model) if quantization else model


def load_reward_model(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    new_head: bool = False,
    dtype: str = "auto",
    quantization: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Loads a sequence classifier with one label.

    Its tokenizer is given a pad token of its own where it has none or shares it with EOS:
    transformers' classifiers read the score at the last token that is not padding, which must be
    the EOS.

    Args:
        path: A local folder or a Hub id.
        tokenizer: The tokenizer, changed in place when it lacks a pad token.
        new_head: Give a model without a score head, such as a causal LM, a random one to train.
        dtype: ``auto`` keeps the checkpoint's type; else float32, bfloat16 or float16.
        quantization: None, or nf4 or int8 for linear layers that are frozen under an adapter.
        revision: A branch, tag or commit on the Hub.
        trust_remote_code: Run code that comes with the model.

    Raises:
        PrefoptError: Nothing can be loaded from ``path``, it has no score head, or this machine
            cannot quantise.
    """
    model, info = _load(
        AutoModelForSequenceClassification.from_pretrained,
        path,
        "sequence classifier",
        num_labels=1,
        output_loading_info=True,
        dtype=_dtype(dtype),
        revision=revision,
        trust_remote_code=trust_remote_code,
        **_quantized(quantization),
    )
    if info["missing_keys"] and not new_head:
        raise PrefoptError(
            f"model path {path!r}: not a reward model: it lacks {', '.join(info['missing_keys'])}; "
            "expected a sequence classifier as `prefopt train` makes it (algorithm reward_model)"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return _prepared(model) if quantization else model


def check_weights(path: str) -> None:
    """Looks whether a local folder has weights that can be loaded; reads no tensor.

    Args:
        path: A local folder; of a Hub id nothing is known before its weights are there.

    Raises:
        PrefoptError: There are none, they are pickles, or a file is missing or cut off.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    _refuse_pickles(folder)
    files = {*folder.glob("*.safetensors")}
    for index in folder.glob("*.safetensors.index.json"):
        try:
            files |= {
                folder / name for name in json.loads(index.read_text())["weight_map"].values()
            }
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise PrefoptError(
                f"model path {path!r}: {index.name} is no index of weights"
            ) from error
    if not files:
        raise PrefoptError(f"model path {path!r}: found no weights there, expected *.safetensors")
    for file in sorted(files):
        try:
            with safe_open(file, framework="pt"):
                pass  # the header, and whether the file is as long as it says
        except (OSError, SafetensorError) as error:
            raise PrefoptError(
                f"model path {path!r}: {file.name} cannot be read ({error}); copy or download it "
                "again"
            ) from error


def check_quantization(name: str | None) -> None:
    """Finds out whether this machine can load quantised weights.

    Raises:
        PrefoptError: There is no CUDA device, or bitsandbytes is not installed.
    """
    if name is None:
        return
    if not torch.cuda.is_available():
        raise PrefoptError(
            f"model.quantization: found {name} on a machine without a CUDA device; expected one, "
            "or quantization: null"
        )
    if find_spec("bitsandbytes") is None:
        raise PrefoptError(
            f"model.quantization: {name} needs bitsandbytes, which is not installed; "
            "pip install 'prefopt[qlora]'"
        )


def _quantized(name: str | None) -> dict[str, Any]:
    """What ``from_pretrained`` is told; the head stays as it is."""
    check_quantization(name)
    if name is None:
        return {}
    config = BitsAndBytesConfig(
        load_in_4bit=name == "nf4",
        load_in_8bit=name == "int8",
        llm_int8_skip_modules=["lm_head", "score"],
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config}


def _prepared(model: PreTrainedModel) -> PreTrainedModel:
    """A quantised model ready for an adapter: frozen, what is not quantised in float32."""
    from peft import prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    # reentrant checkpoints need it, and PEFT sees to it only where nothing is quantised
    model.enable_input_require_grads()
    return model


@contextmanager
def loaded_whole() -> Iterator[None]:
    """What is loaded inside the block is whole in the process that loads it.

    Elsewhere ZeRO-3 parts a model as it is loaded, and FSDP with ``cpu_ram_efficient_loading``
    loads it in the main process alone and gives the others zeros: right for the model that is
    trained, wrong for any other.
    """
    zero, fsdp = deepspeed._hf_deepspeed_config_weak_ref, os.environ.get(RAM_EFFICIENT)
    deepspeed.unset_hf_deepspeed_config()
    os.environ[RAM_EFFICIENT] = "false"
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = zero
        os.environ.pop(RAM_EFFICIENT)
        if fsdp is not None:
            os.environ[RAM_EFFICIENT] = fsdp


def _dtype(name: str) -> Any:
    return name if name == "auto" else getattr(torch, name)


def _load(load: Callable[..., T], path: str, what: str, **kwargs: Any) -> T:
    if Path(path).is_file():
        raise PrefoptError(f"model path {path!r}: found a file, expected a checkpoint's folder")
    local = {"local_files_only": not _on_hub(path)}
    if load not in (AutoTokenizer.from_pretrained, AutoConfig.from_pretrained, snapshot_download):
        kwargs["adapter_kwargs"] = local  # the search for an adapter does not inherit the setting
        if local["local_files_only"]:
            _refuse_pickles(Path(path))
        kwargs["use_safetensors"] = True  # never a pickle, which may run code as it is loaded
    try:
        return load(path, **local, **kwargs)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise PrefoptError(f"model path {path!r}: a package is missing ({reason})") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise PrefoptError(
            f"model path {path!r}: no {what} could be loaded; {_expected(reason)} ({reason})"
        ) from error


def _expected(reason: str) -> str:
    if "contains custom code" in reason or "references custom code" in reason:
        return (
            "it comes with code of its own, which is run only where the recipe says "
            "model.trust_remote_code: true, and never for a judge; read the code before"
        )
    return (
        "expected a local folder with a transformers checkpoint in safetensors, or a Hub id that "
        "can be reached"
    )


def _refuse_pickles(folder: Path) -> None:
    """Refuses a folder whose weights are pickles only."""
    for pattern, name in (
        ("pytorch_model*.bin", "model*.safetensors"),
        ("adapter_model.bin", "adapter_model.safetensors"),
    ):
        found = sorted(folder.glob(pattern))
        if found and not any(folder.glob(name)):
            raise PrefoptError(
                f"model path '{folder}': found {found[0].name}, a pickle, which can run any "
                f"program as it is loaded; expected {name}: convert the weights, for a model that "
                "you trust, with AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)"
            )


def _on_hub(path: str) -> bool:
    """Asks the Hub once, so that without a network nothing waits through a series of retries."""
    if Path(path).exists():
        return False
    try:
        model_info(path, timeout=10)
    except (HTTPError, OSError, ValueError):  # unreachable, unknown or not the form of a Hub id
        return False
    return True
