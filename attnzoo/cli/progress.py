"""A progress bar on stderr for everything that takes longer than a second."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

WIDEST_BAR = 40
LEAST_BAR = 4
LEAST_WORDS = 50
"""Columns that are kept for what is done, how much of it, and the time."""


class Count(MofNCompleteColumn):
    """How much is done, where it is known of how much."""

    def render(self, task: Task) -> Text:
        """The column."""
        return Text("") if task.total is None else super().render(task)


class Bar:
    """Called with (what, done, total); one line, for what is being done now."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        # What is done may hold brackets, which are no markup; the bar gives way to it on a narrow terminal.
        columns = (
            TextColumn("{task.description:>12}", markup=False),
            BarColumn(bar_width=max(LEAST_BAR, min(WIDEST_BAR, console.width - LEAST_WORDS))),
            Count(),
            TimeElapsedColumn(),
        )
        # Where nobody watches, a bar would leave nothing but an empty line.
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task("working", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Shows how far something is; a total of 0 is not known."""
        self._progress.update(self._task, description=what, completed=done, total=total or None)
