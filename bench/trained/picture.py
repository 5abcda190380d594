"""Conversions beside their controls, a panel for each model, and what further training makes of fewer KV heads."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnzoo.reporting import charts, labels
from bench.trained.results import CONTROL, CONVERSION, ORIGINAL, TrainedResults, TrainedRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D


def picture(results: TrainedResults, path: Path) -> None:
    """Draws results, as a PNG or whatever the suffix says."""
    with charts.style():
        charts.save(draw(results), path)


def draw(results: TrainedResults) -> Figure:
    """The picture: conversions above, further training below."""
    hosts = [name for name, rows in results.rows.items() if any(row.role == CONVERSION for row in rows)]
    splits = _splits(results)
    title = "Models trained here, converted: perplexity over the original's (above), and with further training (below)"
    figure = charts.sheet(4.4 * max(len(hosts), 2.4), 8.6 if hosts and splits else 4.8, title)
    parts = figure.subfigures(2 if hosts and splits else 1, 1, squeeze=False)[:, 0]
    if hosts:
        panels = parts[0].subplots(1, len(hosts), sharex=True, squeeze=False)[0]
        for axes, host in zip(panels, hosts, strict=True):
            _pairs(axes, host, results.rows[host])
        reached = [float(x) for axes in panels for line in axes.lines for x in _xs(line)]
        charts.logarithmic(panels[0], "x", min(reached) / 1.1, max(reached) * 1.1)
        for axes in panels:
            charts.ticks(axes.xaxis, charts.ladder(min(reached) / 1.1, max(reached) * 1.1, 6))
        handles, told = panels[0].get_legend_handles_labels()
        parts[0].legend(handles, told, loc="outside lower center", ncols=4)
    if splits:
        panels = parts[-1].subplots(1, len(splits), sharey=True, squeeze=False)[0]
        found = [_curves(axes, split, results) for axes, split in zip(panels, splits, strict=True)]
        values = [value for means in found for value in means]
        charts.logarithmic(panels[0], "y", min(values) / 1.03, max(values) * 1.03)
        panels[0].set_ylabel("perplexity of a byte (log scale); lower is better")
        for axes in panels:
            labels.at_ends(axes)
    return figure


def _xs(line: Line2D) -> list[float]:
    xs: Any = line.get_xdata()
    return list(xs)


def over(nll: float | None, original: TrainedRow) -> float | None:
    """A perplexity over the original's."""
    return None if nll is None or original.nll is None else math.exp(nll - original.nll)


def _pairs(axes: Axes, host: str, rows: Sequence[TrainedRow]) -> None:
    """A dot for each conversion and a cross for its control, over the original; circles in long windows."""
    (original,) = [row for row in rows if row.role == ORIGINAL]
    names: list[str] = []
    for at, row in enumerate(rows):
        if row.role != CONVERSION or row.nll is None:
            continue
        after = rows[at + 1] if at + 1 < len(rows) else row
        marks = (
            (row.nll, "o", "#0072b2", "full", "converted"),
            (after.nll if after.role == CONTROL else None, "x", "#d55e00", "full", "its control"),
            (row.long_nll, "o", "#0072b2", "none", "converted, in windows four times as long"),
        )
        for nll, marker, colour, fill, label in marks:
            ratio = over(nll, original)
            if ratio is not None:
                told = label if not names else None
                axes.plot(ratio, len(names), marker, color=colour, fillstyle=fill, label=told)
        names.append(row.name + ("" if row.layers == "all" else " (global)"))
    longer = over(original.long_nll, original)
    if longer is not None:
        axes.axvline(longer, color="#444444", linewidth=1, linestyle="--", label="the original in those")
    axes.axvline(1.0, color="#444444", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("times the original (log scale)")
    axes.set_title(host)
    axes.grid(axis="x")


def _splits(results: TrainedResults) -> list[str]:
    """How many heads become how many, in words."""
    names = [row.name for rows in results.healed.values() for row in rows if row.name != ORIGINAL]
    return list(dict.fromkeys(name.partition(":")[0] for name in names))


def _curves(axes: Axes, split: str, results: TrainedResults) -> list[float]:
    """Perplexity over further steps, a line for each way (means over seeds), and the original's; gives all of them."""
    rows = [row for found in results.healed.values() for row in found]
    # A way looks the same in every panel.
    kinds = list(dict.fromkeys(_kind(row.name) for row in rows))
    drawn = []
    for name in dict.fromkeys(row.name for row in rows):
        of, _, way = name.partition(": ")
        if name != ORIGINAL and of != split:
            continue
        own = [row.nll for row in rows if row.name == name]
        steps = sorted(own[0])
        means = [math.exp(statistics.fmean(nll[step] for nll in own)) for step in steps]
        axes.plot(steps, means, label=way or "unconverted", **charts.look(kinds.index(_kind(name))))
        drawn += means
    axes.set_xlabel("steps of further training")
    axes.set_title(f"KV heads: {split}")
    axes.grid(axis="y")
    return drawn


def _kind(name: str) -> str:
    """A way without how many heads it makes of how many, and without sizes."""
    way = name.partition(": ")[2]
    return way.rstrip("0123456789 ") or ORIGINAL
