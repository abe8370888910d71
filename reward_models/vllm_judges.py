"""Judges whose numbers vLLM reads: a reward model by classification, a preference model by the
log-probs of the first generated token.

What is asked and what follows from the numbers is that of the judges under transformers. A judge
under vLLM holds no torch module: it is known by the files of its checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash
from transformers import PreTrainedConfig, PreTrainedModel

from prefopt.errors import PrefoptError
from prefopt.models.load import (
    checkpoint_folder,
    load_config,
    load_reward_model,
    load_tokenizer,
)
from prefopt.reward_models.preference_model import ComparisonJudge, check_causal
from prefopt.reward_models.reading import Ids
from prefopt.reward_models.reward_model import ScoreJudge
from prefopt.rollout.vllm_process import start


class VllmRewardModel(ScoreJudge):
    """A reward model under vLLM.

    Attributes:
        fingerprint: A hash of the checkpoint's files.

    Args:
        path: A local folder or a Hub id.
        dtype: ``auto`` keeps the checkpoint's type; else float32, bfloat16 or float16.
        gpu_memory: Share of the GPU's memory that vLLM takes; on a CPU it takes 256 MiB for keys
            and values.

    Raises:
        PrefoptError: vLLM is missing or cannot serve the model, or it is no reward model.
    """

    def __init__(self, path: str, *, dtype: str = "auto", gpu_memory: float = 0.3) -> None:
        super().__init__(load_tokenizer(path))
        self.folder = checkpoint_folder(path)
        config = load_config(str(self.folder))
        saved_as = ", ".join(config.architectures or ())
        if "SequenceClassification" not in saved_as or config.num_labels != 1:
            raise PrefoptError(
                f"model path {path!r}: not a reward model: found {saved_as or 'no architecture'} "
                f"with {config.num_labels} labels, expected a sequence classifier with one, as "
                "`prefopt train` makes it (algorithm reward_model)"
            )
        self.llm = _engine(
            self.folder, config, dtype, gpu_memory, runner="pooling", convert="classify"
        )
        self.fingerprint = _fingerprint(self.folder)

    def read(self, sequences: Sequence[Ids]) -> list[float]:
        """The score at the last token of each sequence, in one call of vLLM's."""
        from vllm import PoolingParams

        raw = PoolingParams(use_activation=False)  # or a sigmoid would be taken
        outputs = self.llm.classify(
            _checked(self.llm, sequences, 0), pooling_params=raw, use_tqdm=False
        )
        return [output.outputs.probs[0] for output in outputs]

    def load_model(self) -> PreTrainedModel:
        """The same weights under transformers, on the CPU."""
        path = str(self.folder)
        return load_reward_model(path, load_tokenizer(path))


class VllmPreferenceModel(ComparisonJudge):
    """A preference model under vLLM.

    Attributes:
        fingerprint: A hash of the checkpoint's files.

    Args:
        path: A local folder or a Hub id.
        dtype: ``auto`` keeps the checkpoint's type; else float32, bfloat16 or float16.
        gpu_memory: As for :class:`VllmRewardModel`.

    Raises:
        PrefoptError: vLLM is missing or cannot serve the model, it is a scalar reward model, or its
            tokenizer cannot pose the question.
    """

    def __init__(self, path: str, *, dtype: str = "auto", gpu_memory: float = 0.3) -> None:
        super().__init__(load_tokenizer(path))
        self.folder = checkpoint_folder(path)
        config = load_config(str(self.folder))
        check_causal(path, config)
        self.llm = _engine(self.folder, config, dtype, gpu_memory, skip_tokenizer_init=True)
        self.fingerprint = _fingerprint(self.folder)

    def read(self, sequences: Sequence[Ids]) -> list[float]:
        """The logit of "A" minus that of "B" after each sequence, in one call of vLLM's."""
        from vllm import SamplingParams

        a, b = self.encoder.answer_ids
        settings = SamplingParams(
            max_tokens=1, temperature=0.0, logprob_token_ids=[a, b], detokenize=False
        )
        outputs = self.llm.generate(_checked(self.llm, sequences, 1), settings, use_tqdm=False)
        found = [output.outputs[0].logprobs[0] for output in outputs]
        # the two share their normaliser, so this is the difference of their logits
        return [log_probs[a].logprob - log_probs[b].logprob for log_probs in found]


def _engine(
    folder: Path, config: PreTrainedConfig, dtype: str, gpu_memory: float, **options: Any
) -> Any:
    """A vllm.LLM on token ids, with its prefix cache."""
    stored = str(config.dtype or "float32").removeprefix("torch.")
    return start(
        str(folder),
        dtype=stored if dtype == "auto" else dtype,  # vLLM's auto makes float32 bfloat16
        gpu_memory_utilization=gpu_memory,
        max_model_len=-1,  # as long as the model reads and the memory holds
        enforce_eager=True,  # graphs serve decoding, and nothing is decoded
        use_tqdm_on_load=False,
        **options,
    )


def _checked(llm: Any, sequences: Sequence[Ids], added: int) -> list[dict[str, list[int]]]:
    """The sequences as vLLM takes them.

    Args:
        llm: The engine.
        sequences: Token ids.
        added: Tokens that it generates.

    Raises:
        PrefoptError: One is longer than the engine can read.
    """
    longest = max(map(len, sequences), default=0) + added
    limit = llm.llm_engine.model_config.max_model_len
    if longest > limit:
        raise PrefoptError(
            f"the judge under vLLM reads {longest} tokens, but has room for {limit} at once; use "
            "shorter prompts and answers, a larger judge.gpu_memory, or judge.engine transformers"
        )
    return [{"prompt_token_ids": [*ids]} for ids in sequences]


def _fingerprint(folder: Path) -> str:
    """A 128-bit hash over the names and bytes of a checkpoint's config and weights."""
    digest = xxhash.xxh3_128()
    weights = (*folder.glob("*.safetensors"), *folder.glob("*.bin"))
    for path in sorted([folder / "config.json", *weights]):
        digest.update(f"{path.name}|{path.stat().st_size}|".encode())
        with path.open("rb") as file:
            while chunk := file.read(2**24):
                digest.update(chunk)
    return digest.hexdigest()
