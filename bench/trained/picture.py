"""Conversions beside their controls, a panel for each model, and what further training makes of fewer KV heads."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.trained.results import CONTROL, CONVERSION, ORIGINAL, TrainedResults, TrainedRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"mean": "#d55e00", "mean, groups chosen": "#e69f00", "commuting": "#0072b2", "latent": "#009e73"}
MARKS = (0.8, 1, 1.2, 1.5, 2, 3, 5, 8, 12, 20)
"""Ratios that are marked."""
PERPLEXITIES = (5, 5.5, 6, 6.5, 7, 7.5, 8, 9, 10, 12, 14, 17, 20, 30, 50, 100, 200)
"""Perplexities that are marked."""


def picture(results: TrainedResults, path: Path) -> None:
    """Draws results, as a PNG or whatever the suffix says."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    hosts = [name for name, rows in results.rows.items() if any(row.role == CONVERSION for row in rows)]
    splits = _splits(results)
    above = len(hosts) or 1
    figure = pyplot.figure(figsize=(4.2 * max(above, 2), 8.2 if hosts and splits else 4.4), layout="constrained")
    parts = figure.subfigures(2 if hosts and splits else 1, 1, squeeze=False)[:, 0]
    if hosts:
        panels = parts[0].subplots(1, len(hosts), sharex=True, squeeze=False)[0]
        for axes, host in zip(panels, hosts, strict=True):
            _pairs(axes, host, results.rows[host])
        handles, labels = panels[0].get_legend_handles_labels()
        parts[0].legend(handles, labels, frameon=False, loc="outside lower center", ncols=4, fontsize=8)
    if splits:
        panels = parts[-1].subplots(1, len(splits), sharey=True, squeeze=False)[0]
        for axes, split in zip(panels, splits, strict=True):
            _curves(axes, split, results)
        panels[0].set_ylabel("perplexity of a byte (log scale)", fontsize=9)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def over(nll: float | None, original: TrainedRow) -> float | None:
    """A perplexity over the original's."""
    return None if nll is None or original.nll is None else math.exp(nll - original.nll)


def _pairs(axes: Axes, host: str, rows: Sequence[TrainedRow]) -> None:
    """A dot for each conversion and a cross for its control, over the original; circles in long windows."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

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
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(MARKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("perplexity over the original's", fontsize=9)
    axes.set_title(host, fontsize=10, loc="left")
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _splits(results: TrainedResults) -> list[str]:
    """How many heads become how many, in words."""
    names = [row.name for rows in results.healed.values() for row in rows if row.name != ORIGINAL]
    return list(dict.fromkeys(name.partition(":")[0] for name in names))


def _curves(axes: Axes, split: str, results: TrainedResults) -> None:
    """Perplexity over further steps, a line for each way, the mean over seeds, and the original's."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    rows = [row for found in results.healed.values() for row in found]
    for name in dict.fromkeys(row.name for row in rows):
        of, _, way = name.partition(": ")
        if name != ORIGINAL and of != split:
            continue
        own = [row.nll for row in rows if row.name == name]
        steps = sorted(own[0])
        means = [math.exp(statistics.fmean(nll[step] for nll in own)) for step in steps]
        colour = COLOURS.get(way, COLOURS["latent"] if way.startswith("latent") else "#444444")
        style = "--" if name == ORIGINAL else "-"
        axes.plot(steps, means, style, marker="o", markersize=4, color=colour, label=way or "unconverted")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator(PERPLEXITIES))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("steps of further training", fontsize=9)
    axes.set_title(f"KV heads: {split}", fontsize=10, loc="left")
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
