"""A comparison as a table for a terminal, as Markdown, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnzoo.compare import Comparison, Row

if TYPE_CHECKING:
    from rich.table import Table

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
        f"{row.perplexity:,.2f}",
        f"{row.ratio:,.3f}",
        f"{row.delta_nll:+.4f}",
        f"{row.density:.3f}",
        f"{row.kv_bytes_held:,}",
        f"{row.kv_bytes_read:,}",
        f"{row.decode_tokens_per_s:.1f}",
        ", ".join(row.flags),
    ]


def table(comparison: Comparison) -> Table:
    """The comparison as a rich table."""
    from rich.table import Table

    found = Table(title=_title(comparison.about))
    for index, name in enumerate(COLUMNS):
        found.add_column(name, justify="left" if index in (0, len(COLUMNS) - 1) else "right")
    for row in comparison.rows:
        bad = any(flag in ("NO-OP", "CERTIFICATE FAILS") for flag in row.flags)
        found.add_row(*cells(row), style="bold red" if bad else None)
    return found


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


def _line(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"


def _title(about: dict[str, Any]) -> str:
    count, length = about["windows"]
    return f"{about.get('model', 'model')}: {count} window{'s' if count > 1 else ''} of {length} tokens"


def picture(comparison: Comparison, path: Path) -> None:
    """Draws each row's loss against what its cache holds and reads, as a PNG or whatever the suffix says."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = comparison.rows
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 0.42 * len(rows) + 1.6), layout="constrained", sharey=True, width_ratios=(3, 2)
    )
    place = list(range(len(rows)))[::-1]
    colours = ["#b0413e" if "negative control" in row.flags else "#2b6ca3" for row in rows]
    ratios = [row.ratio for row in rows]
    floor = 0.9
    left.barh(place, [ratio - floor for ratio in ratios], left=floor, color=colours, height=0.62)
    left.axvline(1.0, color="#444444", linewidth=1)
    left.set_xscale("log")
    left.set_xlim(floor, max(2.0, *ratios) * 2.2)
    for y, ratio in zip(place, ratios, strict=True):
        left.text(ratio * 1.04, y, f"{ratio:,.3f}" if ratio < 10 else f"{ratio:,.0f}", va="center", fontsize=9)
    left.set_yticks(place, [row.name for row in rows])
    left.set_xlabel("perplexity, times dense (log scale; red: negative control)")
    held = [row.kv_bytes_held / 1024 for row in rows]
    read = [row.kv_bytes_read / 1024 for row in rows]
    right.barh(place, held, color="#cfd8e3", height=0.62, label="held")
    right.barh(place, read, color="#2b6ca3", height=0.3, label="read by a decode step")
    right.set_xlabel("KV cache, KiB per token")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=2, frameon=False, fontsize=9)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_title(comparison.about), fontsize=11, x=0.02, ha="left")
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
