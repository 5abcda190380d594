"""A comparison as a table for a terminal, as Markdown and as JSON, and all of it in files."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attnzoo.evaluation.compare import Comparison, LongDecoding, Row
from attnzoo.evaluation.compare_picture import picture
from attnzoo.policies.one_forward import UNSEEN
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
    "step x dense",
    "remarks",
)

LONG_COLUMNS = ("variant", "KV bytes/token held", "read", "decode tok/s", "step x dense")

STEP = "step x dense: a decoding step's time over the dense model's in the same rounds, the median; below 1 is quicker"


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
        "" if row.decode_times_dense is None else f"{row.decode_times_dense:.2f}",
        ", ".join(row.flags),
    ]


def long_lengths(comparison: Comparison) -> list[int]:
    """Tokens of the longer prompts behind which decoding was timed."""
    return sorted({one.tokens for row in comparison.rows for one in row.longer})


def long_cells(comparison: Comparison, tokens: int) -> list[list[str]]:
    """The cells of all rows that were timed behind so many tokens."""
    return [
        [
            row.name,
            f"{row.kv_bytes_held:,}",
            f"{one.kv_bytes_read:,}",
            f"{one.tokens_per_s:.1f}",
            f"{one.times_dense:.2f}",
        ]
        for row in comparison.rows
        for one in row.longer
        if one.tokens == tokens
    ]


def long_grids(comparison: Comparison) -> list[Grid]:
    """A table for a terminal for each longer prompt."""
    return [
        Grid(
            LONG_COLUMNS,
            long_cells(comparison, tokens),
            title=_long_title(tokens),
            caption=STEP,
            numbers=frozenset(range(1, len(LONG_COLUMNS))),
        )
        for tokens in long_lengths(comparison)
    ]


def grid(comparison: Comparison) -> Grid:
    """The comparison as a table for a terminal."""
    rows = []
    for row in comparison.rows:
        held, read = (f"{value / 1024:.1f}" for value in (row.kv_bytes_held, row.kv_bytes_read))
        remarks = ", ".join(flag.removeprefix("negative ").removeprefix("certificate ") for flag in row.flags)
        values = cells(row)
        # A name of many options may be folded between them.
        rows.append((re.sub(",(?! )", ", ", row.name), *values[1:5], held, read, *values[7:9], remarks))
    bad = {i for i, row in enumerate(comparison.rows) if {"NO-OP", "CERTIFICATE FAILS", UNSEEN} & set(row.flags)}
    return Grid(
        ("variant", "ppl", "x dense", "ΔNLL", "density", "held", "read", "tok/s", "step x dense", "remarks"),
        rows,
        title=title(comparison.about),
        caption=f"KiB of KV cache for each token, held, and read by a decode step; tok/s when decoding; {STEP}",
        numbers=frozenset(range(1, 9)),
        bad=frozenset(bad),
    )


def tables(comparison: Comparison) -> list[str]:
    """Lines of Markdown: the comparison's table, and one for each longer prompt."""
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS)), *(_line(cells(row)) for row in comparison.rows)]
    for tokens in long_lengths(comparison):
        lines += ["", f"{_long_title(tokens)}:", "", _line(LONG_COLUMNS), _line(["---"] * len(LONG_COLUMNS))]
        lines += [_line(values) for values in long_cells(comparison, tokens)]
    return lines


def markdown(comparison: Comparison) -> str:
    """The comparison as Markdown."""
    about = ", ".join(f"{name}: {value}" for name, value in comparison.about.items())
    lines = [title(comparison.about), "", *tables(comparison), "", f"{STEP}.", ""]
    return "\n".join([*lines, f"Where it comes from: {about}", ""])


def to_json(comparison: Comparison) -> str:
    """The comparison as JSON; only figures of speed differ when it is run again."""
    data = {"about": comparison.about, "rows": [asdict(row) for row in comparison.rows]}
    return json.dumps(data, indent=2, sort_keys=True) + "\n"


def read(text: str) -> Comparison:
    """The comparison that :func:`to_json` gave."""
    data = json.loads(text)
    rows = [Row(**{**row, "longer": [LongDecoding(**one) for one in row.get("longer", [])]}) for row in data["rows"]]
    return Comparison(data["about"], rows)


def write(comparison: Comparison, out: Path) -> None:
    """Writes OUT.json, OUT.md and OUT.png."""
    write_together(
        out,
        {
            "json": lambda path: path.write_text(to_json(comparison), encoding="utf-8"),
            "md": lambda path: path.write_text(markdown(comparison), encoding="utf-8"),
            "png": lambda path: picture(comparison, title(comparison.about), path),
        },
    )


def _line(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"


def _long_title(tokens: int) -> str:
    return f"Decoding behind {tokens:,} tokens"


def title(about: dict[str, Any]) -> str:
    """One line on what was compared."""
    count, length = about["windows"]
    where = f" of {about['text']} from token {about['offset']}" if "text" in about else ""
    return f"{about.get('model', 'model')} on {count} x {length} tokens{where}"
