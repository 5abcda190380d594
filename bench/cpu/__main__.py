"""The CPU table in one command: ``python -m bench.cpu``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.cpu.parts import choose, fail_on_red, measure
from bench.cpu.report import about, picture, report
from bench.cpu.rows import PARTS


def main(
    out: Annotated[Path, typer.Option(help="Write OUT.json, OUT.md and OUT.png.")] = Path("out/cpu"),
    only: Annotated[list[str] | None, typer.Option(help=f"Parts: {', '.join(PARTS)}; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Measures the blocked implementation on this CPU beside its peers."""
    chosen = choose(PARTS, only)
    where = about()
    rows = measure(PARTS, chosen)
    report(rows, where, out, as_json=as_json)
    picture(rows, where, out.with_name(f"{out.name}.png"))
    fail_on_red(rows)


if __name__ == "__main__":
    typer.run(main)
