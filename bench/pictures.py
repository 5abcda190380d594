"""Every stored picture, drawn anew from the results beside it: ``python -m bench.pictures``. Nothing is measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from attnzoo.evaluation import compare_picture, compare_report
from attnzoo.evaluation.two_phase import picture as two_phase_picture
from attnzoo.evaluation.two_phase import report as two_phase_report
from bench import moh
from bench.cpu import report as cpu_report
from bench.cpu.rows import Row
from bench.crossover import picture as crossover_picture
from bench.crossover import report as crossover_report
from bench.heads import outcome
from bench.heads import picture as heads_picture
from bench.longheads import picture as longheads_picture
from bench.longheads.rows import SPAN, Reading
from bench.policies import results as policies_results
from bench.trained import picture as trained_picture
from bench.trained import results as trained_results

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = ROOT / "docs" / "pictures"


def _compare(source: Path, path: Path) -> None:
    comparison = compare_report.read(source.read_text(encoding="utf-8"))
    compare_picture.picture(comparison, compare_report.title(comparison.about), path)


def _cache_alone(source: Path, path: Path) -> None:
    """The first panel of a comparison, for readers who have not met the others."""
    comparison = compare_report.read(source.read_text(encoding="utf-8"))
    rows = [replace(row, decode_times_dense=None, longer=[]) for row in comparison.rows]
    title = f"what SmolLM2-135M loses, and what its cache holds, when it is converted ({comparison.about['text']})"
    compare_picture.picture(replace(comparison, rows=rows), title, path)


def _crossover(source: Path, path: Path) -> None:
    curves, where = crossover_report.read(source.read_text(encoding="utf-8"))
    crossover_picture.picture(curves, crossover_report.where_from(where), path)


def _policies(source: Path, path: Path) -> None:
    comparison = policies_results.read(source).comparison()
    if comparison is None:
        raise ValueError(f"{source}: expected rows of policies, got none")
    two_phase_picture.picture(comparison, two_phase_report.title(comparison.about), path)


def _longheads(source: Path, path: Path) -> None:
    data = _data(source)
    longheads_picture.picture([Reading(**row) for row in data["rows"]], data["about"], SPAN, path)


def _cpu(source: Path, path: Path) -> None:
    cpu_report.picture(*_rows(source), path)


def _moh(source: Path, path: Path) -> None:
    moh.picture(*_rows(source), path)


def _rows(source: Path) -> tuple[list[Row], dict[str, Any]]:
    """Rows as the tables of the CPU store them."""
    data = _data(source)
    rows = [Row(**{name: value for name, value in row.items() if name != "holds"}) for row in data["rows"]]
    return rows, data["about"]


def _data(source: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    return data


PICTURES: dict[str, Callable[[Path, Path], None]] = {
    "cpu-amx": _cpu,
    "cpu-avx2": _cpu,
    "crossover": _crossover,
    "heads": lambda source, path: heads_picture.picture(outcome.read(source), path),
    "moh-amx": _moh,
    "policies": _policies,
    "smollm2-8x1024": _compare,
    "smollm2-demo": _compare,
    "smollm2-longheads": _longheads,
    "trained": lambda source, path: trained_picture.picture(trained_results.read(source), path),
}
"""How each NAME.png is made of NAME.json."""

ON_PAGES: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "quality-against-cache": ("smollm2-demo", _cache_alone)
}
"""Pictures of docs/pictures: of which results, and how."""


def main(
    only: Annotated[
        list[str] | None, typer.Option(help=f"Pictures: {', '.join([*PICTURES, *ON_PAGES])}; may be repeated.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder that they are written to, in place of their own.")
    ] = None,
) -> None:
    """Draws the stored pictures anew from bench/results."""
    known = [*PICTURES, *ON_PAGES]
    unknown = sorted(set(only or ()) - set(known))
    if unknown:
        raise typer.BadParameter(f"only: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    for name in only or known:
        source, draw = ON_PAGES.get(name) or (name, PICTURES[name])
        folder = out or (PAGES if name in ON_PAGES else RESULTS)
        folder.mkdir(parents=True, exist_ok=True)
        draw(RESULTS / f"{source}.json", folder / f"{name}.png")


if __name__ == "__main__":
    typer.run(main)
