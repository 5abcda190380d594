"""Results of ``bench.encoders`` as JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attnzoo.reporting.outputs import write_together
from attnzoo.reporting.tables import Grid
from bench.encoders.embeddings import EmbeddingRow
from bench.encoders.mapping import MappingRow

EMBEDDINGS = ("read", "texts", "density", "cosine", "nearest kept", "ten nearest kept")
MAPPING = ("converted", "values a token", "filled in", "nats", "mapped as before", "mapped right")


def grids(embeddings: Sequence[EmbeddingRow], mapping: Sequence[MappingRow]) -> list[Grid]:
    """Tables for a terminal."""
    found = []
    if embeddings:
        rows = [
            [r.name, r.texts, *(f"{value:.3f}" for value in (r.density, r.cosine, r.nearest, r.near))]
            for r in embeddings
        ]
        found.append(Grid(EMBEDDINGS, rows, title="MiniLM: embeddings", numbers=frozenset(range(2, 6))))
    if mapping:
        rows = [
            [r.name, str(r.values), *(f"{value:.3f}" for value in (r.filled, r.nll, r.same, r.right))] for r in mapping
        ]
        found.append(Grid(MAPPING, rows, title="rxnmapper: reactions", numbers=frozenset(range(1, 6))))
    return found


def markdown(about: dict[str, Any], embeddings: Sequence[EmbeddingRow], mapping: Sequence[MappingRow]) -> str:
    """Everything as Markdown."""
    text = []
    for grid in grids(embeddings, mapping):
        lines = ["| " + " | ".join(row) + " |" for row in [grid.heads, ["---"] * len(grid.heads), *grid.rows]]
        text += [f"## {grid.title}", "", *lines, ""]
    text += [
        "Embeddings: mean cosine to those of the model as it was, and share of nearest neighbours among the texts that "
        'stay. "At random": in the model as it was every token reads itself, the first one, and others at random, as '
        "many as the row above reads.",
        "Reactions: tokens left out one at a time; atoms of products mapped by the head that maps, or the one nearest "
        "to it.",
        "",
        f"Where it comes from: {json.dumps(about)}",
        "",
    ]
    return "\n".join(text)


def as_text(about: dict[str, Any], embeddings: Sequence[EmbeddingRow], mapping: Sequence[MappingRow]) -> str:
    """The JSON."""
    data = {
        "about": about,
        "embeddings": [asdict(row) for row in embeddings],
        "reactions": [asdict(row) for row in mapping],
    }
    return json.dumps(data, indent=1) + "\n"


def write(out: Path, about: dict[str, Any], embeddings: Sequence[EmbeddingRow], mapping: Sequence[MappingRow]) -> None:
    """Writes OUT.json and OUT.md."""
    write_together(
        out,
        {
            "json": lambda path: path.write_text(as_text(about, embeddings, mapping), encoding="utf-8"),
            "md": lambda path: path.write_text(markdown(about, embeddings, mapping), encoding="utf-8"),
        },
    )


def read(out: Path) -> tuple[list[EmbeddingRow], list[MappingRow]]:
    """The rows of an earlier run; none where there is no file."""
    file = out.with_suffix(".json")
    if not file.is_file():
        return [], []
    data = json.loads(file.read_text(encoding="utf-8"))
    return [EmbeddingRow(**row) for row in data["embeddings"]], [MappingRow(**row) for row in data["reactions"]]
