"""Conversations and plain text to token ids: the one place where a chat template runs.

A prompt and its answer are split where the answer begins in the *text* that the template renders,
and again in token ids if the tokenizer keeps the border. The prompt's ids therefore never depend
on the answer, and prompt and answer together are what the model reads when it generates.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING

import jinja2

from prefopt.data.rows import Completion, Message, Prompt, group_by_prompt
from prefopt.errors import PrefoptError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

_QUESTION = {"role": "user", "content": "Is this a probe?"}
_PROBE = "Yes-it-is-a-probe"
_ANSWER = {"role": "assistant", "content": _PROBE}
# A template is a program: these are what its operations on text, lists and numbers raise.
_TEMPLATE_ERRORS = (
    *(jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError),
    *(RuntimeError, TypeError, ValueError),
)
HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt and its answers as text, ready for the tokenizer.

    Attributes:
        prompt: The prompt, up to and with the assistant header of a conversation.
        answers: What follows the prompt, up to and with the end-of-turn token as text.
        plain: Whether the prompt is plain text, which the tokenizer opens with BOS or the like.
        ending: Ids that end a finished answer where its text does not, i.e. EOS.
    """

    prompt: str
    answers: list[str]
    plain: bool
    ending: list[int]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, ready to be continued with an answer.

    Args:
        tokenizer: Any Hugging Face tokenizer.
        prompt: Messages, which go through the chat template and end with the assistant header; or
            a string, which gets the special tokens that the tokenizer puts at the start of a text
            and none at its end.

    Raises:
        PrefoptError: If the template is missing or refuses the conversation, or if the ids would
            begin with two BOS tokens.
    """
    [(prompt_ids, _)] = encode(tokenizer, [render(tokenizer, prompt, [])])
    check_one_bos(tokenizer, prompt_ids)
    return prompt_ids


def encode_completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    completion: Completion,
    *,
    finished: bool = True,
) -> list[int]:
    """Token ids of an answer, to be put after those of `encode_prompt`.

    Args:
        tokenizer: Any Hugging Face tokenizer.
        prompt: What is answered.
        completion: A string, or one assistant message after a conversation.
        finished: Whether the answer ends with the end-of-turn token of the template (EOS if it has
            none, and after a plain prompt), once. An answer that was cut off by a length limit is
            not finished and ends without.

    Raises:
        PrefoptError: If the template is missing, refuses the conversation or renders the prompt
            differently once it is answered, or if the answer holds a stop token before its end.
    """
    rendered = render(tokenizer, prompt, [completion], finished=finished)
    [(_, [ids])] = encode(tokenizer, [rendered])
    _check_stop(tokenizer, ids, stop_token_ids(tokenizer), finished=finished)
    return ids


def encode_answered(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], completions: Sequence[str]
) -> list[list[int]]:
    """Token ids of prompts, each with its finished answer; equal prompts are encoded once.

    Args:
        tokenizer: Any Hugging Face tokenizer.
        prompts: [n].
        completions: An answer to each, [n].

    Raises:
        PrefoptError: As `encode_prompt` and `encode_completion`.
    """
    groups = group_by_prompt(prompts)
    rendered = [
        render(tokenizer, prompts[members[0]], [completions[i] for i in members])
        for members in groups
    ]
    stop_ids = stop_token_ids(tokenizer)
    sequences: list[list[int]] = [[] for _ in completions]
    for members, (prompt_ids, answers) in zip(groups, encode(tokenizer, rendered), strict=True):
        check_one_bos(tokenizer, prompt_ids)
        for i, ids in zip(members, answers, strict=True):
            _check_stop(tokenizer, ids, stop_ids, finished=True)
            sequences[i] = prompt_ids + ids
    return sequences


def find_stop(
    ids: Sequence[int], stop_ids: Collection[int], *, finished: bool = True
) -> int | None:
    """Position of the first stop token that does not end a finished answer, or None."""
    body = ids[:-1] if finished else ids
    return next((i for i, token in enumerate(body) if token in stop_ids), None)


def _check_stop(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    stop_ids: Collection[int],
    *,
    finished: bool,
) -> None:
    """Raises PrefoptError if an answer holds a stop token before its end."""
    inside = find_stop(ids, stop_ids, finished=finished)
    if inside is not None:
        raise PrefoptError(
            f"the answer holds the stop token {tokenizer.convert_ids_to_tokens(ids[inside])!r} "
            f"before its end (token {inside + 1} of {len(ids)}); remove it from the text"
        )


def check_one_bos(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> None:
    """Raises PrefoptError if a prompt begins with two BOS tokens."""
    bos = tokenizer.bos_token_id
    if bos is not None and list(prompt_ids[:2]) == [bos, bos]:
        raise PrefoptError(
            f"the prompt begins with two BOS tokens {tokenizer.bos_token!r}; remove one from the "
            f"chat template or the text ({_name(tokenizer)} or its template adds one by itself)"
        )


def render(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    completions: Sequence[Completion],
    *,
    finished: bool = True,
) -> Rendered:
    """Applies the chat template to a prompt alone and with each answer.

    Raises:
        PrefoptError: As `encode_completion`, apart from stop tokens.
    """
    eos = [_eos(tokenizer)] if finished else []
    if isinstance(prompt, str):
        answers = [text for text in completions if isinstance(text, str)]
        if len(answers) < len(completions):
            raise PrefoptError("a plain prompt has messages as its answer; expected a string")
        return Rendered(prompt, answers, True, eos)
    prompt_text = _apply(tokenizer, prompt, add_generation_prompt=True)
    if not completions:
        return Rendered(prompt_text, [], False, [])
    end = _turn_end(tokenizer, _template(tokenizer), tokenizer.eos_token_id)
    answers = []
    for completion in completions:
        answer = [_assistant(completion)] if isinstance(completion, str) else completion
        text = _apply(tokenizer, prompt + answer)
        if not text.startswith(prompt_text):
            raise PrefoptError(
                f"the chat template of {_name(tokenizer)} renders a prompt differently once it is "
                f"answered ({_difference(prompt_text, text)}), so the answer's tokens cannot be "
                "told apart; set model.chat_template to a template that does not (trl's "
                "get_training_chat_template(tokenizer) may have one)"
            )
        answered = text[len(prompt_text) :]
        if not answered.endswith(end.tail):
            raise PrefoptError(
                f"the chat template of {_name(tokenizer)} does not close every assistant turn "
                f"with {end.tail!r}; set model.chat_template to one that does"
            )
        body = answered.removesuffix(end.tail)
        answers.append(body + end.kept if finished else body)
    return Rendered(prompt_text, answers, False, [] if end.token_id is not None else eos)


def encode(
    tokenizer: PreTrainedTokenizerBase, rendered: Sequence[Rendered]
) -> list[tuple[list[int], list[list[int]]]]:
    """Tokenises many prompts and their answers in one call, which fast tokenizers run in parallel.

    Returns:
        For each prompt its ids and those of its answers.
    """
    texts = [item.prompt + answer for item in rendered for answer in ("", *item.answers)]
    all_ids = iter(_ids(tokenizer, texts) if texts else [])
    opening = _opening_ids(tokenizer) if any(item.plain for item in rendered) else []
    encoded = []
    for item in rendered:
        prompt_ids = next(all_ids)
        completions = []
        for answer in item.answers:
            ids = next(all_ids)
            if ids[: len(prompt_ids)] == prompt_ids:
                ids = ids[len(prompt_ids) :]
            else:  # a token spans the border; the prompt's ids stay what they are without an answer
                ids = _ids_alone(tokenizer, answer)
            completions.append(ids if ids[-1:] == item.ending else ids + item.ending)
        encoded.append((opening + prompt_ids if item.plain else prompt_ids, completions))
    return encoded


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, model_generation_config: GenerationConfig | None = None
) -> list[int]:
    """Tokens that end an answer: EOS, the template's end-of-turn token, and the model's own.

    Args:
        tokenizer: Any Hugging Face tokenizer, with or without a chat template.
        model_generation_config: ``model.generation_config``, whose EOS tokens count too.

    Returns:
        The token ids, sorted, each once.
    """
    found = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        found.add(_turn_end(tokenizer, _template(tokenizer), tokenizer.eos_token_id).token_id)
    if model_generation_config is not None:
        of_model = model_generation_config.eos_token_id
        found.update(of_model if isinstance(of_model, list) else [of_model])
    return sorted(found - {None})


def spellings(tokenizer: PreTrainedTokenizerBase, more: Sequence[str] = ()) -> list[str]:
    """What a tokenizer reads as a special token though it stands in a text, and more; the longest
    first.
    """
    added = tokenizer.added_tokens_decoder.values()
    found = {token.content for token in added if token.special} | {*tokenizer.all_special_tokens}
    return sorted({*found, *more} - {""}, key=lambda s: (-len(s), s))


def without_special_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str]:
    """Texts with the spellings of special and stop tokens taken out.

    A policy can spell them in plain characters; a judge that tokenised them as what they spell
    would read a turn that ends early.

    Args:
        tokenizer: The judge's tokenizer.
        texts: Any texts.
    """
    stops = tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer))
    spelled = spellings(tokenizer, stops)
    return [_without(spelled, text) for text in texts]


def _without(spelled: Sequence[str], text: str) -> str:
    before = None
    while text != before:  # what is taken out may have stood inside another
        before = text
        for spelling in spelled:
            text = text.replace(spelling, "")
    return text


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, *, conversational: bool) -> None:
    """Checks, before any data is read, that a tokenizer can encode prompts and answers.

    A pad token is not needed: masks come from lengths.

    Args:
        tokenizer: The tokenizer.
        conversational: Whether the data are conversations, which need a chat template.

    Raises:
        PrefoptError: If there is no EOS token or no chat template; if the template does not end a
            prompt with the assistant header, changes the prompt once it is answered, or refuses a
            user message and its answer; or if prompts would begin with two BOS tokens.
    """
    _eos(tokenizer)
    if not conversational:
        encode_prompt(tokenizer, _QUESTION["content"])
        return
    prompt = _apply(tokenizer, [_QUESTION], add_generation_prompt=True)
    answer = render(tokenizer, [_QUESTION], [[_ANSWER]]).answers[0]
    header = answer.partition(_PROBE)[0]
    # Templates without a header, such as "[INST] ... [/INST]", also ignore the flag.
    if prompt == _apply(tokenizer, [_QUESTION]) and header.strip():
        raise PrefoptError(
            f"the chat template of {_name(tokenizer)} does not end a prompt with the assistant "
            f"header {header!r}; add it under '{{% if add_generation_prompt %}}' and set "
            "model.chat_template to that file"
        )
    encode_prompt(tokenizer, [_QUESTION])


@dataclass(frozen=True, slots=True)
class _TurnEnd:
    """How a template closes the last assistant turn.

    Attributes:
        tail: The text after the answer.
        kept: The part of it up to and with the end-of-turn token; empty without such a token.
        token_id: The end-of-turn token.
    """

    tail: str
    kept: str
    token_id: int | None


@lru_cache(maxsize=16)
def _turn_end(tokenizer: PreTrainedTokenizerBase, template: str, eos: int | None) -> _TurnEnd:
    """Finds the end-of-turn token: what ends an assistant turn both at the end and before a user's.

    The last special token that both places share is taken, so that an EOS that only closes the
    whole text, or the header of the next turn, is not. ``template`` and ``eos`` are in the cache
    key because both can be changed on the tokenizer.
    """
    tail = _after_probe(tokenizer, [_QUESTION, _ANSWER])
    middle = _after_probe(tokenizer, [_QUESTION, _ANSWER, _QUESTION])
    tail_ids, middle_ids = _ids(tokenizer, [tail, middle])
    # An unknown-word token is special too, but it is not in the text.
    special = {
        token: text
        for token in {*tokenizer.added_tokens_decoder, eos} & {*tail_ids}
        if (text := tokenizer.convert_ids_to_tokens(token)) in tail
    }
    both = tail_ids[: _shared_length(tail_ids, middle_ids)]
    ends = [token for token in both if token in special][-1:]
    ends = ends or [token for token in tail_ids if token in special][:1]
    if not ends:
        return _TurnEnd(tail, "", None)
    text = special[ends[0]]
    return _TurnEnd(tail, tail[: tail.index(text) + len(text)], ends[0])


def _after_probe(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    text = _apply(tokenizer, messages)
    _, probe, after = text.rpartition(_PROBE)
    if not probe:
        raise PrefoptError(
            f"the chat template of {_name(tokenizer)} leaves out the assistant's answer; set "
            "model.chat_template to one that renders it"
        )
    return after


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    *,
    add_generation_prompt: bool = False,
) -> str:
    _template(tokenizer)
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except _TEMPLATE_ERRORS as error:
        roles = ", ".join(message["role"] for message in messages) or "none"
        reason = " ".join(str(error).split())  # a template may raise several lines
        if not isinstance(error, jinja2.TemplateError):
            reason = f"{type(error).__name__}: {reason}"
        raise PrefoptError(
            f"the chat template of {_name(tokenizer)} refuses a conversation with the roles "
            f"{roles} ({reason}); change the conversation or set model.chat_template to another"
        ) from error


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise PrefoptError(
            f"{_name(tokenizer)} has no chat template and the data are conversations; set "
            "model.chat_template (or --chat-template) to a Jinja file, or give prompts and answers "
            "as plain strings"
        )
    return tokenizer.get_chat_template()


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise PrefoptError(
            f"{_name(tokenizer)} has no EOS token, so answers could not end; set "
            "tokenizer.eos_token and save the tokenizer beside the model"
        )
    return tokenizer.eos_token_id


def _opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer itself puts before a text, and not those it puts after."""
    [bare] = _ids(tokenizer, [_PROBE])
    whole = tokenizer(_PROBE)["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:start]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    for text in texts:
        if surrogate := HALF_A_CHARACTER.search(text):  # tokenizers say only that it is no text
            raise PrefoptError(
                f"a text to tokenise has half of a character, {surrogate[0]!r}, after "
                f"{text[: surrogate.start()][-40:]!r}; expected Unicode; repair or drop the row"
            )
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]


def _ids_alone(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that continues another one.

    It is tokenised behind a special token, because SentencePiece-like tokenizers put a space
    before a text that stands alone.
    """
    _eos(tokenizer)
    [ids] = _ids(tokenizer, [tokenizer.eos_token + text])
    return ids[1:]


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _difference(prompt: str, text: str) -> str:
    same = _shared_length(prompt, text)
    return f"{prompt[same : same + 30]!r} becomes {text[same : same + 30]!r}"


def _shared_length(a: Sequence[object], b: Sequence[object]) -> int:
    pairs = zip(a, b, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__
