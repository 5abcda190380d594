"""A comparison as a picture: each row's loss, what its cache holds and reads, and what a decoding step takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from attnzoo.evaluation.compare import Comparison, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OUTLIER = 3.0
"""A bar that is so many times as long as the next shorter one may be broken, so that the others can be told apart."""

SHORTEST = 0.05
"""Nats: no bar shorter than this is the measure of others."""

MOST_BROKEN = 0.2
"""Share of the bars that may be broken; were they more, they would be no outliers."""

STEP_COLOURS = ("#8fb3d4", "#1f4e79", "#c07a1c", "#3a8f5c", "#b0413e")
STEP_MARKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50)

MARKS = (1, 1.02, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)


def reach(ratios: Sequence[float]) -> float:
    """The largest ratio, or its inverse, that is drawn in full; bars beyond are broken and say their value."""
    lengths = sorted(abs(math.log(ratio)) for ratio in ratios if math.isfinite(ratio) and ratio > 0)
    for i, (shorter, longer) in enumerate(pairwise(lengths)):
        broken = len(lengths) - 1 - i
        if shorter >= SHORTEST and longer > OUTLIER * shorter and broken <= MOST_BROKEN * len(lengths):
            return math.exp(shorter)
    return math.exp(max([*lengths, SHORTEST]))


def picture(comparison: Comparison, title: str, path: Path) -> None:
    """Draws a comparison, as a PNG or whatever the suffix says."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = comparison.rows
    figure, panels = pyplot.subplots(
        1, 3, figsize=(14, 0.42 * len(rows) + 1.6), layout="constrained", sharey=True, width_ratios=(3, 2, 2)
    )
    for axes, draw in zip(panels, (_losses, _bytes, _steps), strict=True):
        draw(axes, rows)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11, x=0.02, ha="left")
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _places(rows: Sequence[Row]) -> list[int]:
    return list(range(len(rows)))[::-1]


def _losses(axes: Axes, rows: Sequence[Row]) -> None:
    """Bars from 1, to the right where a row is worse than dense: their lengths are nats per token."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ratios = [row.ratio for row in rows]
    end = reach(ratios)
    room = end**0.12
    for y, row in zip(_places(rows), rows, strict=True):
        colour = "#b0413e" if "negative control" in row.flags else "#2b6ca3"
        broken = not 1 / end <= row.ratio <= end * 1.0001
        stop = (end if not row.ratio < 1 else 1 / end) if broken else row.ratio
        stop = stop * (room if stop > 1 else 1 / room) if broken else stop
        axes.barh(y, stop - 1, left=1, color=colour, height=0.62)
        if broken:
            # Two slanted strokes: the bar goes on.
            for share in (0.4, 0.7):
                axes.plot(stop ** (1 - share * 0.12), y, marker=(2, 0, -20), markersize=22, color="white", mew=2.5)
        text = f"{row.ratio:,.3f}" if row.ratio < 10 else f"{row.ratio:,.0f}"
        note = " (bar broken)" if broken else ""
        axes.text(max(stop, 1) * end**0.015, y, text + note, va="center", fontsize=9)
    axes.axvline(1.0, color="#444444", linewidth=1)
    axes.set_xscale("log")
    below = min([1.0, *(max(ratio, 1 / end) for ratio in ratios if ratio > 0)])
    axes.set_xlim(below / end**0.02, end**1.35)
    axes.xaxis.set_major_locator(FixedLocator(_marks(end)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_yticks(_places(rows), [row.name for row in rows])
    axes.set_xlabel("perplexity, times dense (log scale; red: negative control)")


def _marks(end: float) -> list[float]:
    """Marks of the axis up to ``end``, at least a ninth of it apart."""
    least = math.log(end) / 9
    found = [1.0]
    for mark in MARKS[1:]:
        if mark <= end * 1.0001 and math.log(mark / found[-1]) >= least:
            found.append(mark)
    return [1 / mark for mark in found[:0:-1]] + found


def _bytes(axes: Axes, rows: Sequence[Row]) -> None:
    held = [row.kv_bytes_held / 1024 for row in rows]
    read = [row.kv_bytes_read / 1024 for row in rows]
    axes.barh(_places(rows), held, color="#cfd8e3", height=0.62, label="held")
    axes.barh(_places(rows), read, color="#2b6ca3", height=0.3, label="read by a decode step")
    axes.set_xlabel("KV cache, KiB per token")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=9)


def _steps(axes: Axes, rows: Sequence[Row]) -> None:
    """Marks at a step's time over the dense model's: behind a window, and behind longer prompts."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    points = {"behind a window": {row.name: row.decode_times_dense for row in rows if row.decode_times_dense}}
    for tokens in sorted({one.tokens for row in rows for one in row.longer}):
        points[f"behind {tokens:,} tokens"] = {
            row.name: one.times_dense for row in rows for one in row.longer if one.tokens == tokens
        }
    place = dict(zip((row.name for row in rows), _places(rows), strict=True))
    for (label, found), marker, colour in zip(points.items(), "osD^v", STEP_COLOURS, strict=False):
        axes.scatter(list(found.values()), [place[name] for name in found], marker=marker, color=colour, label=label)
    axes.axvline(1.0, color="#444444", linewidth=1)
    for y in place.values():
        axes.axhline(y, color="#dddddd", linewidth=0.6, zorder=0)
    ratios = [ratio for found in points.values() for ratio in found.values() if ratio]
    axes.set_xscale("log")
    axes.set_xlim(min([0.5, *ratios]) / 1.15, max([2.0, *ratios]) * 1.15)
    axes.xaxis.set_major_locator(FixedLocator(STEP_MARKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("a decoding step's time, times dense (log scale)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=9)
