from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_data_template import CHATML, GEMMA, Q, byte_tokenizer, space_tokenizer
from transformers import PreTrainedTokenizerBase

from prefopt.data import tokenize
from prefopt.data.report import data_report
from prefopt.data.rows import Demonstration, PreferencePair, PromptRow, parse_pair, validate
from prefopt.data.sources import Source, read_rows, read_sources
from prefopt.data.template import encode_completion, encode_prompt
from prefopt.data.tokenize import (
    DropCounts,
    PromptedAnswers,
    PromptedPairs,
    Ragged,
    TokenizedDemonstrations,
    TokenizedPairs,
    TokenizedPrompts,
    occurrences,
    tokenize_demonstrations,
    tokenize_pairs,
    tokenize_prompts,
)
from prefopt.errors import PrefoptError

HH = Path(__file__).parents[2] / "shared" / "data" / "hh" / "hh_harmless_1899.jsonl.gz"
needs_hh = pytest.mark.skipif(not HH.exists(), reason="needs ../shared/data/hh")
NO_LIMIT = {"max_prompt_length": None, "max_length": None}


def pair(question: str, chosen: str, rejected: str, where: str = "a:1") -> PreferencePair:
    return PreferencePair(
        [{"role": "user", "content": question}],
        [{"role": "assistant", "content": chosen}],
        [{"role": "assistant", "content": rejected}],
        where=where,
    )


def plain(prompt: int, chosen: int, rejected: int, where: str = "a:1") -> PreferencePair:
    """A pair of "z"s, one token each; an answer has its EOS besides, and ends apart with "y"."""
    return PreferencePair("z" * prompt, "z" * chosen, "z" * (rejected - 1) + "y", where=where)


PAIRS = [pair(Q, "It is 2.", "Three"), pair("Hello there", "Hi", "What?", "a:2")]


def test_ragged_rows() -> None:
    rows = [[1, 2, 3], [], [4]]
    ragged = Ragged(rows)
    assert list(ragged) == rows
    assert ragged[-1] == [4]
    assert ragged.lengths.tolist() == [3, 0, 1]
    with pytest.raises(IndexError):
        ragged[3]
    assert list(pickle.loads(pickle.dumps(ragged))) == rows
    assert Ragged().lengths.tolist() == []


def test_ragged_takes_four_bytes_a_token() -> None:
    ragged = Ragged([1] * 1000 for _ in range(1000))
    assert len(pickle.dumps(ragged, protocol=5)) < 4.1e6


def test_pairs_are_encoded_as_one_by_one() -> None:
    tokenizer = byte_tokenizer()
    soft = replace(PAIRS[1], p_chosen=0.25, margin=2.0)
    tokenized = tokenize_pairs([PAIRS[0], soft], tokenizer, **NO_LIMIT)
    assert len(tokenized) == 2
    assert tokenized.dropped == DropCounts()
    for item, source in zip(tokenized, [PAIRS[0], soft], strict=True):
        assert item == {
            "prompt_ids": encode_prompt(tokenizer, source.prompt),
            "chosen_ids": encode_completion(tokenizer, source.prompt, source.chosen),
            "rejected_ids": encode_completion(tokenizer, source.prompt, source.rejected),
            "p_chosen": source.p_chosen,
            "margin": source.margin,
            "where": source.where,
        }


def test_batches_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = space_tokenizer()
    pairs = [pair(Q * (1 + i % 3), "It" * i, "is") for i in range(1, 8)]
    whole = list(tokenize_pairs(pairs, tokenizer, **NO_LIMIT))
    monkeypatch.setattr(tokenize, "_BATCH", 3)
    assert list(tokenize_pairs(pairs, tokenizer, **NO_LIMIT)) == whole


def test_limits_drop_whole_pairs_and_cut_nothing() -> None:
    tokenizer = byte_tokenizer(None)
    pairs = [
        plain(10, 4, 4, "fits"),
        plain(11, 1, 2, "prompt too long"),
        plain(10, 5, 4, "chosen too long"),
        plain(10, 4, 5, "rejected too long"),
        plain(5, 9, 9, "short prompt, long answers"),
    ]
    tokenized = tokenize_pairs(pairs, tokenizer, max_prompt_length=10, max_length=15)
    assert tokenized.where == ["fits", "short prompt, long answers"]
    assert tokenized.dropped == DropCounts(prompt_too_long=1, answer_too_long=2)
    assert tokenized.dropped.total == 3
    assert tokenized.prompt_ids.lengths.tolist() == [10, 5]
    assert tokenized.chosen_ids.lengths.tolist() == [5, 10]  # with EOS
    assert len(tokenize_pairs(pairs, tokenizer, **NO_LIMIT)) == 5


