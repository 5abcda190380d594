"""From which length layers are quicker than ten lines of torch: ``python -m bench.crossover``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnzoo.cli import screen
from attnzoo.cli.progress import Bar
from attnzoo.evaluation.cost_setting import KINDS, CostSetting
from attnzoo.evaluation.costs_report import about
from attnzoo.evaluation.layer_costs import SPECS
from attnzoo.reporting.outputs import check_writable
from attnzoo.reporting.tables import Grid
from bench.cpu.clock import threads as with_threads
from bench.crossover.curves import LENGTHS, Curve, measure
from bench.crossover.picture import NAMES
from bench.crossover.report import to_json, where_from, write


def main(  # noqa: PLR0913  (a command line has one parameter for each option)
    out: Annotated[Path, typer.Option(help="Write OUT.json, OUT.md and OUT.png.")] = Path("out/crossover"),
    variants: Annotated[
        list[str] | None, typer.Option(help="variant:option=value,...; may be repeated; as bench if not given.")
    ] = None,
    longest: Annotated[int, typer.Option(help="Tokens at most, from 512 on by doubling.")] = LENGTHS[-1],
    dim: Annotated[int, typer.Option(help="The layers' width.")] = 512,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    seconds: Annotated[float, typer.Option(help="About how long each length of each kind is measured.")] = 2.0,
    limit: Annotated[float, typer.Option(help="Seconds that a length may take; longer ones are left out.")] = 20.0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Measures every variant at 512 tokens, 1,024, ... beside ten lines of torch, correctness first."""
    lengths = [tokens for tokens in LENGTHS if tokens <= longest]
    if not lengths:
        raise typer.BadParameter(f"expected at least {LENGTHS[0]}, got {longest}", param_hint="--longest")
    check_writable(out)
    setting = CostSetting(tokens=lengths[-1], dim=dim, num_heads=heads, seconds=seconds)
    curves: list[Curve] = []
    with with_threads(threads), Bar() as progress:
        where = {**about(setting), "limit": limit}
        for found in measure(setting, variants or SPECS, lengths, limit, progress):
            curves += found
            # Each layer takes a minute: what has been measured is kept.
            write(curves, where, out)
    if as_json:
        typer.echo(to_json(curves, where), nl=False)
    else:
        names = dict.fromkeys(curve.layer for curve in curves)
        rows = [(name, *(curve.quicker_from for curve in curves if curve.layer == name)) for name in names]
        heads_of_table = ("layer", *(f"{NAMES[kind]}: quicker from" for kind in KINDS))
        screen.table(Grid(heads_of_table, rows, title=where_from(where)))
        for problem in dict.fromkeys(f"{curve.layer}: {curve.problem}" for curve in curves if curve.problem):
            screen.text(problem)
    if any(curve.problem for curve in curves):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
