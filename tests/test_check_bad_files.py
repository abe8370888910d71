"""Bad data files, each made on the spot and found by ``prefopt check`` with its row and a remedy.

Numbers in comments are those of the pains that users of other tools report (double BOS: 1, no EOS:
2, answers that were cut: 3, samples lost to limits: 14, format errors and columns believed
reversed: 17, length: 18).
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from test_data_template import GEMMA, byte_tokenizer, space_tokenizer
from transformers import LlamaConfig, PreTrainedTokenizerBase

from prefopt.cli import main
from prefopt.data import rows as rows_module
from prefopt.data.findings import KINDS

Row = dict[str, Any]


def talk(text: str) -> list[Row]:
    return [{"role": "user", "content": text}]


def said(text: str) -> list[Row]:
    return [{"role": "assistant", "content": text}]


def pair(number: int, chosen: str = "", rejected: str = "", **more: Any) -> Row:
    """A good pair; which of its answers is longer alternates."""
    long, short = f"It is {number} + {number}, which gives {2 * number}.", f"It is {2 * number}!"
    first, second = (long, short) if number % 2 else (short, long)
    return {
        "prompt": talk(f"How much is {number} and {number}?"),
        "chosen": said(chosen or first),
        "rejected": said(rejected or second),
        **more,
    }


GOOD = [pair(n) for n in range(1, 9)]
THREE = GOOD[2]  # what stands in row 3 of a good file


def save_model(folder: Path, tokenizer: PreTrainedTokenizerBase, **config: Any) -> Path:
    """A model's folder; its weights, which no check reads, are a file without any."""
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaConfig(**{"vocab_size": len(tokenizer), **shape, **heads, **config}).save_pretrained(
        folder
    )
    save_file({}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of models by the name of what is special about them."""
    folder = tmp_path_factory.mktemp("models")
    makers: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
        "chat": byte_tokenizer,
        "space": space_tokenizer,
        "gemma": lambda: byte_tokenizer(GEMMA, bos_token="<s>", eos_token="</s>"),
    }

    def model(name: str) -> Path:
        path = folder / name
        return path if path.exists() else save_model(path, makers[name]())

    return model


@pytest.fixture
def check(
    models: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Runs the command on a file of rows; returns its exit code and its JSON.

    Memory is left out: it takes a second and has its own tests.
    """
    monkeypatch.setattr("prefopt.check.memory_report", lambda *_: {"problem": "left out"})

    def run(
        rows: list[Any] | bytes, *overrides: str, model: str = "chat", name: str = "rows.jsonl"
    ) -> tuple[int, dict[str, Any]]:
        path = tmp_path / name
        path.write_bytes(rows if isinstance(rows, bytes) else lines(rows))
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"model: {{path: {models(model)}}}\ndata: {{path: {path}}}\n"
            f"run_dir: {tmp_path / 'run'}\ntrainer: {{algorithm: dpo}}\n"
        )
        capsys.readouterr()
        status = main(["check", str(recipe), "--json", *overrides])
        return status, json.loads(capsys.readouterr().out)

    return run


def lines(rows: list[Any]) -> bytes:
    return "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows).encode()


def bad(row: Any, number: int = 3) -> list[Any]:
    """A good file with another row in place of one."""
    return [*GOOD[: number - 1], row, *GOOD[number:]]


def replaced(**columns: Any) -> list[Any]:
    return bad(THREE | columns)


