"""What has been measured so far: kept after every row, and continued."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ORIGINAL = "original"
CERTIFICATE = "certificate"
CONVERSION = "conversion"
CONTROL = "control"


@dataclass(frozen=True, kw_only=True)
class TrainedRow:
    """One conversion of one model.

    Attributes:
        host: Of the model.
        kind: What it is converted to.
        name: Of the conversion, or of the control beside it.
        role: The original, a certificate, a conversion or its control.
        layers: "all", or "global" where blocks with windows of their own stay as they are.
        nll: On the text that is held out, in windows as long as those of the training, nats per token.
        long_nll: The same text in windows four times as long; ``None`` where the model takes no such.
        density: Pairs that converted blocks read, over all; ``None`` where none is counted.
        values: Values that the model caches for each token.
        off: Largest difference to the original's logits over the largest of them.
        bound: What ``off`` may be; ``None`` where the row is no certificate.
        undone: Whether the logits were the original's to the bit once it was undone; ``None`` for a control.
        problem: Why it was refused, or not measured.
        says: What a certificate guarantees.
    """

    host: str
    kind: str
    name: str
    role: str
    layers: str = "all"
    nll: float | None = None
    long_nll: float | None = None
    density: float | None = None
    values: int | None = None
    off: float | None = None
    bound: float | None = None
    undone: bool | None = None
    problem: str | None = None
    says: str = ""

    @property
    def holds(self) -> bool:
        """Whether what was promised was found."""
        exact = self.bound is None or (self.off is not None and self.off <= self.bound)
        return exact and self.undone is not False


@dataclass(frozen=True, kw_only=True)
class HealedRow:
    """One model of fewer KV heads, or of latents, and what further training makes of it.

    Attributes:
        seed: Of the model, of its training and of the order in which it is trained further.
        name: Of the conversion.
        values: Values that the model caches for each token.
        nll: On the text that is held out, after so many further steps, by number, nats per token.
    """

    seed: int
    name: str
    values: int
    nll: dict[int, float]


@dataclass
class TrainedResults:
    """Figures by model.

    Attributes:
        about: Where they come from.
        trainings: What each training came to, by model (and seed).
        rows: Of conversions, by model.
        healed: Of further training, by seed.
    """

    about: dict[str, Any]
    trainings: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, list[TrainedRow]] = field(default_factory=dict)
    healed: dict[str, list[HealedRow]] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether all that was promised was found."""
        return all(row.holds for rows in self.rows.values() for row in rows)

    def drop(self, hosts: Collection[str], seeds: Collection[int]) -> None:
        """Forgets the rows of some models, and of some seeds of further training."""
        self.rows = {name: rows for name, rows in self.rows.items() if name not in hosts}
        self.healed = {seed: rows for seed, rows in self.healed.items() if int(seed) not in seeds}

    def take(self, other: TrainedResults) -> None:
        """Takes what another run of the same command has found and this one has not."""
        self.trainings = {**other.trainings, **self.trainings}
        self.rows = {**other.rows, **self.rows}
        for seed, rows in other.healed.items():
            own = self.healed.setdefault(seed, [])
            names = {row.name for row in own}
            own += [row for row in rows if row.name not in names]


def to_json(results: TrainedResults) -> str:
    """As JSON."""
    data = {
        "about": results.about,
        "trainings": results.trainings,
        "rows": {name: [{**asdict(row), "holds": row.holds} for row in rows] for name, rows in results.rows.items()},
        "healed": {seed: [asdict(row) for row in rows] for seed, rows in results.healed.items()},
    }
    return json.dumps(data, indent=1) + "\n"


def from_json(text: str) -> TrainedResults:
    """What :func:`to_json` gave."""
    data = json.loads(text)
    rows = {
        name: [TrainedRow(**{key: value for key, value in row.items() if key != "holds"}) for row in found]
        for name, found in data["rows"].items()
    }
    healed = {
        seed: [HealedRow(**{**row, "nll": {int(n): x for n, x in row["nll"].items()}}) for row in found]
        for seed, found in data["healed"].items()
    }
    return TrainedResults(data["about"], data["trainings"], rows, healed)


def read(path: Path) -> TrainedResults:
    """What was kept."""
    return from_json(path.read_text(encoding="utf-8"))
