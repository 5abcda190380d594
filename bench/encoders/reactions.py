"""Reactions of four classes, put together from parts, so that it is known which atom of the product was which.

No reaction is from a data set. Parts of those that are tested are in none that a conversion is calibrated on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_TOKEN = re.compile(r"\[[^\]]+\]|Br|Cl|>>|[BCNOSPFIbcnosp]|[()=#.\-+/\\]|\d")
_ATOM = re.compile(r"\[[^\]]+\]|Br|Cl|[BCNOSPFIbcnosp]")

_ACIDS = ("CC", "CCC", "CC(C)", "c1ccccc1", "COc1ccc(cc1)", "Clc1ccc(cc1)", "C1CCCC1", "Cc1ccc(cc1)", "Fc1ccc(cc1)")
_AMINES = ("NCC", "NCc1ccccc1", "Nc1ccccc1", "NC1CCCCC1", "NCCOC", "Nc1ccc(C)cc1", "NC(C)C", "NCCc1ccccc1")
_ALCOHOLS = ("OC", "OCC", "OCc1ccccc1", "OC(C)C", "OCCC", "OC1CCCCC1", "OCCOC")
_HALIDES = ("c1ccccc1", "c1ccc(C)cc1", "c1ccc(OC)cc1", "c1ccc(F)cc1", "c1cccnc1", "c1ccc(C#N)cc1", "c1ccc(C(C)=O)cc1")
_BORONS = ("c1ccccc1", "Cc1ccc(cc1)", "COc1ccc(cc1)", "Fc1ccc(cc1)", "c1ccncc1", "Clc1ccc(cc1)")
_SULFONYLS = ("C", "CC", "c1ccccc1", "Cc1ccc(cc1)", "Fc1ccc(cc1)", "COc1ccc(cc1)")


@dataclass(frozen=True)
class Reaction:
    """A reaction, and where the atoms of its product come from.

    Attributes:
        smiles: Reactants, ``>>`` and the product.
        source: Of each of the product's atoms, the index of its atom among the reactants'.
    """

    smiles: str
    source: tuple[int, ...]

    @property
    def tokens(self) -> list[str]:
        """What the model reads."""
        return _TOKEN.findall(self.smiles)

    def atoms(self) -> tuple[list[int], list[int]]:
        """The tokens that are atoms of reactants, and of the product."""
        tokens = self.tokens
        border = tokens.index(">>")
        atoms = [index for index, token in enumerate(tokens) if _ATOM.fullmatch(token)]
        return [index for index in atoms if index < border], [index for index in atoms if index > border]


def _count(part: str) -> int:
    return len(_ATOM.findall(part))


def _joined(first: str, leaving: str, second: str) -> Reaction:
    """A part that loses something, and one that is joined to it."""
    kept = _count(first)
    gone = _count(leaving)
    source = (*range(kept), *range(kept + gone, kept + gone + _count(second)))
    return Reaction(f"{first}{leaving}.{second}>>{first}{second}", source)


def _coupled(halide: str, boron: str) -> Reaction:
    """A halide and a boronic acid."""
    first = 1 + _count(halide)
    source = (*range(first, first + _count(boron)), *range(1, first))
    return Reaction(f"Br{halide}.{boron}B(O)O>>{boron}{halide}", source)


def _all(part: int) -> Iterator[Reaction]:
    """Reactions of one half of the parts."""
    for acid in _ACIDS[part::2]:
        for nucleophile in (*_AMINES[part::2], *_ALCOHOLS[part::2]):
            yield _joined(f"{acid}C(=O)", "O", nucleophile)
    for sulfonyl in _SULFONYLS[part::2]:
        for amine in _AMINES[part::2]:
            yield _joined(f"{sulfonyl}S(=O)(=O)", "Cl", amine)
    for halide in _HALIDES[part::2]:
        for boron in _BORONS[part::2]:
            yield _coupled(halide, boron)


def to_calibrate() -> list[Reaction]:
    """Those that conversions see."""
    return list(_all(0))


def to_test() -> list[Reaction]:
    """Those that figures are of."""
    return list(_all(1))
