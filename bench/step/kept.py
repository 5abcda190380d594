"""Readings on disk: written after each, and taken up again by a later run of the same code on the same machine."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from attnzoo_kernels.errors import ConfigError
from bench.step.measure import StepReading
from bench.step.report import draw, write
from bench.step.rows import CONTESTANTS

ROOT = Path(__file__).resolve().parents[2]
MAY_DIFFER = ("date",)
"""What runs that go on with each other's readings need not have in common."""


def code() -> str:
    """Twelve digits that change with every change of the packages or of this command."""
    digest = hashlib.sha256()
    for folder in ("attnzoo", "kernels/attnzoo_kernels", "bench/step"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class Kept:
    """All readings so far, those of earlier runs among them.

    Args:
        out: OUT.json, OUT.md and OUT.png are the files; ``None`` keeps nothing on disk.
        where: Where the readings come from: machine, model, code and settings.

    Raises:
        ConfigError: If OUT.json holds readings that come from elsewhere.
    """

    def __init__(self, out: Path | None, where: dict[str, Any]) -> None:
        self.out = out
        self.where = where
        self.readings: list[StepReading] = []
        path = None if out is None else out.with_name(f"{out.name}.json")
        if path is not None and path.exists():
            self.readings = _read(path, where)

    def has(self, name: str, tokens: int) -> bool:
        """Whether a contestant was measured behind so many tokens, and was right."""
        return any((one.name, one.tokens) == (name, tokens) and not one.wrong for one in self.readings)

    def add(self, reading: StepReading) -> None:
        """Takes a reading in, in place of an earlier one of the same, and writes all but the picture."""
        order = [row.name for row in CONTESTANTS]
        key = (reading.name, reading.tokens)
        others = [one for one in self.readings if (one.name, one.tokens) != key]
        self.readings = sorted([*others, reading], key=lambda one: (order.index(one.name), one.tokens))
        if self.out is not None:
            write(self.readings, self.where, self.out)

    def draw(self) -> None:
        """Writes the picture."""
        if self.out is not None and self.readings:
            draw(self.readings, self.where, self.out)


def _read(path: Path, where: dict[str, Any]) -> list[StepReading]:
    """The readings of a file.

    Raises:
        ConfigError: If they come from elsewhere, or the file is of another command.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        about = found["about"]
        names = [name for name in {**about, **where} if name not in MAY_DIFFER]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"out: expected a file of this command or none, got {str(path)!r}") from error
    for name in names:
        if about.get(name) != where.get(name):
            raise ConfigError(
                f"out: expected readings to go on with, {name} {where.get(name)!r}, got {about.get(name)!r} in "
                f"{str(path)!r}: name another place, or remove it"
            )
    return [StepReading(**{name: value for name, value in row.items() if name != "holds"}) for row in found["rows"]]
