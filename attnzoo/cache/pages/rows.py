"""Rows out of a pool and into one: those of each head one behind the other, whatever pages they lie in.

Letters: B batch, G KV heads, h heads of an extent, R rows of the head that holds most, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnzoo.cache.evicting.regions import of_heads
from attnzoo.cache.pages.extents import BlockRing, Extent, placed, shared, with_room
from attnzoo.cache.pages.pool import PagePool
from attnzoo.cache.pages.store import NOTHING, PER_PAGE

MOST_EXTENTS = 4
"""Numbers of rows for which heads of a layer lie apart; where there are more, all lie together."""


def gathered(pool: PagePool) -> tuple[dict[str, Tensor], Tensor]:
    """What each head holds in the order of positions, blocks among it that are held to take tokens back.

    Returns:
        Tensors with a value for each row ``[B, G, R, ...]``, which may be views, with nothing behind a head's rows; and
        how many rows each has, int64 ``[B, G]`` on the CPU.
    """
    counts = torch.zeros(pool.batch, pool.heads, dtype=torch.int64, device="cpu")
    parts = []
    for extent in pool.extents:
        part, count = _rows_of(pool, extent)
        counts[:, list(extent.heads)] = count
        parts.append(part)
    if len(parts) == 1:
        return parts[0], counts
    most = max(part["k"].shape[2] for part in parts)
    rows = {}
    for name, x in parts[0].items():
        whole = x.new_full((pool.batch, pool.heads, most, *x.shape[3:]), NOTHING[name])
        for extent, part in zip(pool.extents, parts, strict=True):
            whole[:, list(extent.heads), : part[name].shape[2]] = part[name]
        rows[name] = whole
    return rows, counts


def _rows_of(pool: PagePool, extent: Extent) -> tuple[dict[str, Tensor], Tensor]:
    names = [name for name in pool.tensors if name not in PER_PAGE]
    if extent.ring is None:
        return {name: pool.view(name, extent).narrow(2, 0, extent.most) for name in names}, extent.each(pool.batch)
    live = {name: pool.view(name, extent).narrow(2, 0, extent.live * pool.page) for name in names}
    position = live["position"]
    there = position >= 0
    counts = there.sum(-1).cpu()
    most = int(counts.max()) if counts.numel() else 0
    order = torch.where(there, position, torch.iinfo(position.dtype).max).argsort(dim=-1, stable=True)[:, :, :most]
    return {name: picked(x, order) for name, x in live.items()}, counts


def picked(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``[B, h, n]`` of ``x [B, h, R, ...]``, a copy ``[B, h, n, ...]``."""
    index = index.to(x.device)
    return x.gather(2, index.view(*index.shape, *[1] * (x.dim() - 3)).expand(*index.shape, *x.shape[3:]))


def grouped(counts: Tensor, rings: Sequence[BlockRing | None], page: int) -> list[Extent]:
    """Heads with as many rows side by side, for rows ``[B, G]`` on the CPU; not placed yet.

    Args:
        counts: Rows of each head; tokens seen, of heads that remember by place.
        rings: How each head's blocks take turns.
        page: Rows of a page.
    """
    columns = [tuple(column) for column in counts.t().tolist()]
    apart = len(set(columns)) <= MOST_EXTENTS
    groups: dict[tuple[bool, tuple[int, ...]], list[int]] = {}
    for head, column in enumerate(columns):
        key = (rings[head] is not None, column if apart else ())
        groups.setdefault(key, []).append(head)
    extents = []
    for heads in groups.values():
        extent = Extent(tuple(heads), 1, 0, rings[heads[0]], rows=shared(counts[:, heads]))
        extent.live = extent.needs(extent.most, page)
        extents.append(extent)
    return extents


def laid(rows: Mapping[str, Tensor], extents: Sequence[Extent], like: PagePool, batch: int) -> PagePool:
    """A pool of these rows, with little room.

    Args:
        rows: Tensors ``[B, G, R, ...]`` as :func:`gathered` gives them.
        extents: Whose they are, and how many.
        like: A pool of the same widths, dtypes and device.
        batch: Items B.
    """
    pages = [with_room(extent.live, extent.ring) for extent in extents]
    pool = PagePool.like(like.tensors, placed(extents, pages, batch), batch, like.page)
    pool.weighed = like.weighed
    for extent in pool.extents:
        length = extent.live * pool.page
        for name in pool.tensors:
            each = extent.live if name in PER_PAGE else length
            pool.view(name, extent).narrow(2, 0, each).fill_(NOTHING[name])
        for name, x in rows.items():
            value = of_heads(x, extent.heads)
            if extent.ring is None:
                count = min(extent.most, value.shape[2])
                pool.view(name, extent).narrow(2, 0, count).copy_(value.narrow(2, 0, count))
            else:
                position = of_heads(rows["position"], extent.heads).long()
                page = extent.ring.page_of(position // pool.page)
                base = extent.bases(batch).to(position.device).unsqueeze(-1)
                where = torch.where(position < 0, 0, (base + page) * pool.page + position % pool.page)
                held = pool.tensors[name].flatten(0, 1)
                held[where.to(held.device)] = value.to(held)
    if "least" in pool.tensors:
        pool.bound_all()
    pool.hide()
    return pool
