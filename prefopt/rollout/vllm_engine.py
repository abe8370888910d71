"""Generation with vLLM in the training process: a second set of weights, a continuous batch.

Every sample is a request of its own with a seed of its own, so that equal samples are asked for
whatever else is in the batch; the prefix cache has the K samples of a prompt share its keys and
values. Weights are pushed tensor by tensor; on a GPU the engine sleeps between rounds and leaves
the device to training.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prefopt.errors import PrefoptError
from prefopt.rollout.engine import (
    Completion,
    Done,
    SamplingSettings,
    check_prompts,
    make_completion,
    settings_of_each,
)
from prefopt.rollout.vllm_process import cannot_run, cannot_serve, start
from prefopt.rollout.vllm_requests import (
    Gathered,
    check_temperatures,
    sampling_options,
    whole_distribution,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


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
        if problem := cannot_run() or cannot_serve(config):
            raise PrefoptError(
                f"rollout.engine vllm: {problem}; use rollout.engine transformers or auto"
            )
        cuda = torch.cuda.is_available()
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            self.llm = start(
                folder,
                called="the policy",
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
        check_temperatures(each)
        asked = [
            (index, prompt, self._parameters(prompt, own, sample))
            for index, (prompt, own) in enumerate(zip(prompts, each, strict=True))
            for sample in range(own.first_sample, own.first_sample + own.samples_per_prompt)
        ]
        gathered = Gathered(each, done)

        def finished(number: int, output: Any) -> None:
            index = asked[number][0]
            gathered.add(index, number, self._completion(output.outputs[0], each[index]))

        self._run([(prompt, how) for _, prompt, how in asked], finished)
        return gathered.completions

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over the policy's weights; see ``PushedEngine.push``.

        Raises:
            PrefoptError: vLLM does not know a name, or a shape differs.
        """
        remaining = iter(weights)
        executor = self.llm.llm_engine.model_executor
        try:
            if self.asleep:
                self.llm.wake_up(tags=["weights"])
            executor.collective_rpc("reload_weights", kwargs={"weights_iterator": remaining})
        except (KeyError, ValueError, AssertionError, RuntimeError) as error:  # how it refuses them
            for _ in remaining:
                pass  # other processes take part in making them
            raise PrefoptError(
                f"rollout.engine vllm: the policy's weights cannot be taken over ({error!r}); "
                "lower rollout.gpu_memory if memory is short, or use rollout.engine transformers"
            ) from error
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        self.llm.reset_prefix_cache()

    def log_probs(self, sequences: Sequence[Sequence[int]]) -> list[list[list[float]]]:
        """Log-probs of given tokens; see ``PushedEngine.log_probs``."""
        from vllm import SamplingParams

        how = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        answers: list[list[float]] = [[] for _ in sequences]

        def finished(number: int, output: Any) -> None:
            tokens = zip(sequences[number][1:], output.prompt_logprobs[1:], strict=True)
            answers[number] = [said[token].logprob for token, said in tokens]

        self._run([(sequence, how) for sequence in sequences], finished)
        return [answers]

    def release(self) -> None:
        """Discards weights and cache and gives their memory back, on a GPU."""
        if self.llm.llm_engine.vllm_config.model_config.enable_sleep_mode:
            self.llm.sleep(level=2)
            self.asleep = True

    def _parameters(self, prompt: Sequence[int], settings: SamplingSettings, sample: int) -> Any:
        from vllm import SamplingParams

        options = sampling_options(prompt, settings, sample, self.stop_token_ids)
        return SamplingParams(**options, detokenize=False)

    def _run(
        self, asked: Sequence[tuple[Sequence[int], Any]], finished: Callable[[int, Any], None]
    ) -> None:
        """Runs requests to their end; ``finished`` is told of the number and output of each."""
        engine, numbers = self.llm.llm_engine, {}
        for number, (prompt, how) in enumerate(asked):
            name = str(next(self.requests))
            numbers[name] = number
            engine.add_request(name, {"prompt_token_ids": list(prompt)}, how)
        try:
            # on a CPU vLLM draws from torch's own noise as well, and throws it away
            with torch.random.fork_rng(devices=[]):
                while engine.has_unfinished_requests():
                    for output in engine.step():
                        if output.finished:
                            finished(numbers.pop(output.request_id), output)
        finally:
            if numbers:  # an error, of which the next call is to see nothing
                engine.abort_request(list(numbers))

    def _completion(self, output: Any, settings: SamplingSettings) -> Completion:
        log_probs = None
        if whole_distribution(settings):
            tokens = zip(output.token_ids, output.logprobs, strict=True)
            log_probs = [said[token].logprob for token, said in tokens]
        return make_completion(output.token_ids, self.stop_token_ids, self.tokenizer, log_probs)
