"""What policies must show, each beside a control that must fail: met or missed.

A bound is on the figure of one row; its control is another row, or another policy, whose figure must lie beyond a bound
of its own: else the measure would not have told them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.policies.results import PolicyResults

HEADLINE = "duo: 40 %"
RANDOM = ("duo, random heads: 40 %", "duo, other random heads: 40 %")
READS = "pages: 40 %"
COARSE = "pages of 64: 40 %"
ALL = "everything"


@dataclass(frozen=True)
class Requirement:
    """One line of the list.

    Attributes:
        id: Which one.
        what: What is measured.
        found: The figure; ``None`` where it has not been measured.
        must: Its bound, in words.
        met: Whether it holds.
        control: What must fail.
        control_found: The control's figure.
        control_must: Its bound, in words.
        control_fails: Whether it does.
    """

    id: str
    what: str
    found: float | None
    must: str
    met: bool | None
    control: str
    control_found: float | None
    control_must: str
    control_fails: bool | None

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.met is None or self.control_fails is None:
            return "not measured"
        if not self.control_fails:
            return "CONTROL DOES NOT FAIL"
        return "met" if self.met else "MISSED"


Bound = tuple[str, Callable[[float], bool]]


def at_most(value: float) -> Bound:
    return f"<= {value:,g}", lambda found: found <= value


def at_least(value: float) -> Bound:
    return f">= {value:,g}", lambda found: found >= value


def line(
    name: str, what: str, figure: tuple[float | None, Bound], control: tuple[str, float | None, Bound]
) -> Requirement:
    """A line from figures and bounds."""
    found, (must, holds) = figure
    of_what, control_found, (control_must, control_holds) = control
    return Requirement(
        id=name,
        what=what,
        found=found,
        must=must,
        met=None if found is None else holds(found),
        control=of_what,
        control_found=control_found,
        control_must=control_must,
        control_fails=None if control_found is None else control_holds(control_found),
    )


def lines(results: PolicyResults) -> list[Requirement]:
    """All lines, with what has been measured so far."""
    return [*_quality(results), *_costs(results)]


def _least(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return min(known) if len(known) == len(values) else None


def _quality(results: PolicyResults) -> list[Requirement]:
    """Recall, running text and passkeys."""
    found = [
        line(
            "A1",
            "Duo, heads found without data: recall above dense, nats",
            (results.above(HEADLINE, "recall"), at_most(0.10)),
            ("random heads, the better of two", _least([results.above(x, "recall") for x in RANDOM]), at_least(1.5)),
        )
    ]
    for place, text in enumerate(results.masked_texts):
        mine = results.masked(HEADLINE, place)
        random = results.masked(RANDOM[0], place)
        beyond = (f"> {mine:.3f}", lambda found, mine=mine: found > mine) if mine is not None else at_least(0.0)
        found.append(
            line(
                "A2",
                f"Duo: 512 tokens of {text} read at once, above dense, nats",
                (mine, at_most(0.04)),
                ("random heads", random, beyond),
            )
        )
    return [
        *found,
        line(
            "A2b",
            "Duo: passkeys in 640 tokens, NLL above dense, nats",
            (results.above(HEADLINE, "key"), at_most(0.10)),
            ("random heads", results.above(RANDOM[0], "key"), at_least(1.5)),
        ),
        line(
            "A8",
            "pages of 16, 25 of 64 read: recall above dense, nats",
            (results.above(READS, "recall"), at_most(0.20)),
            ("pages of 64, as many rows", results.above(COARSE, "recall"), at_least(1.0)),
        ),
    ]


def _costs(results: PolicyResults) -> list[Requirement]:
    """Bytes, the process's memory, and steps."""
    dense = results.bytes_per_token("dense")
    everything = results.bytes_per_token(ALL)
    same = at_least(0.0 if dense is None else dense)
    return [
        line(
            "A3",
            "Duo: bytes held a token, behind 1,024",
            (results.bytes_per_token(HEADLINE), at_most(20_000)),
            ("a policy that holds everything", everything, same),
        ),
        line(
            "A3",
            "Duo: bytes held a token, behind 8,192",
            (results.long_bytes_per_token(HEADLINE), at_most(12_600)),
            ("a policy that holds everything", results.long_bytes_per_token(ALL), same),
        ),
        line(
            "A4",
            "Duo: memory of the process behind 8,192 tokens less than dense's, over the bytes that are not held",
            (results.memory_saved(HEADLINE), at_least(0.5)),
            ("a policy that holds everything, over the same bytes", results.memory_saved(ALL), at_most(0.5)),
        ),
        line(
            "A5",
            "Duo: attention of a decoding step behind 8,192 tokens over DynamicCache's",
            (results.step(HEADLINE, attention=True), at_most(0.5)),
            ("the dense model beside itself", results.step("dense", attention=True), at_least(0.9)),
        ),
        line(
            "A5",
            "Duo: a whole decoding step behind 8,192 tokens over DynamicCache's",
            (results.step(HEADLINE), at_most(0.6)),
            ("the dense model beside itself", results.step("dense"), at_least(0.9)),
        ),
        line(
            "A5",
            "pages: attention of a decoding step behind 8,192 tokens over DynamicCache's",
            (results.step(READS, attention=True), at_most(1.0)),
            ("the dense model beside itself", results.step("dense", attention=True), at_least(0.9)),
        ),
    ]
