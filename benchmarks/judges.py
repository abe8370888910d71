"""Judging 8 samples a prompt: on shared trees, each comparison by itself, plain transformers.

Everything is timed from text to numbers, templates and tokeniser included. ``alone`` gives every
comparison a tree of its own, with the two answers as completions; ``transformers`` is an ordinary
forward on rows that are padded within batches of the same token budget, longest first, with logits
at the last position only. All answers have one length, so that no row is padded and what trees save
is the prompt alone.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from measure import DEVICE, Settings, interleave, parser, report
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from prefopt.data.tree import PromptTree, collate_trees
from prefopt.models.logprobs import sequence_log_probs
from prefopt.reward_models import PreferenceModel, RewardModel
from prefopt.reward_models.preference_model import ComparisonJudge
from prefopt.reward_models.reading import Ids, within_budget
from prefopt.reward_models.reward_model import ScoreJudge
from prefopt.rounds.pairing import PairingSettings, judge_samples
from prefopt.world.tokenizer import CHAT_TEMPLATE, COMPARISON_WORDS, SPECIAL_TOKENS

LENGTHS = {"base": (256, 128), "tiny": (32, 16)}  # words of the prompt and of each answer
BATCH_TOKENS = 8192

Question = tuple[str, list[str]]  # a prompt and its samples


class Alone(PreferenceModel):
    """Each comparison is the prompt of a tree whose completions are "A" and "B"."""

    def read(self, sequences: Sequence[Ids]) -> list[float]:
        """As the other judges do, from trees of one comparison each."""
        differences: dict[Ids, float] = {}
        for batch in within_budget(sequences, lambda ids: len(ids) + 2, BATCH_TOKENS):
            answers = [[token] for token in self.encoder.answer_ids]
            trees = collate_trees([PromptTree(ids, answers) for ids in batch])
            with torch.no_grad():
                a, b = sequence_log_probs(self.model, trees.to(DEVICE)).double().view(-1, 2).T
            differences.update(zip(batch, (a - b).tolist(), strict=True))
        return [differences[ids] for ids in sequences]


class PlainPreferenceModel(ComparisonJudge):
    """transformers' forward on padded rows."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(tokenizer)
        self.model = model

    def read(self, sequences: Sequence[Ids]) -> list[float]:
        """As the other judges do, from rows."""

        def difference(rows: dict[str, Tensor]) -> Tensor:
            logits = self.model(**rows, use_cache=False, logits_to_keep=1).logits[:, -1]
            a, b = self.encoder.answer_ids
            return logits[:, a] - logits[:, b]

        return padded(sequences, self.tokenizer, difference)


class PlainRewardModel(ScoreJudge):
    """transformers' classifier on padded rows."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(tokenizer)
        self.model = model

    def read(self, sequences: Sequence[Ids]) -> list[float]:
        """As the other judges do, from rows."""
        return padded(sequences, self.tokenizer, lambda rows: self.model(**rows).logits[:, 0])


def padded(
    sequences: Sequence[Ids],
    tokenizer: PreTrainedTokenizerFast,
    numbers: Callable[[dict[str, Tensor]], Tensor],
) -> list[float]:
    found: dict[Ids, float] = {}
    for batch in within_budget(sequences, len, BATCH_TOKENS):
        rows = tokenizer.pad({"input_ids": batch}, padding_side="left", return_tensors="pt")
        with torch.no_grad():
            found.update(zip(batch, numbers(rows.to(DEVICE)).tolist(), strict=True))
    return [found[ids] for ids in sequences]


def tokenizer(settings: Settings) -> PreTrainedTokenizerFast:
    """The world's chat template on a word for each remaining token id."""
    words = [*SPECIAL_TOKENS, *COMPARISON_WORDS]
    words += [f"t{i}" for i in range(len(words), settings.config.vocab_size)]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


def questions(settings: Settings, samples: int) -> list[Question]:
    """A prompt with its samples for every step."""
    draw = random.Random(settings.seed)
    prompt, answer = LENGTHS[settings.size]
    first = len(SPECIAL_TOKENS) + len(COMPARISON_WORDS)

    def text(length: int) -> str:
        return " ".join(
            f"t{draw.randrange(first, settings.config.vocab_size)}" for _ in range(length)
        )

    return [(text(prompt), [text(answer) for _ in range(samples)]) for _ in range(settings.steps)]


def tournament(judge: ComparisonJudge, question: Question) -> np.ndarray:
    """The knock-out of Nash-style rounds: 10 comparisons of 8 samples, in three calls."""
    prompt, samples = question
    [judgement] = judge_samples(
        judge, [chat(prompt)], [samples], PairingSettings("tournament"), "?"
    )
    return np.array([p for _, _, p in judgement.matches])


def all_pairs(judge: ComparisonJudge, question: Question) -> np.ndarray:
    """Every two samples, in one call."""
    prompt, samples = question
    a, b = zip(*combinations(samples, 2), strict=True)
    return judge.prefer([chat(prompt)] * len(a), a, b)


def one_pair(judge: ComparisonJudge, question: Question) -> np.ndarray:
    prompt, samples = question
    return judge.prefer([chat(prompt)], samples[:1], samples[1:2])


def scores(judge: ScoreJudge, question: Question) -> np.ndarray:
    prompt, samples = question
    return judge.score([chat(prompt)] * len(samples), samples)


def chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser("Times how samples of one prompt are compared and scored.")
    options.add_argument("--samples", type=int, default=8, help="of each prompt")
    args = options.parse_args(argv)
    settings = Settings(args.size, 1, args.steps, args.seed)
    torch.manual_seed(settings.seed)
    causal = LlamaForCausalLM(settings.config).to(DEVICE).eval()
    classifier = LlamaForSequenceClassification(settings.config).to(DEVICE).eval()
    reads = tokenizer(settings)
    comparing = {
        "tree": PreferenceModel(copy.deepcopy(causal), reads, batch_tokens=BATCH_TOKENS),
        "alone": Alone(copy.deepcopy(causal), reads),
        "transformers": PlainPreferenceModel(causal, reads),
    }
    scoring = {
        "tree": RewardModel(copy.deepcopy(classifier), reads, batch_tokens=BATCH_TOKENS),
        "transformers": PlainRewardModel(classifier, reads),
    }
    asked = questions(settings, args.samples)
    runs = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for mode, ask, judges in (
            ("tournament", tournament, comparing),
            ("all pairs", all_pairs, comparing),
            ("one pair", one_pair, comparing),
            ("scores", scores, scoring),
        ):
            said = {way: ask(judge, asked[0]) for way, judge in judges.items()}  # warm-up too
            timed = {
                way: lambda i, ask=ask, judge=judge: ask(judge, asked[i])
                for way, judge in judges.items()
            }
            times = interleave(timed, settings.steps, settings.seed)
            difference = {way: float(abs(x - said["tree"]).max()) for way, x in said.items()}
            del difference["tree"]
            labels = {"mode": mode, "threads": threads}
            runs.append(labels | times | {"difference": difference})
    return report("judges", args, settings, runs=runs, words=LENGTHS[args.size])


if __name__ == "__main__":
    main()
