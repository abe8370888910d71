"""The chat-template path: any conversation, any template, several kinds of tokenizer."""

from __future__ import annotations

from functools import cache
from typing import Any

from hypothesis import strategies as st
from test_data_template import (
    CHATML,
    GEMMA,
    LLAMA_2,
    NO_END_TOKEN,
    NO_HEADER,
    PHI_3,
    QWEN_3,
    SPECIAL,
    THINKING,
    TWO_BOS,
    UNANSWERED,
    byte_tokenizer,
    space_tokenizer,
)
from transformers import PreTrainedTokenizerBase

from fuzz.target import Target, attempt, texts
from prefopt.data.rows import PreferencePair
from prefopt.data.template import (
    check_tokenizer,
    encode_answered,
    encode_completion,
    encode_prompt,
    find_stop,
    stop_token_ids,
    without_special_tokens,
)
from prefopt.data.tokenize import tokenize_pairs
from prefopt.errors import PrefoptError

GOOD = [CHATML, LLAMA_2, GEMMA, QWEN_3, PHI_3, NO_END_TOKEN, NO_HEADER, THINKING, TWO_BOS]
ODD = [
    *(UNANSWERED, "", "x", "{{ messages }}", "{{ messages | tojson }}", "{{ bos_token }}", "{%"),
    *("{{ 1 / 0 }}", "{{ messages[9].content }}", "{{ messages.content.x.y }}", "{{ none.x }}"),
    *("{{ messages + 1 }}", "{{ 'a' | int / 0 }}", "{{ '%d' % 'x' }}", "{{ range(10**9) | list }}"),
    *("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ {}['x'] }}", "{{ [][0] + 'x' }}"),
    *(
        "{{ raise_exception('two\nlines') }}",
        "{% for i in range(2000) %}.{% endfor %}",
        "{{ x() }}",
    ),
    *("{{ messages[0].content.split('') }}", "{{ 'x'.encode('idna', 'bad') }}", "{{ lipsum }}"),
    *("{{ ''.format_map(1) }}", "{{ cycler() }}", "{{ messages | map('x') | list }}", "{{ ''|x }}"),
    *("{{ messages | sort(attribute='content') | first }}", "{% include 'x' %}", "{{ dict(a) }}"),
    *("{{ messages.pop().content }}", "{{ 2**9999 }}", "{{ '{0.x}'.format(1) }}", "{{ -'x' }}"),
    *("{{ messages | batch(0) | list }}", "{% set a, b = 'abc' %}", "{{ 'x' * 10**12 }}"),
    CHATML.replace("m.content", "m.content | trim"),
    CHATML.replace("m.content", "m.content | upper"),
    CHATML.replace("<|im_end|>\n", ""),
    CHATML.replace("m.content", "m.content | reverse"),
]


def _joined(*parts: str) -> str:
    return "".join(parts)


PARTS = [
    *("{% for m in messages %}", "{% endfor %}", "{% if add_generation_prompt %}", "{% endif %}"),
    *("{{ m.role }}", "{{ m.content }}", "{{ messages[-1].content }}", "{{ bos_token }}", "\n"),
    *(
        "{{ eos_token }}",
        "<|im_start|>",
        "<|im_end|>",
        "assistant",
        " ",
        "{% if m.role == 'user' %}",
    ),
    *("{% if loop.last %}", "{{ m.content | trim }}", "{% else %}", "{{ messages | length }}", "é"),
]
templates = (
    st.sampled_from(GOOD)
    | st.sampled_from(ODD)
    | st.lists(st.sampled_from(PARTS), max_size=8).map("".join)
    | st.builds(
        _joined,
        st.sampled_from(PARTS),
        st.sampled_from(GOOD),
        st.sampled_from(["", *PARTS]),
    )
)


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerBase:
    """Byte-level BPE, or words that carry their spaces; with and without BOS and EOS."""
    return {
        "bytes": lambda: byte_tokenizer(None),
        "bytes, bos": lambda: byte_tokenizer(None, bos_token="<s>", eos_token="</s>"),
        "bytes, no eos": lambda: byte_tokenizer(None, eos_token=None),
        "words": lambda: space_tokenizer(None),
        "words, eos": lambda: space_tokenizer(None, ends_with_eos=True),
        "words, no eos": lambda: space_tokenizer(None, eos_token=None),
    }[kind]()


