"""What training in rounds reads of its data: prompts, and the offline answers beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from prefopt.data.rows import parse_answer, parse_pair, parse_prompt_row, validate
from prefopt.data.template import check_tokenizer
from prefopt.data.tokenize import (
    PromptedAnswers,
    PromptedPairs,
    TokenizedPrompts,
    tokenize_demonstrations,
    tokenize_pairs,
    tokenize_prompts,
)
from prefopt.errors import PrefoptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from prefopt.trainers.round_config import RoundConfig

# prompts, each once; pairs with their prompts; one offline answer a row with its prompt
Rows = Literal["prompts", "pairs", "answers"]
TOKENIZED: dict[Rows, type[TokenizedPrompts]] = {
    "prompts": TokenizedPrompts,
    "pairs": PromptedPairs,
    "answers": PromptedAnswers,
}


def parser_of(args: RoundConfig) -> Callable[..., Any]:
    """What reads a row of data for an algorithm in rounds."""
    if args.rows == "answers":
        return partial(parse_answer, column=args.reset_column)
    return parse_pair if args.rows == "pairs" else parse_prompt_row


def tokenize_rows(
    items: list[Any], args: RoundConfig, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> TokenizedPrompts:
    """Makes token ids of parsed rows; those without room for a completion are left out.

    Args:
        items: What :func:`parser_of` made of the rows.
        args: The limits on lengths, and what is kept of a row.
        tokenizer: The policy's.
        max_new_tokens: The longest completion.

    Raises:
        PrefoptError: No prompt is short enough.
    """
    limit = prompt_limit(args.max_prompt_length, args.max_length, max_new_tokens)
    if args.rows == "prompts":
        return tokenize_prompts(items, tokenizer, max_prompt_length=limit, distinct=True)
    options: dict[str, Any] = {
        "max_prompt_length": limit,
        "max_length": args.max_length,
        "keep_prompts": True,
    }
    tokenize: Any = tokenize_pairs if args.rows == "pairs" else tokenize_demonstrations
    tokenized: PromptedPairs | PromptedAnswers = tokenize(items, tokenizer, **options)
    return tokenized


def rows_of(
    args: RoundConfig,
    rows: TokenizedPrompts | Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
) -> TokenizedPrompts:
    """The rows of a data set (docs/data.md), unless they are tokenised already.

    Raises:
        PrefoptError: A row is wrong, or no prompt is short enough.
    """
    if isinstance(rows, TokenizedPrompts):
        if not isinstance(rows, TOKENIZED[args.rows]):
            raise PrefoptError(
                f"train_dataset: found {type(rows).__name__}, expected "
                f"{TOKENIZED[args.rows].__name__}"
            )
        return rows
    located = ((f"train_dataset:{i}", row) for i, row in enumerate(rows, start=1))
    items, _ = validate(located, parser_of(args))
    check_tokenizer(tokenizer, conversational=not isinstance(items[0].prompt, str))
    return tokenize_rows(items, args, tokenizer, max_new_tokens)


def prompt_limit(
    max_prompt_length: int | None, max_length: int | None, max_new_tokens: int
) -> int | None:
    """The longest prompt, in tokens, that leaves room for a completion; None is no limit.

    Raises:
        PrefoptError: There is no room for any.
    """
    room = None if max_length is None else max_length - max_new_tokens
    if room is not None and room < 1:
        raise PrefoptError(
            f"data.max_length: found {max_length}, which leaves no room for a prompt beside "
            f"rollout.max_new_tokens={max_new_tokens}; raise the one or lower the other"
        )
    return min((n for n in (max_prompt_length, room) if n is not None), default=None)
