"""A comparison as a table for a terminal, as Markdown and as JSON, and all of it in files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attnzoo.evaluation.compare import Comparison, Row
from attnzoo.evaluation.compare_picture import picture
from attnzoo.reporting.outputs import write_together
from attnzoo.reporting.tables import Grid

COLUMNS = (
    "variant",
    "perplexity",
    "x dense",
    "ΔNLL",
    "density",
    "KV bytes/token held",
    "read",
    "decode tok/s",
    "remarks",
)


def cells(row: Row) -> list[str]:
    """One row's cells."""
    return [
        row.name,
        f"{row.perplexity:,.2f}" if row.perplexity < 1000 else f"{row.perplexity:,.0f}",
        f"{row.ratio:,.3f}" if row.ratio < 100 else f"{row.ratio:,.0f}",
        f"{row.delta_nll:+.4f}",
        f"{row.density:.3f}",
        f"{row.kv_bytes_held:,}",
        f"{row.kv_bytes_read:,}",
        f"{row.decode_tokens_per_s:.1f}",
        ", ".join(row.flags),
    ]


def grid(comparison: Comparison) -> Grid:
    """The comparison as a table for a terminal."""
    rows = []
    for row in comparison.rows:
        held, read = (f"{value / 1024:.1f}" for value in (row.kv_bytes_held, row.kv_bytes_read))
        remarks = ", ".join(flag.removeprefix("negative ").removeprefix("certificate ") for flag in row.flags)
        values = cells(row)
        rows.append((*values[:5], held, read, values[7], remarks))
    bad = {i for i, row in enumerate(comparison.rows) if {"NO-OP", "CERTIFICATE FAILS"} & set(row.flags)}
    return Grid(
        ("variant", "ppl", "x dense", "ΔNLL", "density", "held", "read", "tok/s", "remarks"),
        rows,
        title=_title(comparison.about),
        caption="KiB of KV cache for each token, held, and read by a decode step; tok/s when decoding",
        numbers=frozenset(range(1, 8)),
        bad=frozenset(bad),
    )


def markdown(comparison: Comparison) -> str:
    """The comparison as Markdown."""
    lines = [_title(comparison.about), "", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
    lines += [_line(cells(row)) for row in comparison.rows]
    about = ", ".join(f"{name}: {value}" for name, value in comparison.about.items())
    return "\n".join([*lines, "", f"Where it comes from: {about}", ""])


def to_json(comparison: Comparison) -> str:
    """The comparison as JSON; only ``decode_tokens_per_s`` and ``convert_seconds`` differ when it is run again."""
    data = {"about": comparison.about, "rows": [asdict(row) for row in comparison.rows]}
    return json.dumps(data, indent=2, sort_keys=True) + "\n"


def write(comparison: Comparison, out: Path) -> None:
    """Writes OUT.json, OUT.md and OUT.png."""
    write_together(
        out,
        {
            "json": lambda path: path.write_text(to_json(comparison), encoding="utf-8"),
            "md": lambda path: path.write_text(markdown(comparison), encoding="utf-8"),
            "png": lambda path: picture(comparison, _title(comparison.about), path),
        },
    )


def _line(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"


def _title(about: dict[str, Any]) -> str:
    count, length = about["windows"]
    where = f" of {about['text']} from token {about['offset']}" if "text" in about else ""
    return f"{about.get('model', 'model')} on {count} x {length} tokens{where}"
