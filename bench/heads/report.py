"""Outcomes of ``bench.heads`` as Markdown, tables for terminals, JSON and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnzoo.reporting.outputs import write_together
from attnzoo.reporting.tables import Grid
from bench.heads.outcome import Head, HeadClaim, HeadOutcome, HeadResults, HeadRow, number
from bench.heads.picture import picture

CLAIMS = ("", "what", "must", "found", "")


def cells(outcome: HeadOutcome, row: HeadRow) -> list[str]:
    """A condition's figures, by the columns of all."""
    name = f"{row.name} (control)" if row.control else row.name
    return [name, *(number(row.figures.get(column)) for column in outcome.columns)]


def claim_cells(name: str, claim: HeadClaim) -> list[str]:
    return [name, claim.what, claim.must, number(claim.found), "met" if claim.met else "MISSED"]


def grids(results: HeadResults) -> list[Grid]:
    """Tables for a terminal: one for each experiment, and what must hold."""
    found = []
    for outcome in results.outcomes.values():
        header = ("", *outcome.columns)
        rows = [cells(outcome, row) for row in outcome.rows]
        found.append(Grid(header, rows, title=outcome.title, numbers=frozenset(range(1, len(header)))))
    claims = [(name, claim) for name, outcome in results.outcomes.items() for claim in outcome.claims]
    missed = frozenset(place for place, (_, claim) in enumerate(claims) if not claim.met)
    rows = [claim_cells(name, claim) for name, claim in claims]
    return [*found, Grid(CLAIMS, rows, title="what must hold", bad=missed)]


def markdown(results: HeadResults) -> str:
    """Everything as Markdown."""
    about = results.about
    text = [f"# What single heads do: {about.get('model', 'a model')}", ""]
    for outcome in results.outcomes.values():
        text += [f"## {outcome.title}", "", f"{outcome.source}. {outcome.said}", ""]
        text += [*_table(("", *outcome.columns), [cells(outcome, row) for row in outcome.rows]), ""]
        for name, found in outcome.heads.items():
            text += [f"{name[:1].upper()}{name[1:]}: {_heads(found)}.", ""]
        text += [f"{outcome.cpu_seconds:.0f} CPU seconds.", ""]
    claims = [claim_cells(name, claim) for name, outcome in results.outcomes.items() for claim in outcome.claims]
    text += ["## What must hold", "", *_table(CLAIMS, claims), ""]
    return "\n".join([*text, f"Where it comes from: {json.dumps(about)}", ""])


def _heads(found: Sequence[Head]) -> str:
    return ", ".join(f"({layer}, {head})" for layer, head in found)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]


def write(results: HeadResults, out: Path) -> None:
    """Writes OUT.json, OUT.md and OUT.png."""
    writers: dict[str, Any] = {
        "json": lambda path: path.write_text(results.to_json(), encoding="utf-8"),
        "md": lambda path: path.write_text(markdown(results), encoding="utf-8"),
    }
    if results.outcomes:
        writers["png"] = lambda path: picture(results, path)
    write_together(out, writers)
