"""What a mutant is: a file, a piece of its text, what stands there instead, and who should notice."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path


class NeedsNewPlaceError(ValueError):
    """The text of a mutant is not there exactly once, or what would stand there is no Python."""


@dataclass(frozen=True)
class Mutant:
    """One mistake on purpose.

    Attributes:
        name: A name of its own; its area is the catalogue's module.
        file: The file, from the root of the repository.
        old: Text that is there exactly once, in the file or in ``within``.
        new: What stands there instead.
        wrong: What is wrong then, for whoever reads that it lives.
        tests: Arguments of pytest, as in a shell: who should notice.
        within: The function or class (``name``, ``Class.method``) that holds the text; empty for the whole file.
        survives: Why no test notices, or none should; empty for what must die.
        at_import: Whether the mistake is one that modules cannot be imported with.
    """

    name: str
    file: str
    old: str
    new: str
    wrong: str
    tests: str
    within: str = ""
    survives: str = ""
    at_import: bool = False

    def find_place(self, root: Path) -> tuple[str, int]:
        """The text of the file under ``root``, and where in it the piece begins.

        Raises:
            NeedsNewPlaceError: If the piece is not there exactly once.
        """
        path = root / self.file
        if not path.is_file():
            raise NeedsNewPlaceError(f"{self.name}: {self.file} is no file")
        text = path.read_text(encoding="utf-8")
        first, last = _extent(text, self.within)
        if self.within and first == last:
            raise NeedsNewPlaceError(f"{self.name}: {self.file} has no {self.within}")
        times = text.count(self.old, first, last)
        if times != 1:
            where = f"{self.file}, {self.within}" if self.within else self.file
            raise NeedsNewPlaceError(f"{self.name}: {where} holds {self.old!r} {times} times, expected once")
        return text, text.index(self.old, first, last)

    def applied_to(self, root: Path) -> str:
        """The mutated text of the file under ``root``.

        Raises:
            NeedsNewPlaceError: If the piece is not there exactly once, or the result is no other program.
        """
        text, place = self.find_place(root)
        mutated = text[:place] + self.new + text[place + len(self.old) :]
        try:
            same = ast.dump(ast.parse(mutated)) == ast.dump(ast.parse(text))
        except SyntaxError as error:
            raise NeedsNewPlaceError(f"{self.name}: no Python any more: {error}") from error
        if same:
            raise NeedsNewPlaceError(f"{self.name}: the mutant is the same program")
        return mutated


def _extent(text: str, within: str) -> tuple[int, int]:
    """Where a function or class begins and ends in a text, in characters; the whole text for an empty name."""
    if not within:
        return 0, len(text)
    nodes: list[ast.stmt] = ast.parse(text).body
    found: ast.stmt | None = None
    for name in within.split("."):
        found = next((node for node in nodes if getattr(node, "name", None) == name), None)
        if found is None:
            return 0, 0
        nodes = getattr(found, "body", [])
    if found is None or found.end_lineno is None:
        return 0, 0
    lines = text.splitlines(keepends=True)
    return sum(map(len, lines[: found.lineno - 1])), sum(map(len, lines[: found.end_lineno]))
