from __future__ import annotations

import re
from pathlib import Path

import pytest
import trl
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from prefopt.data.rows import Message
from prefopt.data.template import (
    check_tokenizer,
    encode_completion,
    encode_prompt,
    find_stop,
    stop_token_ids,
)
from prefopt.errors import PrefoptError

# Each is one line, so that no newline of the file gets into the rendered text.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The prompt ends with a space, which the tokenizer joins to the first word of the answer.
LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST] ' }}{% else %}{{ m.content + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{{ '<start>' + m.role + '\n' + m.content | trim + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
)
# The last answer gets a thinking block, earlier ones lose theirs.
QWEN_3 = (
    "{% for m in messages %}{% set text = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# EOS closes the text, another token closes the turn.
PHI_3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<end>\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt else eos_token }}"
)
NO_END_TOKEN = (
    "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
NO_HEADER = CHATML.partition("{% if add")[0]
# The prompt opens a thought that the answered conversation does not show.
THINKING = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
TWO_BOS = "{{ bos_token + bos_token }}" + CHATML
UNANSWERED = CHATML.replace("{{ '<|im_start|>'", "{% if m.role == 'user' %}{{ 'x'").replace(
    "{% endfor", "{% endif %}{% endfor"
)

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start>", "<end>", "<think>", "</think>"]
CORPUS = ["Hello there, how are you? Fine. What is 1+1? It is 2. [INST] Hi [/INST] assistant user"]
Q, A = "What is 1+1?", "It is 2."
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello there"},
    {"role": "user", "content": Q},
]


