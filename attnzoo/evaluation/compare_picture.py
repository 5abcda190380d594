"""A comparison as a picture: each row's quality against what its cache holds, and against a decoding step's time."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from attnzoo.evaluation.compare import Comparison, Row
from attnzoo.reporting import charts, labels
from attnzoo.reporting.drawn import Axes, Figure

SHORTEST = 0.05
"""Nats: no loss below this is the measure of others."""

LINEAR = 0.02
"""Nats: the scale is linear up to about here, and logarithmic beyond, so that both small and large losses show."""

RATIOS = (0.2, 0.3, 0.5, 0.7, 0.9, 0.98, 1, 1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100)
"""Perplexities over the dense model's that are marked."""

STEP_REACH = 0.25
"""Nats: a step's time over the dense model's reaches at least so far."""

MOST_NAMED = 18
"""Rows whose points have their names beside them; of more rows it is numbers, and a list of them."""

WIDEST = 26
"""Characters of a line of a label."""

DENSE = "dense"
CONTROL = "negative control"
EXACT = "exact by construction"
BROKEN = "changes what it must not"
VARIANT = "variant"

KINDS: dict[str, dict[str, Any]] = {
    DENSE: {"marker": "D", "color": "#000000", "markersize": 8},
    VARIANT: {"marker": "o", "color": charts.PLAIN, "markersize": 7},
    EXACT: {"marker": "s", "color": "#007a5a", "markersize": 6, "fillstyle": "none", "markeredgewidth": 1.6},
    CONTROL: {"marker": "X", "color": charts.BAD, "markersize": 8},
    BROKEN: {"marker": "P", "color": charts.BAD, "markersize": 8},
}
"""How each kind of row is marked."""


FRONT: dict[str, Any] = {"color": "#8a8a8a", "linestyle": "--", "linewidth": 1.1, "zorder": 1}
"""The line of rows that no other row beats in both quality and cost."""


READ: dict[str, Any] = {"marker": "|", "markersize": 7, "linewidth": 0.9, "markevery": [0], "zorder": 2}
"""The line from what is held to what a decoding step reads of it."""


@dataclass(frozen=True)
class Spot:
    """Where a row is marked.

    Attributes:
        row: Which.
        x: In units of the axes, or their edge.
        y: Likewise.
        across: 1 where it lies beyond the right edge, -1 beyond the left one.
        up: 1 above, -1 below.
        told: What is said of what lies beyond an axis.
    """

    row: Row
    x: float
    y: float
    across: int
    up: int
    told: str


@dataclass(frozen=True)
class Panel:
    """What quality is drawn against.

    Attributes:
        label: Of the axis.
        cost: Of a row, or ``None`` where it was not measured.
        ratio: Whether costs are times the dense model's: 1 is marked, and the scale is logarithmic.
        unit: Behind a value that is beyond the axis.
        least: Of a row that pays less than its cost at times, how much then.
    """

    label: str
    cost: Callable[[Row], float | None]
    ratio: bool
    unit: str
    least: Callable[[Row], float] | None = None


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Bytes held, a step's time where it was measured, and one panel for each longer prompt."""
    held = Panel(
        "KV cache held, KiB per token",
        lambda row: row.kv_bytes_held / 1024,
        ratio=False,
        unit="KiB",
        least=lambda row: row.kv_bytes_read / 1024,
    )
    found = [held]
    if any(row.decode_times_dense is not None for row in rows):
        label = "time of a decoding step, times dense"
        found.append(Panel(label, lambda row: row.decode_times_dense, ratio=True, unit="x dense"))
    for tokens in sorted({one.tokens for row in rows for one in row.longer}):
        label = f"time of a decoding step behind {tokens:,} tokens, times dense"
        found.append(Panel(label, partial(_behind, tokens), ratio=True, unit="x dense"))
    return found


def _behind(tokens: int, row: Row) -> float | None:
    """A step's time behind so many tokens, times dense."""
    return next((one.times_dense for one in row.longer if one.tokens == tokens), None)


