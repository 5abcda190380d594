"""The parts of a table on a command line: which are asked for, and what they measure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import typer

from attnzoo.cli.progress import Bar
from attnzoo.reporting.choices import hint
from bench.cpu.rows import Row

Part = Callable[[], Iterator[Row]]


def choose(parts: Iterable[str], only: list[str] | None) -> list[str]:
    """The parts to run, in their own order.

    Raises:
        typer.BadParameter: If one that was asked for is unknown.
    """
    known = list(parts)
    unknown = sorted(set(only or []) - set(known))
    if unknown:
        raise typer.BadParameter(
            f"expected one of {', '.join(known)}, got {unknown[0]!r}{hint(unknown[0], known)}", param_hint="--only"
        )
    return [name for name in known if not only or name in only]


def measure(parts: Mapping[str, Part], chosen: list[str]) -> list[Row]:
    """The rows of the parts that were chosen, and meanwhile how far it has got."""
    rows = []
    with Bar() as progress:
        for done, name in enumerate(chosen):
            progress(name, done, len(chosen))
            for row in parts[name]():
                rows.append(row)
                progress(f"{row.part}: {row.name}", done, len(chosen))
    return rows


def fail_on_red(rows: Iterable[Row]) -> None:
    """Ends the command where a bound is missed.

    Raises:
        typer.Exit: With code 1.
    """
    if any(row.holds is False for row in rows):
        raise typer.Exit(1)
