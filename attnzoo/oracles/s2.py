r"""S2 attention: every head reads its own shard of the context, one query of one head at a time.

Source: Lin et al. 2024, *S2-Attention: Hardware-Aware Context Sharding Among Attention Heads* (arXiv:2407.17678); the
formula is that of its published kernels; code: linxihui/dkernel. ``sink_blocks`` is an addition: the first blocks stay
visible, as in Xiao et al. 2023 (arXiv:2309.17453).

Letters: ``M``/``N`` query/key blocks, ``G`` key heads; ``i`` a query block, ``j`` a key block, both counted from the
start of the sequence; ``n`` a key head. A key head's pattern is that of all its query heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnzoo.oracles.mha import Recipe, attention, separate


@dataclass(frozen=True, kw_only=True)
class S2Pattern:
    """Which blocks are read.

    Attributes:
        block_size: Tokens in a block.
        local_blocks: Nearest blocks that every head reads, the own one included; a pair (back, ahead) for sequences
            that are read in both directions.
        vert_stride: Every how many blocks a head reads one further away.
        head_offset: Shift of the strided blocks of all heads.
        step: Shift from one key head to the next. ``None`` spreads the heads that are not dense over the stride;
            "dkernel" spreads the query heads, as the published code does.
        num_dense_heads: Last key heads, which read everything.
        sink_blocks: First blocks, which every head reads.
        homogeneous: Whether all heads read what head 0 reads.
    """

    block_size: int = 64
    local_blocks: int | tuple[int, int] = 16
    vert_stride: int = 8
    head_offset: int = 0
    step: int | Literal["dkernel"] | None = None
    num_dense_heads: int = 0
    sink_blocks: int = 0
    homogeneous: bool = False


def head_step(pattern: S2Pattern, num_heads: int, num_kv_heads: int) -> int:
    """How far the strided blocks move from one key head to the next."""
    if pattern.step is None:
        return max(1, pattern.vert_stride // max(1, num_kv_heads - pattern.num_dense_heads))
    if pattern.step == "dkernel":
        return max(1, pattern.vert_stride // num_heads)
    return pattern.step


def reads(pattern: S2Pattern, n: int, i: int, j: int, recipe: Recipe) -> bool:
    r"""Whether query block i of key head n reads key block j.

    .. math:: j \le i \wedge ( i - j < L \vee n \ge G - n_{dense} \vee j < sink
              \vee (j + n \cdot step + offset) \bmod v = 0 )

    Not causal, the stride counts from the edge of the local blocks: j is read if its distance past that edge is a
    multiple of the stride, the same for all heads.
    """
    if recipe.causal and j > i:
        return False
    if n >= recipe.num_kv_heads - pattern.num_dense_heads or j < pattern.sink_blocks:
        return True
    local = pattern.local_blocks
    back, ahead = (local, local) if isinstance(local, int) else local
    if not recipe.causal:
        return (max(0, i - j - back + 1) + max(0, j - i - ahead + 1)) % pattern.vert_stride == 0
    head = 0 if pattern.homogeneous else n
    shift = head * head_step(pattern, recipe.num_heads, recipe.num_kv_heads) + pattern.head_offset
    return i - j < back or (j + shift) % pattern.vert_stride == 0


def block_mask(pattern: S2Pattern, recipe: Recipe, query_blocks: range, key_blocks: range) -> Tensor:
    """The formula for every key head, query block and key block, bool ``[G, M, N]``."""
    return torch.tensor(
        [
            [[reads(pattern, n, i, j, recipe) for j in key_blocks] for i in query_blocks]
            for n in range(recipe.num_kv_heads)
        ]
    )


def s2(
    x: Tensor,
    weights: Mapping[str, Tensor],
    recipe: Recipe,
    pattern: S2Pattern,
    *,
    key_padding: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    r"""Softmax attention over the blocks that the formula of :func:`reads` keeps.

    .. math:: o_t = \sum_{s \in S(t)} softmax_s(\sigma q_t \cdot k_s) v_s,
              \quad S(t) = \{ s \le t : reads(n, \lfloor t / w \rfloor, \lfloor s / w \rfloor) \}

    Args:
        x: Tokens ``[B, T, C]``.
        weights: ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``.
        recipe: The shared numbers.
        pattern: Which blocks are read.
        key_padding: bool ``[B, T]``, true where a token is padding; blocks are counted among the real tokens.
        positions: ``[T]`` or ``[B, T]``, for the rotation alone.
    """
    size = pattern.block_size

    def sees(n: int, t: int, s: int) -> bool:
        return reads(pattern, n, t // size, s // size, recipe)

    project = separate(weights, recipe)
    return attention(x, weights, recipe, project=project, sees=sees, key_padding=key_padding, positions=positions)