def test_answers_that_are_the_same_tokens_or_hold_a_stop_token_are_dropped() -> None:
    tokenizer = byte_tokenizer(GEMMA, bos_token="<s>", eos_token="</s>")
    pairs = [
        *PAIRS,
        pair(Q, "It is 2.", " It is 2. "),  # the template trims
        pair(Q, "It </s> is", "2"),
        pair(Q, "2", "It <end> is"),
    ]
    tokenized = tokenize_pairs(pairs, tokenizer, **NO_LIMIT)
    assert len(tokenized) == 2
    assert tokenized.dropped == DropCounts(stop_token_inside=2, identical=1)


def test_prompt_longer_than_the_limit_everywhere() -> None:
    pairs = [plain(12, 2, 2), plain(9, 2, 2)]
    with pytest.raises(
        PrefoptError,
        match="prompt longer than the limit everywhere: the shortest has 9 tokens, max_prompt_len",
    ):
        tokenize_pairs(pairs, byte_tokenizer(None), max_prompt_length=8, max_length=None)


def test_nothing_left_says_why() -> None:
    pairs = [plain(12, 2, 2), plain(9, 4, 2), plain(3, 20, 2)]
    with pytest.raises(PrefoptError, match="1 prompts exceed max_prompt_length=10") as error:
        tokenize_pairs(pairs, byte_tokenizer(), max_prompt_length=10, max_length=13)
    assert "the shortest prompt has 3 tokens, 14 with its answer" in str(error.value)
    assert "\n" not in str(error.value)


def test_no_rows_is_an_error() -> None:
    with pytest.raises(PrefoptError, match="found no rows"):
        tokenize_pairs([], byte_tokenizer(), **NO_LIMIT)


def test_errors_of_the_template_name_the_row() -> None:
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": Q}]
    pairs = [*PAIRS, replace(PAIRS[0], prompt=system, where="pairs.jsonl:9")]
    tokenizer = byte_tokenizer(GEMMA, bos_token="<s>", eos_token="</s>")
    with pytest.raises(PrefoptError, match=r"^pairs\.jsonl:9: .*System role not supported"):
        tokenize_pairs(pairs, tokenizer, **NO_LIMIT)
    doubled = [PreferencePair("<s>a", "b", "c", where="pairs.jsonl:3")]
    with pytest.raises(PrefoptError, match=r"^pairs\.jsonl:3: .*two BOS"):
        tokenize_pairs(doubled, space_tokenizer(None), **NO_LIMIT)


def test_demonstrations() -> None:
    tokenizer = byte_tokenizer()
    demonstrations = [
        Demonstration(PAIRS[0].prompt, PAIRS[0].chosen, "a:1"),
        Demonstration(PAIRS[0].prompt, "no " * 100, "a:2"),
    ]
    tokenized = tokenize_demonstrations(
        demonstrations, tokenizer, max_prompt_length=None, max_length=60
    )
    assert list(tokenized) == [
        {
            "prompt_ids": encode_prompt(tokenizer, PAIRS[0].prompt),
            "completion_ids": encode_completion(tokenizer, PAIRS[0].prompt, PAIRS[0].chosen),
            "where": "a:1",
        }
    ]
    assert tokenized.dropped == DropCounts(answer_too_long=1)


def test_prompts_keep_their_text() -> None:
    tokenizer = space_tokenizer()
    prompts = [PAIRS[0].prompt, "there " * 60, "Hello"]
    tokenized = tokenize_prompts(prompts, tokenizer, max_prompt_length=50)  # both kinds mixed
    assert list(tokenized) == [
        {"prompt_ids": encode_prompt(tokenizer, prompt), "prompt": prompt, "where": where}
        for prompt, where in ((prompts[0], "prompt 1"), (prompts[2], "prompt 3"))
    ]
    assert tokenized.dropped == DropCounts(prompt_too_long=1)