CONVERSATION = [*talk("Hello?"), *said("Hello."), *talk("How are you?")]
CUT = [pair(n, f"Thought {n} of it. ".ljust(103, "x") + "x then", "No!") for n in range(11, 17)]
BAD_FILES = {
    # 17: formats
    "rejected is missing": (
        bad({k: v for k, v in THREE.items() if k != "rejected"}),
        ("error", "missing column", 3, "rename"),
    ),
    "a number as an answer": (replaced(chosen=7), ("error", "wrong type", 3, "docs/data.md")),
    "from and value": (
        replaced(prompt=[{"from": "human", "value": "Hi?"}]),
        ("error", "wrong type", 3, "docs/data.md"),
    ),
    "a conversation as JSON in a cell": (
        replaced(**{name: json.dumps(THREE[name]) for name in ("prompt", "chosen", "rejected")}),
        ("warning", "messages in a string", 3, "as a list"),
    ),
    "plain text among conversations": (
        bad({"prompt": "How much is it?", "chosen": "It is 6.", "rejected": "It is 7."}),
        ("warning", "text beside conversations", 3, "as messages"),
    ),
    "a margin that dpo does not use": (
        [pair(n, margin=n) for n in range(1, 9)],
        ("note", "margin not used", None, "reward_model"),
    ),
    "role human": (
        replaced(prompt=[{"role": "human", "content": "Hi?"}]),
        ("error", "unknown role", 3, "assistant"),
    ),
    "tool calls": (
        replaced(chosen=[{"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]),
        ("error", "unsupported", 3, "content"),
    ),
    "thinking beside the answer": (
        replaced(chosen=[said("Two.")[0] | {"thinking": "1 + 1"}]),
        ("error", "unsupported", 3, "content"),
    ),
    "two user turns": (
        replaced(prompt=[*talk("Hi?"), *talk("Hi?")]),
        ("error", "roles do not alternate", 3, "alternate"),
    ),
    "a prompt that ends with an answer": (
        replaced(prompt=CONVERSATION[:2]),
        ("error", "no question", 3, "user"),
    ),
    "plain answers without a prompt": (
        bad({"chosen": "Yes.", "rejected": "No."}),
        ("error", "no prompt", 3, "column prompt"),
    ),
    "an empty prompt": (replaced(prompt=talk(" ")), ("error", "empty prompt", 3, "remove")),
    "an empty answer": (replaced(rejected=said("\n")), ("error", "empty completion", 3, "write")),
    "the same answer twice": (
        replaced(rejected=THREE["chosen"]),
        ("error", "chosen equals rejected", 3, "remove"),
    ),
    "answers to two prompts": (
        bad({"chosen": [*talk("A?"), *said("A.")], "rejected": [*talk("B?"), *said("B.")]}),
        ("error", "different prompts", 3, "cut"),
    ),
    "a probability in percent": (replaced(p_chosen=87), ("error", "out of range", 3, "100")),
    "a margin of NaN": (replaced(margin=float("nan")), ("error", "not finite", 3, "finite")),
    "a line cut in two": (bad('{"prompt": "Hi\n'), ("error", "source", 3, "mend")),
    "a list as a line": (bad([1, 2]), ("error", "source", 3, "mend")),
    "half an emoji": (
        replaced(chosen=said("Fun \ud83d!")),
        ("error", "half a character", 3, "UTF-8"),
    ),
    # text
    "lost characters": (
        replaced(chosen=said("caf\ufffd.")),
        ("warning", "replacement character", 3, "decode"),
    ),
    "mojibake": (replaced(chosen=said("Itâ€™s fun.")), ("warning", "mojibake", 3, "decode")),
    "terminal escapes": (
        replaced(chosen=said("\x1b[31mred.")),
        ("warning", "control character", 3, "remove"),
    ),
    "another template's markup": (
        replaced(chosen=said("Fine.<|eot_id|>")),
        ("warning", "special token in text", 3, "markup"),
    ),
    "a prompt repeated in the answer": (
        replaced(chosen=said(THREE["prompt"][0]["content"] + " Six.")),
        ("warning", "prompt repeated", 3, "cut"),
    ),
    "turns in an answer": (
        replaced(chosen=said("It is 6.\n\nHuman: And 7?")),
        ("warning", "role prefix", 3, "roles"),
    ),
    "a name that no template reads": (
        replaced(prompt=[talk("Hi?")[0] | {"name": "Ann"}]),
        ("warning", "field not read", 3, "content"),
    ),
    "tools that no template reads": (
        replaced(tools=[{"name": "sum"}]),
        ("warning", "column not read", 3, "prompt"),
    ),
    # pairs
    "a pair twice": ([*GOOD, GOOD[1]], ("warning", "duplicate", 9, "copies")),
    "a pair both ways": (
        [*GOOD, GOOD[1] | {"chosen": GOOD[1]["rejected"], "rejected": GOOD[1]["chosen"]}],
        ("warning", "contradictory", 9, "decide"),
    ),
    "answers that differ in spaces": (
        replaced(chosen=said("A  b."), rejected=said("A b.")),
        ("warning", "differ in spaces only", 3, "remove"),
    ),
    "an answer cut by its sampler": (  # 3
        replaced(finish_reason="length"),
        ("warning", "truncated", 3, "generate again"),
    ),
    "answers cut at one length": ([*GOOD, *CUT], ("warning", "cut at one length", 9, "limit")),  # 3
    "scores against the pairs": (
        [row | {"score_chosen": 1, "score_rejected": 9} for row in GOOD],
        ("warning", "columns reversed", None, "exchange"),
    ),
    "a label against its pair": (
        replaced(margin=-1.5),
        ("warning", "label against the pair", 3, "exchange"),
    ),
    "a label that says nothing": (
        [pair(n, p_chosen=0.5) for n in range(1, 12)],
        ("warning", "constant label", None, "leave the column out"),
    ),
    "the longer answer is always better": (  # 18
        [pair(n, "It is quite a long answer.", "Short!") for n in range(1, 31)],
        ("warning", "length rule", None, "length_penalty"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_found(name: str, check: Any, tmp_path: Path) -> None:
    rows, expected = BAD_FILES[name]
    status, result = check(rows)
    expect(result, status, expected, tmp_path / "rows.jsonl")


def expect(
    result: dict[str, Any], status: int, expected: tuple[str, str, int | None, str], file: Path
) -> dict[str, Any]:
    """One finding is as expected, no error is beside it, and the exit code fits."""
    severity, kind, row, word = expected
    found = {finding["kind"]: finding for finding in result["findings"]}
    assert kind in found, found
    finding = found[kind]
    assert finding["severity"] == severity
    assert finding["where"][:1] == ([] if row is None else [f"{file}:{row}"])
    assert word in finding["remedy"]
    assert finding["found"]
    errors = [f["kind"] for f in result["findings"] if f["severity"] == "error"]
    assert errors == ([kind] if severity == "error" else [])
    assert status == (1 if errors else 0)
    assert result["errors"] == len(errors)
    return finding


@pytest.mark.parametrize(
    ("rows", "overrides"),
    [
        (GOOD, []),
        ([{"prompt": f"{n} =", "chosen": f" {n}", "rejected": " 0"} for n in range(1, 9)], []),
        ([{"prompt": f"{n}?"} for n in range(9)], ["trainer.algorithm=ppo"]),
        ([{"messages": [*CONVERSATION, *said("Fine.")]}], ["trainer.algorithm=sft"]),
        ([pair(n, p_chosen=n / 10) for n in range(6, 10)], []),
    ],
    ids=["conversations", "plain text", "prompts", "demonstrations", "labels"],
)  # fmt: skip
def test_a_clean_file_gives_no_finding(
    rows: list[Row], overrides: list[str], check: Any, models: Any
) -> None:
    judge = f"judge={{kind: reward_model, path: {models('chat')}}}"
    status, result = check(rows, judge, *overrides)
    assert (status, result["findings"]) == (0, [])


def test_all_bad_rows_are_counted_and_the_first_named(check: Any, tmp_path: Path) -> None:
    rows = [row for good in GOOD for row in (good, {"prompt": good["prompt"]}, {"prompt": " "})]
    status, result = check(rows)
    [finding] = [f for f in result["findings"] if f["kind"] == "missing column"]
    places = [f"{tmp_path / 'rows.jsonl'}:{n}" for n in (2, 3, 5, 6, 8)]
    assert (status, finding["count"], finding["where"]) == (1, 16, places)
    assert result["train"]["rows"] == 8, "what is good is described all the same"


def test_rows_that_training_drops_are_warnings(check: Any) -> None:
    status, result = check(bad({"prompt": "Hi"}), "data.invalid_rows=drop")
    [finding] = result["findings"]
    assert (status, finding["severity"], finding["kind"]) == (0, "warning", "missing column")
    assert result["train"]["invalid"] == {"missing column": 1}


def test_the_rows_before_a_broken_one_are_looked_at(check: Any) -> None:
    _, result = check([GOOD[0], GOOD[1] | {"rejected": said(" ")}, "{\n", *GOOD[3:]])
    kinds = [finding["kind"] for finding in result["findings"]]
    assert kinds == ["empty completion", "source"]
    assert result["train"]["rows"] == 1


@pytest.mark.parametrize(
    ("content", "row", "words"),
    [
        (lines(GOOD[:2]) + b'{"prompt": "caf\xe9"}', 3, "convert it"),
        (lines(GOOD).decode().encode("utf-16"), 1, "as UTF-16 does"),
        (gzip.compress(lines(GOOD)), 1, "let its name end in .gz"),
    ],
    ids=["one line in Latin-1", "UTF-16", "gzip under another name"],
)  # fmt: skip
def test_what_is_no_utf8(content: bytes, row: int, words: str, check: Any, tmp_path: Path) -> None:
    status, result = check(content)
    finding = expect(result, status, ("error", "source", row, "mend"), tmp_path / "rows.jsonl")
    assert words in finding["found"]


def test_where_all_rows_are_bad_that_is_said_once(check: Any) -> None:
    turns = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hi."}]
    status, result = check([{"messages": turns}] * 3, "trainer.algorithm=sft")
    [finding] = result["findings"]
    assert (status, finding["kind"], finding["count"]) == (1, "wrong type", 3)
    assert "rename from to role and value to content" in finding["found"]
    status, result = check([{"messages": turns}], "trainer.algorithm=sft", "data.invalid_rows=drop")
    assert [f["kind"] for f in result["findings"]] == ["no rows left", "wrong type"]


def test_a_truncated_gzip(check: Any) -> None:
    status, result = check(gzip.compress(lines(GOOD))[:60], name="rows.jsonl.gz")
    [finding] = result["findings"]
    assert (status, finding["kind"], finding["severity"]) == (1, "source", "error")
    assert "gzip" in finding["found"]


@pytest.mark.parametrize(
    ("override", "kind", "row", "words"),
    [  # 14
        ("data.max_prompt_length=60", "prompt too long", 3, "data.max_prompt_length="),
        ("data.max_length=90", "answer too long", 3, "data.max_length="),
    ],
)
def test_what_limits_leave_out(
    override: str, kind: str, row: int, words: str, check: Any, tmp_path: Path
) -> None:
    rows = bad(THREE | {"prompt": talk("How much is " + "1 + " * 20 + "1?")})
    finding = expect(
        *check(rows, override)[::-1], ("warning", kind, row, words), tmp_path / "rows.jsonl"
    )
    assert "half of the rows have up to" in finding["found"]
    limit = re.findall(r"=(\d+) would keep", finding["remedy"])[0]
    assert check(rows, f"{override.partition('=')[0]}={limit}")[1]["train"]["rows"] == 8


@pytest.mark.parametrize("override", ["data.max_length=90", "data.max_prompt_length=null"])
def test_prompts_without_room_for_a_sample(
    override: str, check: Any, models: Any, tmp_path: Path
) -> None:
    rows = bad({"prompt": talk("How much is " + "1 + " * 20 + "1?")})
    judge = f"judge={{kind: reward_model, path: {models('chat')}}}"
    options = ["trainer.algorithm=ppo", judge, "rollout.max_new_tokens=20", "data.max_length=90"]
    status, result = check(rows, *options, override)
    expected = ("warning", "prompt too long", 3, "data.max_length=")
    finding = expect(result, status, expected, tmp_path / "rows.jsonl")
    limit = re.findall(r"=(\d+) would keep", finding["remedy"])[0]
    assert check(rows, *options, f"data.max_length={limit}")[1]["train"]["rows"] == 8


def test_pairs_that_a_preference_model_leaves_out(check: Any, tmp_path: Path) -> None:
    rows = bad(THREE | {"chosen": said("It is " + "6 " * 400 + "!")})
    options = ["trainer.algorithm=preference_model", "data.max_length=600"]
    status, result = check(rows, *options)
    expected = ("warning", "answer too long", 3, "data.max_length=")
    expect(result, status, expected, tmp_path / "rows.jsonl")


def test_stop_tokens_in_answers(check: Any, tmp_path: Path) -> None:
    status, result = check(replaced(chosen=said("It is 6.<|im_end|>\n<|im_start|>user")))
    expect(result, status, ("warning", "stop token inside", 3, "remove"), tmp_path / "rows.jsonl")
    kinds = [finding["kind"] for finding in result["findings"]]
    assert "special token in text" in kinds


def test_two_bos_tokens(check: Any, tmp_path: Path) -> None:  # 1
    rows = [{"prompt": f"{n} + {n} =", "chosen": " 2", "rejected": " 3"} for n in range(1, 5)]
    rows[2]["prompt"] = "<s>" + rows[2]["prompt"]
    status, result = check(rows, model="space")
    expect(result, status, ("error", "double BOS", 3, "remove one BOS"), tmp_path / "rows.jsonl")
    assert result["train"]["rows"] == 3


def test_a_conversation_that_the_template_refuses(check: Any, tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    status, result = check(replaced(prompt=[system, *talk("Hi?")]), model="gemma")
    expected = ("error", "template refuses", 3, "model.chat_template")
    expect(result, status, expected, tmp_path / "rows.jsonl")


def test_answers_that_a_template_makes_equal(check: Any, tmp_path: Path) -> None:
    rows = replaced(chosen=said("A b. "), rejected=said("A b."))
    status, result = check(rows, model="gemma")  # which trims
    expect(result, status, ("warning", "identical tokens", 3, "remove"), tmp_path / "rows.jsonl")


def test_held_out_prompts_that_are_trained_on(check: Any, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    shouted = GOOD[4] | {"prompt": talk(GOOD[4]["prompt"][0]["content"].upper() + " ")}
    held_out.write_bytes(lines([pair(77), shouted]))
    status, result = check(GOOD, f"data.eval_path={held_out}")
    finding = expect(result, status, ("warning", "eval overlap", 2, "eval_fraction"), held_out)
    assert f"{tmp_path / 'rows.jsonl'}:5" in finding["found"]


def test_prompts_of_evaluations_that_are_trained_on(
    check: Any, models: Any, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(lines([{"prompt": talk("New?")}, {"prompt": GOOD[1]["prompt"]}]))
    judge = f"judge: {{kind: reward_model, path: {models('chat')}}}"
    status, result = check(GOOD, f"eval={{prompts: {prompts}, {judge}}}")
    expected = ("warning", "evaluation overlap", 2, "not trained on")
    expect(result, status, expected, tmp_path / "rows.jsonl")


def test_every_kind_of_bad_row_has_its_severity_and_remedy() -> None:
    text = Path(rows_module.__file__).read_text()
    kinds = {*re.findall(r'_bad\(\s*\(?[^"]*?"([a-z ]+)",', text)}
    assert {"missing column", "wrong type", "empty completion"} <= kinds, "the pattern fits"
    assert kinds - {"prompt"} <= {*KINDS}


def test_every_kind_is_documented_with_its_severity() -> None:
    page = (Path(__file__).parents[1] / "docs" / "check.md").read_text()
    documented = {
        kind.strip(): severity.strip()
        for kinds, severity in re.findall(r"^\| ([^|]+) \| (error|warning|note)[^|]*\|", page, re.M)
        for kind in kinds.split(",")
    }
    assert documented == {kind: severity for kind, (severity, _) in KINDS.items()}
