"""What was found about a model's heads, as tables, Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from attnzoo.evaluation.heads.knockout import Knockout
from attnzoo.heads import HeadScores
from attnzoo.heads.scores import picture
from attnzoo.reporting.outputs import write_together
from attnzoo.reporting.tables import Grid


@dataclass(frozen=True, eq=False)
class HeadsReport:
    """What was found.

    Attributes:
        model: As the command line names it.
        scores: Of all heads.
        top: How many of each kind are named.
        knockouts: What the model does without some of them, where that was asked.
        skipped: Classes of words that were not asked for, and why.
    """

    model: str
    scores: HeadScores
    top: int
    knockouts: Sequence[Knockout] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """One line."""
        return f"{self.model}: {' and '.join(self.scores.kinds)} scores of heads"

    def grids(self) -> list[Grid]:
        """The heads of the highest scores, and what the model does without them."""
        found = [self.scores.grid(self.top)]
        if self.knockouts:
            rows = [
                (one.name, f"{one.key_nll:.3f}", f"{one.solved} of {one.asked}", f"{one.text_nll:.3f}")
                for one in self.knockouts
            ]
            head = ("heads", "passkeys, nats a token", "solved", "text, nats a token")
            found.append(Grid(head, rows, title="With outputs of heads at 0", numbers=frozenset({1, 2, 3})))
        return found

    def notes(self) -> list[str]:
        """What is to be said beside the tables."""
        return [f"skipped: {name}, since {word!r} is no single token" for name, word in self.skipped.items()]

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        best = {kind: [asdict(one) for one in self.scores.top(kind, self.top)] for kind in self.scores.kinds}
        found = {"model": self.model, "top": best, **self.scores.to_dict()}
        if self.knockouts:
            found["knockouts"] = [asdict(one) for one in self.knockouts]
        if self.skipped:
            found["skipped"] = dict(self.skipped)
        return found

    def to_json(self) -> str:
        """As JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def markdown(self) -> str:
        """As Markdown."""
        lines = [self.title, ""]
        for grid in self.grids():
            rows = [grid.heads, ["---"] * len(grid.heads), *grid.rows]
            lines += [f"{grid.title}:", "", *(f"| {' | '.join(row)} |" for row in rows), ""]
        about = ", ".join(f"{name}: {value}" for name, value in self.scores.about.items())
        return "\n".join([*lines, *self.notes(), f"Where it comes from: {about}", ""])

    def draw(self, path: Path) -> None:
        """Draws all heads' scores, the best of them ringed."""
        picture.picture(self.scores, self.title, path, marked=self.top)

    def write(self, out: Path) -> None:
        """Writes OUT.json, OUT.md and OUT.png."""
        write_together(
            out,
            {
                "json": lambda path: path.write_text(self.to_json() + "\n", encoding="utf-8"),
                "md": lambda path: path.write_text(self.markdown(), encoding="utf-8"),
                "png": self.draw,
            },
        )

    def write_picture(self, path: Path) -> None:
        """Draws at a path, whole or not at all."""
        write_together(path.with_suffix(""), {path.suffix.removeprefix("."): partial(HeadsReport.draw, self)})
