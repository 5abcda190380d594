"""Readings of ``bench.step`` as JSON, Markdown, a table for terminals and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from attnzoo.reporting.outputs import write_together
from bench.step.measure import StepReading

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8a6d00", "#5b4ea8", "#2b6ca3", "#b0413e", "#000000")
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
    bound = "" if reading.must is None else f" (<= {reading.must:g}{'' if reading.holds else ', missed'})"
    return f"{reading.ratio:.2f}{bound}"


def markdown(readings: Sequence[StepReading], where: dict[str, Any]) -> str:
    """The readings as Markdown."""
    rows = [header(readings), ["---"] * len(header(readings)), *lines(readings)]
    text = [f"{where['model']}, {TITLE}", "", *("| " + " | ".join(row) + " |" for row in rows)]
    dense = {reading.tokens: reading.dense_ms for reading in readings}
    text += ["", "Dense: " + ", ".join(f"{ms:.1f} ms behind {length} tokens" for length, ms in sorted(dense.items()))]
    return "\n".join([*text, "", f"Where it comes from: {json.dumps(where)}", ""])


def render(readings: Sequence[StepReading], where: dict[str, Any]) -> Table:
    """The readings as a table for a terminal."""
    table = Table(*header(readings), title=f"{where['model']}, {TITLE}")
    missed = {reading.name for reading in readings if reading.holds is False}
    for line in lines(readings):
        table.add_row(*line, style="bold red" if line[0] in missed else None)
    return table


def picture(readings: Sequence[StepReading], where: dict[str, Any], path: Path) -> None:
    """Draws the ratios against the tokens in the cache."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    figure, axes = pyplot.subplots(figsize=(8, 4.8), layout="constrained")
    for number, name in enumerate(dict.fromkeys(reading.name for reading in readings)):
        own = [reading for reading in readings if reading.name == name]
        place = [reading.tokens for reading in own]
        axes.plot(place, [x.ratio for x in own], marker="o", color=COLOURS[number % len(COLOURS)], label=name)
    axes.axhline(1.0, color="#444444", linewidth=1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({reading.tokens for reading in readings}))
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("time of a step, dense = 1")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{where['model']}, {where['cpu']}, {where['date']}", fontsize=10)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def write(readings: Sequence[StepReading], where: dict[str, Any], out: Path | None) -> str:
    """Writes OUT.json, OUT.md and OUT.png where a place is given; gives the JSON."""
    rows = [{**asdict(reading), "holds": reading.holds} for reading in readings]
    text = json.dumps({"about": where, "rows": rows}, indent=2) + "\n"
    if out is not None:
        write_together(
            out,
            {
                "json": lambda path: path.write_text(text, encoding="utf-8"),
                "md": lambda path: path.write_text(markdown(readings, where), encoding="utf-8"),
                "png": lambda path: picture(readings, where, path),
            },
        )
    return text
