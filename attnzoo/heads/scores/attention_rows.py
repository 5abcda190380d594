"""The attention of some rows of one layer, a few at a time, so that no matrix of all rows and keys is ever held.

Letters: B batch, H query heads, G KV heads, R rows, S key slots, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_VALUES = 1 << 22
"""Weights that are held at once, 16 MiB in fp32."""


def attention_rows(q: Tensor, k: Tensor, first: int, *, scale: float, slot: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """The attention weights of the rows from ``first`` on, a chunk of rows at a time.

    Products and softmax are in fp32, or in fp64 where queries are.

    Args:
        q: Rotated queries ``[B, H, T, D]``.
        k: Rotated keys ``[B, G, S, D]``.
        first: The first row that is asked for.
        scale: The factor on scores.
        slot: The key slot of row 0.

    Yields:
        The slots of R rows, int64 ``[R]``, and their weights ``[B, H, R, S']`` over the slots up to the last of them;
        0 behind a row's own.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, heads, tokens, _ = q.shape
    groups = k.shape[1]
    step = max(1, CHUNK_VALUES // (batch * heads * k.shape[2]))
    keys = k.to(wide).unsqueeze(2)  # [B, G, 1, S, D]
    for start in range(first, tokens, step):
        rows = torch.arange(start, min(start + step, tokens), device=q.device) + slot
        end = slot + min(start + step, tokens)
        queries = q[:, :, start : start + step].to(wide).unflatten(1, (groups, -1)) * scale
        scores = queries @ keys[..., :end, :].transpose(-1, -2)  # [B, G, g, R, S']
        # Causal edge.
        scores.masked_fill_(torch.arange(end, device=q.device) > rows[:, None], float("-inf"))
        yield rows, scores.softmax(-1).flatten(1, 2)
