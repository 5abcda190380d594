"""From which length layers are quicker than ten lines of torch: ``python -m bench.crossover``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from attnzoo.cli import screen
from attnzoo.cli.progress import Bar
from attnzoo.evaluation.cost_setting import KINDS, CostSetting
from attnzoo.evaluation.costs_report import about
from attnzoo.evaluation.layer_costs import SPECS
from attnzoo.evaluation.timing import threads as with_threads
from attnzoo.reporting.outputs import check_writable
from attnzoo.reporting.tables import Grid
from bench.crossover.curves import LENGTHS, Curve, measure
from bench.crossover.picture import NAMES
from bench.crossover.report import read, to_json, where_from, write


def main(
    out: Annotated[Path, typer.Option(help="Write OUT.json, OUT.md and OUT.png.")] = Path("out/crossover"),
    variants: Annotated[
        list[str] | None, typer.Option(help="variant:option=value,...; may be repeated; as bench if not given.")
    ] = None,
    longest: Annotated[int, typer.Option(help="Tokens at most, from 512 on by doubling.")] = LENGTHS[-1],
    seconds: Annotated[float, typer.Option(help="About how long each length of each kind is measured.")] = 2.0,
    limit: Annotated[float, typer.Option(help="Seconds that a length may take; longer ones are left out.")] = 20.0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    add: Annotated[bool, typer.Option("--add", help="Keep what OUT.json has of other layers on this machine.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Measures every variant at 512 tokens, 1,024, ... beside ten lines of torch, correctness first."""
    lengths = [tokens for tokens in LENGTHS if tokens <= longest]
    if not lengths:
        raise typer.BadParameter(f"expected at least {LENGTHS[0]}, got {longest}", param_hint="--longest")
    check_writable(out)
    setting = CostSetting(tokens=lengths[-1], seconds=seconds)
    specs = variants or list(SPECS)
    with with_threads(threads), Bar() as progress:
        where = {**about(setting), "limit": limit}
        curves = kept(out, where, specs) if add else []
        for found in measure(setting, specs, lengths, limit, progress):
            curves = in_order([*curves, *found])
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


def in_order(curves: Sequence[Curve]) -> list[Curve]:
    """Curves in the order of the layers that are measured by themselves, others behind them."""
    places = {spec: place for place, spec in enumerate(SPECS)}
    return sorted(curves, key=lambda curve: places.get(curve.layer, len(places)))


def kept(out: Path, where: dict[str, Any], specs: Sequence[str]) -> list[Curve]:
    """The curves of OUT.json but those of some layers.

    Raises:
        typer.BadParameter: If they were measured on another machine, or at other sizes.
    """
    curves, before = read(out.with_name(f"{out.name}.json").read_text(encoding="utf-8"))
    for name in ("cpu", "class", "threads", "torch", "dtype", "dim", "num_heads", "batch"):
        if before[name] != where[name]:
            raise typer.BadParameter(f"expected {name} {before[name]!r} as in {out}.json, got {where[name]!r}")
    return [curve for curve in curves if curve.layer not in specs]


if __name__ == "__main__":
    typer.run(main)
