"""What commands print on stdout."""

from __future__ import annotations

import os
import textwrap

from rich.console import Console
from rich.text import Text

from attnzoo.reporting.tables import Grid, lines

WIDTH = 120
"""Of output that nobody sees on a terminal, unless COLUMNS says otherwise."""


def _console() -> Console:
    console = Console()
    return console if console.is_terminal or os.environ.get("COLUMNS") else Console(width=WIDTH)


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


def picture(drawn: str) -> None:
    """Lines that must not be folded, but for the first, which is text."""
    first, *rest = drawn.split("\n")
    text(first)
    console = _console()
    for line in rest:
        _line(console, line, "")


def _line(console: Console, line: str, style: str) -> None:
    console.print(Text(line, style=style), soft_wrap=True, highlight=False)
