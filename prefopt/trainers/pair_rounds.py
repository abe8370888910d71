"""Training in rounds on pairs: samples of the policy are judged, paired and trained on.

The base of the algorithms whose loss is one of pairs; see :mod:`prefopt.trainers.rounds` for what
a round is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefopt.errors import PrefoptError
from prefopt.rollout.engine import SamplingSettings
from prefopt.rounds.collect import Ask
from prefopt.rounds.mending import PAIRS
from prefopt.rounds.pairing import PairingSettings, check_samples, judge_samples
from prefopt.rounds.pairs import collect_pairs, pairs_are_collected, read_pairs, sampled_trees
from prefopt.rounds.store import read_lines, round_folder
from prefopt.rounds.weights import exchanged, put_weights, read_weights
from prefopt.trainers.base import TreeDataset
from prefopt.trainers.reference import report_initial_margins, stored_log_probs
from prefopt.trainers.round_config import RoundConfig
from prefopt.trainers.rounds import OpenRound, RoundTrainer

logger = logging.getLogger(__name__)

KL_PROMPTS = 256  # prompts whose first sample an estimate of KL takes
CHOICES = {
    "initial_policy": ("previous", "initial"),
    "reference": ("initial", "previous"),
    "data_window": ("this_round", "all_so_far"),
}


@dataclass
class PairRoundConfig(RoundConfig):
    """Keys of rounds of pairs.

    Defaults are those of the RLHF Workflow paper's implementation: train on from the last policy,
    on the newest data only, against the initial policy, with a new schedule in every round.
    """

    initial_policy: str = field(
        default="previous", metadata={"help": "Weights a round trains on from: previous | initial."}
    )
    reference: str = field(
        default="initial", metadata={"help": "Reference of the loss: initial | previous policy."}
    )
    data_window: str = field(
        default="this_round", metadata={"help": "Pairs to train on: this_round | all_so_far."}
    )
    pairing: str = field(
        default="best_worst",
        metadata={"help": "best_worst | best_random | tournament | independent."},
    )
    length_penalty: float = field(
        default=0.0, metadata={"help": "Score per character, subtracted before samples are paired."}
    )
    ties: str = field(
        default="drop", metadata={"help": "Pairs the judge finds equal: drop | keep | resample."}
    )
    redraws: int = field(
        default=2, metadata={"help": "With ties=resample: new samples for a prompt, at most."}
    )
    soft_labels: bool = field(
        default=False, metadata={"help": "Label with the judge's probability instead of 1."}
    )

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise PrefoptError(
                    f"{name}: found {getattr(self, name)!r}, expected {' or '.join(choices)}"
                )
        if self.redraws < 0:
            raise PrefoptError(f"redraws: found {self.redraws}, expected 0 or more")
        self.pairing_settings()
        if self.overlap and self.ties == "resample":
            raise PrefoptError(
                "overlap: found true with ties=resample, whose new samples would be of a newer "
                "policy than the others; set ties to drop or keep"
            )
        super().__post_init__()

    def rows_planned(self, prompts: Sequence[int], samples_per_prompt: int) -> list[int]:
        """The pairs of every round's data if there are no ties."""
        each = samples_per_prompt // 2 if self.pairing == "independent" else 1
        pairs = [each * count for count in prompts]
        return list(accumulate(pairs)) if self.data_window == "all_so_far" else pairs

    def pairing_settings(self) -> PairingSettings:
        """The keys on pairing, together."""
        return PairingSettings(self.pairing, self.length_penalty, self.ties, self.soft_labels)

    def check_sampling(self, sampling: Sequence[SamplingSettings]) -> None:
        """Checks that samples drawn like this can be paired.

        Raises:
            PrefoptError: There are too few, or all of a part would be the same.
        """
        check_samples(self.pairing_settings(), sum(part.samples_per_prompt for part in sampling))
        for part in sampling:
            if part.temperature == 0 and part.samples_per_prompt > 1:
                raise PrefoptError(
                    "rollout.temperature: found 0 (greedy) for "
                    f"{part.samples_per_prompt} samples of a prompt, which would all be the same "
                    "and make no pair; set it above 0"
                )


