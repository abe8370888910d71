"""The pairwise preference model: what it reads, how it judges, how it is trained and measured."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from prefopt.data.rows import PreferencePair
from prefopt.data.tree import PromptTree, collate_trees
from prefopt.errors import PrefoptError
from prefopt.eval.preference_model import preference_model_report
from prefopt.judge import Judge
from prefopt.models.logprobs import sequence_log_probs
from prefopt.reward_models import PreferenceModel, RewardModel, load_judge
from prefopt.reward_models.preference_model import (
    ANSWERS,
    ComparisonEncoder,
    comparison_prompt,
    position_average,
    render_context,
)
from prefopt.reward_models.preference_trainer import (
    PreferenceModelConfig,
    PreferenceModelTrainer,
    comparison_dataset,
    tokenize_comparisons,
)
from prefopt.reward_models.reading import within_budget
from prefopt.trainers.base import TreeDataset
from prefopt.trainers.checkpoints import last_complete_checkpoint
from prefopt.world.tokenizer import world_tokenizer, world_words

NO_LIMITS: dict[str, Any] = {"max_prompt_length": None, "max_length": None}
PROMPT = [{"role": "user", "content": "how do cow dog sound ?"}]


def texts(count: int, seed: int = 0, longest: int = 9) -> list[str]:
    rng = random.Random(seed)
    words = world_words()
    return [" ".join(rng.choices(words, k=rng.randint(1, longest))) for _ in range(count)]


def conversations(count: int, seed: int = 1) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts(count, seed)]


def pairs(count: int, seed: int = 2, **fields: Any) -> list[PreferencePair]:
    return [
        PreferencePair(prompt, [answer(chosen)], [answer(rejected)], where=f"p:{i}", **fields)
        for i, (prompt, chosen, rejected) in enumerate(
            zip(
                conversations(count, seed),
                texts(count, seed + 1),
                texts(count, seed + 2),
                strict=True,
            )
        )
    ]


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return world_tokenizer()


@pytest.fixture
def tiny_model(tiny_llama, tokenizer):
    """A random causal LM on the world's vocabulary whose judgements are far from one half."""

    def make(seed: int = 0, sharpness: float = 6.0, **config: Any) -> Any:
        return tiny_llama(seed, sharpness, vocab_size=len(tokenizer), **config)

    return make


@pytest.fixture
def judge(tiny_model, tokenizer) -> PreferenceModel:
    return PreferenceModel(tiny_model(), tokenizer)


