"""What ``prefopt check`` finds wrong: one finding for each kind of problem, with its places."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from prefopt.errors import PrefoptError

Severity = Literal["error", "warning", "note"]
ORDER: tuple[Severity, ...] = ("error", "warning", "note")
PLACES = 5  # of each kind that are named
_LONGEST = 300  # characters of what was found

# kind -> (severity, what to do); an error is what training would refuse. See docs/check.md.
KINDS: dict[str, tuple[Severity, str]] = {
    # the recipe
    "recipe": ("error", "correct the recipe (docs/recipes.md)"),
    "settings": ("error", "correct the section trainer (docs/recipes.md)"),
    "run folder": ("error", "choose another run_dir, or delete the folder to begin again"),
    "rounds": ("error", "change trainer.rounds or prompts_per_round, or give more prompts"),
    "machine": ("warning", "run on a machine that has it, or change the key"),
    # where rows come from
    "source": ("error", "mend or fetch the file again, or correct the path; reading ended here"),
    "no rows left": ("error", "mend the rows, or raise the limits under data"),
    # rows: the kinds of prefopt/data/rows.py
    "missing column": ("error", "rename the columns or add the one that is missing (docs/data.md)"),
    "wrong type": ("error", "write the value as docs/data.md shows it"),
    "unknown role": ("error", "use the roles system, user, assistant and tool"),
    "unsupported": ("error", "write it into content, as the model is to produce it"),
    "roles do not alternate": ("error", "put turns in order: user and assistant alternate"),
    "no question": ("error", "end the prompt with the user's message"),
    "no assistant turn": ("error", "add the assistant's answer"),
    "not an assistant message": ("error", "leave one assistant message, the rest in the prompt"),
    "no prompt": ("error", "add a column prompt, or write whole conversations"),
    "empty prompt": ("error", "write the prompt, or remove the row"),
    "empty completion": ("error", "write the answer, or remove the row"),
    "chosen equals rejected": ("error", "remove the row: it says nothing"),
    "different prompts": ("error", "cut both after the first assistant message that differs"),
    "out of range": ("error", "write a probability from 0 to 1; divide percentages by 100"),
    "not finite": ("error", "write a finite number, or leave the column out"),
    "soft labels": ("error", "remove or add the column p_chosen, or use another loss_type"),
    # text
    "half a character": ("error", "repair the text: read and write it as UTF-8, not by bytes"),
    "replacement character": ("warning", "decode the source with its own encoding again"),
    "mojibake": ("warning", "UTF-8 was read as Latin-1 or cp1252: decode it again"),
    "control character": ("warning", "remove control characters but tab and line breaks"),
    "special token in text": ("warning", "remove the markup of a chat template from the text"),
    "prompt repeated": ("warning", "cut the prompt from the head of the answer"),
    "role prefix": ("warning", "write turns as messages with roles, without prefixes in the text"),
    "messages in a string": ("warning", "write messages as a list, not as text like one"),
    "text beside conversations": ("warning", "write all rows as messages, or all as plain text"),
    "field not read": ("warning", "write what it says into content, or leave it out"),
    "column not read": ("warning", "write what it says into the prompt, or leave it out"),
    "margin not used": ("note", "nothing to do, or train with algorithm reward_model"),
    # pairs
    "duplicate": ("warning", "remove the copies, or say data.sources weight if they are meant"),
    "contradictory": ("warning", "decide for one order, or give both one p_chosen near 0.5"),
    "differ in spaces only": ("warning", "remove the row: it teaches spaces"),
    "truncated": ("warning", "generate again with more tokens, or remove the rows"),
    "cut at one length": ("warning", "the answers were cut by a limit: generate again with more"),
    "columns reversed": ("warning", "exchange chosen and rejected"),
    "label against the pair": ("warning", "exchange the answers of these rows, if that is meant"),
    "constant label": ("warning", "leave the column out, or give it the annotators' numbers"),
    "length rule": (
        "warning",
        "watch mean lengths; try trainer.length_penalty where the algorithm has it, "
        "trainer.loss_type simpo or a length-controlled win rate (docs/length_control.md)",
    ),
    # limits
    "prompt too long": ("warning", "raise data.max_prompt_length, or shorten the prompts"),
    "answer too long": ("warning", "raise data.max_length, or shorten the answers"),
    "stop token inside": ("warning", "remove the stop token from the text of the answers"),
    "identical tokens": ("warning", "remove the row: the model reads both answers alike"),
    "prompt recurs": ("note", "nothing to do: prompts that recur are used once"),
    # training and evaluation
    "eval overlap": ("warning", "remove these prompts from either, or set data.eval_fraction"),
    "evaluation overlap": ("warning", "evaluate on prompts that are not trained on"),
    "evaluation": ("error", "correct the section eval (docs/evaluation.md)"),
    "same judge": ("warning", "ask another judge in eval.judge: the policy learns to please it"),
    # tokenizer and template
    "tokenizer": ("error", "correct model.path, or save the tokenizer beside the model"),
    "missing EOS": ("error", "set tokenizer.eos_token and save the tokenizer beside the model"),
    "no chat template": ("error", "set model.chat_template to a Jinja file"),
    "no assistant header": ("error", "write it under add_generation_prompt in the template"),
    "template changes the prompt": ("error", "set model.chat_template to one that does not"),
    "double BOS": ("error", "remove one BOS, from the template or from the text"),
    "template refuses": ("error", "change the conversation, or set model.chat_template"),
    "cannot be encoded": ("error", "change the row, or set model.chat_template"),
    "no end of turn": ("warning", "write eos_token after each assistant turn in the template"),
    "system prompt lost": ("warning", "set model.chat_template to one that renders it"),
    "EOS is PAD": ("note", "nothing to do: masks come from lengths, not from ids"),
    # models
    "model": ("error", "copy or download the model again, with weights in safetensors"),
    "judge": ("error", "train the judge first, or correct its path"),
    "judge template": ("error", "save a chat template with the judge's tokenizer"),
    "judge context": ("warning", "lower rollout.max_new_tokens or max_prompt_length, or change it"),
    "judge tokenizer": ("note", "nothing to do: the judge reads text with a tokenizer of its own"),
    "context": ("warning", "lower data.max_length or rollout.max_new_tokens, or change the model"),
    "context exceeded": ("error", "lower data.max_length or rollout.max_new_tokens"),
    "vocabulary": ("warning", "use the tokenizer that belongs to the model"),
    "ids without embedding": ("error", "use the tokenizer that belongs to the model"),
    # what it takes
    "memory": ("warning", "see the advice in the line on memory"),
    "disk": ("warning", "free space, keep fewer checkpoints, or set run_dir to another disk"),
}  # fmt: skip


@dataclass
class Finding:
    """One kind of problem.

    Attributes:
        severity: ``error`` (training would refuse it), ``warning`` or ``note``.
        kind: One of `KINDS`.
        count: Rows, or 1 where it is not about rows.
        where: The first few places, ``file:row``.
        found: What was found, of the first place.
        remedy: What to do.
    """

    severity: Severity
    kind: str
    count: int
    where: list[str] = field(default_factory=list)
    found: str = ""
    remedy: str = ""


class Findings:
    """Findings as they come, one for each kind and severity; of many places the first are kept."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, Severity], Finding] = {}
        self._last: dict[tuple[str, Severity], str] = {}

    def add(
        self,
        kind: str,
        found: str,
        where: str = "",
        *,
        severity: Severity | None = None,
        remedy: str | None = None,
    ) -> None:
        """Counts a problem; a second one of the same kind in the same row is not counted."""
        usual, what_to_do = KINDS[kind]
        key = (kind, severity or usual)
        if where and self._last.get(key) == where:
            return
        self._last[key] = where
        finding = self._found.get(key)
        if finding is None:
            finding = Finding(key[1], kind, 0, [], printable(found), remedy or what_to_do)
            self._found[key] = finding
        finding.count += 1
        if where and len(finding.where) < PLACES:
            finding.where.append(where)

    @contextmanager
    def of(self, kind: str, severity: Severity | None = None) -> Iterator[None]:
        """What our own error in the block says becomes a finding, and the block ends there."""
        try:
            yield
        except PrefoptError as error:
            self.add(kind, str(error), error.where, severity=severity)

    def __iter__(self) -> Iterator[Finding]:
        """Errors first, then warnings, then notes, each in the order they came."""
        return iter(sorted(self._found.values(), key=lambda f: ORDER.index(f.severity)))

    def count(self, severity: Severity) -> int:
        """How many findings are that severe."""
        return sum(finding.severity == severity for finding in self._found.values())


def printable(text: str) -> str:
    """One line that any terminal and file can hold: what cannot be seen is spelled out.

    >>> printable("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    line = " ".join(text.split()) if text.isprintable() else _spelled(text)
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."


def _spelled(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: 2 * _LONGEST])
