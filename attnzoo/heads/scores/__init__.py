"""Scores of heads: by their attention on random tokens, by what they copy, and by their weights alone."""

from __future__ import annotations

from attnzoo.heads.scores.compositions import Composition, composition
from attnzoo.heads.scores.far_mass import far_mass
from attnzoo.heads.scores.named import duplicate, echo, induction, previous, retrieval
from attnzoo.heads.scores.token_maps import copying, successor

__all__ = [
    "Composition",
    "composition",
    "copying",
    "duplicate",
    "echo",
    "far_mass",
    "induction",
    "previous",
    "retrieval",
    "successor",
]
