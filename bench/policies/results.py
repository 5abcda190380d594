"""What has been measured so far: kept after every row, and continued."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from attnzoo.evaluation.two_phase.rows import DENSE, PolicyComparison, PolicyRow
from bench.policies.costs import Cost, cost_from


@dataclass
class PolicyResults:
    """Figures by row.

    Attributes:
        about: Where they come from.
        rows: Quality, by name.
        costs: Memory and steps, by name.
        masks: NLL of texts that are read at once, by name.
        masked_texts: Which texts these are.
        heads: How many KV heads Duo keeps, and how they were found.
    """

    about: dict[str, Any]
    rows: dict[str, PolicyRow] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    masks: dict[str, list[float]] = field(default_factory=dict)
    masked_texts: list[str] = field(default_factory=list)
    heads: dict[str, Any] = field(default_factory=dict)

    def comparison(self) -> PolicyComparison | None:
        """Quality as a comparison; ``None`` before the dense model has a row."""
        if DENSE not in self.rows:
            return None
        others = [row for name, row in self.rows.items() if name != DENSE]
        return PolicyComparison(self.about, [self.rows[DENSE], *others])

    def above(self, name: str, kind: str) -> float | None:
        """Nats of a kind of probes above dense."""
        if name not in self.rows or DENSE not in self.rows:
            return None
        mine, dense = self.rows[name].figure(kind), self.rows[DENSE].figure(kind)
        return None if mine is None or dense is None else mine - dense

    def masked(self, name: str, place: int) -> float | None:
        """Nats of a text that is read at once above dense."""
        if name not in self.masks or DENSE not in self.masks:
            return None
        return self.masks[name][place] - self.masks[DENSE][place]

    def bytes_per_token(self, name: str) -> float | None:
        """Bytes held for each token behind the longest contexts."""
        return self.rows[name].bytes_per_token if name in self.rows else None

    def long_bytes_per_token(self, name: str) -> float | None:
        """The same behind the longest length."""
        cost = self.costs.get(name)
        return None if cost is None else cost.held_bytes / cost.tokens

    def memory_saved(self, name: str) -> float | None:
        """How much less memory than dense's the process took, over the bytes that the headline does not hold."""
        headline = self.costs.get("duo: 40 %")
        if name not in self.costs or DENSE not in self.costs or headline is None:
            return None
        less = self.costs[DENSE].peak_bytes - self.costs[name].peak_bytes
        return less / (headline.dense_bytes - headline.held_bytes)

    def step(self, name: str, *, attention: bool = False) -> float | None:
        """A step behind the longest length over dense's."""
        cost = self.costs.get(name)
        if cost is None:
            return None
        return cost.steps[-1].attention if attention else cost.steps[-1].ratio


def to_json(results: PolicyResults, acceptance: list[dict[str, Any]]) -> str:
    """As JSON."""
    data = {
        "about": results.about,
        "heads": results.heads,
        "rows": [asdict(row) for row in results.rows.values()],
        "costs": [asdict(cost) for cost in results.costs.values()],
        "masks": results.masks,
        "masked_texts": results.masked_texts,
        "acceptance": acceptance,
    }
    return json.dumps(data, indent=1) + "\n"


def read(path: Path) -> PolicyResults:
    """What was kept."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return PolicyResults(
        about=data["about"],
        rows={row["name"]: PolicyRow(**row) for row in data["rows"]},
        costs={cost["name"]: cost_from(cost) for cost in data["costs"]},
        masks=data["masks"],
        masked_texts=data["masked_texts"],
        heads=data["heads"],
    )
