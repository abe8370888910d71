"""Training of pairwise preference models: each pair is read in both orders.

A comparison is a prompt tree: the question is the prompt, the tokens "A" and "B" its completions.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from prefopt.data.rows import Completion, PreferencePair
from prefopt.data.tokenize import DropCounts, Ragged, Tokenized
from prefopt.data.tree import PromptTree
from prefopt.errors import PrefoptError
from prefopt.models.logprobs import sequence_log_probs
from prefopt.objectives.reward import answer_loss
from prefopt.reward_models.preference_model import ComparisonEncoder, render_context
from prefopt.reward_models.trainer import JudgeTrainer
from prefopt.trainers.base import TreeDataset, TreeTrainerConfig
from prefopt.trainers.pairs import LazyTrees, PairSource, as_trees

_BATCH = 1000  # pairs in one call of the tokenizer


@dataclass
class TokenizedComparisons(Tokenized):
    """Comparisons as token ids: rows 2i and 2i + 1 are the two orders of pair i.

    Attributes:
        letters: The tokens of "A" and "B".
        answer_ids: The right one of the two; of a soft label the likelier.
        p_a: The probability that the answer called A is the better one: ``p_chosen`` in even rows,
            where A is the chosen answer, and 1 minus it in odd ones.
        length_difference: Tokens of the chosen answer minus those of the rejected one.
    """

    letters: tuple[int, int] = (0, 0)
    answer_ids: Ragged = field(default_factory=Ragged)
    p_a: array[float] = field(default_factory=lambda: array("d"))
    length_difference: array[int] = field(default_factory=lambda: array("i"))


def tokenize_comparisons(
    pairs: Iterable[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int | None,
    max_length: int | None,
) -> TokenizedComparisons:
    """Tokenises both orders of each pair; a pair that is too long is left out whole, never cut.

    Args:
        pairs: The pairs; margins are not used.
        tokenizer: A tokenizer that knows "A" and "B", with a chat template.
        max_prompt_length: The most tokens that the pair's prompt may have, as it is quoted in the
            comparison; None is no limit.
        max_length: The most tokens that the whole comparison with its answer may have in either
            order; None is no limit.

    Returns:
        Two rows a pair; ``dropped`` counts pairs.

    Raises:
        PrefoptError: If nothing is left, or the tokenizer cannot pose the question.
    """
    encoder = ComparisonEncoder(tokenizer)
    kept = TokenizedComparisons(letters=encoder.answer_ids)
    shortest: int | None = None
    for pair, orders, prompt_length, length_difference in _encode(pairs, encoder):
        whole = max(map(len, orders)) + 1
        shortest = min(whole, shortest or whole)
        if max_prompt_length is not None and prompt_length > max_prompt_length:
            kept.leave_out("prompt_too_long", pair.where, prompt_length, whole)
        elif max_length is not None and whole > max_length:
            kept.leave_out("answer_too_long", pair.where, prompt_length, whole)
        elif any(map(encoder.holds_stop_token, orders)):
            kept.leave_out("stop_token_inside", pair.where, prompt_length, whole)
        elif orders[0] == orders[1]:
            kept.leave_out("identical", pair.where, prompt_length, whole)
        else:
            for question, p_a in zip(orders, (pair.p_chosen, 1 - pair.p_chosen), strict=True):
                kept.prompt_ids.append(question)
                kept.answer_ids.append([encoder.answer_ids[0 if p_a >= 0.5 else 1]])
                kept.p_a.append(p_a)
                kept.length_difference.append(length_difference)
                kept.where.append(pair.where)
    if not len(kept):
        raise _nothing_left(kept.dropped, shortest, max_prompt_length, max_length)
    return kept


def _encode(
    pairs: Iterable[PreferencePair], encoder: ComparisonEncoder
) -> Iterator[tuple[PreferencePair, tuple[list[int], list[int]], int, int]]:
    """Yields each pair with what a row needs.

    That is its two orders (A is the chosen answer in the first), the length of its prompt, and by
    how much the chosen answer is longer, in tokens.
    """
    pairs = iter(pairs)
    while batch := list(islice(pairs, _BATCH)):
        prompts = [pair.prompt for pair in batch]
        chosen = [_text(pair.chosen) for pair in batch]
        rejected = [_text(pair.rejected) for pair in batch]
        forth = encoder.encode(list(zip(prompts, chosen, rejected, strict=True)))
        back = encoder.encode(list(zip(prompts, rejected, chosen, strict=True)))
        texts = ([render_context(prompt) for prompt in prompts], chosen, rejected)
        lengths = [_lengths(encoder.tokenizer, column) for column in texts]
        for i, pair in enumerate(batch):
            prompt_length, chosen_length, rejected_length = (column[i] for column in lengths)
            yield pair, (forth[i], back[i]), prompt_length, chosen_length - rejected_length


def comparison_dataset(comparisons: TokenizedComparisons) -> TreeDataset:
    """The data set of a preference model's trainer."""

    def tree(index: int) -> PromptTree:
        a, b = comparisons.letters
        return PromptTree(comparisons.prompt_ids[index], ([a], [b]))

    columns: dict[str, Sequence[Any]] = {
        "p_a": comparisons.p_a,
        "length_difference": comparisons.length_difference,
    }
    return TreeDataset(LazyTrees(len(comparisons), tree), columns)


