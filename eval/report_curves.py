"""The part of a report on training: panels of curves, with what is normal of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prefopt.eval import plots
from prefopt.eval.numbers import number
from prefopt.eval.run_folder import Run

CURVE_BYTES = 900_000  # of the page
# What is looked at first; a metric that stands in neither list comes between the two.
FIRST = ("loss", "rewards", "logps", "kl", "judge", "rollout", "length")
LAST = ("grad_norm", "learning_rate", "tokens_per_second", "time")
COUNTERS = ("round", "num_tokens")  # they tell where training is, not how it goes

Note = tuple[str, str]
# Panel -> what it shows, what is normal and what is not.
NOTES: dict[str, tuple[Note, ...]] = {
    "logps": (
        (
            "What it is",
            "The log-probability of whole answers in nats, a sum over tokens: long answers lie "
            "lower than short ones.",
        ),
        (
            "Normal",
            "Both curves may fall while the margin between them rises: the loss asks only that "
            "the rejected answer lose more probability than the chosen one. A chosen curve that "
            "falls by a small part of its height is common, and so is one that rises a little.",
        ),
        (
            "Not normal",
            "The chosen curve falls as steeply as the rejected one, or by as much as it was high; "
            "or both rise towards 0, as when answers are learned by heart.",
        ),
        (
            "Look at",
            "rewards/margins and rewards/accuracies on held-out rows, KL, the length of answers "
            "and the answers themselves. A larger beta, a lower learning rate or fewer epochs "
            "hold the policy back.",
        ),
    ),
    "rewards": (
        (
            "What it is",
            "Of a policy: beta times the log-probability that an answer gained over the "
            "reference, 0 at the start. Of a reward model: its scores.",
        ),
        ("Normal", "Chosen above rejected; of a policy often with both below 0."),
        (
            "Not normal",
            "Curves that stay together, when nothing is learned; or a gap that grows without end "
            "while held-out accuracy and win rate do not gain.",
        ),
    ),
    "kl": (
        (
            "What it is",
            "How far the policy has moved from the reference, in nats an answer. Where it grows "
            "faster and faster while the win rate does not, the policy has found a weakness of "
            "its judge.",
        ),
    ),
}


def curve_groups(
    runs: Mapping[str, Run],
    styles: Mapping[str, plots.Style],
    remarks: list[str],
    evaluated: bool,
) -> list[dict[str, Any]]:
    """Groups of panels: with several runs, losses and pairs run by run, the rest laid over.

    Args:
        runs: By name.
        styles: Of the runs.
        remarks: Receives a sentence on panels that are left out.
        evaluated: Whether evaluations have plots of their own.
    """
    groups: list[dict[str, Any]] = []
    shared: dict[str, Any] = {"title": "", "notes": {}, "panels": []}
    size, left_out = 0, 0
    for metric, members in _panels(runs).items():
        if metric in COUNTERS or (evaluated and metric.startswith("evaluation/")):
            continue  # shown elsewhere
        own = len(runs) > 1 and (metric == "loss" or len(members) > 1)
        panels = []
        for shown in [[name] for name in runs] if own else [list(runs)]:
            lines = [x for name in shown for x in _lines(runs[name], name, members, styles[name])]
            if not any(len(set(line.y)) > 1 for line in lines):  # the table of last values says it
                continue
            if size > CURVE_BYTES:
                left_out += 1
                continue
            plot = plots.curves(
                lines,
                name=f"curve-{metric}-{shown[0]}" if own else f"curve-{metric}",
                title=f"{metric} over steps" + (f": {shown[0]}" if len(shown) == 1 else ""),
                rounds=_begins(runs[shown[0]]) if len(shown) == 1 else (),
                styles=styles if len(shown) > 1 else None,
            )
            size += len(plot.svg)
            caption = shown[0] if own else metric
            panels.append({"caption": caption, "run": own, "plot": plot})
        notes = {metric: NOTES[metric]} if panels and metric in NOTES else {}
        if own and panels:
            groups.append({"title": metric, "notes": notes, "panels": panels})
        else:
            shared["panels"].extend(panels)
            shared["notes"].update(notes)
    if left_out:
        remarks.append(f"{left_out} panels of curves are left out to keep the page small.")
    if groups:
        shared["title"] = "all runs"
    return ([shared] if shared["panels"] else []) + groups


def _begins(run: Run) -> list[float]:
    """Steps at which rounds begin."""
    first: dict[float, float] = {}
    for step, index in run.metrics.get("round", {}).items():
        first.setdefault(index, step)
    return list(first.values())


def last_values(runs: Mapping[str, Run]) -> list[list[str]]:
    """One row a metric, one column a run: also what was logged only once and has no curve."""

    def last(points: Mapping[float, float]) -> str:
        return number([*points.values()][-1]) if points else "–"

    metrics = sorted({name for run in runs.values() for name in run.metrics})
    return [[name, *(last(run.metrics.get(name, {})) for run in runs.values())] for name in metrics]


def _panels(runs: Mapping[str, Run]) -> dict[str, list[str]]:
    """Panel -> its metrics: `x/chosen` and `x/rejected` share panel x, `eval_x` joins x."""
    names = dict.fromkeys(
        name.removeprefix("eval_") for run in runs.values() for name in run.metrics
    )
    panels: dict[str, list[str]] = {}
    for name in names:
        stem = name.rpartition("/")[0]
        pair = [f"{stem}/chosen", f"{stem}/rejected"]
        paired = name in pair and all(metric in names for metric in pair)
        panels.setdefault(stem if paired else name, []).append(name)

    def place(panel: str) -> tuple[int, str]:
        room = panel.split("/")[0]
        if room in FIRST:
            return FIRST.index(room), panel
        return (100 + LAST.index(room) if room in LAST else 50), panel

    return {panel: sorted(panels[panel]) for panel in sorted(panels, key=place)}


def _lines(run: Run, owner: str, members: Iterable[str], style: plots.Style) -> list[plots.Line]:
    lines = []
    for metric in members:
        last = metric.rpartition("/")[2]
        side = last if last in ("chosen", "rejected") else ""
        for name in (metric, f"eval_{metric}"):
            if points := run.metrics.get(name):
                held_out = name != metric
                lines.append(
                    plots.Line(
                        list(points),
                        list(points.values()),
                        style,
                        owner,
                        name,
                        f"{side} evaluation".strip() if held_out else side,
                        solid=side != "rejected",
                        points_only=held_out,
                    )
                )
    return lines
