"""A comparison of policies as a table for a terminal, as Markdown and as JSON, and all of it in files."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attnzoo.evaluation.two_phase.picture import picture
from attnzoo.evaluation.two_phase.rows import HOLDS_ALL, PolicyComparison, PolicyRow
from attnzoo.evaluation.two_phase.tasks import KEY, RECALL, TEXT
from attnzoo.reporting.outputs import write_together
from attnzoo.reporting.tables import Grid

COLUMNS = ("policy", "held", "read", "bytes/token", "text", "recall", "key", "keys right", "remarks")

LEGEND = (
    "held and read: over what the dense model holds behind the context and reads for a step; text, recall and key: nats"
    " per token above the dense model's, of the text going on, of spans of the context word for word, and of a passkey"
)


def cells(comparison: PolicyComparison, row: PolicyRow) -> list[str]:
    """One row's cells; the dense model's are figures by themselves, the others' lie above them."""
    return [
        row.name,
        f"{row.held_share:.3f}",
        f"{row.read_share:.3f}",
        f"{row.bytes_per_token:,.0f}",
        *(_nats(comparison, row, kind) for kind in (TEXT, RECALL, KEY)),
        f"{row.keys_right}/{row.keys_asked}" if row.keys_asked else "",
        ", ".join(row.flags),
    ]


def _nats(comparison: PolicyComparison, row: PolicyRow, kind: str) -> str:
    if row is comparison.dense:
        value = row.figure(kind)
        return "" if value is None else f"{value:.3f}"
    above = comparison.above(row, kind)
    return "" if above is None else f"{above:+.3f}"


def grid(comparison: PolicyComparison) -> Grid:
    """The comparison as a table for a terminal."""
    rows = []
    for row in comparison.rows:
        name, *rest, flags = cells(comparison, row)
        # A name of many options may be folded between them.
        rows.append((re.sub(",(?! )", ", ", name), *rest, flags.removeprefix("negative ")))
    return Grid(
        COLUMNS,
        rows,
        title=title(comparison.about),
        caption=LEGEND,
        numbers=frozenset(range(1, 8)),
        bad=frozenset(i for i, row in enumerate(comparison.rows) if HOLDS_ALL in row.flags),
    )


def markdown(comparison: PolicyComparison) -> str:
    """The comparison as Markdown."""
    about = ", ".join(f"{name}: {value}" for name, value in comparison.about.items())
    lines = [title(comparison.about), "", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
    lines += [_line(cells(comparison, row)) for row in comparison.rows]
    return "\n".join([*lines, "", f"{LEGEND}.", "", f"Where it comes from: {about}", ""])


def to_json(comparison: PolicyComparison) -> str:
    """The comparison as JSON; only seconds differ when it is run again."""
    data = {"about": comparison.about, "rows": [asdict(row) for row in comparison.rows]}
    return json.dumps(data, indent=2, sort_keys=True) + "\n"


def read(text: str) -> PolicyComparison:
    """The comparison that :func:`to_json` gave."""
    data = json.loads(text)
    return PolicyComparison(data["about"], [PolicyRow(**row) for row in data["rows"]])


def write(comparison: PolicyComparison, out: Path) -> None:
    """Writes OUT.json, OUT.md and OUT.png."""
    write_together(
        out,
        {
            "json": lambda path: path.write_text(to_json(comparison), encoding="utf-8"),
            "md": lambda path: path.write_text(markdown(comparison), encoding="utf-8"),
            "png": lambda path: picture(comparison, title(comparison.about), path),
        },
    )


def title(about: dict[str, Any]) -> str:
    """One line on what was read."""
    lengths = " and ".join(f"{length:,}" for length in about["context"])
    return f"{about.get('model', 'model')} behind {lengths} tokens of {', '.join(about['cases'])}"


def _line(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"