@dataclass
class PreferenceModelConfig(TreeTrainerConfig):
    """Keys of the preference model; the values are those of the RLHF Workflow recipe."""

    learning_rate: float = field(default=5e-6, metadata={"help": "Peak learning rate."})
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Steps of warm-up, or below 1 their share."}
    )
    max_length: int | None = field(
        default=3072, metadata={"help": "Limit for prompt and both answers, in tokens, likewise."}
    )


class PreferenceModelTrainer(JudgeTrainer):
    """Fits a causal LM to the answers "A" and "B" of comparisons; soft labels are used.

    Args:
        model: The causal LM, best one that follows instructions.
        args: A :class:`PreferenceModelConfig`.
        train_dataset: Rows of preference pairs (docs/data.md), which ``processing_class`` then
            tokenises in both orders, or what `comparison_dataset` returns.
        **kwargs: As for :class:`prefopt.trainers.base.TreeTrainer`.

    Raises:
        PrefoptError: A data set holds trees that are not comparisons.
    """

    def __init__(
        self,
        model: nn.Module,
        args: PreferenceModelConfig,
        train_dataset: PairSource,
        **kwargs: Any,
    ) -> None:
        arguments = as_trees(
            args,
            train_dataset,
            kwargs,
            tokenize=tokenize_comparisons,
            dataset_of=comparison_dataset,
        )
        for name in ("train_dataset", "eval_dataset"):
            if arguments[name] is not None and "p_a" not in arguments[name].columns:
                raise PrefoptError(
                    f"{name}: found trees without the column p_a, expected comparisons; make them "
                    "with comparison_dataset(tokenize_comparisons(...))"
                )
        super().__init__(model, args, **arguments)

    def readings(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The log-probs of "A" and "B", [2 trees]."""
        return sequence_log_probs(model, inputs["trees"])

    def pair_losses(
        self, readings: Tensor, inputs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The cross-entropy of each comparison's answer, and its metrics."""
        a, b, p_a = readings[0::2], readings[1::2], inputs["p_a"]
        losses = answer_loss(a, b, p_a)
        with torch.no_grad():
            margins = torch.where(p_a >= 0.5, a - b, b - a)
            metrics = {
                "rewards/margins": margins,
                "rewards/accuracies": (margins > 0).float(),
                "answers/first": (a > b).float(),
                "answers/mass": a.exp() + b.exp(),
            }
        return losses, metrics


def _text(completion: Completion) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def _lengths(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[int]:
    """Tokens of each text by itself."""
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False).input_ids]


def _nothing_left(
    dropped: DropCounts,
    shortest: int | None,
    max_prompt_length: int | None,
    max_length: int | None,
) -> PrefoptError:
    if shortest is None:
        return PrefoptError("nothing to tokenise: found no pairs, expected at least one")
    return PrefoptError(
        f"nothing is left after tokenising: of {dropped.total:,} pairs the prompts of "
        f"{dropped.prompt_too_long:,} exceed max_prompt_length={max_prompt_length}, "
        f"{dropped.answer_too_long:,} comparisons exceed max_length={max_length}, "
        f"{dropped.stop_token_inside:,} hold a stop token, {dropped.identical:,} have identical "
        f"answers; the shortest comparison has {shortest:,} tokens: raise the limits or mend the "
        "rows"
    )