KINDS = ["bytes", "bytes, bos", "bytes, no eos", "words", "words, eos", "words, no eos"]
said = (
    st.sampled_from(["Hi", "What is 1+1?", " It is 2.", "It is 2. ", "[/INST] you", ""])
    | texts
    | st.lists(st.sampled_from([*SPECIAL, "Hi", " ", "\n", "<unk>", "▁"]), max_size=4).map("".join)
)
roles = st.sampled_from(["user", "assistant"]) | st.sampled_from(["system", "tool", "x\ny", ""])
prompts = st.lists(st.fixed_dictionaries({"role": roles, "content": said}), max_size=3) | said
answers = said | said.map(lambda text: [{"role": "assistant", "content": text}])
cases = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(KINDS),
        "template": st.none() | templates,
        "prompt": prompts,
        "answers": st.lists(answers, min_size=2, max_size=2),
    }
)


def encode(case: dict[str, Any]) -> None:
    """Ids are as the docstrings say, or the conversation, text or template is refused."""
    tok = tokenizer(case["kind"])
    tok.chat_template = case["template"]
    prompt, first = case["prompt"], case["answers"][0]
    attempt(check_tokenizer, tok, conversational=not isinstance(prompt, str))
    stops = attempt(stop_token_ids, tok)
    prompt_ids = attempt(encode_prompt, tok, prompt)
    whole = attempt(encode_completion, tok, prompt, first)
    part = attempt(encode_completion, tok, prompt, first, finished=False)
    if isinstance(stops, list):
        assert stops == sorted({*stops})
    if isinstance(whole, list):
        assert isinstance(stops, list)
        assert whole[-1] in stops
        assert find_stop(whole, stops) is None
    if isinstance(part, list) and isinstance(stops, list):
        assert find_stop(part, stops, finished=False) is None
    if isinstance(prompt_ids, list) and isinstance(whole, list):
        check_together(tok, case, prompt_ids, whole)
    clean = attempt(without_special_tokens, tok, [text for text in case["answers"]
                                                  if isinstance(text, str)])  # fmt: skip
    if isinstance(clean, list):
        assert not any(token in text for text in clean for token in tok.all_special_tokens)


def check_together(
    tok: PreTrainedTokenizerBase, case: dict[str, Any], prompt_ids: list[int], whole: list[int]
) -> None:
    """One answer, or pairs of answers, give the same ids; bytes decode to the template's text."""
    prompt, (first, second) = case["prompt"], case["answers"]
    if isinstance(first, str):
        assert encode_answered(tok, [prompt, prompt], [first, first]) == [prompt_ids + whole] * 2
    pair = PreferencePair(prompt, first, second, where="f:1")
    rows = attempt(tokenize_pairs, [pair], tok, max_prompt_length=None, max_length=None)
    if isinstance(rows, PrefoptError):
        assert len(str(rows).splitlines()) == 1
    else:
        assert rows[0]["prompt_ids"] == prompt_ids
        assert rows[0]["chosen_ids"] == whole
        assert rows[0]["rejected_ids"] == encode_completion(tok, prompt, second)
    if not case["kind"].startswith("bytes"):
        return
    decoded = tok.decode(prompt_ids + whole, clean_up_tokenization_spaces=False)
    if isinstance(prompt, str):
        assert decoded == f"{prompt}{first}{tok.eos_token}" or first.endswith(tok.eos_token)
        return
    turn = [{"role": "assistant", "content": first}] if isinstance(first, str) else first
    rendered = tok.apply_chat_template(prompt + turn, tokenize=False)
    assert rendered.startswith(decoded.removesuffix(tok.eos_token or ""))


def _case(kind: str, template: str | None, prompt: Any = ()) -> dict[str, Any]:
    talk = [{"role": "user", "content": "Hi"}]
    prompt = talk if prompt == () else prompt
    return {"kind": kind, "template": template, "prompt": prompt, "answers": ["It is 2.", "no"]}


TEMPLATES = Target(
    cases,
    encode,
    {
        "no messages": _case("bytes", CHATML, []),
        "no EOS, and a token over the border": _case("bytes, no eos", None, "It is 2. "),
        "an end that lies inside the prompt": {
            **_case("bytes", f"{LLAMA_2} "),
            "answers": ["", "It is 2."],
        },
        "1 / 0": _case("bytes", "{{ 1 / 0 }}"),
        "an unknown error handler": _case("bytes", "{{ 'x'.encode('idna', 'bad') }}"),
        "an empty separator": _case("bytes", "{{ messages[0].content.split('') }}"),
        "a list and a number": _case("words", "{{ messages + 1 }}"),
        "without end": _case("words", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
        "a terabyte": _case("words", "{{ 'x' * 10**12 }}"),
        "a filter that wants items": _case("words", "{{ cycler() }}"),
    },
)
