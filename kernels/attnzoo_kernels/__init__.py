"""attnzoo_kernels: one block-sparse attention operation, its layouts and its implementations."""

from __future__ import annotations

from attnzoo_kernels.cpu.slots import Slots, attend_slots
from attnzoo_kernels.errors import AttnzooError, ConfigError, ConversionError, ShapeError, UnsupportedError
from attnzoo_kernels.layouts.flex_call import MaskedCall, read_block_mask
from attnzoo_kernels.layouts.layout import BlockLayout
from attnzoo_kernels.merge import merge_states
from attnzoo_kernels.op import block_sparse_attention, block_sparse_attention_with_lse, visible_pairs, why_not
from attnzoo_kernels.runtime.autocast import autocasts as autocasts
from attnzoo_kernels.runtime.autocast import no_autocast as no_autocast
from attnzoo_kernels.runtime.store import memory_held, memory_limit, remembers, set_memory_limit
from attnzoo_kernels.runtime.tracing import traceable
from attnzoo_kernels.runtime.workspace import clear_memory, clear_scratch
from attnzoo_kernels.spec.extras import Extras

__all__ = [
    "AttnzooError",
    "BlockLayout",
    "ConfigError",
    "ConversionError",
    "Extras",
    "MaskedCall",
    "ShapeError",
    "Slots",
    "UnsupportedError",
    "attend_slots",
    "block_sparse_attention",
    "block_sparse_attention_with_lse",
    "clear_memory",
    "clear_scratch",
    "memory_held",
    "memory_limit",
    "merge_states",
    "read_block_mask",
    "remembers",
    "set_memory_limit",
    "traceable",
    "visible_pairs",
    "why_not",
]
