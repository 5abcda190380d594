"""Small models trained on the text that ships, and converted: ``python -m bench.trained``.

A Qwen3-like, a Gemma-3-like and a GPT-NeoX-like model (others by ``--only``) are trained for two minutes of CPU time
and converted in every way that their family takes, certificates first; a Llama of as many KV heads as query heads gets
fewer, and is trained further. Models that are not asked for stay as OUT.json has them; the same command with
``--go-on`` measures what is missing, in several processes where there are cores for them. ``--models`` keeps trained
weights. ``--quick`` trains smaller models for a few steps, to see that it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from attnzoo.cli import screen
from attnzoo.cli.progress import Bar
from attnzoo.reporting.outputs import check_writable
from bench.cpu.parts import choose
from bench.cpu.report import about
from bench.trained import report
from bench.trained.hosts import HOSTS
from bench.trained.results import TrainedResults, read, to_json
from bench.trained.run import MHA_ROW, TrainedRun, setting_for

DEFAULT = ("Qwen3-like", "Gemma-3-like", "GPT-NeoX-like", MHA_ROW)


def main(
    out: Annotated[Path | None, typer.Option(help="Write OUT.json, OUT.md and OUT.png.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Models by name; may be repeated.")] = None,
    seconds: Annotated[float, typer.Option(help="CPU time for which each model is trained.")] = 120.0,
    seed: Annotated[
        list[int] | None, typer.Option(help="Of models whose KV heads are merged; may be repeated.")
    ] = None,
    models: Annotated[Path | None, typer.Option(help="A folder that keeps trained weights, and has some.")] = None,
    go_on: Annotated[
        bool, typer.Option("--go-on", help="Keep what OUT.json has of these, and measure what is missing.")
    ] = False,
    quick: Annotated[bool, typer.Option(help="Smaller models, and a few steps.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Trains and converts on one thread, in about half an hour of CPU time; fails where a certificate does."""
    known = [*HOSTS, MHA_ROW]
    chosen = choose(known, only) if only else list(DEFAULT)
    torch.set_num_threads(1)
    if out is not None:
        check_writable(out)
    setting = setting_for(seconds, quick=quick)
    where = {"dtype": "float32", "threads": 1, **setting.about(), **about()}
    results = TrainedResults(where)
    seeds = (seed or (0, 1)) if MHA_ROW in chosen else ()

    def take() -> None:
        """What OUT.json has, and maybe another process has just put there; not what is measured anew."""
        if out is not None and out.with_suffix(".json").is_file():
            found = read(out.with_suffix(".json"))
            if not go_on:
                found.drop(chosen, seeds)
            results.take(found)

    def keep() -> None:
        take()
        if out is not None:
            report.write(results, out)

    take()
    with Bar() as progress:
        run = TrainedRun(setting, results, keep=keep, models=models, progress=progress)
        for name in chosen:
            if name != MHA_ROW:
                run.convert(name)
        for one in seeds:
            run.heal(one)
    keep()
    if as_json:
        typer.echo(to_json(results), nl=False)
    else:
        _show(results)
    if not results.holds:
        raise typer.Exit(1)


def _show(results: TrainedResults) -> None:
    for grid in report.grids(results):
        screen.table(grid)
        Console().print()
    for line in report.refusals(results):
        screen.text(line)


if __name__ == "__main__":
    typer.run(main)
