"""The operation, under the package's own name."""

from __future__ import annotations

from attnzoo_kernels import BlockLayout as BlockLayout
from attnzoo_kernels import Extras as Extras
from attnzoo_kernels import block_sparse_attention as block_sparse_attention
from attnzoo_kernels import block_sparse_attention_with_lse as block_sparse_attention_with_lse
from attnzoo_kernels import clear_memory as clear_memory
from attnzoo_kernels import memory_held as memory_held
from attnzoo_kernels import memory_limit as memory_limit
from attnzoo_kernels import merge_states as merge_states
from attnzoo_kernels import read_block_mask as read_block_mask
from attnzoo_kernels import remembers as remembers
from attnzoo_kernels import set_memory_limit as set_memory_limit
from attnzoo_kernels import visible_pairs as visible_pairs
from attnzoo_kernels import why_not as why_not
