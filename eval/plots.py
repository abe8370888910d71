"""The plots of the report; :mod:`prefopt.eval.plot_files` makes SVG, PNG and CSV of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from prefopt.eval.plot_files import INK, Plot, Table, finish, lay_out, new_axes, plain
from prefopt.eval.win_rate import wilson_interval

# Okabe and Ito's colour-blind safe palette, less its yellow (lost on white) and its black.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c8c8c")
MARKERS = "osD^vPX"
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))
HALF: Any = {"color": INK, "lw": 0.9, "ls": (0, (4, 3))}  # the line of no difference
MAX_POINTS = 150
MAX_LABELS = 8
FEW = 12  # points of a curve that are each shown, and rounds whose begin is
BINS = 30
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "prefopt",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


class Style(NamedTuple):
    """How one algorithm looks wherever it appears."""

    colour: str
    marker: str
    dash: str | tuple[int, tuple[float, float]]


class Line(NamedTuple):
    """One curve: x and y of shape [points]; `solid` is False for the second of a pair."""

    x: Sequence[float]
    y: Sequence[float]
    style: Style
    run: str
    metric: str
    label: str = ""
    solid: bool = True
    points_only: bool = False


class Rate(NamedTuple):
    """A win rate in 0-100 with its 95 % interval, at some place on an axis."""

    win_rate: float
    ci: tuple[float, float] | None
    x: float
    label: str = ""


def style_of(index: int) -> Style:
    """Style of the algorithm at `index`: colour, marker and dash repeat only after 21."""
    dash = DASHES[index // len(COLOURS) % len(DASHES)]
    # The marker moves on each time the colours start again, so that the two together differ.
    marker = MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]
    return Style(COLOURS[index % len(COLOURS)], marker, dash)


@matplotlib.rc_context(STYLE)
def win_rate_bars(rates: Mapping[str, Rate], styles: Mapping[str, Style], *, name: str) -> Plot:
    """Horizontal bars, one an algorithm, with 95 % intervals and a line at 50 %."""
    figure, axes = new_axes(4.6, 0.75 + 0.34 * len(rates))
    for row, (run, rate) in enumerate(rates.items()):
        axes.barh(row, rate.win_rate, height=0.62, color=styles[run].colour)
        if rate.ci is not None:
            axes.errorbar(rate.win_rate, row, xerr=_arms(rate), color=INK, capsize=3, lw=1.1)
        right = rate.ci[1] if rate.ci else rate.win_rate
        axes.annotate(
            f"{rate.win_rate:.1f}", (right, row), (5, 0), textcoords="offset points", va="center"
        )
    axes.axvline(50, **HALF)
    axes.set(xlim=(0, 108), xticks=range(0, 101, 25), xlabel="win rate, %")
    axes.set_yticks(range(len(rates)), [_short(run) for run in rates])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0, labelsize=9)
    rows = [[run, rate.win_rate, *_ends(rate)] for run, rate in rates.items()]
    table = Table(["run", "win_rate", "low", "high"], rows)
    return finish(figure, name, "Win rates with their 95 % intervals", table)


@matplotlib.rc_context(STYLE)
def win_rate_paths(
    paths: Mapping[str, Sequence[Rate]],
    styles: Mapping[str, Style],
    *,
    name: str,
    title: str,
    x: str,
    labelled: bool = True,
) -> Plot:
    """Win rate against something else: one path a run, its last point the one that counts.

    Args:
        paths: Points of each run in order, error bars at 95 %.
        styles: Of the runs.
        name: Of the plot.
        title: Of the plot.
        x: What stands on the horizontal axis, with its unit.
        labelled: Writes beside the last points whose they are; with one run of several points,
            beside each its label.
    """
    figure, axes = new_axes(4.6, 3.2)
    for run, points in paths.items():
        style = styles[run]
        at, heights = [point.x for point in points], [point.win_rate for point in points]
        axes.plot(at, heights, color=style.colour, ls=style.dash, lw=1.2, alpha=0.7)
        for index, point in enumerate(points):
            last = index == len(points) - 1
            axes.errorbar(
                point.x,
                point.win_rate,
                yerr=_arms(point) if point.ci else None,
                color=style.colour,
                marker=style.marker,
                ls="none",
                capsize=3 if last else 1.5,
                elinewidth=1.2 if last else 0.7,
                ms=6 if last else 3.5,
            )
    axes.axhline(50, **HALF)
    axes.margins(x=0.14 if labelled else 0.05, y=0.12)
    if all(point.x == round(point.x) for path in paths.values() for point in path):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel=plain(x), ylabel="win rate, %")
    if labelled:
        _label_points(figure, axes, _labels(paths), [p for path in paths.values() for p in path])
    rows = [
        [run, point.label, point.x, point.win_rate, *_ends(point)]
        for run, points in paths.items()
        for point in points
    ]
    head = ["run", "after", x.split(",")[0], "win_rate", "low", "high"]
    legend = [] if labelled or len(paths) == 1 else _handles(list(paths), styles, markers=True)
    return finish(figure, name, title, Table(head, rows), legend)


@matplotlib.rc_context(STYLE)
def calibration_plot(name: str, rows: Sequence[Mapping[str, float]], style: Style) -> Plot:
    """Accuracy against stated confidence with Wilson's 95 % intervals; area grows with count."""
    figure, axes = new_axes(3.6, 3.2)
    confidence = np.array([row["confidence"] for row in rows])
    accuracy = np.array([row["accuracy"] for row in rows])
    count = np.array([max(row["count"], 1) for row in rows])
    bounds = np.array([wilson_interval(a, n) for a, n in zip(accuracy, count, strict=True)])
    start = 0.5 if confidence.min() >= 0.5 else 0.0
    axes.plot([start, 1], [start, 1], **HALF)
    axes.vlines(confidence, bounds[:, 0], bounds[:, 1], color=style.colour, lw=1.2)
    axes.scatter(confidence, accuracy, s=16 + 120 * count / count.max(), color=style.colour)
    axes.set(xlabel="stated confidence", ylabel="accuracy", xlim=(start - 0.02, 1.02))
    numbers = np.column_stack([confidence, accuracy, bounds, count]).tolist()
    table = Table(["confidence", "accuracy", "low", "high", "count"], numbers)
    return finish(figure, f"calibration-{name}", "Accuracy against stated confidence", table)


