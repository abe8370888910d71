"""The plots of the report, as inline SVG that takes the page's own ink, light or dark."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from io import StringIO
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from prefopt.eval.win_rate import wilson_interval

# Okabe and Ito's colour-blind safe palette, less its yellow (lost on white) and its black.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c8c8c")
MARKERS = "osD^vPX"
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))
# Stands for the page's text colour until the SVG is written; no other element may use it.
INK = "#010203"
MAX_POINTS = 150
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
    label: str = ""
    solid: bool = True
    points_only: bool = False


class Rate(NamedTuple):
    """A win rate in 0-100 with its interval, and the divergence from the reference in nats."""

    win_rate: float
    ci: tuple[float, float] | None
    kl: float | None


def style_of(index: int) -> Style:
    """Style of the algorithm at `index`: colour, marker and dash repeat only after 21."""
    dash = DASHES[index // len(COLOURS) % len(DASHES)]
    # The marker moves on each time the colours start again, so that the two together differ.
    marker = MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]
    return Style(COLOURS[index % len(COLOURS)], marker, dash)


@matplotlib.rc_context(STYLE)
def win_rate_bars(rates: Mapping[str, Rate], styles: Mapping[str, Style]) -> Markup:
    """Horizontal bars, one an algorithm, with 95 % intervals and a line at 50 %."""
    figure, axes = _axes(5.2, 0.75 + 0.34 * len(rates))
    for row, (name, rate) in enumerate(rates.items()):
        axes.barh(row, rate.win_rate, height=0.62, color=styles[name].colour)
        if rate.ci is not None:
            axes.errorbar(rate.win_rate, row, xerr=_arms(rate), color=INK, capsize=3, lw=1.1)
        right = rate.ci[1] if rate.ci else rate.win_rate
        axes.annotate(
            f"{rate.win_rate:.1f}", (right, row), (5, 0), textcoords="offset points", va="center"
        )
    axes.axvline(50, color=INK, lw=0.9, ls=(0, (4, 3)))
    axes.set(xlim=(0, 108), xticks=range(0, 101, 25), xlabel="win rate, %")
    axes.set_yticks(range(len(rates)), list(rates))
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0, labelsize=9)
    return _svg(figure, "Win rate of each algorithm with its 95 % interval")


@matplotlib.rc_context(STYLE)
def frontier(rates: Mapping[str, Rate], styles: Mapping[str, Style]) -> Markup:
    """Win rate against KL, one labelled point an algorithm, error bars at 95 %."""
    figure, axes = _axes(5.2, 3.4)
    points = {name: (rate.kl, rate.win_rate) for name, rate in rates.items() if rate.kl is not None}
    for name, point in points.items():
        axes.errorbar(
            *point,
            yerr=_arms(rates[name]) if rates[name].ci else None,
            color=styles[name].colour,
            marker=styles[name].marker,
            ls="none",
            capsize=3,
            elinewidth=1.2,
            ms=6,
        )
    axes.axhline(50, color=INK, lw=0.9, ls=(0, (4, 3)))
    axes.margins(x=0.14, y=0.12)
    axes.set(xlabel="KL from the reference, nats", ylabel="win rate, %")
    bars = {
        name: [(kl, height) for height in np.linspace(*(rates[name].ci or (rate, rate)), 15)]
        for name, (kl, rate) in points.items()
    }
    _label_points(figure, axes, points, bars)
    return _svg(figure, "Win rate against KL from the reference, one point an algorithm")


@matplotlib.rc_context(STYLE)
def calibration_plot(rows: Sequence[Mapping[str, float]], style: Style) -> Markup:
    """Accuracy against stated confidence with Wilson's 95 % intervals; area grows with count."""
    figure, axes = _axes(3.6, 3.2)
    confidence = np.array([row["confidence"] for row in rows])
    accuracy = np.array([row["accuracy"] for row in rows])
    count = np.array([max(row["count"], 1) for row in rows])
    bounds = np.array([wilson_interval(a, n) for a, n in zip(accuracy, count, strict=True)])
    start = 0.5 if confidence.min() >= 0.5 else 0.0
    axes.plot([start, 1], [start, 1], color=INK, lw=0.9, ls=(0, (4, 3)))
    axes.vlines(confidence, bounds[:, 0], bounds[:, 1], color=style.colour, lw=1.2)
    axes.scatter(confidence, accuracy, s=16 + 120 * count / count.max(), color=style.colour)
    axes.set(xlabel="stated confidence", ylabel="accuracy", xlim=(start - 0.02, 1.02))
    return _svg(figure, "Accuracy of the judge against its stated confidence")


@matplotlib.rc_context(STYLE)
def curves(lines: Sequence[Line], label: str) -> Markup:
    """One small panel of curves over steps; long curves are averaged over runs of steps."""
    figure, axes = _axes(3.3, 2.05)
    # Many noisy curves on one panel hide each other unless they are smoothed more.
    points = MAX_POINTS if len(lines) <= 4 else MAX_POINTS // 4
    for line in lines:
        x, y = (_stretch_means(values, points) for values in (line.x, line.y))
        alone = len(x) == 1
        axes.plot(
            x,
            y,
            color=line.style.colour if line.solid else INK,
            ls="none" if line.points_only else line.style.dash if line.solid else DASHES[1],
            marker=line.style.marker if line.points_only or alone else "",
            mfc="none" if line.points_only else None,
            ms=5,
            lw=1.3,
            alpha=1 if line.solid else 0.7,
            label=line.label or "_",
        )
    if any(line.label for line in lines):
        axes.legend(loc="best", handlelength=1.6, borderaxespad=0.2)
    axes.set_xlabel("step", fontsize=8)
    axes.locator_params(nbins=5)
    return _svg(figure, label)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _arms(rate: Rate) -> list[list[float]]:
    low, high = rate.ci or (rate.win_rate, rate.win_rate)
    return [[max(rate.win_rate - low, 0)], [max(high - rate.win_rate, 0)]]


def _stretch_means(values: Sequence[float], parts: int) -> list[float]:
    """Means over `parts` consecutive stretches; the values themselves when there are fewer."""
    stretches = np.array_split(np.asarray(values, float), min(len(values), parts))
    return [float(stretch.mean()) for stretch in stretches]


def _label_points(
    figure: Figure,
    axes: Axes,
    points: Mapping[str, tuple[float, float]],
    bars: Mapping[str, Sequence[tuple[float, float]]],
) -> None:
    """Writes each name beside its point or at an end of its bar, where most room is left."""
    figure.draw_without_rendering()
    taken = [spot for bar in bars.values() for spot in axes.transData.transform(bar)]
    scale = figure.dpi / 72
    for name, point in points.items():
        half = 2.4 * len(name) + 8
        centre = axes.transData.transform(point)
        heights = [(y - centre[1]) / scale for _, y in axes.transData.transform(bars[name])]
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
        axes.annotate(name, point, offset, textcoords="offset points", ha=align, va="center")


def _svg(figure: Figure, label: str) -> Markup:
    """Writes the figure as an SVG element that inherits the page's text colour and font."""
    out = StringIO()
    empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", transparent=True, metadata=empty)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    # Group names (figure_1, text_3) would repeat from plot to plot; nothing refers to them.
    svg = re.sub(r' id="[A-Za-z.2]+_\d+"', "", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    svg = svg.replace(INK, "currentColor")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))
