"""Rows of the CPU's tables as JSON, Markdown, a table for terminals and a picture, and where they come from."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from attnzoo.doctor import cpu_model
from attnzoo.reporting import charts
from attnzoo_kernels.runtime.processor import cpu_class
from bench.cpu.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def about() -> dict[str, Any]:
    """Where the figures come from."""
    return {
        "cpu": cpu_model(),
        "class": cpu_class(),
        "torch": torch.__version__,
        "date": time.strftime("%F"),
    }


def render(rows: list[Row], where: dict[str, Any]) -> Table:
    """The rows as a table for a terminal."""
    table = Table(title=f"{where['cpu']} ({where['class']}), torch {where['torch']}")
    for name in ("", "case", "figures", "ratio", "must"):
        table.add_column(name, justify="right" if name in ("ratio", "must") else "left")
    last = ""
    for row in rows:
        red = row.holds is False
        table.add_row(*cells(row, row.part if row.part != last else ""), style="bold red" if red else None)
        last = row.part
    return table


def cells(row: Row, part: str) -> tuple[str, str, str, str, str]:
    """One row's cells."""
    figures = "; ".join(f"{name} {value:.3g}" for name, value in row.figures.items())
    figures += f" {row.unit}" if row.unit else ""
    bound = "" if row.must is None else f"{'<=' if row.at_most else '>='} {row.must:g}"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    return part, row.name, "; ".join([figures, *row.notes]), ratio, bound


def markdown(rows: list[Row], where: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [f"{where['cpu']} ({where['class']}), torch {where['torch']}, {where['date']}"]
    lines += ["", "| part | case | figures | ratio | must |", "| --- | --- | --- | --- | --- |"]
    lines += ["| " + " | ".join(cells(row, row.part)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def picture(rows: list[Row], where: dict[str, Any], path: Path) -> None:
    """Draws each row that has a bound beside it: times faster than a peer, and costs over a peer or a floor."""
    with charts.style():
        charts.save(draw(rows, where), path)


def draw(rows: list[Row], where: dict[str, Any]) -> Figure:
    """The picture: bars from 1 on, hatched where a bound is missed."""
    panels = {
        "times faster than FlexAttention (log scale); higher is better": [
            row for row in rows if row.must and not row.at_most
        ],
        "cost, times that of a peer or a floor (log scale); lower is better": [
            row for row in rows if row.must and row.at_most and row.unit in ("ms", "x")
        ],
    }
    panels = {label: chosen for label, chosen in panels.items() if chosen}
    counts = [len(chosen) for chosen in panels.values()] or [1]
    title = f"The operation on a CPU beside its peers: {where['cpu']}, class {where['class']}, {where['date']}"
    figure = charts.sheet(10, 0.3 * sum(counts) + 1.1 * len(counts) + 0.6, title)
    grid = figure.subplots(len(counts), 1, squeeze=False, height_ratios=[count + 1 for count in counts])
    for (label, chosen), axes in zip(panels.items(), grid[:, 0], strict=False):
        _bars(axes, chosen)
        axes.set_xlabel(label)
    return figure


def _bars(axes: Axes, rows: list[Row]) -> None:
    """A bar for each row's ratio from 1 on, hatched where the bound is missed, and a mark at the bound."""
    from matplotlib.patches import Patch

    place = list(range(len(rows)))[::-1]
    ratios = [row.ratio or 1.0 for row in rows]
    bounds = [row.must or 1.0 for row in rows]
    missed = [row.holds is False for row in rows]
    bars = axes.barh(place, [ratio - 1 for ratio in ratios], left=1, color=charts.PLAIN, height=0.6)
    for bar, bad in zip(bars, missed, strict=True):
        if bad:
            bar.set(facecolor="white", edgecolor=charts.BAD, hatch="////")
    marks = axes.scatter(bounds, place, marker="|", s=220, color="#111111", label="bound", zorder=3)
    for y, ratio, bound in zip(place, ratios, bounds, strict=True):
        axes.text(max(ratio, bound, 1) * 1.04, y, f"{ratio:.2f}", va="center", fontsize=9)
    axes.set_yticks(place, [f"{row.part}: {row.name}" for row in rows])
    charts.logarithmic(axes, "x", min([0.9, *ratios]) * 0.95, max([1.5, *ratios, *bounds]) * 1.25, most=10)
    axes.axvline(1.0, color=charts.RULE, linewidth=1)
    handles: list[Any] = [marks, Patch(color=charts.PLAIN, label="bound kept")]
    if any(missed):
        handles.append(Patch(facecolor="white", edgecolor=charts.BAD, hatch="////", label="bound missed"))
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(handles))


def report(rows: list[Row], where: dict[str, Any], out: Path, *, as_json: bool) -> None:
    """Writes the rows as OUT.json and OUT.md, and prints them."""
    out.parent.mkdir(parents=True, exist_ok=True)
    data = {"about": where, "rows": [{**asdict(row), "holds": row.holds} for row in rows]}
    text = json.dumps(data, indent=2) + "\n"
    out.with_name(f"{out.name}.json").write_text(text, encoding="utf-8")
    out.with_name(f"{out.name}.md").write_text(markdown(rows, where), encoding="utf-8")
    if as_json:
        typer.echo(text, nl=False)
    else:
        console = Console()
        (console if console.is_terminal else Console(width=140)).print(render(rows, where))
