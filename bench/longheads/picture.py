"""What ``bench.longheads`` has measured as a picture: all rows against position, and LongHeads' settings close up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bench.longheads.rows import Reading

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8a6d00", "#5b4ea8", "#000000")
LINES = ("-", "--", "-.", ":")
MARKERS = "osD^vP*X"
PLAIN = ("#444444", "#b0413e", "#c07a1c")
OURS = "#2b6ca3"


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
    lines = [
        Line(row.name, row.perplexity, {"color": PLAIN[i % len(PLAIN)], "linestyle": "--", "marker": MARKERS[i % 8]})
        for i, row in enumerate(plain)
    ]
    bundle = f"longheads, {len(ours)} settings" if len(ours) > 1 else "longheads"
    for i, row in enumerate(ours):
        lines.append(Line(bundle if i == 0 else "", row.perplexity, {"color": OURS, "linewidth": 1}))
    return lines


def close_up(rows: list[Reading]) -> list[Line]:
    """LongHeads' settings in percent over the best of them in each span."""
    ours = [row for row in rows if is_ours(row)]
    best = [min(values) for values in zip(*(row.perplexity for row in ours), strict=True)]
    lines = []
    for i, row in enumerate(ours):
        percent = [100 * (value / least - 1) for value, least in zip(row.perplexity, best, strict=True)]
        style = {"color": COLOURS[i % 8], "linestyle": LINES[i % 4], "marker": MARKERS[i % 8]}
        lines.append(Line(row.name.removeprefix("longheads "), percent, style))
    return lines


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights from 0 to 1 moved apart by at least ``gap``, in the same order, as little upwards as that takes."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved = list(heights)
    floor = 0.0
    for i in order:
        moved[i] = max(heights[i], floor)
        floor = moved[i] + gap
    # What has been pushed out at the top comes back, and pushes the others down.
    ceiling = 1.0
    for i in reversed(order):
        moved[i] = min(moved[i], ceiling)
        ceiling = moved[i] - gap
    return moved


def draw(axes: Axes, place: Sequence[float], lines: list[Line]) -> None:
    """Draws lines and their labels at the right edge, in their colours."""
    for line in lines:
        axes.plot(place, line.values, **{"markersize": 4, "linewidth": 1.4, **line.style})
    axes.margins(x=0.02)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("position (tokens)")
    # Limits are settled before heights are read.
    axes.set_ylim(axes.get_ylim())
    named = [line for line in lines if line.label]
    to_fraction = axes.transData + axes.transAxes.inverted()
    ends = [to_fraction.transform((place[-1], line.values[-1])) for line in named]
    for line, end, height in zip(named, ends, spread([end[1] for end in ends], gap=0.055), strict=True):
        axes.annotate(
            line.label,
            xy=tuple(end),
            xytext=(1.03, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=line.style["color"],
            fontsize=9,
            va="center",
            arrowprops={"arrowstyle": "-", "color": line.style["color"], "linewidth": 0.6, "shrinkB": 3},
        )


def picture(rows: list[Reading], where: dict[str, Any], span: int, path: Path) -> None:
    """Draws perplexity against position, over spans of so many positions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    plain_numbers = FuncFormatter(lambda value, _: f"{value:g}")
    close = sum(map(is_ours, rows)) > 1
    figure, axes = pyplot.subplots(1, 1 + close, figsize=(14 if close else 8, 4.8), layout="constrained", squeeze=False)
    place = [span * (i + 0.5) for i in range(len(rows[0].perplexity))]
    axes[0][0].set_yscale("log")
    axes[0][0].yaxis.set_major_formatter(plain_numbers)
    axes[0][0].yaxis.set_minor_formatter(plain_numbers)
    axes[0][0].set_ylabel(f"perplexity over {span} positions (log scale)")
    draw(axes[0][0], place, overview(rows))
    if close:
        axes[0][1].set_ylabel("percent over the best setting in each span")
        axes[0][1].set_title("longheads: attention length, chunk size", fontsize=10, loc="left")
        draw(axes[0][1], place, close_up(rows))
    figure.suptitle(f"{where['model']} on {where['text']}", fontsize=11, x=0.02, ha="left")
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
