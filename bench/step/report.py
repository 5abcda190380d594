"""Readings of ``bench.step`` as JSON, Markdown, a table for terminals and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.table import Table

from attnzoo.reporting import charts, labels
from attnzoo.reporting.outputs import write_together
from bench.step.measure import StepReading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "a decoding step over transformers' sdpa with its DynamicCache in the same rounds"


def header(readings: Sequence[StepReading]) -> list[str]:
    """The table's columns."""
    lengths = sorted({reading.tokens for reading in readings})
    return ["", *(f"{length} tokens" for length in lengths), "cache / tokens", "off by"]


def lines(readings: Sequence[StepReading]) -> list[list[str]]:
    """One line for each contestant: ratios with their bounds, bytes of the cache over those of the tokens."""
    lengths = sorted({reading.tokens for reading in readings})
    found = []
    for name in dict.fromkeys(reading.name for reading in readings):
        own = {reading.tokens: reading for reading in readings if reading.name == name}
        cells = [_cell(own.get(length)) for length in lengths]
        last = own[max(own)]
        share = f"{last.cache_bytes / last.token_bytes:.2f}"
        found.append([name, *cells, share, f"{max(reading.error for reading in own.values()):.0e}"])
    return found


def _cell(reading: StepReading | None) -> str:
    if reading is None:
        return ""
    if reading.ratio is None:
        return f"wrong: {reading.error:.1e}"
    bound = "" if reading.must is None else f" (<= {reading.must:g}{'' if reading.holds else ', missed'})"
    return f"{reading.ratio:.2f}{bound}"


def markdown(readings: Sequence[StepReading], where: dict[str, Any]) -> str:
    """The readings as Markdown."""
    rows = [header(readings), ["---"] * len(header(readings)), *lines(readings)]
    text = [f"{where['model']}, {TITLE}", "", *("| " + " | ".join(row) + " |" for row in rows)]
    dense: dict[int, list[float]] = {}
    for reading in readings:
        if reading.dense_ms is not None:
            dense.setdefault(reading.tokens, []).append(reading.dense_ms)
    times = [f"{median(ms):.1f} ms behind {length} tokens" for length, ms in sorted(dense.items())]
    text += ["", *([f"Dense: {', '.join(times)}"] if times else [])]
    text += [f"Wrong: {reading.wrong}" for reading in readings if reading.wrong]
    return "\n".join([*text, "", f"Where it comes from: {json.dumps(where)}", ""])


def render(readings: Sequence[StepReading], where: dict[str, Any]) -> Table:
    """The readings as a table for a terminal."""
    table = Table(*header(readings), title=f"{where['model']}, {TITLE}")
    missed = {reading.name for reading in readings if reading.holds is False}
    for line in lines(readings):
        table.add_row(*line, style="bold red" if line[0] in missed else None)
    return table


def picture(readings: Sequence[StepReading], where: dict[str, Any], path: Path) -> None:
    """Draws the ratios against the tokens in the cache; what is wrong has none."""
    with charts.style():
        charts.save(figure(readings, where), path)


def figure(readings: Sequence[StepReading], where: dict[str, Any]) -> Figure:
    """The picture: a line for each contestant, named where it ends."""
    timed = [reading for reading in readings if reading.ratio is not None]
    names = list(dict.fromkeys(reading.name for reading in timed))
    title = f"Time of a decoding step, times dense: {where['model']}, {where['cpu']}, {where['date']}"
    made = charts.sheet(8.4, max(4.8, 0.2 * len(names) + 1.6), title)
    axes = made.subplots()
    for number, name in enumerate(names):
        own = [reading for reading in timed if reading.name == name]
        ratios = [reading.ratio for reading in own if reading.ratio is not None]
        axes.plot([x.tokens for x in own], ratios, label=name, **charts.look(number))
    axes.axhline(1.0, color=charts.RULE, linewidth=1)
    ratios = [reading.ratio for reading in timed if reading.ratio is not None]
    charts.logarithmic(axes, "y", min([0.8, *ratios]) / 1.1, max([1.25, *ratios]) * 1.1)
    axes.set_xscale("log", base=2)
    charts.ticks(axes.xaxis, sorted({reading.tokens for reading in readings}), charts.tokens)
    axes.set_xlabel("tokens in the cache (log scale)")
    axes.set_ylabel("times dense (log scale); lower is better")
    axes.grid(axis="y")
    labels.at_ends(axes)
    return made


def as_text(readings: Sequence[StepReading], where: dict[str, Any]) -> str:
    """The readings as JSON."""
    rows = [{**asdict(reading), "holds": reading.holds} for reading in readings]
    return json.dumps({"about": where, "rows": rows}, indent=2) + "\n"


def write(readings: Sequence[StepReading], where: dict[str, Any], out: Path) -> None:
    """Writes OUT.json and OUT.md."""
    write_together(
        out,
        {
            "json": lambda path: path.write_text(as_text(readings, where), encoding="utf-8"),
            "md": lambda path: path.write_text(markdown(readings, where), encoding="utf-8"),
        },
    )


def draw(readings: Sequence[StepReading], where: dict[str, Any], out: Path) -> None:
    """Writes OUT.png."""
    write_together(out, {"png": lambda path: picture(readings, where, path)})
