"""KV-cache policies on SmolLM2: what each keeps, what it costs, and what must be shown: ``python -m bench.policies``.

Quality behind 1,024 tokens of both texts that ship, passkeys in 640 tokens; memory of a process and decoding steps
behind 1,024 and 8,192 tokens, each row in a process of its own. What is there is kept after every row: the same command
with ``--go-on`` measures what is missing. ``--quick`` is a tiny model with random weights, to see that it runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from attnzoo.cli import screen
from attnzoo.cli.progress import Bar
from attnzoo.evaluation.two_phase.rows import PolicyComparer
from attnzoo.evaluation.two_phase.scores import DenseReader, prefill_nll
from attnzoo.evaluation.two_phase.specs import PolicyContestant, fit
from attnzoo.policies.one_forward import why_one_forward_says_nothing
from bench.cpu.parts import choose
from bench.cpu.report import about
from bench.policies import costs, report
from bench.policies.results import DENSE, PolicyResults, read
from bench.policies.setting import Setting, full_setting, quick_setting, rows

Keep = Callable[[], None]


class Part(StrEnum):
    """What is measured."""

    QUALITY = "quality"
    MASKS = "masks"
    COSTS = "costs"


def measure_quality(
    setting: Setting, contestants: Sequence[PolicyContestant], results: PolicyResults, keep: Keep
) -> None:
    """Two-phase scores of all rows that are missing."""
    with Bar() as progress:
        comparer = PolicyComparer(setting.model, setting.cases, progress=progress)
        results.about |= comparer.about({})
        if DENSE not in results.rows:
            results.rows[DENSE] = comparer.dense_row()
            keep()
        for contestant in contestants:
            if contestant.name not in results.rows:
                results.rows[contestant.name] = comparer.row(contestant)
                keep()


def measure_masks(
    setting: Setting, contestants: Sequence[PolicyContestant], results: PolicyResults, keep: Keep
) -> None:
    """NLL of texts that are read at once, for policies of which that says something."""
    results.masked_texts = [case.name for case in setting.cases][: len(setting.masks)]
    if DENSE not in results.masks:
        results.masks[DENSE] = [prefill_nll(DenseReader(setting.model), ids) for ids in setting.masks]
    for contestant in contestants:
        if contestant.name in results.masks or why_one_forward_says_nothing(contestant.policy) is not None:
            continue
        with contestant.applied(setting.model) as reader:
            results.masks[contestant.name] = [prefill_nll(reader, ids) for ids in setting.masks]
        keep()


def measure_costs(
    setting: Setting, contestants: Sequence[PolicyContestant], results: PolicyResults, keep: Keep, *, rounds: int
) -> None:
    """Memory and steps of all rows that are missing; the dense model's caches are made in any case."""
    with tempfile.TemporaryDirectory() as place, Bar() as progress:
        missing = [contestant for contestant in contestants if contestant.name not in results.costs]
        if not missing and DENSE in results.costs:
            return
        progress(DENSE, 0, len(missing) + 1)
        results.costs[DENSE] = costs.run(DENSE, None, setting, Path(place), rounds)
        keep()
        for done, contestant in enumerate(missing):
            progress(contestant.name, done + 1, len(missing) + 1)
            found = costs.run(contestant.name, contestant.policy, setting, Path(place), rounds)
            results.costs[contestant.name] = found
            keep()


def main(
    out: Annotated[Path | None, typer.Option(help="Write OUT.json, OUT.md and OUT.png, after every row.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Rows by name; may be repeated.")] = None,
    percent: Annotated[list[int] | None, typer.Option(help="Shares held: 40, 20, 10; may be repeated.")] = None,
    part: Annotated[list[Part] | None, typer.Option(help="What is measured; may be repeated.")] = None,
    rounds: Annotated[int, typer.Option(help="Steps timed.")] = 25,
    go_on: Annotated[
        bool, typer.Option("--go-on", help="Keep what OUT.json has, and measure what is missing.")
    ] = False,
    quick: Annotated[bool, typer.Option(help="A tiny model with random weights.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Measures policies on one thread; an hour or two for all rows."""
    specs = rows(percent or (40, 20, 10), quick=quick)
    chosen = choose([spec.name for spec in specs], only)
    torch.set_num_threads(1)
    setting = quick_setting() if quick else full_setting()
    kept = out is not None and go_on and out.with_suffix(".json").is_file()
    where = {"model": setting.name, "dtype": "float32", "threads": 1, "rounds": rounds, **about()}
    results = read(out.with_suffix(".json")) if out is not None and kept else PolicyResults(where)
    with Bar() as progress:
        contestants = fit(setting.model, [spec for spec in specs if spec.name in chosen], progress)

    def keep() -> None:
        if out is not None:
            report.write(results, out)

    parts = part or list(Part)
    if Part.QUALITY in parts:
        measure_quality(setting, contestants, results, keep)
    if Part.MASKS in parts:
        measure_masks(setting, contestants, results, keep)
    if Part.COSTS in parts:
        measure_costs(setting, contestants, results, keep, rounds=rounds)
    keep()
    if as_json:
        typer.echo(report.as_text(results), nl=False)
        return
    for grid in report.grids(results):
        screen.table(grid)
        Console().print()


if __name__ == "__main__":
    typer.run(main)
