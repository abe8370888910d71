"""What token ids say: the tokenizer and its template, limits, cut answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prefopt.data.findings import Findings
from prefopt.data.row_findings import SENTENCE_ENDS, answers_of, pile_of_cut_answers
from prefopt.data.rows import Message, Prompt
from prefopt.data.template import check_one_bos, check_tokenizer, encode, render
from prefopt.data.tokenize import Ragged, Tokenized, TokenizedPairs
from prefopt.errors import PrefoptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What our own errors on tokenizers and templates say, and the kind that each is.
_PHRASES = {
    "two BOS tokens": "double BOS",
    "has no EOS token": "missing EOS",
    "has no chat template": "no chat template",
    "does not end a prompt with the assistant": "no assistant header",
    "differently once it is": "template changes the prompt",
    "refuses a conversation": "template refuses",
    "nothing is left": "no rows left",
    "longer than the limit everywhere": "no rows left",
}
_SYSTEM: list[Message] = [
    {"role": "system", "content": "A-probe-of-systems"},
    {"role": "user", "content": "Is this a probe?"},
]
_LEFT_OUT = {
    "prompt_too_long": "prompt too long",
    "answer_too_long": "answer too long",
    "stop_token_inside": "stop token inside",
    "identical": "identical tokens",
    "duplicate": "prompt recurs",
}


def look_at_tokenizer(
    tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Prompt], findings: Findings
) -> bool:
    """Tries a tokenizer and its chat template, as training does before it tokenises anything.

    Returns:
        Whether training would go on.
    """
    prompts = list(prompts)
    conversations = [prompt for prompt in prompts if not isinstance(prompt, str)]
    try:
        # as training: by the first row; a conversation among plain texts needs a template too
        check_tokenizer(tokenizer, conversational=bool(conversations))
    except PrefoptError as error:
        findings.add(kind_of(error), str(error))
        return False
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        findings.add("EOS is PAD", f"both are {tokenizer.eos_token!r}")
    if conversations:
        _look_at_template(tokenizer, conversations, findings)
    return True


def _look_at_template(
    tokenizer: PreTrainedTokenizerBase, conversations: list[Any], findings: Findings
) -> None:
    question = _SYSTEM[1:]
    answered = render(tokenizer, question, ["A-probe."])
    if answered.ending:
        text = "the chat template writes no special token after an assistant turn"
        findings.add("no end of turn", f"{text}; {tokenizer.eos_token!r} is added to answers")
    if any(turns[0]["role"] == "system" for turns in conversations):
        try:
            text = render(tokenizer, _SYSTEM, []).prompt
        except PrefoptError:  # each row with a system message will say so
            return
        if _SYSTEM[0]["content"] not in text:
            found = "rows have a system message, and the chat template leaves it out"
            findings.add("system prompt lost", found)


def kind_of(error: PrefoptError) -> str:
    """The kind of finding that our own error on a tokenizer, a template or one row is."""
    kinds = (kind for phrase, kind in _PHRASES.items() if phrase in str(error))
    return next(kinds, "cannot be encoded")


def encodable(
    tokenizer: PreTrainedTokenizerBase, items: list[Any], findings: Findings
) -> list[Any]:
    """The items that training could tokenise; the others become findings. One by one, so slow."""
    good = []
    for item in items:
        try:
            rendered = render(tokenizer, item.prompt, answers_of(item))
            [(prompt_ids, _)] = encode(tokenizer, [rendered])
            check_one_bos(tokenizer, prompt_ids)
        except PrefoptError as error:
            findings.add(kind_of(error), str(error), item.where)
        else:
            good.append(item)
    return good


# --- limits --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    """A limit on lengths.

    Attributes:
        tokens: The most; None is no limit.
        key: What says so in a recipe.
        beside: Tokens that the key's value counts too, those of a sample.
    """

    tokens: int | None
    key: str
    beside: int = 0


def look_at_limits(tokenized: Tokenized, prompt: Limit, whole: Limit, findings: Findings) -> None:
    """Says which rows training leaves out, and what limit would keep 99 in 100.

    Args:
        tokenized: The rows.
        prompt: On prompts.
        whole: On prompts with their answers.
        findings: Where problems go.
    """
    out = tokenized.left_out
    if not out.where:
        return
    prompts = np.concatenate([tokenized.prompt_ids.lengths, np.asarray(out.prompt)])
    wholes = np.concatenate([whole_lengths(tokenized), np.asarray(out.whole)])
    told = {
        "prompt_too_long": _told(prompts, prompt),
        "answer_too_long": _told(wholes, whole),
    }
    if hasattr(tokenized, "length_difference"):  # a comparison's prompt quotes the answers
        del told["prompt_too_long"]
    for where, reason in zip(out.where, out.reason, strict=True):
        found, remedy = told.get(reason, ("the row is left out", None))
        findings.add(_LEFT_OUT[reason], found, where, remedy=remedy)


def _told(lengths: NDArray[np.int64], limit: Limit) -> tuple[str, str]:
    """What is found of a limit, and what to do."""
    values = np.percentile(lengths, (50, 95, 99, 100), method="inverted_cdf")
    p50, p95, p99, most = map(int, values)
    found = (
        f"more than {limit.tokens} tokens; half of the rows have up to {p50:,}, 95 % {p95:,}, "
        f"99 % {p99:,}, all {most:,}"
    )
    more = limit.beside
    remedy = f"{limit.key}={most + more} would keep all rows"
    if p99 < most:
        remedy = f"{limit.key}={p99 + more} would keep 99 % of the rows, {most + more} all"
    return found, remedy


def whole_lengths(tokenized: Tokenized) -> Any:
    """Tokens of each prompt with its longest answer, int64 [rows]."""
    prompt = tokenized.prompt_ids.lengths
    answers = [column.lengths for _, column in answer_columns(tokenized)]
    return prompt + np.max(answers, axis=0) if answers else prompt


def answer_columns(tokenized: Tokenized) -> list[tuple[str, Ragged]]:
    """The columns of a data set that hold answers, with their names."""
    columns = ((name.removesuffix("_ids"), c) for name, c in vars(tokenized).items())
    return [(n, c) for n, c in columns if isinstance(c, Ragged) and n != "prompt"]


def look_for_cut_answers(
    tokenized: Tokenized, tokenizer: PreTrainedTokenizerBase, findings: Findings
) -> None:
    """Looks for a pile of answers that end in mid-sentence after the same number of tokens."""
    ends: dict[int, bool] = {}

    def finished(ids: list[int]) -> bool:
        last = ids[-2] if len(ids) > 1 else ids[-1]  # before the token that ends the answer
        if last not in ends:
            text = tokenizer.decode([last]).rstrip()
            ends[last] = not text or text[-1] in SENTENCE_ENDS
        return ends[last]

    columns = [column for _, column in answer_columns(tokenized)]
    if not columns:
        return
    distinct = {  # equal answers count once
        hash(tuple(ids)): (len(ids) - 1, not finished(ids), row)
        for column in columns
        for row, ids in enumerate(column)
    }
    lengths, unfinished, rows = np.array([*distinct.values()]).T
    for i in pile_of_cut_answers(lengths, unfinished.astype(bool), shortest=16):
        text = f"answers of exactly {lengths[i]:,} tokens end in mid-sentence"
        findings.add("cut at one length", text, tokenized.where[rows[i]])


def length_differences(tokenized: Tokenized) -> Any:
    """Tokens of chosen minus those of rejected, int [pairs]; None where rows are no pairs."""
    if isinstance(tokenized, TokenizedPairs):
        return tokenized.chosen_ids.lengths - tokenized.rejected_ids.lengths
    differences = getattr(tokenized, "length_difference", None)  # both orders of each comparison
    return None if differences is None else np.asarray(differences)[::2]
