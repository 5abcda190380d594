"""Curves as a picture: a panel for each kind of call, a line for each layer, and where it crosses 1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attnzoo.evaluation.cost_setting import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bench.crossover.curves import Curve

COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8a6d00", "#5b4ea8")
MARKERS = "osD^vP*X"
LINES = ("-", "--", "-.", ":")
MARKS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20)
"""Ratios that are marked."""

NAMES = {"forward": "forward", "step": "training step", "decode": "decoding step"}


def picture(curves: Sequence[Curve], title: str, path: Path) -> None:
    """Draws curves, as a PNG or whatever the suffix says."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator

    lengths = sorted({tokens for curve in curves for tokens in curve.tokens})
    figure, panels = pyplot.subplots(1, len(KINDS), figsize=(14, 4.8), layout="constrained", sharex=True, sharey=True)
    names = list(dict.fromkeys(curve.layer for curve in curves))
    for axes, kind in zip(panels, KINDS, strict=True):
        _lines(axes, [curve for curve in curves if curve.kind == kind], names)
        axes.xaxis.set_major_locator(FixedLocator(lengths))
        axes.set_title(NAMES[kind], fontsize=10, loc="left")
    panels[0].set_ylabel("time over ten lines of torch (log scale)")
    handles = {label: x for axes in panels for x, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10, x=0.02, ha="left")
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _lines(axes: Axes, curves: Sequence[Curve], names: Sequence[str]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for curve in curves:
        if not curve.tokens:
            continue
        i = names.index(curve.layer)
        style = {"color": COLOURS[i % 8], "marker": MARKERS[i % 8], "linestyle": LINES[i % 4]}
        axes.plot(curve.tokens, curve.times_baseline, label=curve.layer, markersize=5, linewidth=1.4, **style)
    axes.axhline(1.0, color="#444444", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.yaxis.set_major_locator(FixedLocator(MARKS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens")
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _short(tokens: float) -> str:
    return f"{tokens / 1024:g}k" if tokens >= 1024 else f"{tokens:g}"