def logit_difference(model: Any, tokenizer: Any, content: str, *, header: bool = True) -> float:
    """logit("A") - logit("B") at the last position, by nothing but transformers."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=header
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1].double()
    a, b = tokenizer.convert_tokens_to_ids(["A", "B"])
    return (logits[a] - logits[b]).item()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# What the model reads


def test_the_format_is_that_of_rlhf_workflow() -> None:
    conversation = [*PROMPT, answer("moo woof ."), {"role": "user", "content": "now reverse"}]
    context = (
        "\n\n\n<turn> user\n how do cow dog sound ?\n\n<turn> assistant\n moo woof ."
        "\n\n<turn> user\n now reverse\n\n\n"
    )
    assert render_context(conversation) == context
    [message] = comparison_prompt(conversation, "woof moo", "{A} %s")
    assert message["role"] == "user"
    assert message["content"] == (
        f"[CONTEXT] {context} [RESPONSE A] woof moo [RESPONSE B] {{A}} %s \n"
    )


def test_a_string_is_quoted_as_one_user_message(judge: PreferenceModel) -> None:
    text = PROMPT[0]["content"]
    assert render_context(text) == render_context(PROMPT)
    assert judge.prefer([text], ["moo"], ["woof"]) == judge.prefer([PROMPT], ["moo"], ["woof"])


def test_the_world_can_write_a_comparison(tokenizer) -> None:
    [ids] = ComparisonEncoder(tokenizer).encode([(PROMPT, "moo .", "woof .")])
    assert tokenizer.decode(ids) == (
        "<bos> <user> [CONTEXT] <turn> user how do cow dog sound ? [RESPONSE A] moo . "
        "[RESPONSE B] woof . <assistant>"
    )


def test_a_template_without_the_assistant_header_is_refused(tiny_model, tokenizer) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("if add_generation_prompt", "if 0")
    with pytest.raises(PrefoptError, match="does not end a prompt with the assistant header"):
        PreferenceModel(tiny_model(), tokenizer)
    with pytest.raises(PrefoptError, match="does not end a prompt with the assistant header"):
        tokenize_comparisons(pairs(2), tokenizer, **NO_LIMITS)


def test_without_the_header_the_numbers_are_others(tiny_model, tokenizer) -> None:
    [message] = comparison_prompt(PROMPT, "moo woof .", "woof .")
    with_header = logit_difference(tiny_model(), tokenizer, message["content"])
    without = logit_difference(tiny_model(), tokenizer, message["content"], header=False)
    forth = PreferenceModel(tiny_model(), tokenizer).prefer_by_order(
        [PROMPT], ["moo woof ."], ["woof ."]
    )[0, 0]
    assert forth == pytest.approx(sigmoid(with_header), abs=1e-5)
    assert abs(forth - sigmoid(without)) > 0.05


def test_answers_must_be_single_tokens(tiny_model, tokenizer) -> None:
    vocabulary = tokenizer.backend_tokenizer.to_str()
    for missing in ('"A":', '"B":'):
        broken = tokenizer.backend_tokenizer.from_str(vocabulary.replace(missing, '"other":'))
        other = type(tokenizer)(
            tokenizer_object=broken, **tokenizer.special_tokens_map, chat_template="x"
        )
        other.chat_template = tokenizer.chat_template
        with pytest.raises(PrefoptError, match=r"single tokens 'A' and 'B'.*gives \[.*<unk>"):
            PreferenceModel(tiny_model(), other)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "~ message['content']",
        "~ ('moo ' if message['role'] == 'assistant' else '') ~ message['content']",
    )
    with pytest.raises(PrefoptError, match=r"\['moo', 'A'\] and \['moo', 'B'\]"):
        PreferenceModel(tiny_model(), tokenizer)


# The judge


def test_the_mean_over_both_orders_by_hand() -> None:
    """Logits (A, B): (2.0, 0.5) in the order (y1, y2), (1.2, 0.1) in the order (y2, y1)."""
    forth, back = sigmoid(2.0 - 0.5), sigmoid(1.2 - 0.1)
    p = position_average(np.array([forth]), np.array([back]))
    assert p[0] == pytest.approx(0.533657, abs=5e-7)
    assert p[0] == pytest.approx((forth + (1 - back)) / 2, abs=1e-15)


def test_prefer_is_what_transformers_says_in_both_orders(judge, tiny_model, tokenizer) -> None:
    prompts, a, b = conversations(12), texts(12, 5), texts(12, 6)
    plain = tiny_model()
    both = judge.prefer_by_order(prompts, a, b)
    for i, (prompt, x, y) in enumerate(zip(prompts, a, b, strict=True)):
        forth, back = (
            sigmoid(
                logit_difference(plain, tokenizer, comparison_prompt(prompt, *two)[0]["content"])
            )
            for two in ((x, y), (y, x))
        )
        assert both[i] == pytest.approx([forth, 1 - back], abs=1e-4)
    assert judge.prefer(prompts, a, b) == pytest.approx(both.mean(axis=1), abs=1e-12)
    assert np.ptp(both) > 0.5, "the judgements must differ for this to mean anything"
    assert np.abs(both[:, 0] - both[:, 1]).max() > 0.1


def test_swapping_gives_exactly_one_minus_p(judge: PreferenceModel) -> None:
    prompts, a, b = conversations(40), texts(40, 5), texts(40, 6)
    p, swapped = judge.prefer(prompts, a, b), judge.prefer(prompts, b, a)
    assert (p + swapped == 1.0).all()
    assert (position_average(p, swapped) + position_average(swapped, p) == 1.0).all()
    assert len(set(p.tolist())) > 30
    assert isinstance(judge, Judge)


def test_identical_answers_are_exactly_even(judge: PreferenceModel) -> None:
    same = texts(10, 5)
    assert (judge.prefer(conversations(10), same, same) == 0.5).all()
    forth, back = judge.prefer_by_order(conversations(10), same, same).T
    assert (forth != 0.5).any(), "the model itself has a favourite place"
    assert forth + back == pytest.approx(1.0)


def test_batches_order_and_padding_side_do_not_matter(tiny_model, tokenizer) -> None:
    prompts, a, b = conversations(20), texts(20, 5, 30), texts(20, 6, 30)
    expected = PreferenceModel(tiny_model(), tokenizer).prefer(prompts, a, b)
    for tokens in (1, 100, 1000):
        small = PreferenceModel(tiny_model(), tokenizer, batch_tokens=tokens)
        assert small.prefer(prompts, a, b) == pytest.approx(expected, abs=1e-5)
    left = world_tokenizer()
    left.padding_side = "left"
    rows = random.Random(0).sample(range(20), 20)
    shuffled = PreferenceModel(tiny_model(), left).prefer(
        *([column[i] for i in rows] for column in (prompts, a, b))
    )
    assert (shuffled == expected[rows]).all()
    separate = PreferenceModel(tiny_model(), tokenizer)
    separate.layout = "separate"
    assert separate.prefer(prompts, a, b) == pytest.approx(expected, abs=1e-4)


def test_each_comparison_is_read_once(judge: PreferenceModel, monkeypatch) -> None:
    read: list[int] = []
    forward = judge.model.forward
    monkeypatch.setattr(
        judge.model,
        "forward",
        lambda *args, trees, **kw: read.append(trees.num_completions) or forward(trees=trees),
    )
    a, b = ["moo", "woof", "moo", "moo"], ["woof", "moo", "woof", "moo"]
    judge.prefer([PROMPT] * 4, a, b)
    assert sum(read) == 3  # (moo, woof), (woof, moo), (moo, moo)


def test_comparisons_of_one_prompt_share_its_context(judge: PreferenceModel, monkeypatch) -> None:
    read: list[tuple[int, int]] = []
    forward = judge.model.forward
    monkeypatch.setattr(
        judge.model,
        "forward",
        lambda *args, trees, **kw: (
            read.append((trees.num_trees, trees.input_ids.numel())) or forward(trees=trees)
        ),
    )
    prompt = [{"role": "user", "content": "how do cow dog sound ? " * 8}]
    a, b = ["moo .", "woof"], ["baa", "quack ."]
    judge.prefer([prompt] * 2, a, b)
    matches = [(prompt, x, y) for x, y in zip(a + b, b + a, strict=True)]
    questions = judge.encoder.encode(matches)
    context = next(
        i for i, column in enumerate(zip(*questions, strict=False)) if len({*column}) > 1
    )
    assert context > 40
    assert read == [(1, context + sum(len(question) - context for question in questions))]


def test_long_comparisons_come_first() -> None:
    questions = [(1,) * n for n in (3, 9, 5, 30, 1)]
    batches = within_budget(questions, lambda q: len(q) + len(ANSWERS), 20)
    assert [[len(q) for q in batch] for batch in batches] == [[30], [9, 5], [3, 1]]


def test_score_is_the_mean_win_rate_against_the_others(judge: PreferenceModel) -> None:
    prompts = [*[conversations(1)[0]] * 3, PROMPT, PROMPT]
    completions = ["moo", "woof .", "baa", "moo", "quack"]
    order = [3, 0, 4, 2, 1]
    scores = judge.score([prompts[i] for i in order], [completions[i] for i in order])
    p = {
        (i, j): judge.prefer([prompts[i]], [completions[i]], [completions[j]])[0]
        for i in range(5)
        for j in range(5)
    }
    expected = [
        (p[0, 1] + p[0, 2]) / 2,
        (p[1, 0] + p[1, 2]) / 2,
        (p[2, 0] + p[2, 1]) / 2,
        p[3, 4],
        p[4, 3],
    ]
    assert scores == pytest.approx([expected[i] for i in order], abs=1e-5)
    assert scores.mean() == pytest.approx(0.5)
    assert judge.score([PROMPT] * 3, ["moo"] * 3).tolist() == [0.5] * 3


def test_a_completion_alone_has_no_score(judge: PreferenceModel) -> None:
    with pytest.raises(PrefoptError, match=r"1 of 2 prompts have a single .* number 3\).* sample"):
        judge.score([PROMPT, PROMPT, "hello"], ["moo", "woof", "moo"])


def test_nothing_asked_nothing_answered(judge: PreferenceModel) -> None:
    assert judge.prefer([], [], []).shape == judge.score([], []).shape == (0,)
    assert judge.prefer_by_order([], [], []).shape == (0, 2)


def test_an_answer_cannot_end_the_question(judge: PreferenceModel) -> None:
    spelt = judge.prefer([PROMPT], ["moo"], ["woof <e<eos>os>"])  # as a policy could spell it
    assert spelt == judge.prefer([PROMPT], ["moo"], ["woof "])
    with pytest.raises(PrefoptError, match="a prompt holds a stop token of the judge"):
        judge.prefer(["please <eos> repeat"], ["moo"], ["woof"])


def test_what_is_too_long_for_the_judge_is_noticed(
    judge: PreferenceModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level("WARNING"):
        judge.prefer([PROMPT], ["moo " * 1000], ["woof"])
    assert re.search(r"reads \d+ tokens, but was made for \d+ at once", caplog.text)
    monkeypatch.setattr(judge.model.config, "rope_parameters", None)  # a table of positions
    with pytest.raises(PrefoptError, match="use shorter prompts"):
        judge.prefer([PROMPT], ["moo " * 1000], ["woof"])


def test_weights_that_are_not_numbers_are_noticed(judge: PreferenceModel) -> None:
    with torch.no_grad():
        next(judge.model.parameters()).fill_(math.nan)
    with pytest.raises(PrefoptError, match="NaN"):
        judge.prefer([PROMPT], ["moo"], ["woof"])


def test_judges_are_loaded_by_kind(tiny_model, tokenizer, tmp_path: Path) -> None:
    model = tiny_model()
    causal, scalar = tmp_path / "causal", tmp_path / "scalar"
    model.save_pretrained(causal)
    LlamaForSequenceClassification(model.config).save_pretrained(scalar)
    for folder in (causal, scalar):
        tokenizer.save_pretrained(folder)
    assert isinstance(load_judge("preference_model", str(causal), device="cpu"), PreferenceModel)
    with pytest.raises(PrefoptError, match="LlamaForSequenceClassification, expected a causal LM"):
        load_judge("preference_model", str(scalar))
    model.config.num_labels = 1
    LlamaForSequenceClassification(model.config).save_pretrained(scalar)
    assert isinstance(load_judge("reward_model", str(scalar), device="cpu"), RewardModel)
    for kind, folder in (("preference_model", causal), ("reward_model", scalar)):
        half = load_judge(kind, str(folder), dtype="bfloat16", device="cpu")
        assert half.model.dtype == torch.bfloat16
        assert 0 < half.prefer([PROMPT], ["moo"], ["woof"])[0] < 1
    with pytest.raises(PrefoptError, match="not a reward model"):
        load_judge("reward_model", str(causal))
    with pytest.raises(PrefoptError, match="'oracle', expected reward_model or preference_model"):
        load_judge("oracle", str(causal))


# Tokenising


def test_each_pair_is_read_in_both_orders(tokenizer) -> None:
    [pair] = pairs(1, p_chosen=0.8)
    rows = tokenize_comparisons([pair], tokenizer, **NO_LIMITS)
    chosen, rejected = pair.chosen[0]["content"], pair.rejected[0]["content"]
    orders = [(pair.prompt, chosen, rejected), (pair.prompt, rejected, chosen)]
    assert list(rows.prompt_ids) == ComparisonEncoder(tokenizer).encode(orders)
    assert len(rows) == 2
    assert rows.dropped.total == 0
    difference = len(chosen.split()) - len(rejected.split())
    answers = tokenizer.convert_tokens_to_ids(["A", "B"])
    for i, p in enumerate((0.8, 0.2)):
        assert rows[i] == {
            "prompt_ids": rows.prompt_ids[i],
            "answer_ids": [answers[i]],  # the likelier one
            "p_a": pytest.approx(p),
            "length_difference": difference,
            "where": "p:0",
        }
    tree = comparison_dataset(rows).trees[1]
    assert (tree.prompt, [list(c) for c in tree.completions]) == (
        rows.prompt_ids[1],
        [[answers[0]], [answers[1]]],
    )


def test_exchanging_answers_and_label_changes_nothing(tokenizer) -> None:
    [pair] = pairs(1, p_chosen=0.8)
    other = PreferencePair(pair.prompt, pair.rejected, pair.chosen, 1 - pair.p_chosen)
    rows, swapped = (tokenize_comparisons([p], tokenizer, **NO_LIMITS) for p in (pair, other))
    assert list(rows.prompt_ids) == list(swapped.prompt_ids)[::-1]
    assert list(rows.p_a) == pytest.approx(list(swapped.p_a)[::-1])


def test_long_pairs_are_dropped_whole_and_counted(tokenizer) -> None:
    pair = PreferencePair(PROMPT, [answer("moo woof .")], [answer("quack")])
    size = len(tokenize_comparisons([pair], tokenizer, **NO_LIMITS).prompt_ids[0]) + 1
    context = len(render_context(pair.prompt).split())
    short = PreferencePair("moo", "moo", "woof")
    for limits, kept, reason in (
        ((context, size), 4, None),
        ((None, size - 1), 2, "answer_too_long"),
        ((context - 1, None), 2, "prompt_too_long"),
    ):
        limit = dict(zip(NO_LIMITS, limits, strict=True))
        found = tokenize_comparisons([pair, short], tokenizer, **limit)
        assert len(found) == kept
        assert found.dropped.total == (reason is not None)
        assert reason is None or getattr(found.dropped, reason) == 1
    odd = [
        PreferencePair("moo", "moo <eos>", "woof"),
        PreferencePair("<eos> moo", "moo", "woof"),
        PreferencePair("moo", "moo woof", "moo  woof"),
    ]
    found = tokenize_comparisons([*odd, short], tokenizer, **NO_LIMITS)
    assert (len(found), found.dropped.stop_token_inside, found.dropped.identical) == (2, 2, 1)
    with pytest.raises(
        PrefoptError, match=r"of 1 pairs .* 1 comparisons exceed max_length=5.* 1\d"
    ):
        tokenize_comparisons([short], tokenizer, max_prompt_length=None, max_length=5)
    with pytest.raises(PrefoptError, match="found no pairs"):
        tokenize_comparisons([], tokenizer, **NO_LIMITS)


# Training


@pytest.fixture
def make_trainer(tiny_model, tokenizer, tmp_path):
    """Makes trainers on the same 13 pairs and the same initial weights."""

    def make(run: str = "run", rows: Any = None, **options: Any) -> PreferenceModelTrainer:
        extra = {
            name: options.pop(name) for name in ("eval_dataset", "callbacks") if name in options
        }
        model = options.pop("model", None) or tiny_model(sharpness=3.0)
        config: dict[str, Any] = {
            "output_dir": str(tmp_path / run),
            "per_device_train_batch_size": 8,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "max_steps": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
        }
        if rows is None:
            rows = comparison_dataset(tokenize_comparisons(pairs(13), tokenizer, **NO_LIMITS))
        args = PreferenceModelConfig(**config | options)
        return PreferenceModelTrainer(model, args, rows, processing_class=tokenizer, **extra)

    return make


def trained(trainer: PreferenceModelTrainer, **kwargs: Any) -> dict[str, Tensor]:
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.train(**kwargs)
    after = trainer.model.state_dict()
    assert any(not torch.equal(after[k], before[k]) for k in after), "nothing was trained"
    return after


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


def losses(trainer: PreferenceModelTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("p_chosen", [1.0, 0.8])
def test_the_loss_is_the_cross_entropy_of_transformers(
    p_chosen, make_trainer, tiny_model, tokenizer
) -> None:
    """On the answer token alone, over the whole vocabulary, weighted with the label; at step 0."""
    rows = tokenize_comparisons(pairs(4, p_chosen=p_chosen), tokenizer, **NO_LIMITS)
    model, expected, margins = tiny_model(sharpness=3.0), [], []
    for i in range(len(rows)):
        by_answer = []
        for token in rows.letters:
            ids = torch.tensor([[*rows.prompt_ids[i], token]])
            labels = torch.full_like(ids, -100)
            labels[0, -1] = token
            with torch.no_grad():
                by_answer.append(model(input_ids=ids, labels=labels).loss.item())
        a, b = by_answer
        expected.append(rows.p_a[i] * a + (1 - rows.p_a[i]) * b)
        margins.append(b - a if rows.p_a[i] >= 0.5 else a - b)
    trainer = make_trainer(rows=comparison_dataset(rows), max_steps=1)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(np.mean(expected), abs=1e-4)
    assert first["rewards/margins"] == pytest.approx(np.mean(margins), abs=1e-4)
    assert first["rewards/accuracies"] == pytest.approx(np.mean(np.array(margins) > 0))
    assert first["loss"] > 2, "most of the mass is on other tokens before the first step"
    assert 0 < first["answers/mass"] < 0.3


def test_micro_batches_do_not_change_a_run(make_trainer) -> None:
    """26 comparisons: an epoch ends with a step of 2."""
    runs = []
    for size, steps in ((8, 1), (1, 8)):
        trainer = make_trainer(
            f"{size}x{steps}",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=0.1,
            max_steps=6,
        )
        runs.append((trained(trainer), losses(trainer)))
    (weights, history), (other_weights, other_history) = runs
    assert max(history) - min(history) > 1e-2, "the loss must move for this to mean anything"
    assert difference(weights, other_weights) < 2e-5
    assert other_history == pytest.approx(history, abs=2e-5)


def test_separate_rows_train_to_the_same_weights(make_trainer) -> None:
    options = {"optim": "sgd", "learning_rate": 0.1}
    weights = trained(make_trainer("tree", layout="tree", **options))
    assert difference(trained(make_trainer("rows", layout="separate", **options)), weights) < 2e-5


class Interrupt(TrainerCallback):
    """Ends the process, as it were, after a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_killed_and_resumed_is_uninterrupted(make_trainer) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    expected = trained(make_trainer("whole", **options))
    with pytest.raises(KeyboardInterrupt):
        make_trainer("killed", callbacks=[Interrupt()], **options).train()
    resumed = make_trainer("killed", **options)
    checkpoint = last_complete_checkpoint(Path(resumed.args.output_dir))
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-2"
    assert difference(trained(resumed, resume_from_checkpoint=str(checkpoint)), expected) == 0.0


