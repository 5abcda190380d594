"""What single heads of a model do: scores of them, looking at them, and edits of them."""

from __future__ import annotations

from attnzoo.heads import act as act
from attnzoo.heads import scores as scores
from attnzoo.heads.causal.ablation import ablation_scores as ablation_scores
from attnzoo.heads.causal.attribution import attribution as attribution
from attnzoo.heads.causal.capture import capture as capture
from attnzoo.heads.causal.contributions import contributions as contributions
from attnzoo.heads.causal.divergence import divergence as divergence
from attnzoo.heads.causal.patching import patch as patch
from attnzoo.heads.causal.patching import path as path
from attnzoo.heads.scores.head_scores import HeadScores as HeadScores
from attnzoo.heads.scores.head_scores import RankedHead as RankedHead
from attnzoo.heads.scores.retrieval_cases import RetrievalCase as RetrievalCase
from attnzoo.heads.scores.scoring import score_heads as score_heads
from attnzoo.heads.training import lofit as lofit
from attnzoo.heads.training.duo_gates import DuoGates as DuoGates
from attnzoo.heads.training.duo_gates import calibrate_duo as calibrate_duo
from attnzoo.heads.training.locret import RetainingTraining as RetainingTraining
from attnzoo.heads.training.locret import retaining_heads as retaining_heads
from attnzoo.heads.training.verbatim import verbatim_batches as verbatim_batches
from attnzoo.surgery.edits.edit import HeadEdit as HeadEdit
from attnzoo.surgery.edits.edited import edited as edited
from attnzoo.surgery.edits.fold import FoldReport as FoldReport
from attnzoo.surgery.edits.fold import fold as fold
from attnzoo.surgery.edits.key_bias import KeyBias as KeyBias
from attnzoo.surgery.edits.key_bias import SinkScaling as SinkScaling
from attnzoo.surgery.edits.places import HeadSite as HeadSite
from attnzoo.surgery.edits.places import sites as sites
