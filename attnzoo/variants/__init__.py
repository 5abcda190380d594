"""The animals, one file each."""

from __future__ import annotations

from attnzoo.variants.landmark import LandmarkAttention as LandmarkAttention
from attnzoo.variants.landmark import LandmarkConfig as LandmarkConfig
from attnzoo.variants.longheads import LongHeadsAttention as LongHeadsAttention
from attnzoo.variants.longheads import LongHeadsConfig as LongHeadsConfig
from attnzoo.variants.lowrank_gqa import LowRankGQAAttention as LowRankGQAAttention
from attnzoo.variants.lowrank_gqa import LowRankGQAConfig as LowRankGQAConfig
from attnzoo.variants.mha import MHAAttention as MHAAttention
from attnzoo.variants.mha import MHAConfig as MHAConfig
from attnzoo.variants.moh import MoHAttention as MoHAttention
from attnzoo.variants.moh import MoHConfig as MoHConfig
from attnzoo.variants.rcmha import RCMHAAttention as RCMHAAttention
from attnzoo.variants.rcmha import RCMHAConfig as RCMHAConfig
from attnzoo.variants.s2 import S2Attention as S2Attention
from attnzoo.variants.s2 import S2Config as S2Config
