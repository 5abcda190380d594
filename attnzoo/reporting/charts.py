"""How every picture looks: colours, markers and dashes that differ in black and white too, axes, and files.

matplotlib is imported when something is drawn. No setting of the caller's is changed.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from attnzoo.reporting.drawn import Axes, Axis, Figure

INK = "#222222"
RULE = "#444444"
FAINT = "#e2e2e2"
PLAIN = "#2b6ca3"
BAD = "#c2410c"
"""For what is worse. In black and white it is no darker than :data:`PLAIN`: a marker or a hatch goes with it."""

COLOURS = ("#0072b2", "#d55e00", "#007a5a", "#b0548c", "#000000", "#3a9bd9", "#8a6d00", "#5b4ea8")
MARKERS = "osD^vP*X"
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1.5, 1, 1.5, 1, 1.5)))

STYLE: dict[str, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.xmargin": 0.03,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.dpi": 140,
    "figure.titlesize": 12,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}

LETTERS = 11
"""Of a title, to an inch."""

OUTLIER = 3.0
"""What is so many times as far out as the next nearer one may be cut off, so that the others can be told apart."""

MOST_CUT = 0.2
"""Share of the values that may be cut off; were they more, they would be no outliers."""

STEPS = (
    (1.0,),
    (1.0, 3.0),
    (1.0, 2.0, 5.0),
    (1.0, 1.5, 2.0, 3.0, 5.0, 7.0),
    (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0),
    tuple(1 + i / 10 for i in range(90)),
)
"""Marks of a decade, from few to many."""


@contextmanager
def style() -> Iterator[None]:
    """The project's look for what is drawn within, whatever the caller's own settings are."""
    import matplotlib

    settings: Any = matplotlib.rcParams
    with matplotlib.rc_context():
        # All but the window system, which is the process's own.
        matplotlib.rcdefaults()
        settings.update(STYLE)
        yield


def sheet(width: float, height: float, title: str = "") -> Figure:
    """An empty white figure of so many inches, with a title at its left; it is no window's and needs no closing."""
    from matplotlib.figure import Figure as Sheet

    figure = Sheet(figsize=(width, height), layout="constrained", facecolor="white")
    if title:
        figure.suptitle(textwrap.fill(title, int(LETTERS * width)), x=0.01, ha="left")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a figure, as a PNG or whatever the suffix says."""
    figure.savefig(path, dpi="figure")


def look(number: int) -> dict[str, Any]:
    """Colour, marker and dash of the line of this number: no two of the first 32 share more than one of them."""
    turn = number // len(COLOURS)
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[(number + turn) % len(MARKERS)],
        "linestyle": DASHES[(number + turn) % len(DASHES)],
    }


def plain(value: float, _: object = None) -> str:
    """A number as people write it: 0.5, 20, 1,000."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def tokens(value: float, _: object = None) -> str:
    """A number of tokens: 512, 1k, 64k."""
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else plain(value)


def ticks(axis: Axis, marks: Sequence[float], write: Any = plain) -> None:
    """Ticks at these values and nowhere else."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(marks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(write))


def ladder(low: float, high: float, most: int = 8) -> list[float]:
    """Marks of a logarithmic axis from ``low`` to ``high``: round values, as many as ``most`` allows."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    best: list[float] = []
    for steps in STEPS:
        marks = [float(f"{step * 10.0**decade:.6g}") for decade in decades for step in steps]
        marks = [mark for mark in marks if low * 0.9999 <= mark <= high * 1.0001]
        if len(best) < len(marks) <= most:
            best = marks
    return best


def logarithmic(axes: Axes, which: Literal["x", "y"], low: float, high: float, most: int = 8) -> None:
    """A logarithmic axis from ``low`` to ``high`` with round marks."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    if which == "x":
        axes.set_xscale("log")
        axes.set_xlim(low, high)
    else:
        axes.set_yscale("log")
        axes.set_ylim(low, high)
    ticks(axis, ladder(low, high, most))


def reach(lengths: Sequence[float], shortest: float) -> float:
    """How far an axis goes, so that an outlier does not squeeze the others.

    Args:
        lengths: How far each value is from the axis's beginning; what is not finite is not looked at.
        shortest: Nothing nearer than this is the measure of others.

    Returns:
        The longest length that is drawn, at least ``shortest``; what is longer is cut off, and has to be said.
    """
    found = sorted(length for length in lengths if math.isfinite(length))
    for i, (shorter, longer) in enumerate(pairwise(found)):
        cut = len(found) - 1 - i
        if shorter >= shortest and longer > OUTLIER * shorter and cut <= MOST_CUT * len(found):
            return shorter
    return max([*found, shortest])
