"""What :mod:`bench.large` has measured, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnzoo.reporting.outputs import write_together
from attnzoo.reporting.tables import Grid

MUST = 8 << 30
"""The most memory that a conversion may take."""


def as_text(rows: Sequence[dict[str, Any]], where: dict[str, Any]) -> str:
    """The readings as JSON."""
    return json.dumps({"about": where, "must_bytes": MUST, "rows": list(rows)}, indent=2) + "\n"


def read(out: Path, where: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The readings of OUT.json by name; none where it was measured otherwise, or is not there."""
    file = out.with_suffix(".json")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"about": None}
    return {row["name"]: row for row in found["rows"]} if found["about"] == where else {}


def grid(rows: Sequence[dict[str, Any]], where: dict[str, Any]) -> Grid:
    """The readings as a table."""
    return Grid(
        ("", "peak memory", "minutes", "CPU minutes", "energy kept"),
        [
            (
                _name(row),
                _memory(row),
                f"{row['seconds'] / 60:.1f}",
                f"{row['cpu_seconds'] / 60:.1f}",
                "-" if row["kept"] is None else f"{row['kept']:.3f}",
            )
            for row in rows
        ],
        title=f"{where['parameters'] / 1e9:.2f}e9 parameters in {where['dtype']}, {where['calibration']}",
        numbers=frozenset({1, 2, 3, 4}),
    )


def _name(row: dict[str, Any]) -> str:
    options = ", ".join(f"{name}={value}" for name, value in (row["options"] or {}).items())
    return options or row["name"]


def _memory(row: dict[str, Any]) -> str:
    found = f"{row['peak_bytes'] / (1 << 30):.2f} GiB"
    if row["options"] is None:
        return found
    return f"{found} (<= {MUST >> 30}{'' if row['peak_bytes'] <= MUST else ', missed'})"


def write(rows: Sequence[dict[str, Any]], where: dict[str, Any], out: Path) -> None:
    """Writes OUT.json and OUT.md."""
    table = grid(rows, where)
    lines = [table.title, "", f"| {' | '.join(table.heads)} |", f"|{' --- |' * len(table.heads)}"]
    lines += [f"| {' | '.join(cells)} |" for cells in table.rows]
    lines += ["", f"Where it comes from: {json.dumps(where)}", ""]
    text = "\n".join(lines)
    writers = {
        "json": lambda path: path.write_text(as_text(rows, where), encoding="utf-8"),
        "md": lambda path: path.write_text(text, encoding="utf-8"),
    }
    write_together(out, writers)
