"""Rows of the CPU's tables as JSON, Markdown, a table for terminals and a picture, and where they come from."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from attnzoo.doctor import cpu_model
from attnzoo_kernels.runtime.processor import cpu_class
from bench.cpu.rows import Row


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
    """Draws forward and training: how many times faster than the baseline of each row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    chosen = [row for row in rows if row.ratio is not None and not row.at_most]
    figure, axes = pyplot.subplots(figsize=(9, 0.36 * len(chosen) + 1.4), layout="constrained")
    place = list(range(len(chosen)))[::-1]
    axes.barh(place, [row.ratio or 0 for row in chosen], color="#2b6ca3", height=0.6, label="measured")
    marked = [(row.must, y) for row, y in zip(chosen, place, strict=True) if row.must is not None]
    bounds = ([x for x, _ in marked], [y for _, y in marked])
    axes.scatter(*bounds, marker="|", s=260, color="#b0413e", label="bound")
    axes.set_yticks(place, [f"{row.part}: {row.name} | {row.ratio:.2f}" for row in chosen], fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.axvline(1.0, color="#444444", linewidth=1)
    axes.set_xlabel("times faster than FlexAttention (forward) or dense attention (the rest)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", fontsize=8)
    figure.suptitle(f"{where['cpu']}, class {where['class']}, {where['date']}", fontsize=10)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


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
