"""Curves as a picture: a panel for each kind of call, a line for each layer, and where it crosses 1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attnzoo.evaluation.cost_setting import KINDS
from attnzoo.reporting import charts, labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bench.crossover.curves import Curve

NAMES = {"forward": "forward", "step": "training step", "decode": "decoding step"}


def picture(curves: Sequence[Curve], title: str, path: Path) -> None:
    """Draws curves, as a PNG or whatever the suffix says."""
    with charts.style():
        charts.save(draw(curves, title), path)


def draw(curves: Sequence[Curve], title: str) -> Figure:
    """The picture: a panel for each kind of call, as wide as its lengths need, and a line for each layer."""
    panels = [[curve for curve in curves if curve.kind == kind] for kind in KINDS]
    lengths = [sorted({tokens for curve in found for tokens in curve.tokens}) for found in panels]
    names = list(dict.fromkeys(curve.layer for curve in curves))
    height = max(4.8, 0.2 * len(names) + 1.6)
    figure = charts.sheet(13, height, f"Time of a layer, times ten lines of torch (below 1 it is quicker): {title}")
    widths = [2 + len(found) for found in lengths]
    grid = figure.subplots(1, len(KINDS), width_ratios=widths)
    for axes, kind, found, tokens in zip(grid, KINDS, panels, lengths, strict=True):
        _lines(axes, found, names)
        if tokens:
            charts.ticks(axes.xaxis, tokens, charts.tokens)
        axes.set_title(NAMES[kind])
        ratios = [ratio for curve in found for ratio in curve.times_baseline]
        charts.logarithmic(axes, "y", min([0.8, *ratios]) / 1.1, max([1.25, *ratios]) * 1.1, most=10)
    grid[0].set_ylabel("times ten lines of torch (log scale)")
    for axes, found in zip(grid, panels, strict=True):
        labels.at_ends(axes, [_short(curve.layer, names) for curve in found if curve.tokens])
    return figure


def _short(name: str, names: Sequence[str]) -> str:
    """A layer's variant, and the first of its options where another layer is of the same variant."""
    variant = name.partition(":")[0]
    several = sum(other.partition(":")[0] == variant for other in names) > 1
    return name.partition(",")[0] if several else variant


def _lines(axes: Axes, curves: Sequence[Curve], names: Sequence[str]) -> None:
    """A line for each curve that has points, and one at 1."""
    for curve in curves:
        if curve.tokens:
            look = charts.look(names.index(curve.layer))
            axes.plot(curve.tokens, curve.times_baseline, label=curve.layer, **look)
    axes.axhline(1.0, color=charts.RULE, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens (log scale)")
    axes.grid(axis="y")
