"""What commands print on stdout."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from attnzoo.reporting.tables import Grid, lines

WIDTH = 120
"""Of output that nobody sees on a terminal, unless COLUMNS says otherwise."""

INDENT = 2
"""Blanks before what is listed under a heading."""

GAP = 2
"""Blanks between a word and its meaning."""

LEAST_MEANING = 36
"""A meaning is folded to no less beside its word."""

GOES_ON = " \\"
"""Ends a line that a shell reads on."""


class Screen(Console):
    """A console that leaves it to the caller what happens where nobody reads on, such as behind ``| head``."""

    def on_broken_pipe(self) -> None:
        """Raises the error that is being handled, in place of an end without a word."""
        raise BrokenPipeError


def _console() -> Console:
    console = Screen()
    return console if console.is_terminal or os.environ.get("COLUMNS") else Screen(width=WIDTH)


def table(grid: Grid) -> None:
    """A table, as wide as there is room."""
    console = _console()
    for line, style in lines(grid, console.width):
        _line(console, line, style)


def text(paragraph: str, style: str = "") -> None:
    """A paragraph, folded at blanks; markup means nothing in it."""
    console = _console()
    indent = " " * (len(paragraph) - len(paragraph.lstrip(" ")))
    for line in paragraph.split("\n"):
        for part in textwrap.wrap(line, console.width, subsequent_indent=indent, break_on_hyphens=False) or [""]:
            _line(console, part, style)


def written(out: Path | None) -> None:
    """Says which files results went to, by their common name, if there are any."""
    if out is not None:
        text(f"written: {out}.json, .md, .png")


def definitions(entries: Sequence[tuple[str, str]]) -> None:
    """Words and what they mean: side by side where there is room, else one below the other."""
    console = _console()
    left = max(len(word) for word, _ in entries)
    room = console.width - INDENT - left - GAP
    for word, meaning in entries:
        if room >= LEAST_MEANING:
            parts = textwrap.wrap(meaning, room, break_on_hyphens=False) or [""]
            for n, part in enumerate(parts):
                _line(console, f"{' ' * INDENT}{(word if n == 0 else '').ljust(left + GAP)}{part}".rstrip(), "")
            continue
        for indent, line in ((INDENT, word), (2 * INDENT + GAP, meaning)):
            for part in _folded(line, console.width, indent):
                _line(console, part, "")


def calls(entries: Sequence[tuple[str, str]]) -> None:
    """Calls of the command line, each behind what it does; one that is too long is folded as a shell reads it."""
    console = _console()
    for call, what in entries:
        for part in _folded(f"{what}:", console.width, INDENT):
            _line(console, part, "")
        # A shell would read a broken word as two.
        *parts, last = _folded(call, console.width - len(GOES_ON), INDENT + GAP, break_long_words=False)
        for part in parts:
            _line(console, f"{part}{GOES_ON}", "bold")
        _line(console, last, "bold")


def _folded(line: str, width: int, indent: int, *, break_long_words: bool = True) -> list[str]:
    blanks = " " * indent
    fold = textwrap.TextWrapper(width, initial_indent=blanks, subsequent_indent=blanks, break_on_hyphens=False)
    fold.break_long_words = break_long_words
    return fold.wrap(line)


def picture(drawn: str) -> None:
    """Lines that must not be folded, but for the first, which is text."""
    first, *rest = drawn.split("\n")
    text(first)
    console = _console()
    for line in rest:
        _line(console, line, "")


def _line(console: Console, line: str, style: str) -> None:
    console.print(Text(line, style=style), soft_wrap=True, highlight=False)
