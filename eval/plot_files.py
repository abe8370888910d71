"""A drawn figure as what the page takes and as files: inline SVG, and PNG, SVG and CSV."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from prefopt.errors import PrefoptError
from prefopt.eval.numbers import csv_cell
from prefopt.rounds.storage import atomic_write

# Stands for the page's text colour until an SVG is written; no other element may use it.
INK = "#010203"
PRINTED_INK = "#1d2126"
DPI = 150
METADATA: dict[str, None] = dict.fromkeys(("Creator", "Date", "Format", "Type"))


class Table(NamedTuple):
    """The plotted numbers: names of columns, and rows in their order."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Plot(NamedTuple):
    """A plot by name: an SVG element in the page's own ink, and the content of its files."""

    name: str
    svg: Markup
    files: Mapping[str, bytes]


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure of one pair of axes; sizes are in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def plain(text: str) -> str:
    """Text that can be drawn and stand in XML: no control characters, no lone surrogates."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def lay_out(figure: Figure) -> None:
    """Gives the axes their place in the figure."""
    engine = figure.get_layout_engine()
    if engine is not None:  # None: the places are final
        engine.execute(figure)


def finish(
    figure: Figure, name: str, title: str, table: Table, legend: Sequence[Line2D] = ()
) -> Plot:
    """Writes a figure once for the page and once for files, which have a title and a legend.

    Args:
        figure: Of one pair of axes.
        name: From which the names of the files are made.
        title: Of the files; in the page it is read aloud in place of the plot.
        table: For the CSV file.
        legend: What the page says elsewhere, such as which colour is which run.
    """
    title = plain(title)
    lay_out(figure)
    figure.set_layout_engine(None)  # the layout is made, and saving would make it again
    with matplotlib.rc_context({"svg.hashsalt": ascii(name)}):  # ids stand once on a page
        svg = _inline(_svg(figure, transparent=True), title)
    _make_room(figure, title, legend)
    image = BytesIO()
    figure.savefig(image, format="png", dpi=DPI, facecolor="white")
    printed = _svg(figure, facecolor="white").replace(INK, PRINTED_INK)
    rows = StringIO()
    written = [[csv_cell(value) for value in row] for row in (table.head, *table.rows)]
    csv.writer(rows, lineterminator="\n").writerows(written)
    files = {
        "png": image.getvalue(),
        "svg": printed.encode(errors="replace"),
        "csv": rows.getvalue().encode(errors="replace"),
    }
    return Plot(name, svg, files)


def save_plots(folder: Path, plots: Iterable[Plot]) -> list[str]:
    """Writes the files of plots into a folder.

    Names of plots come from names of metrics and runs, so whatever could lead out of the folder
    becomes a dash; names that come out equal are numbered.

    Returns:
        The names of the files without their endings.

    Raises:
        PrefoptError: The folder is a link, which may lead anywhere.
    """
    if folder.is_symlink():
        raise PrefoptError(f"{folder}: found a link, expected a folder or nothing; remove it")
    names: list[str] = []
    taken: set[str] = set()
    for plot in plots:
        stem = re.sub(r"[^A-Za-z0-9_]+", "-", plot.name).strip("-")[:80] or "plot"
        count, name = 1, stem
        while name.lower() in taken:
            count += 1
            name = f"{stem}-{count}"
        taken.add(name.lower())
        names.append(name)
        for ending, content in plot.files.items():
            atomic_write(folder / f"{name}.{ending}", content)
    return names


def _make_room(figure: Figure, title: str, legend: Sequence[Line2D]) -> None:
    """Adds a strip above the axes for the title and one below for the legend."""
    width, height = figure.get_size_inches()
    columns = max(1, int(width / 1.6))
    above = 0.24
    below = 0.2 * -(-len(legend) // columns) + 0.06 if legend else 0.0
    whole = height + above + below
    (axes,) = figure.axes
    box = axes.get_position()
    figure.set_size_inches(width, whole)
    axes.set_position(
        (box.x0, (below + box.y0 * height) / whole, box.width, box.height * height / whole)
    )
    most = int(11 * width)  # characters of bold 9 points
    shown = title if len(title) <= most else f"{title[: most - 1]}…"
    figure.text(0.02, 1 - 0.04 / whole, shown, va="top", fontsize=9, fontweight="bold")
    if legend:
        figure.legend(handles=legend, loc="lower left", ncols=columns, borderaxespad=0.2)


def _svg(figure: Figure, **options: Any) -> str:
    out = StringIO()
    figure.savefig(out, format="svg", metadata=METADATA, **options)
    return out.getvalue()


def _inline(svg: str, label: str) -> Markup:
    """An SVG element that inherits the page's text colour and font."""
    svg = svg[svg.index("<svg") :]
    # Group names (figure_1, text_3) would repeat from plot to plot; nothing refers to them.
    svg = re.sub(r' id="[A-Za-z.2]+_\d+"', "", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    svg = svg.replace(INK, "currentColor")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))
