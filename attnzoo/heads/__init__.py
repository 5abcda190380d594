"""What single heads of a model do: scores of them, looking at them, and edits of them."""

from __future__ import annotations

from attnzoo.heads import act, scores
from attnzoo.heads.causal.ablation import ablation_scores
from attnzoo.heads.causal.attribution import attribution
from attnzoo.heads.causal.capture import capture
from attnzoo.heads.causal.contributions import contributions
from attnzoo.heads.causal.divergence import divergence
from attnzoo.heads.causal.patching import patch, path
from attnzoo.heads.scores.head_scores import HeadScores, RankedHead
from attnzoo.heads.scores.retrieval_cases import RetrievalCase
from attnzoo.heads.scores.scoring import score_heads
from attnzoo.heads.training import lofit
from attnzoo.heads.training.duo_gates import DuoGates, calibrate_duo
from attnzoo.heads.training.locret import RetainingTraining, retaining_heads
from attnzoo.heads.training.verbatim import verbatim_batches
from attnzoo.surgery.edits.edit import HeadEdit
from attnzoo.surgery.edits.edited import edited
from attnzoo.surgery.edits.fold import FoldReport, fold
from attnzoo.surgery.edits.key_bias import KeyBias, SinkScaling
from attnzoo.surgery.edits.places import HeadSite, sites

__all__ = [
    "DuoGates",
    "FoldReport",
    "HeadEdit",
    "HeadScores",
    "HeadSite",
    "KeyBias",
    "RankedHead",
    "RetainingTraining",
    "RetrievalCase",
    "SinkScaling",
    "ablation_scores",
    "act",
    "attribution",
    "calibrate_duo",
    "capture",
    "contributions",
    "divergence",
    "edited",
    "fold",
    "lofit",
    "patch",
    "path",
    "retaining_heads",
    "score_heads",
    "scores",
    "sites",
    "verbatim_batches",
]
