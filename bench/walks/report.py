"""The table of the five jobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.walks.jobs import PACKAGES

CAPTION = (
    "Lines hold code, checks included, and neither comments nor docstrings. Seconds are CPU seconds of a whole process "
    "on one thread, imports included: the median of the rounds, programs taking turns. Below: what they cannot do."
)
LIMITS = (
    "Other packages' layers and adapters do much that is not asked here. PEFT's scale folds, but what was 0 cannot be "
    "taken back from merged weights, and which head to take has to be known; x-transformers' program has learned "
    "positions, of 24 tokens, and no window."
)


def read(path: Path) -> dict[str, Any]:
    """Stored results."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def table(results: dict[str, Any]) -> list[str]:
    """The table in Markdown, and why some cells are empty."""
    heads = [f"{name} {results['versions'][name]}" for name in PACKAGES]
    lines = [f"| job | {' | '.join(heads)} |", f"| --- |{' --- |' * len(PACKAGES)}"]
    notes = []
    for row in results["rows"]:
        cells = []
        for name in PACKAGES:
            done = row["done"].get(name)
            cells.append(f"{done['lines']} lines, {done['seconds']:.1f} s" if done else "no")
            if not done:
                notes.append(f"- {row['job']}: {name} {row['reasons'][name]}.")
        lines.append(f"| {row['job']} | {' | '.join(cells)} |")
    return [*lines, "", f"{CAPTION} Measured on {results['machine']}.", "", *notes, "", LIMITS]
