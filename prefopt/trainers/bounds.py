"""Guards on what a run logs and samples: bounds that, once crossed, are warned of or end it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback

from prefopt.errors import PrefoptError
from prefopt.rounds.store import read_lines, write_lines
from prefopt.trainers.base import CompleteCheckpoints
from prefopt.trainers.rounds import RoundTrainer

logger = logging.getLogger(__name__)

KL = ("kl", "evaluation/kl")  # as they are logged
TRY = {
    "max_kl": "the policy is far from where it began: try a lower trainer.learning_rate, or a "
    "higher weight of the KL (trainer.beta, kl_weight, tau or kl_coef, as the algorithm calls it)",
    "max_mean_length": "judges tend to prefer longer answers: try trainer.length_penalty, a lower "
    "rollout.max_new_tokens, a lower trainer.learning_rate, or a judge that cares less for length",
    "min_finished": "answers are cut off before they end: try a higher rollout.max_new_tokens, a "
    "lower trainer.learning_rate, or look at the chat template's end of turn",
    "equal_scores": "there is nothing to learn from: look at the judge (its path, its dtype) and "
    "at the samples in rounds/, which may all be the same; try a higher rollout.temperature",
    "finished": "look at the chat template's end of turn and at the model's EOS; "
    "rollout.max_new_tokens may be too low",
    "empty": "look at the chat template and at the model: it ends its turn at once",
}


@dataclass(frozen=True)
class Bounds:
    """What a run is watched for; None: not.

    Attributes:
        action: ``stop``: training ends at the next safe point, saved; ``warn``: it is said.
        max_kl: The most nats an answer between the policy and the initial one.
        max_mean_length: The most tokens that the samples of a round have on average.
        min_finished: The least share of a round's samples that end by themselves.
        equal_scores: Rounds in a row in which the judge tells no sample apart.
    """

    action: Literal["stop", "warn"] = "stop"
    max_kl: float | None = None
    max_mean_length: float | None = None
    min_finished: float | None = None
    equal_scores: int | None = 3


class BoundsGuard(TrainerCallback):
    """Watches a trainer: what it logs, and the samples of each round.

    Without a bound it still warns, once each, of a round in which no sample ended by itself or all
    are empty. A bound that the algorithm has no numbers for is named when training begins.

    Args:
        trainer: The trainer, before it trains.
        bounds: What is watched for.
        path: A file of JSON lines for whatever was found: ``guard``, ``step``, ``value``,
            ``bound``, ``action`` and ``message``.

    Examples:
        >>> BoundsGuard(trainer, Bounds(max_kl=10.0))  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self, trainer: CompleteCheckpoints, bounds: Bounds, path: Path | None = None
    ) -> None:
        self.trainer, self.bounds, self.path = trainer, bounds, path
        self.holding: set[str] = set()  # what was crossed when it was last looked at
        self.said: set[tuple[str, float | None]] = set()  # guard and bound, by earlier processes
        self.equal = 0  # rounds in a row
        self.measured = False  # whether there was a KL
        trainer.add_callback(self)
        trainer.watcher = self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins to count, or goes on with it; names what cannot be watched."""
        self.equal = 0
        self._go_on(state)
        if unseen := self._unseen():
            logger.warning(
                "guards: %s cannot be watched here: %s",
                ", ".join(f"guards.{name}" for name in unseen),
                "; ".join(dict.fromkeys(unseen.values())),
            )

    def _go_on(self, state: Any) -> None:
        """Takes up what an earlier process has warned of, which is not said again while it lasts.

        Where a bound ends training nothing is taken up: the same command is to end again.
        """
        step = state.global_step
        self.said = {
            (row["guard"], row["bound"]) for row in self._rows() if row["step"] <= step > 0
        }
        self.holding = {guard for guard, bound in self.said if bound is None}
        for name in KL:
            values = [line[name] for line in state.log_history if name in line]
            if values and self.bounds.max_kl is not None:
                self._take_up("max_kl", name, values[-1] > self.bounds.max_kl, self.bounds.max_kl)

    def _take_up(self, guard: str, metric: str, crossed: bool, bound: float) -> None:
        said = self.bounds.action == "warn" and (guard, bound) in self.said
        (self.holding.add if crossed and said else self.holding.discard)(f"{guard} {metric}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says where no KL came to be watched, as of samples with something cut off."""
        if self.bounds.max_kl and not self.measured and "max_kl" not in self._unseen():
            logger.warning(
                "guards.max_kl was not watched: this run measured no KL while it trained"
            )

    def _unseen(self) -> dict[str, str]:
        """Why, by name of a bound that is set."""
        trainer, bounds, unseen = self.trainer, self.bounds, {}
        samples = isinstance(trainer, RoundTrainer) and bool(trainer.sampling)
        if not samples and bounds.max_kl and trainer.evaluator is None:
            unseen["max_kl"] = "it takes an algorithm that samples, or a section eval"
        for name in ("max_mean_length", "min_finished"):
            if getattr(bounds, name) and not samples:
                unseen[name] = "this algorithm draws no samples"
        judged = isinstance(trainer, RoundTrainer) and trainer.judge is not None
        # the default stands in every recipe
        if bounds.equal_scores not in (None, Bounds.equal_scores) and not judged:
            unseen["equal_scores"] = "this algorithm asks no judge"
        return unseen

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Looks at the KL."""
        for name in KL:
            if self.bounds.max_kl is not None and name in logs:
                value, bound, self.measured = float(logs[name]), self.bounds.max_kl, True
                self._look(
                    "max_kl",
                    name,
                    value > bound,
                    value,
                    bound,
                    f"{name} is {value:.4g} nats, above {bound:g}",
                )

    def after_sampling(self, report: Mapping[str, Any], begins: bool) -> None:
        """Looks at the samples of a round, of which its ``round.json`` tells."""
        bounds = self.bounds
        spread = report.get("judge/spread")
        if spread is not None:
            self.equal = self.equal + 1 if spread == 0 else 0
        where = f"round {report['round'] + 1}: "  # as it is announced
        length, finished = report.get("rollout/length"), report.get("rollout/finished")
        seen: list[tuple[str, bool, float, float, str]] = []
        if bounds.equal_scores is not None and spread is not None:
            told = f"the judge told no sample apart, in {self.equal} rounds in a row"
            crossed = self.equal >= bounds.equal_scores
            seen.append(("equal_scores", crossed, self.equal, bounds.equal_scores, told))
        if bounds.max_mean_length is not None and length is not None:
            bound = bounds.max_mean_length
            told = f"samples have {length:.4g} tokens on average, above {bound:g}"
            seen.append(("max_mean_length", length > bound, length, bound, told))
        if bounds.min_finished is not None and finished is not None:
            bound = bounds.min_finished
            told = f"{finished:.1%} of samples end by themselves (EOS), below {bound:.1%}"
            seen.append(("min_finished", finished < bound, finished, bound, told))
        for guard, crossed, value, bound, told in seen:
            if begins:
                self._look(guard, "", crossed, value, bound, where + told)
            else:  # an earlier process has said what there was to say
                self._take_up(guard, "", crossed, bound)
        if begins and finished == 0 and bounds.min_finished is None:
            self._warn_once("finished", finished, where + "no sample ended by itself (EOS)")
        if begins and report.get("rollout/empty") == 1:
            self._warn_once("empty", 1.0, where + "all samples are empty")

    def _warn_once(self, guard: str, value: float, told: str) -> None:
        if guard not in self.holding:
            self.holding.add(guard)
            self._record(guard, value, None, "warn", f"{told}; {TRY[guard]}")

    def _look(
        self, guard: str, metric: str, crossed: bool, value: float, bound: float, told: str
    ) -> None:
        """Does what is to be done where a bound begins to be crossed."""
        name = f"{guard} {metric}"
        begins = crossed and name not in self.holding
        (self.holding.add if crossed else self.holding.discard)(name)
        if begins:
            self.found(guard, value, bound, f"{told} (guards.{guard}); {TRY[guard]}")

    def found(self, guard: str, value: float, bound: float | None, message: str) -> None:
        """Warns of something, and where ``action`` is stop has training end with it.

        All processes call this alike; so may a guard that stands elsewhere.

        Args:
            guard: Its key in the section ``guards``.
            value: What was seen.
            bound: What was expected at most, or at least.
            message: What was seen, where, and what to try.
        """
        self._record(guard, value, bound, self.bounds.action, message)
        if self.bounds.action == "stop":
            step = self.trainer.state.global_step
            self.trainer.end_early(
                PrefoptError(
                    f"a guard ends training at step {step}, and what was trained is saved: "
                    f"{message}. With another guards.{guard}, or guards.action=warn, the same "
                    "command goes on; other changes need another run_dir"
                )
            )

    def write_down(self, guard: str, message: str) -> None:
        """Adds to the file what another guard ends training with at once."""
        self._write(guard, None, None, "stop", message)

    def _record(
        self, guard: str, value: float, bound: float | None, action: str, message: str
    ) -> None:
        """Logs what a guard found, and adds it to the file."""
        logger.warning("guard at step %d: %s", self.trainer.state.global_step, message)
        self._write(guard, value, bound, action, message)

    def _write(
        self, guard: str, value: float | None, bound: float | None, action: str, message: str
    ) -> None:
        """Adds a line to the file; what is found again stands there once."""
        if self.path is None or not self.trainer.is_world_process_zero():
            return
        step = self.trainer.state.global_step
        kept = [row for row in self._rows() if row["guard"] != guard or row["step"] < step]
        found = {
            "guard": guard,
            "step": step,
            "value": value,
            "bound": bound,
            "action": action,
            "message": message,
        }
        write_lines(self.path, [*kept, found])

    def _rows(self) -> list[dict[str, Any]]:
        return read_lines(self.path) if self.path is not None and self.path.exists() else []
