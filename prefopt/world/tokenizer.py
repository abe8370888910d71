"""A word-level tokenizer for the generated world, saved and loaded like any other."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prefopt.world import grammar

MAX_LENGTH = 256
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<system>", "<user>", "<assistant>")
# What a pairwise preference model reads and says besides the world's own words.
COMPARISON_WORDS = (
    "[CONTEXT]", "<turn>", "user", "assistant", "[RESPONSE", "A]", "B]", "A", "B",
)  # fmt: skip
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role ' ~ message['role']) }}
    {%- endif %}
    {{- '<' ~ message['role'] ~ '>' ~ message['content'] }}
    {%- if message['role'] == 'assistant' %}
        {{- eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<assistant>' }}
{%- endif %}"""


def world_words() -> list[str]:
    """Every word and punctuation mark of the world, in a fixed order, without repetition."""
    kinds = grammar.KINDS.values()
    texts = [
        *(phrasing.format("") for kind in kinds for phrasing in kind.phrasings),
        *(kind.follow_up for kind in kinds if kind.follow_up),
        *(phrase for phrases in grammar.PHRASES.values() for phrase in phrases),
        *(word for kind in kinds for word in (*kind.operands, *kind.answers)),
        ".",
    ]
    return list(dict.fromkeys(" ".join(texts).split()))


def world_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer: one token per word, so that texts and token ids map one to one."""
    words = (*SPECIAL_TOKENS, *world_words(), *COMPARISON_WORDS)
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<system>", "<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
