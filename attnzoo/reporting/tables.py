"""Tables as lines of text at any width: nothing is cut off, and no column is lost."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

GAP = 2
"""Blanks between columns."""

LEAST_TEXT = 16
"""A column of text is folded to no less, unless it is narrower by itself."""

BAD = "bold red"
HEAD = "bold"
QUIET = "dim"


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        heads: What the columns are called.
        rows: Cells of text, as many in each row as there are heads.
        title: One line before it.
        caption: One line behind it.
        numbers: Columns of numbers, by place: to the right, and never folded but for their heads.
        bad: Rows that stand out, by place.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    caption: str = ""
    numbers: frozenset[int] = field(default_factory=frozenset)
    bad: frozenset[int] = field(default_factory=frozenset)


def lines(grid: Grid, width: int) -> Iterator[tuple[str, str]]:
    """The table's lines, each with a style: in columns where they fit, else one row below the other."""
    if grid.title:
        yield from ((line, HEAD) for line in _folded(grid.title, width))
    columns = _widths(grid, width)
    yield from _listed(grid, width) if columns is None else _in_columns(grid, columns)
    if grid.caption:
        yield from ((line, QUIET) for line in _folded(grid.caption, width))


def _widths(grid: Grid, width: int) -> list[int] | None:
    """The columns' widths, or ``None`` where not all of them fit."""
    columns = list(zip(grid.heads, *grid.rows, strict=True))
    found = [max(len(cell) for cell in column) for column in columns]
    # The head of a column of numbers may be folded, its numbers may not.
    floors = [
        max(_longest_word(column[0]), *(len(cell) for cell in column[1:]), 0)
        if i in grid.numbers
        else max(min(wide, LEAST_TEXT), *(_longest_word(cell) for cell in column))
        for i, (wide, column) in enumerate(zip(found, columns, strict=True))
    ]
    room = width - GAP * (len(columns) - 1)
    if sum(floors) > room:
        return None
    # The widest column gives first.
    while sum(found) > room:
        widest = max((i for i in range(len(found)) if found[i] > floors[i]), key=lambda i: found[i])
        found[widest] -= 1
    return found


def _longest_word(text: str) -> int:
    return max((len(word) for word in text.split()), default=0)


def _in_columns(grid: Grid, columns: list[int]) -> Iterator[tuple[str, str]]:
    for line in _row(grid, grid.heads, columns):
        yield line, HEAD
    yield "─" * (sum(columns) + GAP * (len(columns) - 1)), QUIET
    for i, cells in enumerate(grid.rows):
        for line in _row(grid, cells, columns):
            yield line, BAD if i in grid.bad else ""


def _row(grid: Grid, cells: Sequence[str], columns: list[int]) -> Iterator[str]:
    """The lines of one row, whose cells are folded at blanks."""
    parts = [_folded(cell, wide) for cell, wide in zip(cells, columns, strict=True)]
    for n in range(max(1, *(len(part) for part in parts))):
        texts = [part[n] if n < len(part) else "" for part in parts]
        padded = [
            text.rjust(wide) if i in grid.numbers else text.ljust(wide)
            for i, (text, wide) in enumerate(zip(texts, columns, strict=True))
        ]
        yield (" " * GAP).join(padded).rstrip()


def _listed(grid: Grid, width: int) -> Iterator[tuple[str, str]]:
    """Each row by itself: its first cell, and below it what the other columns say, packed."""
    for i, cells in enumerate(grid.rows):
        style = BAD if i in grid.bad else HEAD
        yield from ((line, style) for line in _folded(cells[0], width))
        line = ""
        for head, cell in zip(grid.heads[1:], cells[1:], strict=True):
            if not cell:
                continue
            pair = f"{head}: {cell}"
            if line and len(line) + GAP + len(pair) <= width:
                line += " " * GAP + pair
                continue
            if line:
                yield line, ""
            *whole, line = textwrap.wrap(pair, width, initial_indent="  ", subsequent_indent="    ")
            yield from ((part, "") for part in whole)
        if line:
            yield line, ""


def _folded(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False)
