"""Outcomes as a picture: bars of each experiment's conditions, and maps of layers and heads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bench.heads.outcome import HeadOutcome, HeadResults, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE = "#2b6ca3"
GREY = "#b5b5b5"
RING = "#111111"
COLUMNS = 2
MAPS = 4
"""Maps in a row."""

ALIKE = 0.1
"""Conditions whose figures differ by less than this share of them are drawn by what they differ by."""


def picture(results: HeadResults, path: Path) -> None:
    """Draws all outcomes, as a PNG or whatever the suffix says."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    outcomes = list(results.outcomes.values())
    maps = [(name, table, outcome) for outcome in outcomes for name, table in outcome.maps.items()]
    bar_rows = -(-len(outcomes) // COLUMNS)
    map_rows = -(-len(maps) // MAPS)
    figure = pyplot.figure(figsize=(13, 2.5 * bar_rows + 4.2 * map_rows), layout="constrained")
    parts = figure.subfigures(2 if maps else 1, 1, height_ratios=[2.5 * bar_rows, 4.2 * map_rows][: 2 if maps else 1])
    upper: Figure = parts[0] if maps else parts
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
    upper.suptitle(f"{results.about.get('model', '')}: what single heads do (grey: controls)", fontsize=11)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


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
    axes.set_yticks(place, [row.name for row in rows], fontsize=6.5)
    axes.tick_params(axis="x", labelsize=7)
    for y, value in zip(place, values, strict=True):
        axes.annotate(
            number(value),
            (value, y),
            xytext=(3 if value >= 0 else -3, 0),
            textcoords="offset points",
            ha="left" if value >= 0 else "right",
            va="center",
            fontsize=7,
        )
    low, high = min([0.0, *values]), max([0.0, *values])
    room = 0.12 * (high - low or 1)
    axes.set_xlim(low - (room if low < 0 else 0), high + room)
    axes.axvline(0, color="#444444", linewidth=0.8)
    axes.set_title(outcome.title, fontsize=9, loc="left")
    axes.set_xlabel(label, fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)


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
    axes.set_title(name, fontsize=8)
    axes.set_xlabel("query head", fontsize=7)
    axes.set_ylabel("layer", fontsize=7)
    axes.tick_params(labelsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    colours = axes.figure.colorbar(drawn, ax=axes, shrink=0.8)
    colours.ax.tick_params(labelsize=6)