def kind(row: Row) -> str:
    """What a row is there for."""
    if "negative control" in row.flags:
        return CONTROL
    if "CERTIFICATE FAILS" in row.flags:
        return BROKEN
    if "certificate holds" in row.flags:
        return EXACT
    return DENSE if not row.conversions else VARIANT


def loss(row: Row) -> float:
    """Nats per token above the dense model."""
    if math.isnan(row.ratio):
        return math.inf
    return math.log(row.ratio) if row.ratio > 0 else -math.inf


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of costs and losses those that no other point beats or equals in both, by ascending cost."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def picture(comparison: Comparison, title: str, path: Path) -> None:
    """Draws a comparison, as a PNG or whatever the suffix says."""
    with charts.style():
        charts.save(draw(comparison, title), path)


def draw(comparison: Comparison, title: str) -> Figure:
    """The picture: a panel for each cost, all with the same axis of quality; lower left is better."""
    rows = comparison.rows
    shown = panels(rows)
    numbered = len(rows) > MOST_NAMED
    names = {row.name: str(i) if numbered else _spaced(row.name) for i, row in enumerate(rows, start=1)}
    size = (5.4 * len(shown) + (4.2 if numbered else 0.8), max(5.6, 0.17 * len(rows) + 1.5))
    figure = charts.sheet(*size, f"Quality against cost: {title}")
    grid = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    losses = [loss(row) for row in rows]
    end = charts.reach([abs(value) for value in losses], SHORTEST)
    spots = []
    for axes, panel in zip(grid, shown, strict=True):
        _quality(axes, losses, end)
        spots.append(_points(axes, panel, rows, end))
    grid[0].set_ylabel("perplexity, times dense (scale finer near 1); lower is better")
    grid[0].tick_params(labelleft=True)
    _legend(figure, rows, names if numbered else {})
    for axes, panel, found in zip(grid, shown, spots, strict=True):
        _labels(axes, panel, names, found)
    return figure


def _quality(axes: Axes, losses: Sequence[float], end: float) -> None:
    """The axis of quality: nats, marked with the ratios of perplexities that they are; finer near 1."""
    axes.set_yscale("asinh", linear_width=LINEAR)
    low = min([0.0, *(value for value in losses if abs(value) <= end)])
    # Room on either side, of what the scale makes of it.
    top = LINEAR * math.sinh(math.asinh(end / LINEAR) * 1.14)
    bottom = LINEAR * math.sinh(math.asinh(low / LINEAR) - 0.2 * math.asinh(end / LINEAR))
    axes.set_ylim(bottom, top)
    marks = [ratio for ratio in RATIOS if min(low, 0.0) - 1e-9 <= math.log(ratio) <= top]
    charts.ticks(axes.yaxis, [math.log(ratio) for ratio in marks], lambda value, _: charts.plain(math.exp(value)))
    axes.axhline(0.0, color=charts.RULE, linewidth=0.8, zorder=0)
    axes.grid(axis="y", zorder=0)


def _costs(panel: Panel, rows: Sequence[Row]) -> tuple[float, float]:
    """From where to where a panel's axis of cost goes."""
    costs = [cost for row in rows if (cost := panel.cost(row)) is not None and math.isfinite(cost) and cost > 0]
    if not panel.ratio:
        first = costs[0] if costs else 1.0
        most = first * math.exp(charts.reach([math.log(max(1.0, cost / first)) for cost in costs], STEP_REACH))
        return 0.0, max(cost for cost in [1e-3, *costs] if cost <= most * 1.0001) * 1.12
    high = charts.reach([math.log(cost) for cost in costs if cost >= 1], STEP_REACH)
    low = charts.reach([-math.log(cost) for cost in costs if cost <= 1], STEP_REACH)
    room = 0.08 * (high + low)
    return math.exp(-low - room), math.exp(high + room)


