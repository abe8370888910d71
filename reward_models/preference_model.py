"""The pairwise preference model: a causal LM that reads two answers and names the better one.

It is the PM of RLHF Workflow (Dong et al., arXiv 2405.07863): both answers stand in one
user message, and the probabilities of the answer tokens "A" and "B" are the judgement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from prefopt.data.rows import Message, Prompt, group_by_prompt
from prefopt.data.template import (
    check_one_bos,
    check_tokenizer,
    encode,
    encode_completion,
    render,
    stop_token_ids,
    without_special_tokens,
)
from prefopt.data.tree import Layout, TreeBatch
from prefopt.errors import PrefoptError
from prefopt.models.forward import enable_trees, supports_tree_attention
from prefopt.models.load import load_policy, load_tokenizer
from prefopt.models.logprobs import next_token_log_probs
from prefopt.reward_models.reading import Ids, read_last, read_once
from prefopt.reward_models.reward_model import probability_of_beating

ANSWERS = ("A", "B")
Comparison = tuple[Prompt, str, str]


def render_context(prompt: Prompt) -> str:
    """What is answered, as the comparison quotes it.

    Each message becomes its role and its text. RLHF Workflow's template takes the role from the
    place, even or odd; for user and assistant in turn that is the same, and a system message is
    called what it is. A string counts as one user message, so that a model trained on
    conversations can judge plain text and the other way round.

    >>> render_context("1+1?")
    '\\n\\n\\n<turn> user\\n 1+1?\\n\\n\\n'
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    turns = (f"\n\n<turn> {message['role']}\n {message['content']}" for message in messages)
    return "\n" + "".join(turns) + "\n\n\n"


def comparison_prompt(prompt: Prompt, a: str, b: str) -> list[Message]:
    """The question to the model: which of two answers to a prompt is better, as one user message.

    >>> comparison_prompt("1+1?", "2", "3")[0]["content"]
    '[CONTEXT] \\n\\n\\n<turn> user\\n 1+1?\\n\\n\\n [RESPONSE A] 2 [RESPONSE B] 3 \\n'
    """
    text = f"[CONTEXT] {render_context(prompt)} [RESPONSE A] {a} [RESPONSE B] {b} \n"
    return [{"role": "user", "content": text}]