def test_prompts_wanted_once_keep_their_first_place() -> None:
    rows = [PromptRow(text, f"p.jsonl:{i}") for i, text in enumerate(("Hi", "Hello", "Hi"), 1)]
    tokenized = tokenize_prompts(rows, space_tokenizer(), max_prompt_length=None, distinct=True)
    assert (tokenized.prompt, tokenized.where) == (["Hi", "Hello"], ["p.jsonl:1", "p.jsonl:2"])
    assert tokenized.dropped == DropCounts(duplicate=1)


DEMONSTRATIONS = [Demonstration(p.prompt, p.chosen, p.where) for p in PAIRS]


def test_pairs_keep_the_text_of_their_prompts() -> None:
    tokenizer = byte_tokenizer()
    pairs = [PAIRS[0], pair(Q, "same", "same"), pair("Hi " * 90, "a", "b"), PAIRS[1]]
    limits = {"max_prompt_length": 90, "max_length": None}
    kept = tokenize_pairs(pairs, tokenizer, **limits, keep_prompts=True)
    assert isinstance(kept, PromptedPairs)
    assert isinstance(kept, TokenizedPrompts)
    assert kept.prompt == [PAIRS[0].prompt, PAIRS[1].prompt]
    without = tokenize_pairs(pairs, tokenizer, **limits)
    assert kept.dropped == without.dropped == DropCounts(identical=1, prompt_too_long=1)
    assert list(kept) == [
        {**item, "prompt": source.prompt} for item, source in zip(without, PAIRS, strict=True)
    ]


def test_answers_keep_the_text_of_their_prompts() -> None:
    tokenizer = byte_tokenizer()
    items = [DEMONSTRATIONS[0], Demonstration(Q, "so <|im_end|> it"), DEMONSTRATIONS[1]]
    kept = tokenize_demonstrations(items, tokenizer, **NO_LIMIT, keep_prompts=True)
    assert isinstance(kept, PromptedAnswers)
    assert isinstance(kept, TokenizedPrompts)
    without = tokenize_demonstrations(items, tokenizer, **NO_LIMIT)
    assert kept.dropped == without.dropped == DropCounts(stop_token_inside=1)
    assert list(kept) == [
        {**item, "prompt": source.prompt}
        for item, source in zip(without, DEMONSTRATIONS, strict=True)
    ]


@pytest.mark.parametrize("column", ["prompt", "chosen_ids", "rejected_ids", "p_chosen"])
def test_fingerprint_covers_the_text_and_the_pair(column: str) -> None:
    kept = [tokenize_pairs(PAIRS, byte_tokenizer(), **NO_LIMIT, keep_prompts=True) for _ in "ab"]
    assert kept[0].fingerprint == kept[1].fingerprint
    changed = {"prompt": ["other"] * 2, "p_chosen": [0.5] * 2}.get(column, Ragged([[1], [2]]))
    setattr(kept[1], column, changed)
    assert kept[0].fingerprint != kept[1].fingerprint


def test_occurrences_number_the_rows_of_a_prompt() -> None:
    rows = [[1, 2], [1], [1, 2], [2, 1], [], [1, 2], [1], []]
    assert occurrences(Ragged(rows)) == [0, 0, 1, 0, 0, 2, 1, 1]
    assert occurrences(Ragged()) == []


def pairs_of_lengths(lengths: list[tuple[int, int, int]], where: list[str]) -> TokenizedPairs:
    tokenized = TokenizedPairs()
    for (prompt, chosen, rejected), place in zip(lengths, where, strict=True):
        tokenized.prompt_ids.append([5] * prompt)
        tokenized.chosen_ids.append([6] * chosen)
        tokenized.rejected_ids.append([7] * rejected)
        tokenized.p_chosen.append(1.0)
        tokenized.margin.append(0.0)
        tokenized.where.append(place)
    return tokenized


def test_report_numbers() -> None:
    lengths = [(i, 2 * i, 100) for i in range(1, 101)]
    tokenized = pairs_of_lengths(lengths, [f"a:{i}" for i in range(1, 101)])
    tokenized.dropped.identical = 3
    report = data_report(tokenized, byte_tokenizer(), invalid={"empty prompt": 2})
    assert report["rows"] == 100
    assert report["invalid"] == {"empty prompt": 2}
    assert report["dropped"] == {"identical": 3}
    assert report["tokens"] == {
        "prompt": {"p5": 5, "p50": 50, "p95": 95, "p99": 99, "max": 100},
        "chosen": {"p5": 10, "p50": 100, "p95": 190, "p99": 198, "max": 200},
        "rejected": {"p5": 100, "p50": 100, "p95": 100, "p99": 100, "max": 100},
    }
    assert report["chosen_longer"] == 0.5  # 2 i > 100 from i = 51 on
    assert report["duplicates"] == 0
    json.dumps(report)


