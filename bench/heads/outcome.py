"""What came out of an experiment: rows of figures, what must hold of them, and the heads that were found."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Head = tuple[int, int]
"""(layer, query head)."""


@dataclass(frozen=True)
class HeadRow:
    """Figures of one condition.

    Attributes:
        name: What was done to the model.
        figures: By what they are called.
        control: Whether it is there to show what does not help.
    """

    name: str
    figures: dict[str, float]
    control: bool = False


@dataclass(frozen=True)
class HeadClaim:
    """Something that must hold.

    Attributes:
        what: Of which figure.
        found: The figure.
        must: Its bound, in words.
        met: Whether it holds.
    """

    what: str
    found: float
    must: str
    met: bool


def number(value: float | None) -> str:
    """A figure as text, to three places."""
    if value is None:
        return ""
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"


def at_least(what: str, found: float, bound: float) -> HeadClaim:
    return HeadClaim(what, found, f">= {bound:,g}", found >= bound)


def at_most(what: str, found: float, bound: float) -> HeadClaim:
    return HeadClaim(what, found, f"<= {bound:,g}", found <= bound)


def above(what: str, found: float, other: float) -> HeadClaim:
    return HeadClaim(what, found, f"> {other:,.3g}", found > other)


@dataclass(frozen=True)
class HeadOutcome:
    """What came out of one experiment.

    Attributes:
        title: What it is about.
        source: The paper.
        said: What was measured, in a sentence or two.
        main: The figure that is drawn.
        rows: Figures by condition.
        claims: What must hold.
        heads: Heads that were found, by how.
        maps: Figures of all heads ``[L, H]``, by what they are.
        cpu_seconds: Of the whole experiment, loading aside.
    """

    title: str
    source: str
    said: str
    main: str
    rows: list[HeadRow]
    claims: list[HeadClaim] = field(default_factory=list)
    heads: dict[str, list[Head]] = field(default_factory=dict)
    maps: dict[str, list[list[float]]] = field(default_factory=dict)
    cpu_seconds: float = 0.0

    @property
    def columns(self) -> list[str]:
        """What the rows' figures are called, in order."""
        return list(dict.fromkeys(name for row in self.rows for name in row.figures))


@dataclass
class HeadResults:
    """Outcomes by experiment.

    Attributes:
        about: Where they come from.
        outcomes: By the experiment's name.
    """

    about: dict[str, Any]
    outcomes: dict[str, HeadOutcome] = field(default_factory=dict)

    def to_json(self) -> str:
        data = {"about": self.about, "outcomes": {name: asdict(found) for name, found in self.outcomes.items()}}
        return json.dumps(data, indent=1) + "\n"


def read(path: Path) -> HeadResults:
    """What was written."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return HeadResults(data["about"], {name: _outcome(found) for name, found in data["outcomes"].items()})


def _outcome(data: Mapping[str, Any]) -> HeadOutcome:
    rows = [HeadRow(**row) for row in data["rows"]]
    claims = [HeadClaim(**claim) for claim in data["claims"]]
    heads = {name: _pairs(found) for name, found in data["heads"].items()}
    return HeadOutcome(**{**data, "rows": rows, "claims": claims, "heads": heads})


def _pairs(found: Iterable[Iterable[int]]) -> list[Head]:
    return [(layer, head) for layer, head in found]
