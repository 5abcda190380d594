"""The command: ``python -m tests.mutants``."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from attnzoo.cli.progress import Bar
from tests.mutants import runner
from tests.mutants.catalogue import areas
from tests.mutants.record import Mutant, NeedsNewPlaceError
from tests.mutants.verdicts import Verdict, as_data, counts, holds, markdown, share_killed

COLORS = {"killed": "green", "timed out": "green", "survived": "red"}


def choose(only: list[str], area: list[str], *, changed: bool) -> dict[str, list[Mutant]]:
    """The mutants that were asked for, by area.

    Raises:
        typer.BadParameter: If there is none of them.
    """
    everything = areas()
    unknown = sorted(set(area) - set(everything))
    if unknown:
        raise typer.BadParameter(f"expected one of {', '.join(everything)}, got {unknown[0]!r}", param_hint="--area")
    touched = changed_files() if changed else None
    chosen: dict[str, list[Mutant]] = {}
    for name, mutants in everything.items():
        for mutant in mutants:
            wanted = not only or any(part in mutant.name or part in mutant.file for part in only)
            if wanted and (not area or name in area) and (touched is None or mutant.file in touched):
                chosen.setdefault(name, []).append(mutant)
    if not chosen:
        raise typer.BadParameter("expected a part of the name of a mutant or of its file, got none that is there")
    return chosen


def changed_files() -> set[str]:
    """The files that differ from main, committed or not."""
    command = ["git", "diff", "--name-only", "main"]
    found = subprocess.run(command, cwd=runner.ROOT, check=True, capture_output=True, text=True)
    return set(found.stdout.split())


def show_list(chosen: dict[str, list[Mutant]]) -> bool:
    """Prints the mutants; whether each has its place."""
    complete = True
    for area, mutants in chosen.items():
        typer.echo(f"{area}: {len(mutants)}")
        for mutant in mutants:
            try:
                mutant.find_place(runner.ROOT)
            except NeedsNewPlaceError as error:
                typer.echo(f"  NEEDS A NEW PLACE {error}")
                complete = False
            else:
                typer.echo(f"  {mutant.name}: {mutant.wrong}")
    return complete


def render(by_area: dict[str, list[Verdict]]) -> Table:
    """The counts by area, for a terminal."""
    everything = [verdict for verdicts in by_area.values() for verdict in verdicts]
    table = Table(title=f"{share_killed(everything):.1%} of the decided mutants die")
    columns = ("all", "killed", "timed out", "survived", "argued", "undecided", "error")
    table.add_column("area")
    for column in columns:
        table.add_column(column, justify="right")
    for area, verdicts in [*by_area.items(), ("all", everything)]:
        found = counts(verdicts)
        table.add_row(area, *(str(found[column]) for column in columns))
    return table


def main(
    only: Annotated[list[str] | None, typer.Option(help="A part of the name or file; may be repeated.")] = None,
    area: Annotated[list[str] | None, typer.Option(help="A module of the catalogue; may be repeated.")] = None,
    changed: Annotated[bool, typer.Option("--changed", help="Those of files that differ from main.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Workers at once.")] = 2,
    out: Annotated[Path | None, typer.Option("--json", help="Write this file, and a page beside it.")] = None,
    as_list: Annotated[
        bool, typer.Option("--list", help="List the mutants, run nothing; fails where a place is lost.")
    ] = False,
) -> None:
    """Makes mistakes on purpose, one at a time, and looks whether the tests notice.

    Exit code 1 if fewer than 95 % of the decided mutants die, one that lives has no reason, or one was not decided.
    """
    chosen = choose(only or [], area or [], changed=changed)
    if as_list:
        if not show_list(chosen):
            raise typer.Exit(1)
        return
    console, began = Console(), time.monotonic()
    known: dict[str, Verdict] = {}

    def by_area() -> dict[str, list[Verdict]]:
        return {name: [known[m.name] for m in mutants if m.name in known] for name, mutants in chosen.items()}

    with Bar() as progress:

        def tell(verdict: Verdict, done: int, total: int) -> None:
            known[verdict.mutant.name] = verdict
            if verdict.outcome != "killed" or verdict.is_outdated:
                show(console, verdict)
            if out is not None:
                # What an interrupted run has found is there.
                minutes = round((time.monotonic() - began) / 60, 1)
                write(by_area(), out, {"torch": torch.__version__, "minutes": minutes})
            progress("mutants", done, total)

        found = runner.run([m for mutants in chosen.values() for m in mutants], jobs=jobs, tell=tell)
    console.print(render(by_area()))
    if not holds(found):
        raise typer.Exit(1)


def show(console: Console, verdict: Verdict) -> None:
    """Prints what became of a mutant that did not simply die."""
    outdated = " (it was said to live)" if verdict.is_outdated else ""
    color = COLORS.get(verdict.outcome, "yellow")
    console.print(f"[{color}]{verdict.outcome}[/] {verdict.mutant.name}: {verdict.mutant.wrong}{outdated}")
    if verdict.detail:
        console.print(verdict.detail, markup=False, highlight=False)


def write(by_area: dict[str, list[Verdict]], out: Path, more: dict[str, Any]) -> None:
    """Writes OUT and OUT with the ending .md."""
    where = {"python": platform.python_version(), **more, "date": time.strftime("%F")}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(as_data(by_area, where), indent=2) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(by_area, where), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
