"""Which attention heads of a model do what: scores of heads, with data and without."""

from __future__ import annotations

from attnzoo.heads import scores
from attnzoo.heads.scores.head_scores import HeadScores, RankedHead
from attnzoo.heads.scores.retrieval_cases import RetrievalCase
from attnzoo.heads.scores.scoring import score_heads
from attnzoo.heads.training.duo_gates import DuoGates, calibrate_duo
from attnzoo.heads.training.locret import RetainingTraining, retaining_heads
from attnzoo.heads.training.verbatim import verbatim_batches

__all__ = [
    "DuoGates",
    "HeadScores",
    "RankedHead",
    "RetainingTraining",
    "RetrievalCase",
    "calibrate_duo",
    "retaining_heads",
    "score_heads",
    "scores",
    "verbatim_batches",
]
