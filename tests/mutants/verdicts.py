"""What became of the mutants, counted by area, as JSON and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.mutants.record import Mutant

KILLED = ("killed", "timed out")
DECIDED = (*KILLED, "survived")
LEAST = 0.95
"""The share of decided mutants that has to die."""


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant.

    Attributes:
        mutant: The mutant.
        outcome: "killed", "timed out" (it hung, which tests notice too), "survived", "undecided" (its tests fail on the
            code as it is) or "error" (it has no place, or breaks an import).
        detail: Why, where that is not plain.
        seconds: How long its tests ran.
    """

    mutant: Mutant
    outcome: str
    detail: str
    seconds: float

    @property
    def is_unargued(self) -> bool:
        """Whether it lives and nothing says why."""
        return self.outcome == "survived" and not self.mutant.survives

    @property
    def is_outdated(self) -> bool:
        """Whether it was said to live and dies."""
        return self.outcome in KILLED and bool(self.mutant.survives)


def share_killed(verdicts: Sequence[Verdict]) -> float:
    """Killed among decided; 1 where nothing was decided."""
    decided = [verdict for verdict in verdicts if verdict.outcome in DECIDED]
    return sum(verdict.outcome in KILLED for verdict in decided) / len(decided) if decided else 1.0


def holds(verdicts: Sequence[Verdict]) -> bool:
    """Whether enough died, all that live are argued, and everything was decided."""
    settled = all(verdict.outcome in DECIDED for verdict in verdicts)
    return settled and share_killed(verdicts) >= LEAST and not any(verdict.is_unargued for verdict in verdicts)


def counts(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How many there are of each outcome, and how many of the survivors are argued."""
    found = {"all": len(verdicts)}
    for outcome in (*DECIDED, "undecided", "error"):
        found[outcome] = sum(verdict.outcome == outcome for verdict in verdicts)
    return {**found, "argued": sum(v.outcome == "survived" and not v.is_unargued for v in verdicts)}


def as_data(by_area: Mapping[str, Sequence[Verdict]], where: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, for machines."""
    everything = [verdict for verdicts in by_area.values() for verdict in verdicts]
    return {
        "about": dict(where),
        "killed_of_decided": round(share_killed(everything), 4),
        "counts": counts(everything),
        "areas": {area: counts(verdicts) for area, verdicts in by_area.items()},
        "mutants": [
            {
                "area": area, "name": verdict.mutant.name, "file": verdict.mutant.file, "wrong": verdict.mutant.wrong,
                "outcome": verdict.outcome, "detail": verdict.detail, "survives": verdict.mutant.survives,
                "seconds": verdict.seconds,
            }
            for area, verdicts in by_area.items() for verdict in verdicts
        ],
    }  # fmt: skip


def markdown(by_area: Mapping[str, Sequence[Verdict]], where: Mapping[str, Any]) -> str:
    """A table by area, then what did not die."""
    everything = [verdict for verdicts in by_area.values() for verdict in verdicts]
    columns = ("all", "killed", "timed out", "survived", "argued", "undecided", "error")
    head = ", ".join(f"{name} {value}" for name, value in where.items())
    lines = [f"{share_killed(everything):.1%} of the decided mutants die ({head}).", ""]
    lines += [f"| area | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for area, verdicts in [*by_area.items(), ("**all**", everything)]:
        found = counts(verdicts)
        lines.append(f"| {area} | {' | '.join(str(found[column]) for column in columns)} |")
    for title, chosen in (
        ("Survivors", [v for v in everything if v.outcome == "survived"]),
        ("Timed out", [v for v in everything if v.outcome == "timed out"]),
        ("Undecided", [v for v in everything if v.outcome not in DECIDED]),
    ):
        if chosen:
            lines += ["", f"## {title}", ""]
            lines += [f"- `{v.mutant.name}` ({v.mutant.file}): {v.mutant.wrong}.{_why(v)}" for v in chosen]
    return "\n".join(lines) + "\n"


def _why(verdict: Verdict) -> str:
    if verdict.outcome == "survived":
        return f" {verdict.mutant.survives or '**Nothing says why.**'}"
    return f" {verdict.detail.splitlines()[0]}" if verdict.detail else ""