@matplotlib.rc_context(STYLE)
def length_histograms(
    lengths: Mapping[str, Sequence[int]],
    before: Mapping[str, Sequence[int]],
    styles: Mapping[str, Style],
) -> Plot:
    """One histogram a run, filled, over the outline of what it is compared with.

    Args:
        lengths: Of each run's answers, in characters.
        before: The same of its baseline, where there is one.
        styles: Of the runs.
    """
    every = np.concatenate([*lengths.values(), *before.values()])
    # A few very long answers would press all others into one bar: the last bar holds them.
    width = max(1, math.ceil(np.quantile(every, 0.99) / BINS))  # whole, as lengths are
    edges = width * np.arange(BINS + 1)
    top = edges[-1]
    figure, axes = new_axes(4.6, 0.75 + 0.62 * len(lengths))
    rows: list[list[Any]] = []

    def shares(name: str, which: str, values: Sequence[int]) -> np.ndarray:
        counts, _ = np.histogram(np.minimum(values, top), edges)
        bounds = zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
        rows.extend([name, which, *bound] for bound in bounds)
        return counts / max(len(values), 1)

    drawn = {
        name: (
            shares(name, "answers", values),
            shares(name, "baseline", before[name]) if name in before else np.zeros(BINS),
        )
        for name, values in lengths.items()
    }
    scale = 0.85 / max(float(both.max()) for pair in drawn.values() for both in pair)
    for row, (name, (after, base)) in enumerate(drawn.items()):
        floor = len(drawn) - 1 - row
        axes.stairs(
            floor + scale * after,
            edges,
            baseline=floor,
            fill=True,
            color=styles[name].colour,
            alpha=0.75,
        )
        if name in before:
            axes.stairs(floor + scale * base, edges, baseline=floor, color=INK, lw=0.9)
    axes.set(ylim=(0, len(drawn)), xlim=(0, top), xlabel="length of an answer, characters")
    names = [_short(name) for name in drawn]
    axes.set_yticks([len(drawn) - 0.7 - row for row in range(len(drawn))], names)
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.grid(False, axis="y")
    table = Table(["run", "answers_of", "from", "to", "answers"], rows)
    return finish(figure, "length", "Lengths of answers; outlined: the baseline's", table)


