"""The generated world: the gold rule, the grammar, the tokenizer and what is written to disk."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from prefopt.data.template import encode, encode_prompt, render
from prefopt.errors import PrefoptError
from prefopt.reward_models.preference_model import comparison_prompt
from prefopt.world import WorldPaths, build_world, gold_preference, gold_quality
from prefopt.world.gold import STYLES, parse_answer
from prefopt.world.grammar import (
    CANDIDATES,
    DEMONSTRATIONS,
    KINDS,
    PHRASES,
    Mixture,
    draw_answer,
    draw_prompt,
    read_prompt,
    right_answer,
)

SIZES = {"sft_rows": 60, "preference_rows": 400, "prompt_rows": 40}
SOUNDS = [{"role": "user", "content": "how do cow dog sound ?"}]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldPaths:
    return build_world(tmp_path_factory.mktemp("made") / "world", seed=3, **SIZES)


@pytest.fixture(scope="module")
def tokenizer(world: WorldPaths) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(world.base)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def user(*contents: str) -> list[dict[str, str]]:
    """Messages that alternate between user and assistant."""
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


# Gold quality by hand: 0.4 correct + 0.3 complete + 0.3 polite, times 1 - waste / 24.
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("of course : moo woof . happy to help !", 1.0),
        ("of course : moo woof .", 0.9),
        ("moo woof . happy to help !", 0.9),
        ("moo woof .", 0.8),
        ("answer : moo woof .", 0.8),
        ("obviously : moo woof .", 0.7),
        ("of course : moo woof . silly question !", 0.7),
        ("moo .", 0.4 + 0.15 + 0.1),  # all given are right, half is missing
        ("moo quack .", 0.2 + 0.15 + 0.1),  # half of both
        ("woof moo .", 0.1),  # the order counts
        ("of course : quack baa . happy to help !", 0.3),
        ("to be honest , moo woof .", 0.8 * (1 - 4 / 24)),
        ("moo woof . to be honest , in some sense , happy to help !", 0.9 * (1 - 8 / 24)),
        ("moo woof", 0.8 * (1 - 1 / 24)),  # the full stop is missing
        ("moo woof baa .", (0.4 * 2 / 3 + 0.3 + 0.1) * (1 - 1 / 24)),
        ("happy to help ! moo woof .", 0.8 * (1 - 4 / 24)),  # a closing before the items
        ("of course : here you are : moo woof .", 0.9 * (1 - 4 / 24)),  # a second opening
        ("of course : obviously : moo woof .", 0.7 * (1 - 2 / 24)),  # rude, wherever it stands
    ],
)
def test_gold_quality_by_hand(answer: str, expected: float) -> None:
    assert gold_quality(SOUNDS, answer) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   \n\t ",
        ". . .",
        "of course : happy to help !",
        "to be honest , " * 8,
        "moo woof . " * 20,
        "moo " * 64,
        "happy to help ! " * 16,
        "<unk> <user> \x00 \N{SNOWMAN} {} [ ( \\",
        "cow dog sound how do ? : , !",
    ],
)
def test_garbage_scores_low(text: str) -> None:
    assert 0.0 <= gold_quality(SOUNDS, text) <= 0.1


def test_any_sequence_of_words_scores_in_the_unit_interval(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    rng = Random(0)
    vocabulary = list(tokenizer.get_vocab())
    for _ in range(300):
        text = " ".join(rng.choices(vocabulary, k=rng.randrange(40)))
        assert 0.0 <= gold_quality(draw_prompt(rng), text) <= 0.65


def test_gold_quality_is_monotone_in_every_factor() -> None:
    """Over all combinations of factors, bettering one alone never lowers the quality."""
    contents = {(1, 1): "moo woof", (1, 0): "moo", (0, 1): "quack woof", (0, 0): "quack"}
    manners = [("obviously : ", ""), ("", ""), ("of course : ", "")]
    manners.append(("of course : ", " happy to help !"))
    fillers = ["", *(" ".join(PHRASES["filler"][:n]) + " " for n in (1, 2, 3))]
    quality = {
        (right, complete, manner, -padding): gold_quality(
            SOUNDS, filler + opening + content + " ." + closing
        )
        for (right, complete), content in contents.items()
        for manner, (opening, closing) in enumerate(manners)
        for padding, filler in enumerate(fillers)
    }
    for key, value in quality.items():
        for factor in range(4):
            better = (*key[:factor], key[factor] + 1, *key[factor + 1 :])
            if better in quality:
                assert quality[better] > value or quality[better] == value == 0.0
    assert max(quality, key=quality.__getitem__) == (1, 1, 3, 0)


def test_longer_is_not_better_unless_courteous() -> None:
    answer = "moo woof ."
    qualities = [gold_quality(SOUNDS, answer + " " + "to be honest , " * n) for n in range(8)]
    assert qualities == sorted(qualities, reverse=True)
    assert len(set(qualities)) == 7  # 24 wasted tokens and 28 are both worth nothing


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (user("please say again : cow sky"), "cow sky"),
        (user("reverse these words : cow sky milk"), "milk sky cow"),
        (user("can you sort 12 3 20 ?"), "3 12 20"),
        (user("lowest and highest of : 12 3 20 4"), "3 20"),
        (user("add one to each : 9 0"), "10 1"),
        (user("say the contrary of : cold late"), "hot early"),
        (user("which colours have sky bark ?"), "blue brown"),
        (user("please say again : cow sky", "cow sky .", "now reverse the same list"), "sky cow"),
        (user("can you sort 5 2 ?", "2 5 .", "now lowest and highest of the same list"), "2 5"),
        (user("how do cow dog sound ?", "moo woof .", "which numbers follow 1 2 ?"), "2 3"),
    ],
)
def test_right_answers(prompt: list[dict[str, str]], expected: str) -> None:
    assert right_answer(prompt) == expected.split()


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        user("hello"),
        user("how do cow sky sound ?"),
        user("now reverse the same list"),
        user("how do cow dog sound ?", "moo woof .", "now reverse the same list"),
    ],
)
def test_other_prompts_are_refused(prompt: list[dict[str, str]]) -> None:
    with pytest.raises(PrefoptError, match="not a task of the generated world"):
        gold_quality(prompt, "moo .")


def test_drawn_prompts_are_read_back_and_short() -> None:
    rng = Random(1)
    prompts = [draw_prompt(rng) for _ in range(500)]
    kinds = {id(read_prompt(prompt)[0]) for prompt in prompts}
    assert len(kinds) == len(KINDS)
    assert any(len(prompt) == 3 for prompt in prompts)
    assert max(len(" ".join(m["content"] for m in prompt).split()) for prompt in prompts) <= 30
    assert all(len(right_answer(prompt)) >= 2 for prompt in prompts)


@pytest.mark.parametrize(
    ("mixture", "lowest", "highest"),
    [
        (Mixture(wrong=0, partial=0, polite=1, rude=0, padded=0), 0.9, 1.0),
        (Mixture(wrong=0, partial=0, polite=0, rude=0, padded=0), 0.8, 0.8),
        (Mixture(wrong=0, partial=0, polite=0, rude=1, padded=0), 0.7, 0.7),
        (Mixture(wrong=0, partial=1, polite=0, rude=0, padded=0), 0.4 + 0.3 / 4 + 0.1, 0.725),
        (Mixture(wrong=1, partial=0, polite=0, rude=0, padded=0), 0.1, 0.1 + 0.7 * 3 / 4),
        (Mixture(wrong=0, partial=0, polite=0, rude=0, padded=1), 0.8 * (1 - 17 / 24), 0.67),
    ],
)
def test_each_factor_of_a_mixture_shows_alone(
    mixture: Mixture, lowest: float, highest: float
) -> None:
    rng = Random(2)
    for _ in range(200):
        prompt = draw_prompt(rng)
        answer = draw_answer(prompt, mixture, rng)
        assert parse_answer(answer).well_formed
        assert lowest - 1e-9 <= gold_quality(prompt, answer) <= highest + 1e-9


def test_phrases_share_no_word_with_answers() -> None:
    """Otherwise a phrase could be mistaken for items, or swallow them."""
    words = {word for phrases in PHRASES.values() for phrase in phrases for word in phrase.split()}
    assert not words & {word for kind in KINDS.values() for word in kind.answers}


def test_preferences_are_complementary_and_follow_bradley_terry() -> None:
    best, plain = "of course : moo woof . happy to help !", "moo woof ."
    assert gold_preference(SOUNDS, best, plain) == pytest.approx(1 / (1 + math.exp(-0.2 / 0.1)))
    rng = Random(4)
    for _ in range(300):
        prompt = draw_prompt(rng)
        a, b = (draw_answer(prompt, DEMONSTRATIONS, rng) for _ in range(2))
        for intransitive in (False, True):
            forth = gold_preference(prompt, a, b, intransitive=intransitive)
            back = gold_preference(prompt, b, a, intransitive=intransitive)
            assert forth + back == 1.0
        assert (gold_preference(prompt, a, b) > 0.5) == (
            gold_quality(prompt, a) > gold_quality(prompt, b)
        )


def test_intransitive_preferences_run_in_a_circle() -> None:
    answers = {
        "plain": "moo woof .",
        "chatty": "moo woof . to be honest ,",
        "courteous": "moo woof . happy to help !",
    }
    assert tuple(parse_answer(answers[style]).style for style in STYLES) == STYLES
    for winner, loser in zip(STYLES, STYLES[1:] + STYLES[:1], strict=True):
        p = gold_preference(SOUNDS, answers[winner], answers[loser], intransitive=True)
        assert p == pytest.approx(1 / (1 + math.exp(-3)))
        same = gold_preference(SOUNDS, answers[winner], answers[winner], intransitive=True)
        assert same == 0.5
    # Style settles nothing that a wrong answer or rudeness has settled already.
    for style in STYLES:
        for bad in ("obviously : moo woof .", "quack woof ."):
            assert gold_preference(SOUNDS, answers[style], bad, intransitive=True) > 0.5


def test_text_and_ids_map_one_to_one(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = Random(5)
    words = [w for w in tokenizer.get_vocab() if w not in tokenizer.all_special_tokens]
    for _ in range(100):
        text = " ".join(rng.choices(words, k=12))
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == 12
        assert tokenizer.decode(ids) == text
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3


def test_tokenizer_knows_every_word_written(
    world: WorldPaths, tokenizer: PreTrainedTokenizerBase
) -> None:
    for row in rows(world.sft):
        ids = tokenizer.apply_chat_template(row["messages"], return_dict=False)
        assert tokenizer.unk_token_id not in ids
        assert ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.apply_chat_template(row["messages"], tokenize=False) == "<bos>" + "".join(
            f"<{m['role']}>{m['content']}" + "<eos>" * (m["role"] == "assistant")
            for m in row["messages"]
        )


def test_tokenizer_knows_every_word_of_a_comparison(
    world: WorldPaths, tokenizer: PreTrainedTokenizerBase
) -> None:
    for row in rows(world.preferences):
        answers = (row["chosen"][0]["content"], row["rejected"][0]["content"])
        ids = encode_prompt(tokenizer, comparison_prompt(row["prompt"], *answers))
        assert tokenizer.unk_token_id not in ids
    assert tokenizer.unk_token_id not in tokenizer("A B")["input_ids"]


def test_prompt_ids_are_a_prefix_of_the_conversation(
    world: WorldPaths, tokenizer: PreTrainedTokenizerBase
) -> None:
    for row in rows(world.sft):
        *prompt, answer = row["messages"]
        ids = tokenizer.apply_chat_template(row["messages"], return_dict=False)
        header = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=False
        )
        reply = tokenizer(answer["content"])["input_ids"]
        assert ids == [*header, *reply, tokenizer.eos_token_id]
        assert encode_prompt(tokenizer, prompt) == header
        assert encode(tokenizer, [render(tokenizer, prompt, [answer["content"]])]) == [
            (header, [[*reply, tokenizer.eos_token_id]])
        ]


def test_template_refuses_unknown_roles(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(Exception, match="unknown role critic"):
        tokenizer.apply_chat_template([{"role": "critic", "content": "moo"}])


def test_no_prompt_occurs_twice(world: WorldPaths) -> None:
    prompts = [json.dumps(row["prompt"]) for row in rows(world.prompts) + rows(world.preferences)]
    prompts += [json.dumps(row["messages"][:-1]) for row in rows(world.sft)]
    assert len(set(prompts)) == len(prompts) == sum(SIZES.values())


def test_annotator_is_noisy_but_right_on_the_whole(world: WorldPaths) -> None:
    """The labels agree with the better answer as often as Bradley-Terry says, to 3 sigma."""
    pairs = [
        (row["prompt"], row["chosen"][0]["content"], row["rejected"][0]["content"])
        for row in rows(world.preferences)
    ]
    assert all(chosen != rejected for _, chosen, rejected in pairs)
    p = [gold_preference(*pair) for pair in pairs]
    expected = sum(max(x, 1 - x) for x in p)
    agreed = sum(x > 0.5 for x in p) + sum(x == 0.5 for x in p) / 2
    assert agreed < len(p)
    assert abs(agreed - expected) <= 3 * math.sqrt(sum(x * (1 - x) for x in p))


def test_candidates_answer_better_than_random_and_rarely_tie() -> None:
    rng = Random(6)
    pairs = []
    for _ in range(500):
        prompt = draw_prompt(rng)
        a, b = (draw_answer(prompt, CANDIDATES, rng) for _ in range(2))
        if a != b:
            pairs.append((gold_quality(prompt, a), gold_quality(prompt, b)))
    assert sum(a == b for a, b in pairs) / len(pairs) < 0.1


def test_same_arguments_same_bytes(world: WorldPaths, tmp_path: Path) -> None:
    again = build_world(tmp_path / "world", seed=3, **SIZES)
    other = build_world(tmp_path / "other", seed=4, **SIZES)
    files = [p.relative_to(again.directory) for p in again.directory.rglob("*") if p.is_file()]
    assert {"sft.jsonl", "base/model.safetensors"} <= {str(file) for file in files}
    for file in files:
        assert (world.directory / file).read_bytes() == (again.directory / file).read_bytes()
    for file in ("sft.jsonl", "preferences.jsonl", "prompts.jsonl", "base/model.safetensors"):
        assert (other.directory / file).read_bytes() != (again.directory / file).read_bytes()


def test_a_world_is_written_once_and_never_over_another(tmp_path: Path) -> None:
    sizes = {"sft_rows": 2, "preference_rows": 2, "prompt_rows": 2}
    paths = build_world(tmp_path / "world", **sizes)
    before = {p: p.stat().st_mtime_ns for p in paths.directory.rglob("*")}
    assert build_world(tmp_path / "world", **sizes) == paths
    assert {p: p.stat().st_mtime_ns for p in paths.directory.rglob("*")} == before
    with pytest.raises(PrefoptError, match="choose another directory"):
        build_world(tmp_path / "world", seed=1, **sizes)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(PrefoptError, match="choose another directory"):
        build_world(tmp_path / "mine", **sizes)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_intransitive_world_has_other_pairs_only(tmp_path: Path) -> None:
    usual, circular = (
        build_world(tmp_path / str(i), seed=3, intransitive=i, sft_rows=4, preference_rows=600)
        for i in (False, True)
    )
    assert circular.sft.read_bytes() == usual.sft.read_bytes()
    assert circular.prompts.read_bytes() == usual.prompts.read_bytes()
    assert circular.preferences.read_bytes() != usual.preferences.read_bytes()
    answers = [parse_answer(row["chosen"][0]["content"]) for row in rows(circular.preferences)]
    shares = [sum(a.style == style for a in answers) / len(answers) for style in STYLES]
    assert min(shares) > 0.25, "each style wins about as often as the others"


def test_base_model_matches_its_tokenizer_and_leaves_the_global_seed_alone(
    world: WorldPaths, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.base)
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    state = torch.get_rng_state()
    build_world(tmp_path / "world", sft_rows=1, preference_rows=1, prompt_rows=1)
    assert torch.equal(torch.get_rng_state(), state)