class PairRoundTrainer(RoundTrainer):
    """Base of the trainers on pairs of samples; an algorithm implements ``tree_losses`` on pairs.

    The arguments are those of :class:`prefopt.trainers.rounds.RoundTrainer`.
    """

    args: PairRoundConfig
    reads_again = PAIRS

    @property
    def frozen(self) -> tuple[str, ...]:
        """The frozen log-probs that the loss needs: ``reference``, ``previous``."""
        raise NotImplementedError

    # --- a round ---------------------------------------------------------------------------------

    def ask(self) -> Ask:
        """What the pairing needs to know of the judge."""
        judge, pairing = self.judge, self.args.pairing_settings()
        assert judge is not None
        return lambda prompts, samples, keys: judge_samples(judge, prompts, samples, pairing, keys)

    def is_collected(self, folder: Path) -> bool:
        """Whether a round's pairs are on disk."""
        return pairs_are_collected(folder)

    def collect(self, index: int, folder: Path) -> dict[str, float]:
        """Brings the samples, judgements and pairs of a round to disk."""
        return collect_pairs(
            self.collector,
            folder,
            index,
            self.plan[index],
            self.args.pairing_settings(),
            redraws=self.args.redraws,
            progress=partial(self.progress, index),
        )

    def rows_of_round(self, index: int) -> int:
        """The pairs a round trains on, of earlier rounds too if these are asked for."""
        return sum(self.reports_of[k]["pairs"] for k in self.window(index))

    def window(self, index: int) -> range:
        """Its own pairs, or all so far."""
        return range(0 if self.args.data_window == "all_so_far" else index, index + 1)

    def round_dataset(self, index: int, moved: bool) -> TreeDataset:
        """The pairs of some rounds with their frozen log-probs."""
        window = self.window(index)
        folders = {k: round_folder(self.rounds_dir, k) for k in window}
        rounds = {k: read_pairs(folders[k], self.plan[k], self.prompts) for k in window}
        labels = [p for collected in rounds.values() for p in collected.p_chosen]
        trees = [tree for collected in rounds.values() for tree in collected.trees]
        self.choose_layout_once(trees)
        columns: dict[str, Sequence[Any]] = {}
        if self.args.soft_labels or any(p != 1.0 for p in labels):
            columns["p_chosen"] = labels
        for name in self.frozen:
            initial = index == 0 or (name == "reference" and self.args.reference == "initial")
            values: list[Tensor] = []
            for k, collected in rounds.items():
                swap = initial and (index > 0 or moved)
                values += stored_log_probs(
                    self,
                    collected.trees,
                    folders[k] / "log_probs" / ("initial" if initial else f"policy-{index:04d}"),
                    weights=self._initial_policy() if swap else nullcontext(),
                    moved=moved and not initial,
                )
            columns[name] = values
        return TreeDataset(trees, columns)

    def begin_training(self, index: int) -> dict[str, float]:
        """Weights as a round asks for them, once it is collected; the KL before that."""
        kl = self._kl(index) if index else {}
        if index and self.args.initial_policy == "initial":
            put_weights(self.policy, read_weights(self.policy, self.initial_weights))
        return kl

    @contextmanager
    def _initial_policy(self) -> Iterator[None]:
        with exchanged(self.policy, read_weights(self.policy, self.initial_weights)):
            yield

    def _kl(self, index: int) -> dict[str, float]:
        """An estimate of the KL of the policy that sampled from the initial one, in nats.

        There is none with ``overlap``: the policy that sampled is not the one at hand.
        """
        folder = round_folder(self.rounds_dir, index)
        trees = sampled_trees(self.collector, folder, self.plan[index], limit=KL_PROMPTS)
        if not trees or not self.uses_initial_weights or self.ahead is not None:
            return {}
        own, initial = (
            stored_log_probs(
                self, trees, folder / "log_probs" / f"kl-{name}", weights=context, moved=False
            )
            for name, context in (("policy", nullcontext()), ("initial", self._initial_policy()))
        )
        return {"kl": (torch.cat(own) - torch.cat(initial)).mean().item()}

    @property
    def uses_initial_weights(self) -> bool:
        """Whether a later round needs the weights the run began with."""
        reference = "reference" in self.frozen and self.args.reference == "initial"
        return len(self.plan) > 1 and (reference or self.args.initial_policy == "initial")

    # --- what is said ----------------------------------------------------------------------------

    def reports(self) -> list[dict[str, Any]]:
        """Counts and means of every round so far, as their ``round.json`` say."""
        paths = (round_folder(self.rounds_dir, k) / "round.json" for k in range(len(self.plan)))
        return [report for path in paths if path.exists() for report in read_lines(path)]

    def announce(self, opened: OpenRound, facts: dict[str, Any]) -> None:
        """Says and logs what a round begins with."""
        args = self.args
        logger.info(
            "round %d of %d: %d prompts x %d samples, %d pairs (ties: %d dropped, %d kept; "
            "identical: %d); policy: %s; reference: %s; data: %s, %d pairs; optimiser: %s; "
            "%d steps of %d pairs (%d x %d accumulated x %d processes)",
            opened.index + 1,
            len(self.plan),
            facts["prompts"],
            self.samples_per_prompt,
            facts["pairs"],
            facts["ties_dropped"],
            facts["ties_kept"],
            facts["identical"],
            args.initial_policy,
            args.reference,
            args.data_window,
            self.rows_of_round(opened.index),
            args.optimizer_state,
            opened.steps,
            args.global_batch,
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            args.world_size,
        )
        self.log(facts)
        if opened.index == 0 and "reference" in self.frozen and opened.steps:
            report_initial_margins(self, self.dataset, beta=1.0)
