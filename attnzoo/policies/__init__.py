"""Policies: which KV heads of a model remember what, with the memory of the rest really freed.

A policy is settings and pure functions. :func:`applied` puts one on a model of transformers for a while,
``surgery.convert(model, "policy", policy=...)`` for good, and ``layer.new_cache(..., policy=...)`` makes a cache for a
layer of attnzoo's own.
"""

from __future__ import annotations

from attnzoo.cache.policies.known import EMS as EMS
from attnzoo.cache.policies.known import H2O as H2O
from attnzoo.cache.policies.known import TOVA as TOVA
from attnzoo.cache.policies.known import Compose as Compose
from attnzoo.cache.policies.known import Duo as Duo
from attnzoo.cache.policies.known import KNorm as KNorm
from attnzoo.cache.policies.known import Locret as Locret
from attnzoo.cache.policies.known import Pages as Pages
from attnzoo.cache.policies.known import Policy as Policy
from attnzoo.cache.policies.known import Razor as Razor
from attnzoo.cache.policies.known import RetainingHead as RetainingHead
from attnzoo.cache.policies.known import SnapKV as SnapKV
from attnzoo.cache.policies.known import Streaming as Streaming
from attnzoo.cache.policies.known import policy_from as policy_from
from attnzoo.heads import HeadScores as HeadScores
from attnzoo.heads import RetainingTraining as RetainingTraining
from attnzoo.heads import retaining_heads as retaining_heads
from attnzoo.heads import score_heads as score_heads
from attnzoo.policies.files import load as load
from attnzoo.policies.files import save as save
from attnzoo.surgery.policies import LayerHeld as LayerHeld
from attnzoo.surgery.policies import PolicyReport as PolicyReport
from attnzoo.surgery.policies import PolicyRun as PolicyRun
from attnzoo.surgery.policies import applied as applied
from attnzoo.surgery.policies import cache as cache
