"""The animals, one file each."""

from __future__ import annotations

from attnzoo.variants.landmark.config import LandmarkConfig as LandmarkConfig
from attnzoo.variants.landmark.layer import LandmarkAttention as LandmarkAttention
from attnzoo.variants.longheads.config import LongHeadsConfig as LongHeadsConfig
from attnzoo.variants.longheads.layer import LongHeadsAttention as LongHeadsAttention
from attnzoo.variants.lowrank_gqa import LowRankGQAAttention as LowRankGQAAttention
from attnzoo.variants.lowrank_gqa import LowRankGQAConfig as LowRankGQAConfig
from attnzoo.variants.mha import MHAAttention as MHAAttention
from attnzoo.variants.mha import MHAConfig as MHAConfig
from attnzoo.variants.moh.config import MoHConfig as MoHConfig
from attnzoo.variants.moh.layer import MoHAttention as MoHAttention
from attnzoo.variants.rcmha.config import RCMHAConfig as RCMHAConfig
from attnzoo.variants.rcmha.layer import RCMHAAttention as RCMHAAttention
from attnzoo.variants.s2.layer import S2Attention as S2Attention
from attnzoo.variants.s2.layer import S2Config as S2Config
