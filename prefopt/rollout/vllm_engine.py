"""Generation with vLLM in the training process: a second set of weights, a continuous batch.

Every sample is a request of its own with a seed of its own, so that equal samples are asked for
whatever else is in the batch; the prefix cache has the K samples of a prompt share its keys and
values. Weights are pushed tensor by tensor; on a GPU the engine sleeps between rounds and leaves
the device to training.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from torch import Tensor

from prefopt.errors import PrefoptError
from prefopt.rollout.engine import (
    Completion,
    Done,
    SamplingSettings,
    check_prompts,
    make_completion,
    sample_key,
    settings_of_each,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

TEMPERATURES = (0.01, 2.0)  # vLLM raises what is below and refuses what is above
CPU_CACHE = 2**28  # bytes of keys and values, unless VLLM_CPU_KVCACHE_SPACE says more (in GiB)
INSTALL = "pip install 'prefopt[vllm]', or see docs/vllm.md for machines without a GPU"


class VLLMEngine:
    """Draws completions with a vLLM engine inside this process, one for each process.

    Nothing can be sampled before the first :meth:`push`: the engine is built from the policy's
    configuration alone.

    Args:
        config: The policy's configuration.
        tokenizer: Decodes completions.
        stop_token_ids: Tokens that end a completion; an empty sequence means never to stop early.
        context_length: Tokens of the longest prompt and its completion; no memory is kept for more.
        dtype: What it computes in: float32, bfloat16 or float16.
        gpu_memory: Share of the device's memory it may take, weights and cache, while it samples.

    Raises:
        PrefoptError: vLLM is missing, or cannot run this model.
    """

    continuous = True
    elsewhere = False

    def __init__(
        self,
        config: PreTrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_token_ids: Sequence[int],
        context_length: int,
        dtype: str = "bfloat16",
        gpu_memory: float = 0.5,
    ) -> None:
        self.tokenizer, self.stop_token_ids = tokenizer, list(stop_token_ids)
        self.context_length = context_length
        self.asleep = False
        self.requests = itertools.count()
        cuda = torch.cuda.is_available()
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            self.llm = start(
                folder,
                skip_tokenizer_init=True,
                load_format="dummy",
                dtype=dtype,
                max_model_len=context_length,
                enable_sleep_mode=cuda,
                logprobs_mode="processed_logprobs",  # at the temperature of the request
                generation_config="vllm",
                **({"gpu_memory_utilization": gpu_memory} if cuda else {}),
            )
        self.release()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings | Sequence[SamplingSettings],
        *,
        done: Done | None = None,
    ) -> list[list[Completion]]:
        """Draws completions; see ``Engine.generate``.

        Raises:
            PrefoptError: If a prompt is empty or too long, or a temperature is one that vLLM does
                not take.
        """
        each = settings_of_each(settings, len(prompts))
        check_prompts(prompts, each, self.context_length)
        asked = [
            (index, prompt, parameters(prompt, own, sample, self.stop_token_ids))
            for index, (prompt, own) in enumerate(zip(prompts, each, strict=True))
            for sample in range(own.first_sample, own.first_sample + own.samples_per_prompt)
        ]
        found: list[dict[int, Completion]] = [{} for _ in prompts]
        answers: list[list[Completion]] = [[] for _ in prompts]

        def finished(number: int, output: Any) -> None:
            index = asked[number][0]
            found[index][number] = self._completion(output.outputs[0], each[index])
            if len(found[index]) == each[index].samples_per_prompt:
                answers[index] = [completion for _, completion in sorted(found[index].items())]
                if done is not None:
                    done(index, answers[index])

        self._run([(prompt, how) for _, prompt, how in asked], finished)
        return answers

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over the policy's weights; see ``PushedEngine.push``.

        Raises:
            PrefoptError: vLLM does not know a name, or a shape differs.
        """
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        executor = self.llm.llm_engine.model_executor
        try:
            executor.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        except (KeyError, ValueError, AssertionError, RuntimeError) as error:  # how it refuses them
            raise PrefoptError(
                f"rollout.engine vllm: the policy's weights cannot be taken over ({error!r}); use "
                "rollout.engine transformers for this model"
            ) from error
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        self.llm.reset_prefix_cache()

    def log_probs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs of given tokens; see ``PushedEngine.log_probs``."""
        from vllm import SamplingParams

        how = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        answers: list[list[float]] = [[] for _ in sequences]

        def finished(number: int, output: Any) -> None:
            tokens = zip(sequences[number][1:], output.prompt_logprobs[1:], strict=True)
            answers[number] = [said[token].logprob for token, said in tokens]

        self._run([(sequence, how) for sequence in sequences], finished)
        return answers

    def release(self) -> None:
        """Discards weights and cache and gives their memory back, on a GPU."""
        if self.llm.llm_engine.vllm_config.model_config.enable_sleep_mode:
            self.llm.sleep(level=2)
            self.asleep = True

    def _run(
        self, asked: Sequence[tuple[Sequence[int], Any]], finished: Callable[[int, Any], None]
    ) -> None:
        """Runs requests to their end; ``finished`` is told of the number and output of each."""
        engine, numbers = self.llm.llm_engine, {}
        for number, (prompt, how) in enumerate(asked):
            name = str(next(self.requests))
            numbers[name] = number
            engine.add_request(name, {"prompt_token_ids": list(prompt)}, how)
        # on a CPU vLLM draws from torch's own noise as well, and throws it away
        with torch.random.fork_rng(devices=[]):
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        finished(numbers[output.request_id], output)

    def _completion(self, output: Any, settings: SamplingSettings) -> Completion:
        log_probs = None
        if whole_distribution(settings):
            tokens = zip(output.token_ids, output.logprobs, strict=True)
            log_probs = [said[token].logprob for token, said in tokens]
        return make_completion(output.token_ids, self.stop_token_ids, self.tokenizer, log_probs)


def cannot_run() -> str | None:
    """Why vLLM cannot run here; None if it can."""
    if importlib.util.find_spec("vllm") is None:
        return f"vLLM is not installed ({INSTALL})"
    vllm_environment()
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and torch.cuda.is_available():
        return "the installed vLLM is a build for CPUs, but there is a GPU; install vllm instead"
    if not current_platform.is_cpu() and not torch.cuda.is_available():
        return "the installed vLLM is a build for GPUs, but there is none; see docs/vllm.md"
    return None


def architectures() -> set[str]:
    """The models that vLLM knows, by the name of their class in transformers."""
    from vllm import ModelRegistry

    return set(ModelRegistry.get_supported_archs())


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


def parameters(
    prompt: Sequence[int], settings: SamplingSettings, sample: int, stop_token_ids: Sequence[int]
) -> Any:
    """vLLM's parameters of one sample.

    Raises:
        PrefoptError: The temperature is one that vLLM would replace or refuse.
    """
    from vllm import SamplingParams

    check_temperature(settings.temperature)
    return SamplingParams(
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        max_tokens=settings.max_new_tokens,
        seed=request_seed(settings.seed, prompt, sample),
        stop_token_ids=list(stop_token_ids),
        ignore_eos=True,  # only the ids above end an answer
        logprobs=0,  # of the token that was drawn alone
        detokenize=False,
    )


def request_seed(seed: int, prompt: Sequence[int], sample: int) -> int:
    """The seed of one sample's request, of the 63 bits that vLLM takes."""
    return sample_key(seed, prompt, sample) % 2**63


