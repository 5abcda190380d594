"""Results of ``bench.policies`` as Markdown, a table for terminals, JSON and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attnzoo.evaluation.two_phase import report
from attnzoo.evaluation.two_phase.picture import picture
from attnzoo.reporting.outputs import write_together
from attnzoo.reporting.tables import Grid
from bench.policies.acceptance import Requirement, lines
from bench.policies.costs import Cost
from bench.policies.results import DENSE, PolicyResults, to_json

MIB = 1 << 20


def cost_header(results: PolicyResults) -> list[str]:
    """The columns of what policies cost."""
    lengths = sorted({step.tokens for cost in results.costs.values() for step in cost.steps})
    last = f"{max(lengths, default=0):,}"
    return [
        "policy",
        f"held behind {last}",
        "buffers",
        "read",
        "process, MiB: most",
        "and then",
        *(f"step x dense behind {length:,}" for length in lengths),
        f"attention of it behind {last}",
    ]


def cost_cells(cost: Cost) -> list[str]:
    """What one policy costs: bytes over dense's, memory above what the process took before it read, and steps."""
    return [
        cost.name,
        *(f"{value / cost.dense_bytes:.3f}" for value in (cost.held_bytes, cost.pool_bytes, cost.read_bytes)),
        f"{(cost.peak_bytes - cost.start_bytes) / MIB:,.0f}",
        f"{(cost.resident_bytes - cost.start_bytes) / MIB:,.0f}",
        *(f"{step.ratio:.2f}" for step in cost.steps),
        f"{cost.steps[-1].attention:.2f}",
    ]


LINE_HEADER = ("", "what", "must", "found", "control", "must", "found", "")


def line_cells(line: Requirement) -> list[str]:
    """One line of what must be shown."""
    found, control = (_number(value) for value in (line.found, line.control_found))
    return [line.id, line.what, line.must, found, line.control, line.control_must, control, line.verdict]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"


def grids(results: PolicyResults) -> list[Grid]:
    """Tables for a terminal."""
    found = []
    comparison = results.comparison()
    if comparison is not None:
        found.append(report.grid(comparison))
    if results.costs:
        header = cost_header(results)
        cells = [cost_cells(cost) for cost in results.costs.values()]
        found.append(Grid(header, cells, title="what it costs", numbers=frozenset(range(1, len(header)))))
    shown = lines(results)
    bad = frozenset(i for i, line in enumerate(shown) if line.verdict not in ("met", "not measured"))
    return [*found, Grid(LINE_HEADER, [line_cells(line) for line in shown], title="what must be shown", bad=bad)]


def markdown(results: PolicyResults) -> str:
    """Everything as Markdown."""
    text = []
    comparison = results.comparison()
    if comparison is not None:
        text += [report.markdown(comparison)]
    if results.costs:
        header = cost_header(results)
        dense = results.costs.get(DENSE)
        text += ["## What it costs", "", *_table(header, [cost_cells(cost) for cost in results.costs.values()]), ""]
        text += ["Memory is that of a process of its own, above what it took before it read: the most, and then."]
        if dense is not None:
            told = ", ".join(f"{step.dense_ms:.1f} ms behind {step.tokens:,} tokens" for step in dense.steps)
            text += [f"A step of the dense model: {told}."]
        text += [""]
    text += ["## What must be shown", "", *_table(LINE_HEADER, [line_cells(line) for line in lines(results)]), ""]
    return "\n".join([*text, f"Where it comes from: {json.dumps({**results.about, 'heads': results.heads})}", ""])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]


def as_text(results: PolicyResults) -> str:
    """The JSON."""
    acceptance: list[dict[str, Any]] = [{**asdict(line), "verdict": line.verdict} for line in lines(results)]
    return to_json(results, acceptance)


def write(results: PolicyResults, out: Path) -> None:
    """Writes OUT.json and OUT.md, and OUT.png where there is something to draw."""
    writers: dict[str, Any] = {
        "json": lambda path: path.write_text(as_text(results), encoding="utf-8"),
        "md": lambda path: path.write_text(markdown(results), encoding="utf-8"),
    }
    comparison = results.comparison()
    if comparison is not None and len(comparison.rows) > 1:
        writers["png"] = lambda path: picture(comparison, report.title(comparison.about), path)
    write_together(out, writers)
