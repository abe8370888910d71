"""Convergence of algorithms on one game: distance from equilibrium against payoff queries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prefopt.games.trajectory import Trajectory

# Okabe and Ito's colour-blind safe palette, with grey for its yellow, which is lost on white.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c8c8c", "#000000")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))
# Probabilities in float64 sum to 1 within about this; below it a distance says nothing.
FLOOR = 1e-16


def plot_trajectories(
    trajectories: Mapping[str, Trajectory], path: str | Path, title: str = ""
) -> None:
    """Writes two panels on log scales: KL to the equilibrium and exploitability, by queries.

    Args:
        trajectories: One run for each label of the legend.
        path: The picture; its ending says the format, one that matplotlib knows.
        title: Text above the panels.
    """
    figure = Figure(figsize=(8, 4.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    for index, (label, run) in enumerate(trajectories.items()):
        # colours and dashes have coprime counts: the two together repeat after 24 curves only
        look = {
            "color": COLOURS[index % len(COLOURS)],
            "ls": DASHES[index % len(DASHES)],
            "lw": 1.7,
        }
        for axes, distance in ((left, run.kl), (right, run.exploitability)):
            shown = np.where(distance > FLOOR, distance, np.nan)
            axes.plot(run.queries, shown, label=label, **look)
    _dress(left, "KL(equilibrium || policy), nats")
    _dress(right, "exploitability")
    figure.suptitle(title, fontsize=10)
    handles, labels = left.get_legend_handles_labels()
    columns = min(len(labels), 4)
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=3
    )
    figure.savefig(path)


def _dress(axes: Axes, label: str) -> None:
    axes.set(yscale="log", xlabel="payoff queries", ylabel=label)
    shown = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.get_lines()])
    shown = shown[np.isfinite(shown)]
    low, high = (shown.min(), shown.max()) if shown.size else (FLOOR, 1.0)
    # at least a decade, or the axis carries no labelled tick
    axes.set_ylim(min(low / 2, high / 20), high * 2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