def check_temperature(temperature: float) -> None:
    """Checks that vLLM would sample at this temperature and no other.

    Raises:
        PrefoptError: It would not.
    """
    least, most = TEMPERATURES
    if temperature != 0 and not least <= temperature <= most:
        raise PrefoptError(
            f"rollout.temperature: found {temperature}, expected 0 or {least} to {most}, which is "
            "what vLLM can sample at; change it, or use rollout.engine transformers"
        )


def whole_distribution(settings: SamplingSettings) -> bool:
    """Whether nothing is cut off, so that vLLM's log-prob of a token is that of its softmax."""
    return settings.temperature == 0 or (settings.top_p == 1 and settings.top_k == 0)


def start(model: str, **options: Any) -> Any:
    """A vLLM engine in this process that leaves the process's own things alone.

    Args:
        model: A folder with a configuration, and with weights unless ``load_format`` is dummy.
        **options: What else ``vllm.LLM`` takes.

    Raises:
        PrefoptError: vLLM cannot run here, or cannot run this model.
    """
    if problem := cannot_run():
        raise PrefoptError(f"vllm: {problem}")
    from vllm import LLM

    if not torch.cuda.is_available():
        options = {"enforce_eager": True, **options}
        if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            options |= {"kv_cache_memory_bytes": CPU_CACHE}
    if PartialState().num_processes > 1:  # they are there already: each takes the rank it has
        options["distributed_executor_backend"] = "external_launcher"
    try:
        with _threads_kept():
            llm = LLM(model=model, enable_prefix_caching=True, disable_log_stats=True, **options)
    except (ValueError, RuntimeError, AssertionError) as error:  # how it refuses models
        raise PrefoptError(
            f"vllm: no engine could be built ({error}); use the engine transformers for this "
            "model, or give it another share of memory (gpu_memory)"
        ) from error
    # vLLM's own way to end would take all process groups along, those of training too
    llm.llm_engine.engine_core._finalizer.detach()
    core = llm.llm_engine.engine_core.engine_core
    weakref.finalize(llm, core.model_executor.shutdown).atexit = False
    gc.unfreeze()  # vLLM hides all there is from the collector, its own memory too
    return llm


@contextmanager
def _threads_kept() -> Iterator[None]:
    """vLLM takes all threads but one from torch, and on a CPU the means to ask for them back."""
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