def test_rows_of_text_are_tokenised(make_trainer, tokenizer) -> None:
    rows = [
        {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        for pair in pairs(13)
    ]
    assert difference(trained(make_trainer("text", rows=rows)), trained(make_trainer())) == 0.0
    short = make_trainer(rows=[*rows, {"prompt": "moo", "chosen": "moo", "rejected": "woof"}])
    assert len(short.train_dataset) == 28
    short = make_trainer(
        rows=[*rows, {"prompt": "moo", "chosen": "moo", "rejected": "woof"}], max_length=17
    )
    assert 2 <= len(short.train_dataset) < 28


def test_trees_that_are_no_comparisons_are_refused(make_trainer, random_trees) -> None:
    with pytest.raises(PrefoptError, match="train_dataset: found trees without the column p_a"):
        make_trainer(rows=TreeDataset(random_trees([2, 2])))
    with pytest.raises(PrefoptError, match="eval_dataset: found trees without the column p_a"):
        make_trainer(eval_dataset=TreeDataset(random_trees([2, 2])))


def test_defaults_are_those_of_the_paper(tmp_path: Path) -> None:
    args = PreferenceModelConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    assert (args.learning_rate, args.warmup_steps, args.num_train_epochs) == (5e-6, 0.03, 1.0)
    assert (args.lr_scheduler_type, args.weight_decay, args.max_grad_norm) == ("cosine", 0.0, 1.0)


def ruled_pairs(count: int, seed: int) -> list[PreferencePair]:
    """The better answer is the one that contains "moo"."""
    rng = random.Random(seed)
    result = []
    for prompt, a, b in zip(
        conversations(count, seed),
        texts(count, seed + 1, 4),
        texts(count, seed + 2, 4),
        strict=True,
    ):
        words = [word for word in a.split() if word != "moo"]
        words.insert(rng.randint(0, len(words)), "moo")
        rejected = b.replace("moo", "woof")
        result.append(PreferencePair(prompt, " ".join(words), rejected))
    return result


def test_a_trivial_rule_is_learned_saved_and_loaded(make_trainer, tiny_model, tokenizer) -> None:
    train, held_out = (
        comparison_dataset(tokenize_comparisons(ruled_pairs(n, seed), tokenizer, **NO_LIMITS))
        for n, seed in ((400, 10), (60, 20))
    )
    trainer = make_trainer(
        rows=train,
        eval_dataset=held_out,
        model=tiny_model(sharpness=2.0, hidden_size=48),
        per_device_train_batch_size=32,
        max_steps=150,
        warmup_steps=10,
        logging_steps=50,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
    )
    before = preference_model_report(trainer)
    assert before["accuracy"] < 0.75
    trainer.train()
    report = preference_model_report(trainer)
    assert report["pairs"] == 60
    assert report["accuracy"] > 0.9
    assert report["position_consistency"] > 0.9
    assert abs(report["first_position"] - 0.5) < 0.1
    assert report["ece"] < 0.15
    assert sum(row["count"] for row in report["accuracy_by_length"]) == 60
    folder = Path(trainer.args.output_dir) / "final"
    trainer.save_model(str(folder))
    judge = PreferenceModel.from_pretrained(str(folder), device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
    pairs_ = ruled_pairs(60, 20)
    columns = ([getattr(x, name) for x in pairs_] for name in ("prompt", "chosen", "rejected"))
    p = judge.prefer(*columns)
    assert (p > 0.5).mean() == report["accuracy"]
    content = comparison_prompt(pairs_[0].prompt, pairs_[0].chosen, pairs_[0].rejected)[0][
        "content"
    ]
    forth = sigmoid(logit_difference(plain, tokenizer, content))
    found = judge.prefer_by_order(
        *([getattr(pairs_[0], n)] for n in ("prompt", "chosen", "rejected"))
    )
    assert found[0, 0] == pytest.approx(forth, abs=1e-4)


def test_the_report_by_hand(tokenizer) -> None:
    """Four pairs: right in both orders, wrong in both, twice the first, the first and even."""
    held_out = comparison_dataset(tokenize_comparisons(pairs(4), tokenizer, **NO_LIMITS))
    logits = [2.0, -1.0, -2.0, 1.0, 2.0, 1.0, 1.0, 0.0]  # "A" over "B", in rows of 2i, 2i + 1
    predictions = np.array([[-1.0, -1.0 - x] for x in logits], dtype=np.float32)
    trainer = SimpleNamespace(
        eval_dataset=held_out, predict=lambda _: SimpleNamespace(predictions=predictions)
    )
    report = preference_model_report(trainer)
    assert report["pairs"] == 4
    assert report["accuracy"] == 0.75  # the third says A twice, and the surer one counts
    assert report["position_consistency"] == 0.5
    assert report["first_position"] == pytest.approx((1 + 0 + 0 + 1 + 1 + 1 + 1 + 0.5) / 8)
    p = (sigmoid(2) - sigmoid(1)) / 2 + 0.5
    assert report["calibration"][0]["confidence"] == pytest.approx(
        (p + (sigmoid(1) - 0.5) / 2 + 0.5) / 2, abs=0.06
    )
    assert sum(row["count"] for row in report["calibration"]) == 4


def test_readout_and_trainer_agree_on_log_probs(judge: PreferenceModel, tokenizer) -> None:
    """P(A) of the judge is pi(A) / (pi(A) + pi(B)) of the trees that are trained on."""
    rows = tokenize_comparisons(pairs(6), tokenizer, **NO_LIMITS)
    trees: list[PromptTree] = comparison_dataset(rows).trees[:]
    with torch.no_grad():
        log_probs = sequence_log_probs(judge.model, collate_trees(trees)).double()
    p_a = torch.sigmoid(log_probs[0::2] - log_probs[1::2]).numpy()
    found = judge.prefer_by_order(
        [pair.prompt for pair in pairs(6)],
        [pair.chosen[0]["content"] for pair in pairs(6)],
        [pair.rejected[0]["content"] for pair in pairs(6)],
    )
    assert found[:, 0] == pytest.approx(p_a[0::2], abs=1e-5)
    assert found[:, 1] == pytest.approx(1 - p_a[1::2], abs=1e-5)
