"""What is measured at a first contact with a GPU, in the order of its worth."""

from __future__ import annotations

from dataclasses import dataclass

PLANTED = "planted"
"""What a rehearsal calls that which it makes go wrong."""
DENSE = 32768
LONG = 131072
ALONE = ("--without", "flex", "--without", "xformers", "--without", "flash-attn")
BESIDE = ("--without", "xformers", "--without", "flash-attn", "--without", "sdpa cudnn")


@dataclass(frozen=True)
class Item:
    """A cell to measure.

    Attributes:
        name: As ``bench.gpu`` calls it, or "machine" for what the machine could do at best.
        arguments: More for ``bench.gpu``.
        plant: In a rehearsal, what goes wrong.
    """

    name: str
    arguments: tuple[str, ...] = ALONE
    plant: str = ""

    @property
    def label(self) -> str:
        """How it is told."""
        beside = ", beside FlexAttention" if self.arguments == BESIDE else ""
        return f"{self.name}{beside}{f', {PLANTED} {self.plant}' if self.plant else ''}"


def _named(what: str, width: int, tokens: int, rho: str, heads: str = "") -> str:
    return f"{what}-d{width}-t{tokens}-rho{rho}{heads}"


CELLS = (
    Item("machine", ()),
    Item(_named("forward", 128, DENSE, "1")),
    Item(_named("forward", 128, DENSE, "0.25")),
    Item(_named("decode", 128, LONG, "0.5", "-h32x8")),
    Item(_named("backward", 128, DENSE, "1")),
    Item(_named("backward", 128, DENSE, "0.25")),
    Item(_named("forward", 128, DENSE, "0.25"), BESIDE),
    Item(_named("forward", 128, DENSE, "0.05")),
    Item(_named("forward", 64, DENSE, "1")),
    Item(_named("decode", 128, LONG, "0.25", "-h32x8")),
    Item("recompilations-d128-t8192-rho0.3-h8x4"),
    Item(_named("form-skewed", 128, DENSE, "1")),
    Item(_named("form-skewed", 64, DENSE, "1")),
    Item(_named("backward", 128, DENSE, "0.25"), BESIDE),
    Item(_named("decode", 128, LONG, "0.5", "-h32x8"), BESIDE),
    Item(_named("forward", 64, DENSE, "0.25")),
    Item(_named("backward", 64, DENSE, "1")),
)
SPECIALISED = tuple(Item(_named("form-specialised", width, DENSE, rho)) for rho in ("1", "0.25") for width in (128, 64))
TINY = (
    Item("machine", ()),
    Item("forward-d16-t40-rho0.5-h2x1"),
    Item("decode-d16-t40-rho0.5-h2x1", plant="crash"),
)
TINY_SPECIALISED = (Item("form-specialised-d16-t40-rho0.5-h2x1", plant="hang"),) * 2
