"""Results of ``bench.trained`` as tables for a terminal, Markdown, JSON and a picture."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnzoo.reporting.outputs import write_together
from attnzoo.reporting.tables import Grid
from bench.trained.picture import picture
from bench.trained.results import (
    CERTIFICATE,
    CONTROL,
    CONVERSION,
    ORIGINAL,
    HealedRow,
    TrainedResults,
    TrainedRow,
    to_json,
)

HEADS = ("converted to", "layers", "perplexity", "x original", "in long windows", "density", "values a token")
CERTIFICATES = ("model", "conversion", "the same function, since", "logits off by", "undone", "")


def perplexity(nll: float | None) -> str:
    """As a cell."""
    if nll is None:
        return ""
    value = math.exp(nll)
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def cells(row: TrainedRow, original: TrainedRow) -> list[str]:
    """The cells of one row."""
    ratio = "" if row.nll is None or original.nll is None else f"{math.exp(row.nll - original.nll):.3f}"
    # Of heads that are left out, whoever computes all of them in short texts reads everything.
    density = "" if row.density is None or row.kind == "moh" else f"{row.density:.2f}"
    values = "" if row.values is None else f"{row.values:,}"
    return [row.name, row.layers, perplexity(row.nll), ratio, perplexity(row.long_nll), density, values]


def host_grid(name: str, results: TrainedResults) -> Grid:
    """The perplexities of one model."""
    rows = [row for row in results.rows[name] if row.problem is None and row.role != CERTIFICATE]
    (original,) = [row for row in rows if row.role == ORIGINAL]
    lines = [cells(row, original) for row in rows]
    return Grid(HEADS, lines, title=f"{name}: {told(name, results)}", numbers=frozenset(range(2, len(HEADS))))


def told(name: str, results: TrainedResults) -> str:
    """What a model is, and what its training came to."""
    found = results.trainings[name]
    size = f"{found['parameters'] / 1e6:.2f} million parameters"
    return f"{found['says']}; {size}, {found['steps']:,} steps in {found['seconds']:.0f} s of CPU time"


def certificates(results: TrainedResults) -> Grid | None:
    """What conversions guarantee, and whether it was found."""
    rows = [row for found in results.rows.values() for row in found if row.role == CERTIFICATE and row.problem is None]
    if not rows:
        return None
    lines = [
        [
            row.host,
            f"{row.name}{'' if row.layers == 'all' else ', global layers'}",
            row.says,
            f"{row.off or 0.0:.0e}",
            "to the bit" if row.undone else "NO",
            "holds" if row.holds else "FAILS",
        ]
        for row in rows
    ]
    bad = frozenset(i for i, row in enumerate(rows) if not row.holds)
    return Grid(CERTIFICATES, lines, title="Certificates", numbers=frozenset({3}), bad=bad)


def refusals(results: TrainedResults) -> list[str]:
    """What was refused, and why: a reason once for each model."""
    found: dict[tuple[str, str], list[str]] = {}
    for rows in results.rows.values():
        for row in rows:
            if row.problem is not None:
                reason = re.sub(r"^[\w.]+\.\d+\.[\w.]+: ", "", row.problem)
                found.setdefault((row.host, reason), []).append(f"{row.name} ({row.layers} layers)")
    return [f"{host}: {', '.join(names)}: {reason}" for (host, reason), names in found.items()]


def healed_names(results: TrainedResults) -> list[str]:
    """The rows of further training."""
    return list(dict.fromkeys(row.name for rows in results.healed.values() for row in rows))


def of_all_seeds(results: TrainedResults, name: str) -> list[HealedRow]:
    """One row of further training, for each seed."""
    return [row for rows in results.healed.values() for row in rows if row.name == name]


def mean_nll(rows: Sequence[HealedRow], steps: int) -> float:
    """Mean over seeds."""
    return statistics.fmean(row.nll[steps] for row in rows)


def healed_grid(results: TrainedResults) -> Grid | None:
    """Fewer KV heads, before and after further training."""
    names = healed_names(results)
    if not names:
        return None
    marks = sorted(of_all_seeds(results, names[0])[0].nll)
    originals = of_all_seeds(results, ORIGINAL)
    lines = []
    for name in names:
        rows = of_all_seeds(results, name)
        figures = [perplexity(mean_nll(rows, mark)) for mark in marks]
        ratios = [
            f"{math.exp(mean_nll(rows, mark) - mean_nll(originals, mark)):.3f}" if originals else ""
            for mark in (marks[0], marks[-1])
        ]
        seeds = ", ".join(perplexity(row.nll[marks[-1]]) for row in rows)
        lines.append([name, f"{rows[0].values:,}", *figures, *ratios, seeds])
    counts = [f"{mark} steps" if mark else "as converted" for mark in marks]
    heads = ("", "values a token", *counts, "x original, before", "x original, after", "each seed, after")
    title = f"Fewer KV heads in a Llama that has one for each query head, {len(originals)} seeds"
    return Grid(heads, lines, title=title, numbers=frozenset(range(1, len(heads) - 1)))


def grids(results: TrainedResults) -> list[Grid]:
    """All tables."""
    found = [host_grid(name, results) for name in results.rows if results.rows[name]]
    more = [certificates(results), healed_grid(results)]
    return [*found, *(grid for grid in more if grid is not None)]


def lines(grid: Grid) -> list[str]:
    """A table as Markdown."""
    return ["| " + " | ".join(row) + " |" for row in [grid.heads, ["---"] * len(grid.heads), *grid.rows]]


def markdown(results: TrainedResults) -> str:
    """Everything as Markdown."""
    text = ["# Small models, trained and converted", "", NOTE, ""]
    for grid in grids(results):
        text += [f"## {grid.title}", "", *lines(grid), ""]
    refused = refusals(results)
    if refused:
        text += ["## Refused", "", *(f"- {line}" for line in refused), ""]
    if results.healed:
        text += [HEALED, ""]
    return "\n".join([*text, f"Where it comes from: {json.dumps(results.about)}", ""])


NOTE = (
    "Tokens are bytes; perplexities are of one byte, on text that no training has seen, in windows as long as those of "
    'the training, and in windows four times as long. "At random": the model as it was, where each row of each head '
    "reads itself, the first token and others at random, as many as in the row above; of heads, as many chosen for no "
    "reason. Averaged KV heads remember as much as the latent above. Layers: all, or those without own windows."
)
HEALED = (
    "Perplexity is the exponential of the mean over seeds. All rows of a seed see the same windows in the same order, "
    "the unconverted model too."
)


def summary(results: TrainedResults) -> list[str]:
    """The tables of the documentation: conversions of all models, with their controls in brackets; fewer KV heads."""
    hosts = list(results.rows)
    rows = [row for found in results.rows.values() for row in found]
    header = ["perplexity (of its control)", *hosts]
    table = [header, ["---"] * len(header)]
    for name in dict.fromkeys(row.name for row in rows if row.role in (ORIGINAL, CONVERSION)):
        table.append([name, *(_summary_cell(results.rows[host], name) for host in hosts)])
    found = ["| " + " | ".join(row) + " |" for row in table]
    healed = healed_grid(results)
    return found if healed is None else [*found, "", f"{healed.title}:", "", *lines(healed)]


def _summary_cell(rows: Sequence[TrainedRow], name: str) -> str:
    """A perplexity, its control's in brackets, and the layers where it is not all; empty where there is no such row."""
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        if row.name != name or row.problem is not None:
            continue
        control = "" if after is None or after.role != CONTROL else f" ({perplexity(after.nll)})"
        return perplexity(row.nll) + control + ("" if row.layers == "all" else ", global layers")
    return "refused" if any(row.name == name for row in rows) else ""


def write(results: TrainedResults, out: Path) -> None:
    """Writes OUT.json and OUT.md, and OUT.png where there is something to draw."""
    writers: dict[str, Any] = {
        "json": lambda path: path.write_text(to_json(results), encoding="utf-8"),
        "md": lambda path: path.write_text(markdown(results), encoding="utf-8"),
    }
    if any(results.rows.values()) or results.healed:
        writers["png"] = lambda path: picture(results, path)
    write_together(out, writers)