@matplotlib.rc_context(STYLE)
def curves(
    lines: Sequence[Line],
    name: str,
    title: str,
    rounds: Sequence[float] = (),
    styles: Mapping[str, Style] | None = None,
) -> Plot:
    """One small panel of curves over steps; long curves are averaged over runs of steps.

    Args:
        lines: The curves.
        name: Of the plot.
        title: Of the plot.
        rounds: Steps at which rounds begin.
        styles: Of the runs, where several share the panel.
    """
    figure, axes = new_axes(3.3, 2.05)
    # Many noisy curves on one panel hide each other unless they are smoothed more.
    points = MAX_POINTS if len(lines) <= 4 else MAX_POINTS // 4
    for line in lines:
        x, y = (_stretch_means(values, points) for values in (line.x, line.y))
        axes.plot(
            x,
            y,
            color=line.style.colour if line.solid else INK,
            ls="none" if line.points_only else line.style.dash if line.solid else DASHES[1],
            marker=line.style.marker if line.points_only or len(x) <= FEW else "",
            mfc="none" if line.points_only else None,
            ms=5 if line.points_only or len(x) == 1 else 3.5,
            lw=1.3,
            alpha=1 if line.solid else 0.7,
            label=line.label or "_",
        )
    for step in rounds if 1 < len(rounds) <= FEW else ():
        axes.axvline(step, color=INK, lw=0.7, ls=(0, (1, 2)), alpha=0.6, zorder=0)
    if any(line.label for line in lines):
        axes.legend(loc="best", handlelength=1.6, borderaxespad=0.2)
    axes.set_xlabel("step", fontsize=8)
    axes.locator_params(nbins=5)
    rows = [
        [line.run, line.metric, x, y] for line in lines for x, y in zip(line.x, line.y, strict=True)
    ]
    legend = _handles(list(dict.fromkeys(line.run for line in lines)), styles) if styles else []
    return finish(figure, name, title, Table(["run", "metric", "step", "value"], rows), legend)


def _handles(
    names: Sequence[str], styles: Mapping[str, Style], markers: bool = False
) -> list[Line2D]:
    return [
        Line2D(
            [],
            [],
            color=styles[name].colour,
            ls=styles[name].dash,
            marker=styles[name].marker if markers else "",
            ms=4,
            label=_short(name),
        )
        for name in names
    ]


def _short(name: str) -> str:
    """A name as it is drawn."""
    return plain(name if len(name) <= 24 else f"{name[:23]}…")


def _arms(rate: Rate) -> list[list[float]]:
    low, high = rate.ci or (rate.win_rate, rate.win_rate)
    return [[max(rate.win_rate - low, 0)], [max(high - rate.win_rate, 0)]]


def _ends(rate: Rate) -> tuple[float | str, float | str]:
    return rate.ci or ("", "")


def _stretch_means(values: Sequence[float], parts: int) -> list[float]:
    """Means over `parts` consecutive stretches; the values themselves when there are fewer."""
    stretches = np.array_split(np.asarray(values, float), min(len(values), parts))
    return [float(stretch.mean()) for stretch in stretches]


def _labels(paths: Mapping[str, Sequence[Rate]]) -> list[tuple[str, Rate]]:
    """What is written beside which points: names of runs, or of one run's points a few."""
    if len(paths) > 1:
        return [(_short(run), points[-1]) for run, points in paths.items()]
    (points,) = paths.values()
    shown = points if len(points) <= MAX_LABELS else [points[0], points[-1]]
    (run,) = paths
    return [(_short(point.label or run), point) for point in shown]


def _label_points(
    figure: Figure, axes: Axes, labels: Sequence[tuple[str, Rate]], points: Sequence[Rate]
) -> None:
    """Writes each label beside its point or at an end of its bar, where most room is left."""
    lay_out(figure)
    taken = [spot for point in points for spot in axes.transData.transform(_bar(point))]
    scale = figure.dpi / 72
    for label, point in labels:
        half = 2.4 * len(label) + 8
        centre = axes.transData.transform((point.x, point.win_rate))
        heights = [(y - centre[1]) / scale for _, y in axes.transData.transform(_bar(point))]
        ends = [(0.0, max(heights) + 8), (0.0, min(heights) - 8)]
        sides = [(x, y) for x in (half, -half) for y in (9.0, -9.0)]
        rooms: dict[tuple[float, float], float] = {}
        for side in sides + ends:
            spot = centre + scale * np.array(side)
            inside = axes.bbox.x0 < spot[0] - scale * half and spot[0] + scale * half < axes.bbox.x1
            # from the label's middle line, which is as wide as the name
            reach = np.maximum(np.abs(spot - taken) - [scale * half, 0], 0)
            rooms[side] = np.hypot(*reach.T).min() if inside else -1
        best = max(rooms, key=lambda side: rooms[side])
        width = scale * np.linspace(-half, half, 5)
        middle = centre + scale * np.array(best)
        taken += list(np.column_stack([middle[0] + width, np.full(5, middle[1])]))
        align = {1: "left", 0: "center", -1: "right"}[int(np.sign(best[0]))]
        offset = (7 * float(np.sign(best[0])), best[1])
        place = (point.x, point.win_rate)
        axes.annotate(label, place, offset, textcoords="offset points", ha=align, va="center")


def _bar(point: Rate) -> list[tuple[float, float]]:
    """Places along a point's error bar."""
    low, high = point.ci or (point.win_rate, point.win_rate)
    return [(point.x, float(height)) for height in np.linspace(low, high, 15)]
