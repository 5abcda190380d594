"""Readings as JSON, Markdown and a picture, and what they say about the goal."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attnzoo.reporting.outputs import write_together
from bench.longheads.picture import picture
from bench.longheads.rows import FAR, SPAN, Reading

GOAL = 45.0


def verdict(rows: list[Reading]) -> str:
    """What the figures say about the goal."""
    found = {row.name: row for row in rows}
    tried = [row for row in rows if row.options.get("variant") == "longheads"]
    if not tried or math.isnan(tried[0].far):
        return ""
    best = min(tried, key=lambda row: row.far)
    text = f"best beyond {FAR}: {best.name}, perplexity {best.far:.1f} (goal: {GOAL:g})"
    if "dense" in found:
        text += f"; dense {found['dense'].far:.0f}, {found['dense'].far / best.far:.1f} times as much"
    return text


def holds(rows: list[Reading]) -> bool:
    """Whether the best setting is below a third of dense, and all are dense below their threshold."""
    dense = next((row.far for row in rows if row.name == "dense"), None)
    tried = [row for row in rows if row.options.get("variant") == "longheads"]
    same = all(row.same is None or row.same < 1e-3 for row in tried)
    if dense is None or not tried or math.isnan(dense):
        return same
    return same and min(row.far for row in tried) < dense / 3


def header(rows: list[Reading]) -> list[str]:
    """The table's columns."""
    spans = [f"{SPAN * i // 1024}k" for i in range(len(rows[0].perplexity))]
    return ["", *(f"from {span}" for span in spans), f"{FAR} on", "keys a step", "off dense before", "s"]


def cells(row: Reading) -> list[str]:
    """One row's cells."""
    same = "" if row.same is None else f"{row.same:.0e}"
    return [
        row.name,
        *(f"{x:.1f}" for x in row.perplexity),
        f"{row.far:.1f}",
        str(row.keys),
        same,
        f"{row.seconds:.0f}",
    ]


def markdown(rows: list[Reading], where: dict[str, Any]) -> str:
    """The rows as Markdown."""
    names = header(rows)
    lines = [
        f"Perplexity of {where['model']} on {where['tokens']} tokens of {where['text']} from {where['offset']}",
        "",
    ]
    lines += ["| " + " | ".join(line) + " |" for line in [names, ["---"] * len(names), *map(cells, rows)]]
    return "\n".join([*lines, "", verdict(rows), "", f"Where it comes from: {json.dumps(where)}", ""])


def write(rows: list[Reading], where: dict[str, Any], out: Path) -> str:
    """Writes OUT.json, OUT.md and OUT.png; gives the JSON."""
    text = (
        json.dumps({"about": where, "rows": [asdict(row) for row in rows], "verdict": verdict(rows)}, indent=2) + "\n"
    )
    write_together(
        out,
        {
            "json": lambda path: path.write_text(text, encoding="utf-8"),
            "md": lambda path: path.write_text(markdown(rows, where), encoding="utf-8"),
            "png": lambda path: picture(rows, where, SPAN, path),
        },
    )
    return text
