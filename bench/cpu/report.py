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
from attnzoo_kernels.runtime.processor import cpu_class
from bench.cpu.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "times faster than FlexAttention (higher is better; red: the bound is missed)": [
            row for row in rows if row.must and not row.at_most
        ],
        "cost over a peer or a floor (lower is better; red: the bound is missed)": [
            row for row in rows if row.must and row.at_most and row.unit in ("ms", "x")
        ],
    }
    panels = {label: chosen for label, chosen in panels.items() if chosen}
    counts = [len(chosen) for chosen in panels.values()] or [1]
    figure, axes = pyplot.subplots(
        len(counts), 1, figsize=(10, 0.32 * sum(counts) + 1.1 * len(counts) + 0.6), layout="constrained",
        squeeze=False, height_ratios=[count + 1 for count in counts],
    )  # fmt: skip
    for (label, chosen), axis in zip(panels.items(), axes[:, 0], strict=False):
        _bars(axis, chosen)
        axis.set_xlabel(label, fontsize=9)
    figure.suptitle(f"{where['cpu']}, class {where['class']}, {where['date']}", fontsize=10, x=0.02, ha="left")
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _bars(axis: Axes, rows: list[Row]) -> None:
    """A bar for each row's ratio from 1 on, red where the bound is missed, and a mark at the bound."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    place = list(range(len(rows)))[::-1]
    ratios = [row.ratio or 1.0 for row in rows]
    bounds = [row.must or 1.0 for row in rows]
    colours = ["#2b6ca3" if row.holds is not False else "#b0413e" for row in rows]
    axis.barh(place, [ratio - 1 for ratio in ratios], left=1, color=colours, height=0.6)
    axis.scatter(bounds, place, marker="|", s=220, color="#222222", label="bound", zorder=3)
    for y, ratio, bound in zip(place, ratios, bounds, strict=True):
        axis.text(max(ratio, bound, 1) * 1.03, y, f"{ratio:.2f}", va="center", fontsize=8)
    axis.set_yticks(place, [f"{row.part}: {row.name}" for row in rows], fontsize=8)
    axis.set_xscale("log")
    axis.set_xlim(min([0.9, *ratios]) * 0.95, max([1.5, *ratios, *bounds]) * 1.2)
    axis.xaxis.set_major_locator(FixedLocator((0.2, 0.5, 0.7, 1, 1.2, 1.5, 2, 3, 5, 8, 12, 20, 50, 100)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.axvline(1.0, color="#444444", linewidth=1)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right", fontsize=8)


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