def byte_tokenizer(template: str | None = CHATML, **special: str | None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer as GPT-2, Llama 3 and Qwen have; every text is encodable."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train(bpe, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False))
    return wrap(bpe, template, **{"bos_token": None, "eos_token": "<|im_end|>", **special})


def space_tokenizer(
    template: str | None = LLAMA_2, *, ends_with_eos: bool = False, **special: str | None
) -> PreTrainedTokenizerFast:
    """A SentencePiece-like tokenizer as Llama 2 has: words carry the space before them."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Metaspace(prepend_scheme="first")
    train(bpe, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False))
    bpe.add_special_tokens(SPECIAL)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if ends_with_eos else "<s> $A",
        special_tokens=[(token, bpe.token_to_id(token)) for token in ("<s>", "</s>")],
    )
    return wrap(bpe, template, **{"bos_token": "<s>", "eos_token": "</s>", **special})


def train(bpe: Tokenizer, trainer: trainers.BpeTrainer) -> None:
    bpe.train_from_iterator(CORPUS * 3, trainer)
    bpe.add_special_tokens(SPECIAL)


def wrap(bpe: Tokenizer, template: str | None, **special: str | None) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **special)
    tokenizer.chat_template = template
    return tokenizer


def text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def both(tokenizer: PreTrainedTokenizerBase, messages: list[Message], answer: str) -> str:
    prompt = encode_prompt(tokenizer, messages)
    return text(tokenizer, prompt + encode_completion(tokenizer, messages, answer))


CHATML_TALK = (
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello there<|im_end|>\n"
    f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "answer", "cut"),
    [
        (byte_tokenizer(), CHATML_TALK, "It is 2.<|im_end|>", "It is 2."),
        (
            byte_tokenizer(QWEN_3),
            CHATML_TALK,
            "<think>\n\n</think>\n\nIt is 2.<|im_end|>",
            "<think>\n\n</think>\n\nIt is 2.",
        ),
        (
            byte_tokenizer(PHI_3, eos_token="</s>"),
            CHATML_TALK.replace("<|im_end|>", "<end>"),
            "It is 2.<end>",
            "It is 2.",
        ),
        (
            byte_tokenizer(GEMMA, bos_token="<s>", eos_token="</s>"),
            "<s>" + CHATML_TALK.replace("<|im_start|>", "<start>").replace("<|im_end|>", "<end>"),
            "It is 2.<end>",
            "It is 2.",
        ),
        (
            byte_tokenizer(NO_END_TOKEN, eos_token="</s>"),
            f"### user:\nHi\n\n### assistant:\nHello there\n\n### user:\n{Q}\n\n### assistant:\n",
            "It is 2.</s>",
            "It is 2.",
        ),
        (
            byte_tokenizer(LLAMA_2, bos_token="<s>", eos_token="</s>"),
            f"<s>[INST] Hi [/INST] Hello there </s>[INST] {Q} [/INST] ",
            "It is 2. </s>",
            "It is 2.",
        ),
        (
            space_tokenizer(),
            f"<s>[INST] Hi [/INST] Hello there </s>[INST] {Q} [/INST] ",
            "It is 2. </s>",
            "It is 2.",
        ),
    ],
    ids=["chatml", "qwen 3", "phi 3", "gemma", "no end token", "llama 2", "llama 2 with spaces"],
)
def test_conversation_becomes_the_rendered_text(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, cut: str
) -> None:
    check_tokenizer(tokenizer, conversational=True)
    prompt_ids = encode_prompt(tokenizer, TALK)
    ids = encode_completion(tokenizer, TALK, A)
    unfinished = encode_completion(tokenizer, TALK, A, finished=False)
    assert text(tokenizer, prompt_ids) == prompt
    assert text(tokenizer, prompt_ids + ids) == prompt + answer
    assert text(tokenizer, prompt_ids + unfinished) == prompt + cut
    stops = stop_token_ids(tokenizer)
    assert ids[-1] in stops
    assert not set(stops) & {*ids[:-1], *unfinished}
    assert encode_completion(tokenizer, TALK, [{"role": "assistant", "content": A}]) == ids


def test_prompt_ids_do_not_depend_on_the_answer_where_a_token_spans_the_border() -> None:
    tokenizer = space_tokenizer()
    prompt = encode_prompt(tokenizer, TALK)
    whole = tokenizer(
        tokenizer.apply_chat_template([*TALK, {"role": "assistant", "content": A}], tokenize=False),
        add_special_tokens=False,
    )["input_ids"]
    assert whole[: len(prompt)] != prompt  # the case that needs care
    answer = encode_completion(tokenizer, TALK, A)
    assert tokenizer.convert_ids_to_tokens(answer)[0][0] != "▁"  # the prompt has the space already
    assert text(tokenizer, prompt + answer) == text(tokenizer, whole)


def test_ids_are_those_of_the_whole_text_where_the_border_holds() -> None:
    tokenizer = byte_tokenizer()
    messages = [*TALK, {"role": "assistant", "content": A}]
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    newline = tokenizer("\n")["input_ids"]
    assert encode_prompt(tokenizer, TALK) + encode_completion(tokenizer, TALK, A) + newline == whole


contents = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    lambda content: content.strip() and not any(token in content for token in SPECIAL)
)
BYTE_TOKENIZERS = [byte_tokenizer(), byte_tokenizer(NO_END_TOKEN, eos_token="</s>")]


@pytest.mark.parametrize("tokenizer", BYTE_TOKENIZERS, ids=["chatml", "no end token"])
@given(question=contents, answer=contents)
def test_any_text_survives(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> None:
    messages = [{"role": "user", "content": question}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert both(tokenizer, messages, answer) == rendered + answer + tokenizer.eos_token


def test_plain_text_gets_the_tokenizers_own_start_and_one_eos() -> None:
    tokenizer = space_tokenizer(None, ends_with_eos=True)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokenizer("Hello")["input_ids"][-1] == eos  # what must not get into a prompt
    prompt = encode_prompt(tokenizer, "Hello there")
    answer = encode_completion(tokenizer, "Hello there", ", how are you?")
    assert prompt.count(bos) == 1
    assert prompt[0] == bos
    assert eos not in prompt
    assert answer.count(eos) == 1
    assert answer[-1] == eos
    assert bos not in answer
    # such a tokenizer begins every text with a space
    assert text(tokenizer, prompt + answer) == "<s> Hello there, how are you?</s>"
    unfinished = encode_completion(tokenizer, "Hello there", ", how are you?", finished=False)
    assert [*unfinished, eos] == answer


def test_plain_text_without_special_tokens_at_the_start() -> None:
    tokenizer = byte_tokenizer(None)
    prompt = encode_prompt(tokenizer, Q)
    assert prompt == tokenizer(Q)["input_ids"]
    assert text(tokenizer, prompt) == Q


def test_plain_answer_that_writes_its_eos_has_it_once() -> None:
    tokenizer = byte_tokenizer(None)
    assert encode_completion(tokenizer, Q, A + "<|im_end|>") == encode_completion(tokenizer, Q, A)


def test_template_with_bos_and_tokenizer_with_bos_make_one() -> None:
    tokenizer = space_tokenizer()
    assert tokenizer("Hi")["input_ids"][0] == tokenizer.bos_token_id
    ids = encode_prompt(tokenizer, TALK)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("prompt", [TALK, "<s>Hello there"], ids=["template", "text"])
def test_two_bos_tokens_are_an_error(prompt: list[Message] | str) -> None:
    tokenizer = space_tokenizer(TWO_BOS)
    with pytest.raises(PrefoptError, match="begins with two BOS tokens '<s>'"):
        encode_prompt(tokenizer, prompt)
    with pytest.raises(PrefoptError, match="two BOS"):
        check_tokenizer(tokenizer, conversational=True)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("prompt", [TALK, Q], ids=["conversation", "plain"])
def test_stop_token_inside_an_answer_is_an_error(
    prompt: list[Message] | str, finished: bool
) -> None:
    with pytest.raises(PrefoptError, match=r"holds the stop token '<\|im_end\|>' before its end"):
        encode_completion(byte_tokenizer(), prompt, "It<|im_end|> is", finished=finished)


def test_find_stop() -> None:
    assert find_stop([5, 6, 2], {2}) is None
    assert find_stop([5, 2, 2], {2}) == 1
    assert find_stop([5, 6, 2], {2}, finished=False) == 2
    assert find_stop([], {2}) is None


def test_stop_tokens_of_tokenizer_template_and_model() -> None:
    tokenizer = byte_tokenizer(PHI_3, eos_token="</s>")
    eos, end, other = tokenizer.convert_tokens_to_ids(["</s>", "<end>", "<start>"])
    assert stop_token_ids(tokenizer) == sorted([eos, end])
    for of_model, expected in ((other, [eos, end, other]), ([other, eos], [eos, end, other])):
        config = GenerationConfig(eos_token_id=of_model)
        assert stop_token_ids(tokenizer, config) == sorted(expected)
    assert stop_token_ids(tokenizer, GenerationConfig()) == sorted([eos, end])
    assert stop_token_ids(byte_tokenizer(None)) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_template_may_be_changed_on_the_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    assert both(tokenizer, TALK, A).endswith("It is 2.<|im_end|>")
    tokenizer.chat_template = PHI_3
    assert both(tokenizer, TALK, A).endswith("It is 2.<end>")
    tokenizer.chat_template = {"default": CHATML, "tool_use": PHI_3}
    assert both(tokenizer, TALK, A).endswith("It is 2.<|im_end|>")


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (byte_tokenizer(None), "has no chat template and the data are conversations; set model.ch"),
        (byte_tokenizer(eos_token=None), "has no EOS token"),
        (byte_tokenizer(NO_HEADER), r"does not end a prompt with the assistant header '<\|im_sta"),
        (byte_tokenizer(THINKING), "renders a prompt differently once it is answered .*'<think>"),
        (byte_tokenizer(UNANSWERED), "leaves out the assistant's answer"),
        (
            byte_tokenizer("{{ raise_exception('never') }}"),
            r"refuses a conversation with the roles user \(never\)",
        ),
    ],
)
def test_unusable_tokenizer(tokenizer: PreTrainedTokenizerBase, message: str) -> None:
    with pytest.raises(PrefoptError, match=message) as error:
        check_tokenizer(tokenizer, conversational=True)
    assert "\n" not in str(error.value)


def test_plain_text_needs_an_eos_token_only() -> None:
    check_tokenizer(byte_tokenizer(None), conversational=False)
    check_tokenizer(byte_tokenizer(NO_HEADER), conversational=False)
    with pytest.raises(PrefoptError, match="has no EOS token"):
        check_tokenizer(byte_tokenizer(None, eos_token=None), conversational=False)


def test_errors_name_the_tokenizer_and_the_roles() -> None:
    tokenizer = byte_tokenizer(GEMMA, bos_token="<s>")
    tokenizer.name_or_path = "owner/model"
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": Q}]
    expected = r"owner/model refuses .* roles system, user \(System role not supported\)"
    with pytest.raises(PrefoptError, match=expected):
        encode_prompt(tokenizer, messages)


def test_half_a_character_is_an_error_that_shows_where() -> None:
    with pytest.raises(PrefoptError, match=r"half of a character, '\\ud83d', after 'fish '"):
        encode_prompt(byte_tokenizer(), "fish \ud83d")


def test_plain_prompt_with_messages_as_answer_is_an_error() -> None:
    with pytest.raises(PrefoptError, match="a plain prompt has messages as its answer"):
        encode_completion(byte_tokenizer(), Q, [{"role": "assistant", "content": A}])


# Templates of well-known models; "<eos>" is put where the template itself ends no turn.
KNOWN = {
    "cohere2": ("<|END_OF_TURN_TOKEN|>", "It is 2.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "gemma": ("<eos>", "It is 2.<end_of_turn>"),
    "glm4moe": ("<eos>", "\n<think></think>\nIt is 2.<eos>"),
    "gptoss": ("<|return|>", "<|channel|>final<|message|>It is 2.<|return|>"),
    "llama3": ("<|end_of_text|>", "It is 2.<|eot_id|>"),
    "phi3": ("<|endoftext|>", "It is 2.<|end|>"),
    "qwen2_5": ("<|im_end|>", "It is 2.<|im_end|>"),
    "qwen3": ("<|im_end|>", "<think>\n\n</think>\n\nIt is 2.<|im_end|>"),
    "qwen3_6": ("<|im_end|>", "\n</think>\n\nIt is 2.<|im_end|>"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_templates_of_well_known_models(name: str) -> None:
    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not path.exists():
        pytest.skip("this version of trl does not carry the template")
    template = path.read_text(encoding="utf-8")
    eos, answer = KNOWN[name]
    tokenizer = byte_tokenizer(template, bos_token="<s>", eos_token=eos)
    tokenizer.add_tokens(
        sorted(set(re.findall(r"<\|\w+\|>|</?\w+_of_turn>", template))), special_tokens=True
    )
    check_tokenizer(tokenizer, conversational=True)
    prompt = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert both(tokenizer, TALK, A) == prompt + answer
    assert encode_completion(tokenizer, TALK, A)[-1] in stop_token_ids(tokenizer)
