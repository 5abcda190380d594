"""What ``bench.longheads`` has measured as a picture: all rows against position, and LongHeads' settings close up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnzoo.reporting import charts, labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bench.longheads.rows import Reading

OURS = charts.PLAIN


@dataclass(frozen=True)
class Line:
    """One line and what is written at its end.

    Attributes:
        label: Written beside the last point, or nothing.
        values: One for each span.
        style: Of matplotlib's ``plot``.
    """

    label: str
    values: Sequence[float]
    style: dict[str, Any]


def is_ours(row: Reading) -> bool:
    """Whether a row reads with LongHeads."""
    return row.options.get("variant") == "longheads"


def overview(rows: list[Reading]) -> list[Line]:
    """Every row; LongHeads' are one bundle under one label."""
    plain = [row for row in rows if not is_ours(row)]
    ours = [row for row in rows if is_ours(row)]
    # The first look is ours.
    lines = [Line(row.name, row.perplexity, charts.look(i)) for i, row in enumerate(plain, start=1)]
    bundle = f"longheads, {len(ours)} settings" if len(ours) > 1 else "longheads"
    for i, row in enumerate(ours):
        lines.append(Line(bundle if i == 0 else "", row.perplexity, {"color": OURS, "linewidth": 1, "zorder": 1}))
    return lines


def close_up(rows: list[Reading]) -> list[Line]:
    """LongHeads' settings in percent over the best of them in each span."""
    ours = [row for row in rows if is_ours(row)]
    best = [min(values) for values in zip(*(row.perplexity for row in ours), strict=True)]
    lines = []
    for i, row in enumerate(ours):
        percent = [100 * (value / least - 1) for value, least in zip(row.perplexity, best, strict=True)]
        lines.append(Line(row.name.removeprefix("longheads "), percent, charts.look(i)))
    return lines


def panel(axes: Axes, place: Sequence[float], lines: list[Line]) -> None:
    """Draws lines and their labels at the right edge, in their colours."""
    for line in lines:
        axes.plot(place, line.values, label=line.label or None, **line.style)
    charts.ticks(axes.xaxis, _positions(place), charts.tokens)
    axes.set_xlabel("position in the text (tokens)")
    axes.grid(axis="y")


def _positions(place: Sequence[float]) -> list[float]:
    """Every few thousand tokens up to the end."""
    end = place[-1] + place[0]
    step = 1024 * 2 ** max(0, math.ceil(math.log2(end / 1024 / 8)))
    return [float(step * i) for i in range(int(end / step) + 1)]


def picture(rows: list[Reading], where: dict[str, Any], span: int, path: Path) -> None:
    """Draws perplexity against position, over spans of so many positions."""
    with charts.style():
        charts.save(draw(rows, where, span), path)


def draw(rows: list[Reading], where: dict[str, Any], span: int) -> Figure:
    """The picture: all rows, and LongHeads' settings close up where there are several."""
    close = sum(map(is_ours, rows)) > 1
    title = f"Perplexity far into a text: {where['model']} on {where['text']}"
    figure = charts.sheet(12.5 if close else 7, 4.8, title)
    axes = figure.subplots(1, 1 + close, squeeze=False)[0]
    place = [span * (i + 0.5) for i in range(len(rows[0].perplexity))]
    panel(axes[0], place, overview(rows))
    values = [value for row in rows for value in row.perplexity if math.isfinite(value)]
    charts.logarithmic(axes[0], "y", min(values) / 1.1, max(values) * 1.1)
    axes[0].set_ylabel(f"perplexity over {span:,} positions (log scale)")
    axes[0].set_title("all readings; lower is better")
    labels.at_ends(axes[0])
    if close:
        panel(axes[1], place, close_up(rows))
        axes[1].set_ylabel("% above the best setting of each span")
        axes[1].set_title("longheads alone: attention length, chunk size")
        labels.at_ends(axes[1])
    return figure