class ComparisonEncoder:
    """Turns comparisons into the token ids that a preference model reads.

    Args:
        tokenizer: The model's tokenizer, with a chat template.

    Attributes:
        answer_ids: The tokens of the answers "A" and "B".

    Raises:
        PrefoptError: The template does not end a prompt with the assistant header, or an answer is
            not a single token after it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        check_tokenizer(tokenizer, conversational=True)
        self.tokenizer = tokenizer
        self.answer_ids = _answer_ids(tokenizer)
        self._stop_ids = frozenset(stop_token_ids(tokenizer))
        [nothing] = self.encode([("", "", "")])
        self._stops_of_template = self._count_stops(nothing)

    def encode(self, comparisons: Sequence[Comparison]) -> list[list[int]]:
        """Ids of each comparison (prompt, a, b), up to and with the assistant header."""
        questions = [
            render(self.tokenizer, comparison_prompt(*comparison), []) for comparison in comparisons
        ]
        encoded = [ids for ids, _ in encode(self.tokenizer, questions)]
        for ids in encoded:
            check_one_bos(self.tokenizer, ids)
        return encoded

    def holds_stop_token(self, ids: Sequence[int]) -> bool:
        """Whether a compared text holds a stop token, with which it could end the question."""
        return self._count_stops(ids) > self._stops_of_template

    def _count_stops(self, ids: Sequence[int]) -> int:
        return sum(map(self._stop_ids.__contains__, ids))


class ComparisonJudge:
    """Answers P(a beats b) by reading both orders of the two answers; scores by mean win rate.

    A subclass says how a comparison is read.

    Args:
        tokenizer: The tokenizer, with the chat template the judge was trained with.
    """

    compares_only = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.encoder = ComparisonEncoder(tokenizer)
        self.tokenizer = tokenizer

    def read(self, sequences: Sequence[Ids]) -> list[float]:
        """The logit of "A" minus that of "B" after each of some distinct, sorted sequences."""
        raise NotImplementedError

    def prefer(self, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str]) -> np.ndarray:
        """P(a beats b), the mean over both orders, float64 [n]; swapping gives exactly 1 minus it.

        Raises:
            PrefoptError: A prompt holds a stop token, or a comparison is longer than the model can
                read.
        """
        return position_average(*self._first_wins(prompts, a, b))

    def prefer_by_order(
        self, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str]
    ) -> np.ndarray:
        """P(a beats b) as read in the order (a, b) and in the order (b, a), float64 [n, 2].

        A model is consistent on a pair if both are on the same side of 1/2.
        """
        forth, back = self._first_wins(prompts, a, b)
        return np.stack([forth, 1 - back], axis=1)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        """Mean of P(completion beats another) over the call's others to the same prompt, [n].

        In [0, 1], and only comparable within a prompt and a call. Takes n (n - 1) readings for n
        different completions of a prompt.

        Raises:
            PrefoptError: A prompt has only one completion; or as for ``prefer``.
        """
        groups = group_by_prompt(prompts)
        alone = [members[0] for members in groups if len(members) == 1]
        if alone:
            raise PrefoptError(
                f"{len(alone)} of {len(groups)} prompts have a single completion (the first is "
                f"number {alone[0] + 1}) and a preference model scores completions against each "
                "other; sample two or more a prompt, or use a reward model as judge"
            )
        duels = [duel for members in groups for duel in combinations(members, 2)]
        p = self.prefer(
            [prompts[i] for i, _ in duels],
            [completions[i] for i, _ in duels],
            [completions[j] for _, j in duels],
        )
        won: list[list[float]] = [[] for _ in completions]
        for (i, j), p_i in zip(duels, p.tolist(), strict=True):
            won[i].append(p_i)
            won[j].append(1 - p_i)
        return np.array([math.fsum(w) / len(w) for w in won])  # fsum: the same in every order

    def _first_wins(
        self, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """P("A") where a stands first, and where b does, [n] each."""
        a, b = (without_special_tokens(self.tokenizer, side) for side in (a, b))
        forth = list(zip(prompts, a, b, strict=True))
        back = list(zip(prompts, b, a, strict=True))
        questions = [tuple(ids) for ids in self.encoder.encode(forth + back)]
        for comparison, ids in zip(forth + back, questions, strict=True):
            if self.encoder.holds_stop_token(ids):
                raise PrefoptError(
                    "a prompt holds a stop token of the judge in its text, which would end the "
                    f"question: found it before {_shortened(comparison)}; remove it"
                )
        p = probability_of_beating(read_once(self.read, questions))
        return p[: len(forth)], p[len(forth) :]


class PreferenceModel(ComparisonJudge):
    """A preference model under transformers; comparisons share what they begin with on a tree.

    Args:
        model: A causal LM, on the device where it is to run.
        tokenizer: Its tokenizer, with the chat template it was trained with.
        batch_tokens: Tokens a forward pass takes at most (one comparison may exceed it).
        tree_size: Comparisons that share a tree at most.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int = 8192,
        tree_size: int = 16,
    ) -> None:
        super().__init__(tokenizer)
        enable_trees(model)
        self.model = model.eval()
        self.batch_tokens, self.tree_size = batch_tokens, tree_size
        self.layout: Layout = "tree" if supports_tree_attention(model) else "separate"

    @classmethod
    def from_pretrained(
        cls, path: str, *, dtype: str = "auto", device: str | torch.device | None = None
    ) -> PreferenceModel:
        """Loads a preference model, which is an ordinary causal LM with its tokenizer.

        Args:
            path: A local folder or a Hub id.
            dtype: ``auto`` keeps the checkpoint's type; else float32, bfloat16 or float16.
            device: Where to run; a GPU when there is one.

        Raises:
            PrefoptError: Nothing can be loaded from ``path``, it is a scalar reward model, or its
                tokenizer cannot pose the question.
        """
        tokenizer = load_tokenizer(path)
        model = load_policy(path, dtype=dtype)
        check_causal(path, model.config)  # a reward model is loaded all the same, with a new head
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(device), tokenizer)

    def read(self, sequences: Sequence[Ids]) -> list[float]:
        """The logit of "A" minus that of "B" after each of some distinct, sorted sequences."""

        def differences(trees: TreeBatch) -> Tensor:
            log_probs = next_token_log_probs(self.model, trees, self.encoder.answer_ids).double()
            # the two share their normaliser, so this is the difference of their logits
            return log_probs[:, 0] - log_probs[:, 1]

        return read_last(
            self.model,
            sequences,
            differences,
            layout=self.layout,
            batch_tokens=self.batch_tokens,
            tree_size=self.tree_size,
        )


def check_causal(path: str, config: PreTrainedConfig) -> None:
    """Checks that a preference model was saved as a causal LM.

    Raises:
        PrefoptError: It is a scalar reward model.
    """
    saved_as = ", ".join(config.architectures or ())
    if "SequenceClassification" in saved_as:
        raise PrefoptError(
            f"model path {path!r}: found {saved_as}, expected a causal LM trained with "
            "algorithm preference_model; a scalar reward model has judge kind reward_model"
        )


def position_average(forth: np.ndarray, back: np.ndarray) -> np.ndarray:
    """P(y1 beats y2) = 1/2 [pA(y1, y2) + pB(y2, y1)], with pB = 1 - pA.

    Exchanging the arguments exchanges the answers, and gives exactly 1 minus the result.

    Args:
        forth: pA(y1, y2), [n]: the probability of the first answer where y1 stands first.
        back: pA(y2, y1), [n]: the same where y2 does.

    >>> position_average(np.array([0.9]), np.array([0.5])).tolist()
    [0.7]
    """
    lead = (forth - back) / 2
    upper = 0.5 + np.abs(lead)  # in [1/2, 1], so that 1 - upper is exact
    return np.where(lead >= 0, upper, 1 - upper)


def _answer_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """The tokens of "A" and "B" as they follow the assistant header."""
    question = comparison_prompt("", "", "")
    a, b = (encode_completion(tokenizer, question, text, finished=False) for text in ANSWERS)
    if len(a) != 1 or len(b) != 1 or a == b or tokenizer.unk_token_id in (*a, *b):
        found = " and ".join(str(tokenizer.convert_ids_to_tokens(ids)) for ids in (a, b))
        raise PrefoptError(
            f"a preference model answers with the single tokens 'A' and 'B', and "
            f"{tokenizer.name_or_path or type(tokenizer).__name__} gives {found} after the "
            "assistant header; use a tokenizer that knows both, and a chat template that writes "
            "nothing between header and answer"
        )
    return a[0], b[0]


def _shortened(comparison: Comparison) -> str:
    _, a, b = comparison
    return " and ".join(repr(text if len(text) <= 60 else text[:57] + "...") for text in (a, b))