def test_report_counts_duplicates_but_not_the_copies_of_a_mixture() -> None:
    lengths = [(3, 1, 2), (3, 1, 2), (3, 2, 1), (3, 1, 2), (3, 1, 2), (3, 1, 2)]
    where = ["a:1", "a:1", "a:2", "a:3", "a:3", "b:1"]
    assert data_report(pairs_of_lengths(lengths, where), byte_tokenizer())["duplicates"] == 2


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "chosen"),
    [
        (byte_tokenizer(), f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n", "It is 2."),
        (space_tokenizer(), f"<s>[INST] {Q} [/INST] ", "It is 2. "),
    ],
    ids=["chatml", "llama 2"],
)
def test_report_shows_one_example(
    tokenizer: PreTrainedTokenizerBase, prompt: str, chosen: str
) -> None:
    example = data_report(tokenize_pairs(PAIRS, tokenizer, **NO_LIMIT), tokenizer)["example"]
    assert example["where"] == "a:1"
    pieces = example["chosen"]
    read = ["".join(p["text"] for p in pieces if p["loss"] is loss) for loss in (False, True)]
    assert read == [prompt, chosen + tokenizer.eos_token]
    assert pieces[-1] == {"text": tokenizer.eos_token, "loss": True, "special": True}
    assert pieces[-2] == {"text": chosen, "loss": True, "special": False}
    of_prompt = [piece for piece in pieces if not piece["loss"]]
    assert [piece for piece in example["rejected"] if not piece["loss"]] == of_prompt


def test_report_of_demonstrations() -> None:
    demonstrations = [Demonstration(Q, "It is 2.", "a:1")]
    tokenizer = byte_tokenizer(None)
    report = data_report(tokenize_demonstrations(demonstrations, tokenizer, **NO_LIMIT), tokenizer)
    assert set(report["tokens"]) == {"prompt", "completion"}
    assert "chosen_longer" not in report
    read = [piece["text"] for piece in report["example"]["completion"] if piece["loss"]]
    assert read == ["It is 2.", "<|im_end|>"]


def test_report_does_not_depend_on_kept_prompts() -> None:
    tokenizer = byte_tokenizer()
    pairs = [
        tokenize_pairs(PAIRS, tokenizer, **NO_LIMIT, keep_prompts=keep) for keep in (False, True)
    ]
    report = data_report(pairs[1], tokenizer)
    assert report == data_report(pairs[0], tokenizer)
    assert "chosen_longer" in report
    json.dumps(report)
    answers: list[TokenizedDemonstrations] = [
        tokenize_demonstrations(DEMONSTRATIONS, tokenizer, **NO_LIMIT, keep_prompts=keep)
        for keep in (False, True)
    ]
    report = data_report(answers[1], tokenizer)
    assert report == data_report(answers[0], tokenizer)
    assert set(report["tokens"]) == {"prompt", "completion"}


@needs_hh
def test_hh_rows_keep_their_text_and_order() -> None:
    tokenizer = byte_tokenizer(CHATML)
    pairs, _ = validate(read_rows(HH), parse_pair)
    tokenized = tokenize_pairs(pairs, tokenizer, **NO_LIMIT)
    assert (len(tokenized), tokenized.dropped) == (1899, DropCounts())
    for index in range(0, 1899, 50):
        item, source = tokenized[index], pairs[index]
        messages = source.prompt + source.rejected
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(item["prompt_ids"] + item["rejected_ids"]) + "\n" == rendered
        assert item["where"] == source.where
    report = data_report(tokenized, tokenizer)
    # characters say that the chosen answer is the shorter one in 55.4 % of the pairs
    assert report["chosen_longer"] == pytest.approx(0.446, abs=0.03)


@needs_hh
def test_mixture_to_tokens_is_the_same_every_time() -> None:
    sources = [Source(str(HH), 0.1), Source(str(HH), 0.05)]

    def tokens() -> np.ndarray:
        pairs, _ = validate(read_sources(sources, seed=4), parse_pair)
        tokenized = tokenize_pairs(pairs, byte_tokenizer(), **NO_LIMIT)
        return np.concatenate([item["chosen_ids"] for item in tokenized])

    np.testing.assert_array_equal(tokens(), tokens())
