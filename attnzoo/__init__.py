"""attnzoo: a conformance-tested zoo of attention variants, over one block-sparse operation."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from attnzoo.base.config import AttentionConfig as AttentionConfig
from attnzoo.base.layer import AttentionLayer as AttentionLayer
from attnzoo.base.recording import record as record
from attnzoo.base.rope import RotaryConfig as RotaryConfig
from attnzoo.base.rope import RotaryScaling as RotaryScaling
from attnzoo.base.steps import AttentionOutput as AttentionOutput
from attnzoo.base.steps import Plan as Plan
from attnzoo.cache.kv_cache import KVCache as KVCache
from attnzoo.factory import create as create
from attnzoo.factory import get_config as get_config
from attnzoo.factory import list_variants as list_variants
from attnzoo.ops import BlockLayout as BlockLayout
from attnzoo.ops import Extras as Extras
from attnzoo.ops import block_sparse_attention as block_sparse_attention
from attnzoo.variants import LandmarkAttention as LandmarkAttention
from attnzoo.variants import LandmarkConfig as LandmarkConfig
from attnzoo.variants import LongHeadsAttention as LongHeadsAttention
from attnzoo.variants import LongHeadsConfig as LongHeadsConfig
from attnzoo.variants import LowRankGQAAttention as LowRankGQAAttention
from attnzoo.variants import LowRankGQAConfig as LowRankGQAConfig
from attnzoo.variants import MHAAttention as MHAAttention
from attnzoo.variants import MHAConfig as MHAConfig
from attnzoo.variants import MoHAttention as MoHAttention
from attnzoo.variants import MoHConfig as MoHConfig
from attnzoo.variants import RCMHAAttention as RCMHAAttention
from attnzoo.variants import RCMHAConfig as RCMHAConfig
from attnzoo.variants import S2Attention as S2Attention
from attnzoo.variants import S2Config as S2Config
from attnzoo_kernels.errors import AttnzooError as AttnzooError
from attnzoo_kernels.errors import ConfigError as ConfigError
from attnzoo_kernels.errors import ConversionError as ConversionError
from attnzoo_kernels.errors import ShapeError as ShapeError
from attnzoo_kernels.errors import UnsupportedError as UnsupportedError

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("models", "policies", "surgery"):
        return import_module(f"attnzoo.{name}")
    if name == "MultiheadAttention":
        return import_module("attnzoo.torch_mha").MultiheadAttention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
