"""One decoding row over rows that are read where they lie: its own is written first, where the next one belongs.

Letters: B batch, H query heads, G KV heads, g query heads of a KV head, h heads of an extent, n rows, D head width, Dv
value width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnzoo.base.paged.inputs import in_order
from attnzoo.cache.evicting.regions import of_heads
from attnzoo.cache.pages.cache import PagedCache
from attnzoo.cache.pages.extents import Extent
from attnzoo.cache.pages.pool import PagePool


def attend_row(cache: PagedCache, q: Tensor, scale: float) -> Tensor:
    """Attention of one row over everything that its heads hold.

    Args:
        cache: What is held; the row's own key and value are staged there, and have the dtypes of what is held.
        q: Rotated queries ``[B, H, 1, D]``.
        scale: The factor on scores.

    Returns:
        ``[B, H, 1, Dv]``.
    """
    cache.write_ahead()
    pool = cache.pool
    batch, heads, _, width = q.shape
    groups = pool.heads
    # The query heads of a group along the rows: keys and values are read once for all of them.
    rows = q.reshape(batch, groups, heads // groups, width)
    beside = cache.beside()
    counts_mass = cache.counts_mass
    parts = []
    mass = []
    for extent in pool.extents:
        own = of_heads(rows, extent.heads)
        k, v, bias = _read(pool, extent, q.dtype)
        if beside is None and not counts_mass:
            parts.append(scaled_dot_product_attention(own, k, v, attn_mask=bias, scale=scale))
            continue
        lost = None if beside is None else _of_extent(beside, extent)
        out, share = _by_products((own * scale, k, v), bias, lost)
        parts.append(out)
        mass.append(share.transpose(-1, -2))
    if counts_mass:
        cache.note_mass([x.mean(-1, keepdim=True) if cache.policy.group == "mean" else x for x in mass])
    return in_order(pool, [part.flatten(1, 2).unsqueeze(2) for part in parts], groups)


def _read(pool: PagePool, extent: Extent, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """An extent's keys and values ``[B, h, n, D]``, the row's own among them, and what tells them from nothing."""
    apart = extent.ring is not None or isinstance(extent.rows, Tensor)
    count = extent.live * pool.page if apart else extent.most + 1
    k = pool.view("k", extent).narrow(2, 0, count).to(pool.device)
    v = pool.view("v", extent).narrow(2, 0, count).to(pool.device)
    bias = None
    if pool.is_masked(extent):
        bias = pool.view("bias", extent).narrow(2, 0, count).unsqueeze(2).to(dtype)
    return k, v, bias


def _of_extent(beside: tuple[Tensor, Tensor, Tensor], extent: Extent) -> tuple[Tensor, Tensor, Tensor]:
    k, v, bias = (of_heads(x, extent.heads).unsqueeze(2) for x in beside)
    return k, v, bias


def _by_products(
    tensors: tuple[Tensor, Tensor, Tensor], bias: Tensor | None, lost: tuple[Tensor, Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Attention of scaled rows ``[B, h, g, D]`` by two products; with it their shares of the rows ``[B, h, g, n]``."""
    rows, k, v = tensors
    precise = torch.promote_types(rows.dtype, torch.float32)
    rows = rows.to(precise)
    score = torch.matmul(rows, k.to(precise).transpose(-1, -2))
    if bias is not None:
        score = score + bias
    if lost is None:
        share = score.softmax(-1)
        return torch.matmul(share, v.to(precise)).to(v.dtype), share
    lost_k, lost_v, lost_bias = (x.to(precise) for x in lost)
    beside = torch.matmul(rows, lost_k.transpose(-1, -2)) + lost_bias.unsqueeze(2)
    share = torch.cat((score, beside), -1).softmax(-1)
    held, other = share.split((score.shape[-1], 1), -1)
    return (torch.matmul(held, v.to(precise)) + other * lost_v).to(v.dtype), held
