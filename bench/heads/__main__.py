"""What papers on single heads found, once more on SmolLM2, each beside a control: ``python -m bench.heads``.

Experiments run one after the other on one thread, and what came out is written after each: the same command with
``--go-on`` runs what is missing, ``--only`` names some, which run anew. ``--quick`` is a tiny model with random
weights, to see that it runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from attnzoo.cli import screen
from attnzoo.cli.progress import Bar
from bench.cpu.parts import choose
from bench.cpu.report import about
from bench.heads import report
from bench.heads.experiments.ablations import ablations
from bench.heads.experiments.conflict import conflict
from bench.heads.experiments.context_heads import context_heads
from bench.heads.experiments.copying import copying
from bench.heads.experiments.estimates import estimates
from bench.heads.experiments.format_task import format_task
from bench.heads.experiments.reading import reading
from bench.heads.experiments.retrieval import knock_out
from bench.heads.experiments.sinks import sinks
from bench.heads.experiments.successors import successors
from bench.heads.outcome import HeadOutcome, HeadResults, read
from bench.heads.setting import HeadSetting, full_setting, quick_setting

EXPERIMENTS: Mapping[str, Callable[[HeadSetting], HeadOutcome]] = {
    "retrieval": knock_out,
    "conflict": conflict,
    "lofit": format_task,
    "act": sinks,
    "paths": copying,
    "estimates": estimates,
    "successor": successors,
    "divergence": context_heads,
    "reading": reading,
    "ablations": ablations,
}


def main(
    out: Annotated[
        Path | None, typer.Option(help="Write OUT.json, OUT.md and OUT.png, after every experiment.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Experiments by name; may be repeated.")] = None,
    go_on: Annotated[bool, typer.Option("--go-on", help="Keep what OUT.json has, and run what is missing.")] = False,
    quick: Annotated[bool, typer.Option(help="A tiny model with random weights.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Runs experiments on heads; about ten minutes of one core for all."""
    chosen = choose(list(EXPERIMENTS), only)
    torch.set_num_threads(1)
    kept = out is not None and go_on and out.with_suffix(".json").is_file()
    results = read(out.with_suffix(".json")) if out is not None and kept else HeadResults({})
    setting = quick_setting() if quick else full_setting()
    results.about = {"model": setting.name, "dtype": "float32", "threads": 1, **about()}
    missing = [name for name in EXPERIMENTS if name in chosen and (only or name not in results.outcomes)]
    with Bar() as progress:
        for done, name in enumerate(missing):
            progress(name, done, len(missing))
            began = time.process_time()
            found = EXPERIMENTS[name](setting)
            results.outcomes[name] = replace(found, cpu_seconds=time.process_time() - began)
            # Whatever the order they ran in, they are told in one.
            results.outcomes = {key: results.outcomes[key] for key in EXPERIMENTS if key in results.outcomes}
            if out is not None:
                report.write(results, out)
    if as_json:
        typer.echo(results.to_json(), nl=False)
        return
    for grid in report.grids(results):
        screen.table(grid)
        Console().print()


if __name__ == "__main__":
    typer.run(main)
