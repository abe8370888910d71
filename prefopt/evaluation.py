"""Evaluation while training: how often the policy's answers beat those of a baseline.

The policy that trains answers the same prompts again and again, between two rounds or epochs, and a
judge compares its answers with those it gave before training, or with a file's. What is complete on
disk is not made again, so a run that was killed goes on as if it had not been, and ends early where
it would have.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from prefopt.data.rows import Prompt
from prefopt.data.template import check_tokenizer
from prefopt.data.tokenize import Ragged, tokenize_prompts
from prefopt.data.tree import PromptTree
from prefopt.errors import PrefoptError
from prefopt.eval.head_to_head import head_to_head
from prefopt.eval.win_rate import FloatArray
from prefopt.evaluation_alarm import WHAT_TO_TRY, Judged, alarm_message, watch
from prefopt.evaluation_judges import (
    LoadJudge,
    free_memory,
    judge_to_watch,
    prefer,
    share,
    undisturbed,
)
from prefopt.evaluation_kl import KL_PROMPTS, kl_from_start, measures_kl
from prefopt.evaluation_stop import reason_to_stop
from prefopt.generate import completion_row
from prefopt.judge import Judge
from prefopt.models.forward import unwrap_peft
from prefopt.preemption import leave_if_asked
from prefopt.rollout.engine import Completion, SamplingSettings, check_prompts
from prefopt.rollout.hf_engine import TransformersEngine
from prefopt.rounds.processes import from_main
from prefopt.rounds.sampling import Player
from prefopt.rounds.start import open_facts
from prefopt.rounds.storage import digest, remove_partial
from prefopt.rounds.store import json_lines, read_lines, round_folder
from prefopt.rounds.sums import damaged, read_summed, set_aside, write_summed
from prefopt.trainers.base import CompleteCheckpoints
from prefopt.trainers.players import live_policy, player
from prefopt.trainers.reference import progress_bar
from prefopt.trainers.rounds import RoundTrainer
from prefopt.trainers.sharding import check_gathers

logger = logging.getLogger(__name__)

WITHOUT = "restore this file, or delete its folder to go on without this evaluation"


@dataclass(frozen=True)
class EvaluationTask:
    """What is evaluated, how and how often.

    Attributes:
        prompts: What the policy answers.
        judge: Loads what compares answers; its record has ``kind``.
        every: Rounds or epochs between two evaluations.
        sampling: How the policy answers, one sample a prompt.
        baseline: The answers to compare with, one a prompt; None: the policy's before training.
        baseline_name: Where ``baseline`` comes from.
        stop_on_drop: Training ends where the win rate is so many points below its best so far, the
            start's included, and `paired_comparison` says that the fall is no noise.
        watch: Ends training where its own judge is pleased more and more and the judge of
            evaluations, if it is another, less and less.
        load_start: Loads the policy that training begins with; with it, the KL from it is measured.
        batch_size: Answers generated at a time.
    """

    prompts: Sequence[Prompt]
    judge: LoadJudge
    every: int
    sampling: SamplingSettings
    baseline: Sequence[str] | None = None
    baseline_name: str = "start"
    stop_on_drop: float | None = None
    watch: bool = False
    load_start: Callable[[], PreTrainedModel] | None = None
    batch_size: int = 64


def prompt_ids_of(task: EvaluationTask, tokenizer: PreTrainedTokenizerBase) -> Ragged:
    """Token ids of the prompts, however long.

    Raises:
        PrefoptError: The tokenizer lacks what they need.
    """
    check_tokenizer(tokenizer, conversational=not isinstance(task.prompts[0], str))
    return tokenize_prompts(task.prompts, tokenizer, max_prompt_length=None).prompt_ids


class Evaluation:
    """Evaluates the policy of a trainer, which tells it when; see `Evaluator`.

    All processes call its methods together.

    Args:
        trainer: The trainer, before it trains.
        task: What to do.
        folder: What everything is kept in.
        weights: A hash of the weights that training begins with.

    Raises:
        PrefoptError: The policy is sharded so that it cannot be made whole, the tokenizer lacks
            what the prompts need, or one is too long.
    """

    def __init__(
        self, trainer: CompleteCheckpoints, task: EvaluationTask, folder: Path, weights: str
    ) -> None:
        check_gathers(trainer)
        tokenizer: Any = trainer.processing_class
        self.prompt_ids = list(prompt_ids_of(task, tokenizer))
        config: Any = unwrap_peft(trainer.model).config
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        try:
            check_prompts(self.prompt_ids, [task.sampling] * len(self.prompt_ids), context)
        except PrefoptError as error:
            raise PrefoptError(f"eval.prompts: {error}") from error
        self.trainer, self.task, self.folder = trainer, task, folder
        self.unit = "round" if isinstance(trainer, RoundTrainer) else "epoch"
        self.facts: dict[str, Any] = {
            "weights": weights,
            "prompts": digest(self.prompt_ids),
            "sampling": asdict(task.sampling),
            "baseline": "start" if task.baseline is None else digest(task.baseline),
        }
        self.last: int | None = None  # the number of rounds or epochs that was evaluated last
        self.stopped: str | None = None  # why training was ended
        self.watched: Judge | None = None  # the judge of training, where it can be compared
        trainer.evaluator = self
        trainer.add_callback(_BeforeTraining(self))

    # --- when ------------------------------------------------------------------------------------

    def begin(self, resumed: bool) -> None:
        """Makes the baseline's answers before the first step.

        Raises:
            PrefoptError: What is on disk was made otherwise, or is gone, or the judge cannot be
                loaded.
        """
        if self._is_main:
            remove_partial(self.folder)
        baseline = self.folder / "baseline.jsonl"
        (there,) = self._exist(baseline)
        if resumed and not there:
            raise PrefoptError(
                f"{baseline}: the answers that a run compares with are made before its first "
                "step, and are gone; restore the file, or delete the run folder to begin again"
            )
        with undisturbed():
            judge, self.facts["judge"] = self.task.judge(self.trainer)
        if self.task.watch:
            self.watched = judge_to_watch(self.trainer, judge, self.facts["judge"])
        del judge
        free_memory()
        self._check_facts()
        if self.task.baseline is None:
            self._answer(baseline)
            return
        rows = [
            {"prompt": p, "sample": 0, "completion": c, "finish_reason": None, "tokens": None}
            for p, c in zip(self.task.prompts, self.task.baseline, strict=True)
        ]
        self._write(baseline, json_lines(rows))
        if not resumed:
            self.evaluate(0)

    def _check_facts(self) -> None:
        """Writes down what all evaluations depend on, or compares it with what is there."""
        path = self.folder / "start.json"
        from_main(lambda: open_facts(path, self.facts, "evaluations"))

    def after(self, done: int) -> bool:
        """Evaluates where it is due; True where training is to end."""
        if done % self.task.every:
            return False
        result = self.evaluate(done)
        self.stopped = self._reason_to_stop(done)
        if self.stopped is not None:
            logger.warning("training ends: %s", self.stopped)
        elif "alarm" in result and self.watched is not None:
            self._raise_alarm(f"{result['alarm']}. {WHAT_TO_TRY}", result["watch"])
        return self.stopped is not None

    def _raise_alarm(self, message: str, numbers: dict[str, Any]) -> None:
        """Leaves to the guards what is to be done; without any, training ends."""
        watcher = self.trainer.watcher
        if watcher is None:
            self.trainer.end_early(PrefoptError(message))
        else:
            watcher.found("over_optimisation", numbers["p_fall"], numbers["level"], message)

    def finish(self) -> list[dict[str, Any]]:
        """Evaluates the policy that training ended with, and returns all results in order."""
        done = self._begun()
        if done != self.last and done and (alarm := self.evaluate(done).get("alarm")):
            logger.warning("%s", alarm)
        return self._results(done)

    def _begun(self) -> int:
        """Rounds or epochs so far; the last one may have ended before its time."""
        trainer = self.trainer
        if not isinstance(trainer, RoundTrainer):
            return math.ceil(trainer.state.epoch or 0)
        folders = (round_folder(trainer.rounds_dir, index) for index in range(len(trainer.plan)))
        return sum(trainer.is_collected(folder) for folder in folders)

    # --- an evaluation ---------------------------------------------------------------------------

    def evaluate(self, done: int) -> dict[str, Any]:
        """Makes an evaluation, or reads it where it is on disk, logs it and returns its result.

        Args:
            done: Rounds or epochs so far.
        """
        begun = time.perf_counter()
        folder = self.folder / f"{done:04d}"
        (there,) = self._exist(folder / "result.json")
        if not there:
            self._make(done, folder)
        self.last = done
        result = json.loads((folder / "result.json").read_text())
        low, high = result["win_rate_ci"]
        logger.info(
            "evaluation after %s %d: win rate %.1f (%.1f to %.1f) over %s",
            self.unit,
            done,
            result["win_rate"],
            low,
            high,
            result["baseline"],
        )
        values = {
            "evaluation/win_rate": result["win_rate"],
            "evaluation/win_rate_low": low,
            "evaluation/win_rate_high": high,
            "evaluation/length": result["mean_length"],
            "evaluation/baseline_length": result["baseline_mean_length"],
            "time/evaluation": time.perf_counter() - begun,
        }
        if "kl" in result:
            values["evaluation/kl"] = result["kl"]
        if "training_win_rate" in result:
            values["evaluation/training_win_rate"] = result["training_win_rate"]
            values["evaluation/alarm"] = float("alarm" in result)
        Trainer.log(self.trainer, values)  # a subclass's would add averages of the steps so far
        return result

    def _make(self, done: int, folder: Path) -> None:
        measured = self.task.load_start is not None and measures_kl(self.trainer)
        samples = folder / "samples.jsonl" if measured else None
        texts = self._answer(folder / "answers.jsonl", samples)
        baseline = [row["completion"] for row in read_lines(self.folder / "baseline.jsonl")]
        preferences, told = self._judgements(done, texts, baseline)
        result: dict[str, Any] = {
            "after": done,
            "unit": self.unit,
            "step": self.trainer.state.global_step,
            **head_to_head(preferences, texts, baseline),
            **({} if samples is None else self._kl(samples, folder / "log_probs")),
            "judge": self.facts["judge"],
            "baseline": self.task.baseline_name,
        }
        if self.watched is not None:
            result["training_win_rate"] = 100 * float(told.mean())
            result |= self._watch(Judged(done, preferences, told), result)
        self._write(folder / "result.json", json.dumps(result, indent=2) + "\n")

    def _answer(self, path: Path, samples: Path | None = None) -> list[str]:
        """The policy's answers, from disk where they are there; each process makes its share.

        Args:
            path: Where they are kept.
            samples: Where samples for an estimate of KL are kept, if they are wanted.
        """
        there = self._exist(*filter(None, (path, samples)))
        if not all(there):
            whole = replace(self.task.sampling, temperature=1.0)
            count = 0 if there[0] else len(self.prompt_ids)
            asked = [(index, self.task.sampling) for index in range(count)]
            if not all(there[1:]):
                asked += [(n, whole) for n in range(min(len(self.prompt_ids), KL_PROMPTS))]
            made = self._generate(asked)
            if samples is not None and not all(there[1:]):
                drawn = enumerate(made[count:])
                self._write(
                    samples, json_lines([{"prompt": n, "token_ids": c.token_ids} for n, c in drawn])
                )
            if not there[0]:
                from_main(lambda: _forget_judgements(path.parent))
                pairs = zip(self.task.prompts, made[:count], strict=True)
                self._write(path, json_lines([completion_row(p, 0, c) for p, c in pairs]))
        return [row["completion"] for row in read_lines(path)]

    def _generate(self, asked: Sequence[tuple[int, SamplingSettings]]) -> list[Completion]:
        """One completion for each (prompt, settings), on all processes."""
        own = share(self.trainer.accelerator, len(asked))
        made: list[tuple[int, Completion]] = []

        def keep(position: int, completions: list[Completion]) -> None:
            made.append((own[position], completions[0]))
            advance(1)

        policy = self._policy()
        with (
            undisturbed(),
            policy.ready(),
            progress_bar("evaluation: generate", len(own), self._is_main) as advance,
        ):
            if own:
                prompts = [list(self.prompt_ids[asked[number][0]]) for number in own]
                policy.engine.generate(prompts, [asked[number][1] for number in own], done=keep)
        return [each for _, each in sorted(gather_object(made), key=lambda pair: pair[0])]

    def _kl(self, samples: Path, folder: Path) -> dict[str, float | None]:
        """The KL of the policy from the start, of the samples in a file."""
        assert self.task.load_start is not None
        trees = [
            PromptTree(list(self.prompt_ids[row["prompt"]]), [row["token_ids"]])
            for row in read_lines(samples)
        ]
        try:
            with undisturbed():
                return kl_from_start(self.trainer, trees, folder, self.task.load_start)
        finally:
            free_memory()

    def _policy(self) -> Player:
        """The policy as it is now: on the engine of the rounds, where there are any."""
        trainer = self.trainer
        if isinstance(trainer, RoundTrainer) and hasattr(trainer.engine, "push"):
            if trainer.ahead is not None:
                trainer.ahead.wait()  # what is being sampled is another policy's
            return player(trainer, trainer.engine)
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        tokenizer: Any = trainer.processing_class
        engine = TransformersEngine(model, tokenizer, batch_size=self.task.batch_size)
        return Player(engine, lambda: live_policy(trainer))

    def _judgements(self, done: int, texts: Sequence[str], baseline: Sequence[str]) -> FloatArray:
        """What ``_preferences`` reads; where it is on disk no judge is asked again."""
        path = self.folder / f"{done:04d}" / "preferences.jsonl"
        (there,) = self._exist(path)
        if there:
            found = self._preferences(done)
            if self.watched is None or not np.isnan(found[1]).all():
                return found
        columns = {"preference": self._judge(texts, baseline)}
        if self.watched is not None:
            with undisturbed():
                told = self._prefer(self.watched, {"kind": "of training"}, texts, baseline)
            columns["training_preference"] = told
        rows: list[dict[str, Any]] = [{"prompt": index} for index in range(len(texts))]
        for name, values in columns.items():
            for row, value in zip(rows, values.tolist(), strict=True):
                row[name] = None if math.isnan(value) else value
        self._write(path, json_lines(rows))
        return self._preferences(done)

    def _judge(self, texts: Sequence[str], baseline: Sequence[str]) -> FloatArray:
        """P(the policy's answer beats the baseline's) of each prompt."""
        try:
            with undisturbed():
                judge, record = self.task.judge(self.trainer)
                if record != self.facts["judge"]:
                    raise PrefoptError(
                        f"{self.folder}: found the judge {record}, but earlier evaluations were "
                        f"made with {self.facts['judge']} and would not compare; restore it"
                    )
                return self._prefer(judge, record, texts, baseline)
        finally:
            free_memory()

    def _prefer(
        self, judge: Judge, record: dict[str, Any], texts: Sequence[str], baseline: Sequence[str]
    ) -> FloatArray:
        return prefer(self.trainer.accelerator, judge, record, self.task.prompts, texts, baseline)

    # --- an early end ----------------------------------------------------------------------------

    def _reason_to_stop(self, done: int) -> str | None:
        """Why training is to end after an evaluation, as the evaluations on disk say."""
        if self.task.stop_on_drop is None:
            return None
        results = self._results(done)
        found = [(result, self._preferences(result["after"])[0]) for result in results]
        if self.task.baseline is None:  # over itself the start wins half of the time
            start = {"after": 0, "unit": self.unit, "win_rate": 50.0}
            found.insert(0, (start, np.full(len(self.prompt_ids), 0.5)))
        return reason_to_stop(found, self.task.stop_on_drop)

    def _results(self, done: int) -> list[dict[str, Any]]:
        """The results of the evaluations up to a number of rounds or epochs."""
        paths = self.folder.glob("*/result.json")
        found = (json.loads(read_summed(path, WITHOUT)) for path in paths)
        return sorted((r for r in found if r["after"] <= done), key=lambda r: r["after"])

    def _preferences(self, done: int) -> FloatArray:
        """[2, prompts]: of the judge of evaluations, and of that of training, NaN if not asked."""
        rows = read_lines(self.folder / f"{done:04d}" / "preferences.jsonl", WITHOUT)
        names = ("preference", "training_preference")
        return np.array([[row.get(name) for row in rows] for name in names], dtype=np.float64)

    def _watch(self, now: Judged, result: dict[str, Any]) -> dict[str, Any]:
        """What two judges say of an evaluation and of those before it, for its result."""
        earlier = {each["after"]: each for each in self._results(now.after - 1)}
        judged = [Judged(after, *self._preferences(after)) for after in earlier]
        if self.task.baseline is None:
            judged.insert(0, Judged(0, *np.full((2, len(self.prompt_ids)), 0.5)))
        assert isinstance(self.trainer, RoundTrainer)  # no other trainer asks a judge
        found = watch([*judged, now], math.ceil(len(self.trainer.plan) / self.task.every))
        if found is None or not found.alarming:
            return {} if found is None else {"watch": asdict(found)}
        message = alarm_message(found, earlier.get(found.since), result)
        return {"watch": asdict(found), "alarm": message}

    # --- processes -------------------------------------------------------------------------------

    @property
    def _is_main(self) -> bool:
        return self.trainer.accelerator.is_main_process

    def _exist(self, *paths: Path) -> list[bool]:
        """Which files there are, as all processes see it before any writes; damaged ones are
        taken out of the way.
        """
        from_main(lambda: set_aside(damaged(paths)))
        there = [path.exists() for path in paths]
        self.trainer.accelerator.wait_for_everyone()
        return there

    def _write(self, path: Path, content: str) -> None:
        """Writes a file on the main process; it is there for all when this returns.

        Raises:
            Preempted: SIGTERM came; what an evaluation has on disk is not made again.
        """
        if self._is_main:
            write_summed(path, content)
        self.trainer.accelerator.wait_for_everyone()
        leave_if_asked()


def _forget_judgements(folder: Path) -> None:
    """Removes what judges said of answers in a folder that have to be made anew."""
    for path in folder.glob("**/preferences.jsonl"):
        if not (path.parent / "result.json").exists():
            path.unlink()


class _BeforeTraining(TrainerCallback):
    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation = evaluation

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluation.begin(resumed=state.global_step > 0)