def _points(axes: Axes, panel: Panel, rows: Sequence[Row], end: float) -> list[Spot]:
    """Limits, a marker for each row that lies within, and the line of what nothing beats."""
    left, right = _costs(panel, rows)
    if panel.ratio:
        charts.logarithmic(axes, "x", left, right)
        axes.axvline(1.0, color=charts.RULE, linewidth=0.8, zorder=0)
    else:
        axes.set_xlim(left, right)
    axes.set_xlabel(f"{panel.label}{' (log scale)' if panel.ratio else ''}; lower is better")
    spots = [_spot(axes, panel, row, end) for row in rows if panel.cost(row) is not None]
    for spot in spots:
        look = KINDS[kind(spot.row)]
        least = panel.least(spot.row) if panel.least else spot.x
        if not spot.told and least < spot.x:
            axes.plot([least, spot.x], [spot.y, spot.y], color=look["color"], **READ)
        if not spot.told:
            axes.plot(spot.x, spot.y, linestyle="", **look, zorder=3)
            continue
        # An arrow out of the picture.
        arrow = {"arrowstyle": "-|>", "color": look["color"], "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
        back = (-16 * spot.across, -16 * spot.up)
        axes.annotate("", (spot.x, spot.y), xytext=back, textcoords="offset points", arrowprops=arrow, zorder=3)
    best = pareto([(spot.x, spot.y) for spot in spots if not spot.told])
    if len(best) > 1:
        # As stairs: between two rows there is nothing that costs less than the one and loses less than the other.
        corners = [(best[0][0], axes.get_ylim()[1]), best[0]]
        for (_, before), (cost, after) in pairwise([*best, (right, best[-1][1])]):
            corners += [(cost, before), (cost, after)]
        axes.plot(*zip(*corners, strict=True), **FRONT)
    return spots


def _spot(axes: Axes, panel: Panel, row: Row, end: float) -> Spot:
    """Where a row is marked: at the edge where it lies beyond an axis, which is said."""
    cost = panel.cost(row)
    x = value = math.inf if cost is None or math.isnan(cost) else cost
    y = nats = loss(row)
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    across = int(value > right) - int(value < left)
    up = int(nats > end * 1.0001) - int(nats < -end * 1.0001)
    told = []
    if up:
        y = top if up > 0 else bottom
        told.append(f"{charts.plain(row.ratio)} x")
    if across:
        x = right if across > 0 else left
        told.append(f"{charts.plain(value)} {panel.unit}")
    return Spot(row, float(x), float(y), across, up, f"at {' and '.join(told)} is beyond the axis" if told else "")


def _labels(axes: Axes, panel: Panel, names: dict[str, str], spots: Sequence[Spot]) -> None:
    """Each row's name beside its point; which lie beyond an axis, and which have not been measured, is said."""
    texts = [textwrap.fill(f"{names[spot.row.name]} {spot.told}".strip(), WIDEST) for spot in spots]
    colours = [KINDS[kind(spot.row)]["color"] for spot in spots]
    labels.beside(axes, [(spot.x, spot.y) for spot in spots], texts, colours)
    measured = {spot.row.name for spot in spots}
    left_out = [told for name, told in names.items() if name not in measured]
    if left_out:
        axes.set_title(textwrap.fill(f"not measured: {'; '.join(left_out)}", 80), fontsize=9)


def _spaced(name: str) -> str:
    """A name of many options with places where a line may end."""
    return re.sub(",(?! )", ", ", name)


def _legend(figure: Figure, rows: Sequence[Row], numbers: dict[str, str]) -> None:
    """What the kinds of markers are, below, and at the right what the numbers are, where there are some."""
    from matplotlib.lines import Line2D

    there = {kind(row) for row in rows}
    handles = [Line2D([], [], linestyle="", label=name, **look) for name, look in KINDS.items() if name in there]
    if len(rows) > 1:
        handles.append(Line2D([], [], **FRONT, label="no row is better in both"))
    if any(row.kv_bytes_read < row.kv_bytes_held for row in rows):
        handles.append(Line2D([], [], color=charts.PLAIN, **READ, label="down to what a decoding step reads"))
    columns = 6 if figure.get_figwidth() > 10 else 3
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    if numbers:
        blank = [Line2D([], [], linestyle="") for _ in numbers]
        told = [f"{number}  {textwrap.shorten(name, 48, placeholder='...')}" for name, number in numbers.items()]
        figure.legend(blank, told, loc="outside right upper", handlelength=0, handletextpad=0)
