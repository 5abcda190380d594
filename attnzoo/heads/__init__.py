"""Which attention heads of a model do what: scores of heads, with data and without."""

from __future__ import annotations

from attnzoo.heads.duo_gates import DuoGates, calibrate_duo
from attnzoo.heads.head_scores import HeadScores, RankedHead
from attnzoo.heads.locret import RetainingTraining, retaining_heads
from attnzoo.heads.retrieval import RetrievalCase
from attnzoo.heads.scoring import score_heads
from attnzoo.heads.verbatim import verbatim_batches

__all__ = [
    "DuoGates",
    "HeadScores",
    "RankedHead",
    "RetainingTraining",
    "RetrievalCase",
    "calibrate_duo",
    "retaining_heads",
    "score_heads",
    "verbatim_batches",
]
