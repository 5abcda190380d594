"""The CPU table in one command: ``python -m bench.cpu``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnzoo.cli.progress import Bar
from bench.cpu.report import about, choose, picture, report
from bench.cpu.rows import PARTS, Row


def main(
    out: Annotated[Path, typer.Option(help="Write OUT.json, OUT.md and OUT.png.")] = Path("out/cpu"),
    only: Annotated[list[str] | None, typer.Option(help=f"Parts: {', '.join(PARTS)}; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Measures the blocked implementation on this CPU beside its peers."""
    chosen = choose(PARTS, only)
    where = about()
    rows: list[Row] = []
    with Bar() as progress:
        for done, name in enumerate(chosen):
            progress(name, done, len(chosen))
            rows += list(PARTS[name]())
    report(rows, where, out, as_json=as_json)
    picture(rows, where, out.with_name(f"{out.name}.png"))
    if any(row.holds is False for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
