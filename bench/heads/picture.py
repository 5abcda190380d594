"""Outcomes as a picture: bars of each experiment's conditions, and maps of layers and heads."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from attnzoo.reporting import charts
from bench.heads.outcome import HeadOutcome, HeadResults, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE = charts.PLAIN
GREY = "#b5b5b5"
RING = "#e4572e"
COLUMNS = 2
BAR = 2.5
"""Inches of a row of bars."""

MAP = 4.2
"""Inches of a row of maps."""

MAPS = 4
"""Maps in a row."""

ALIKE = 0.1
"""Conditions whose figures differ by less than this share of them are drawn by what they differ by."""


def picture(results: HeadResults, path: Path) -> None:
    """Draws all outcomes, as a PNG or whatever the suffix says."""
    with charts.style():
        charts.save(draw(results), path)


def draw(results: HeadResults) -> Figure:
    """The picture: a panel of bars for each experiment, and maps below."""
    outcomes = list(results.outcomes.values())
    maps = [(name, table, outcome) for outcome in outcomes for name, table in outcome.maps.items()]
    bar_rows = -(-len(outcomes) // COLUMNS)
    map_rows = -(-len(maps) // MAPS)
    figure = charts.sheet(12, BAR * bar_rows + MAP * map_rows + 0.6)
    heights = [BAR * bar_rows + 0.6, MAP * map_rows][: 2 if maps else 1]
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    upper = parts[0]
    panels = upper.subplots(bar_rows, COLUMNS, squeeze=False).flatten()
    for axes, outcome in zip(panels, outcomes, strict=False):
        _bars(axes, outcome)
    for axes in panels[len(outcomes) :]:
        axes.set_axis_off()
    if maps:
        lower = parts[1].subplots(map_rows, MAPS, squeeze=False).flatten()
        for axes, (name, table, outcome) in zip(lower, maps, strict=False):
            _map(axes, name, table, outcome)
        for axes in lower[len(maps) :]:
            axes.set_axis_off()
    title = (
        f"What single heads do: {results.about.get('model', '')} (grey bars: controls; rings: heads that were found)"
    )
    upper.suptitle(title, x=0.01, ha="left")
    return figure


def _bars(axes: Axes, outcome: HeadOutcome) -> None:
    """A bar for each condition's main figure."""
    rows = [row for row in outcome.rows if outcome.main in row.figures]
    place = list(range(len(rows)))[::-1]
    values = [row.figures[outcome.main] for row in rows]
    label = outcome.main
    if max(values) - min(values) < ALIKE * min(values):
        # Bars of nearly the same length say nothing: what is drawn is what they differ by.
        values = [value - values[0] for value in values]
        label = f"{outcome.main}, less that of the model {rows[0].name}"
    axes.barh(place, values, color=[GREY if row.control else BLUE for row in rows], height=0.7)
    axes.set_yticks(place, [row.name for row in rows], fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    for y, value in zip(place, values, strict=True):
        axes.annotate(
            number(value),
            (value, y),
            xytext=(3 if value >= 0 else -3, 0),
            textcoords="offset points",
            ha="left" if value >= 0 else "right",
            va="center",
            fontsize=8,
        )
    low, high = min([0.0, *values]), max([0.0, *values])
    room = 0.2 * (high - low or 1)
    axes.set_xlim(low - (room if low < 0 else 0), high + room)
    axes.axvline(0, color="#444444", linewidth=0.8)
    axes.set_title(outcome.title, fontsize=10)
    axes.set_xlabel(label, fontsize=8.5)


def _map(axes: Axes, name: str, table: list[list[float]], outcome: HeadOutcome) -> None:
    """A table of layers and heads, with rings round the heads that were found."""
    from matplotlib.ticker import MaxNLocator

    largest = max(abs(value) for row in table for value in row) or 1.0
    signed = min(value for row in table for value in row) < 0
    drawn = axes.imshow(
        table,
        cmap="RdBu" if signed else "Blues",
        vmin=-largest if signed else 0,
        vmax=largest,
        aspect="auto",
    )
    ringed = [head for found in outcome.heads.values() for head in found]
    axes.scatter([head for _, head in ringed], [layer for layer, _ in ringed], s=34, facecolors="none", edgecolors=RING)
    axes.set_title(textwrap.fill(name, 26), fontsize=9)
    axes.set_xlabel("query head", fontsize=8.5)
    axes.set_ylabel("layer", fontsize=8.5)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    colours = axes.figure.colorbar(drawn, ax=axes, shrink=0.8)
    colours.ax.tick_params(labelsize=8)
