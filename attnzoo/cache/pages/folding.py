"""What heads lose by place: the rows that join their compensation rows.

Letters: B batch, G KV heads, h heads of an extent, R rows, T tokens of a call, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attnzoo.cache.evicting.cache import of_heads
from attnzoo.cache.pages.apply import Lost
from attnzoo.cache.pages.extents import Extent
from attnzoo.cache.pages.pool import PagePool


def leaving(pool: PagePool, values: Mapping[str, Tensor], lengths: int | Tensor, tokens: int | Tensor) -> Lost | None:
    """The rows that a call's tokens push out, held or its own; ``None`` where there are none.

    Args:
        pool: What is held before.
        values: The call's keys, values and sidecars ``[B, G, T, ...]``.
        lengths: Its tokens of each item, an int or int64 ``[B]`` on the CPU.
        tokens: Tokens seen before, likewise.
    """
    lost = None
    for extent in pool.extents:
        ring = extent.ring
        if ring is None:
            continue
        after = tokens + lengths
        most = after if isinstance(after, int) else int(after.max()) if after.numel() else 0
        if -(-most // pool.page) <= ring.pages:
            continue
        count = values["k"].shape[2]
        if isinstance(tokens, int) and count == 1 and tokens % pool.page:
            continue
        last = _column((after + pool.page - 1) // pool.page - 1, pool.device)
        gone = last - ring.local - ring.spare
        if lost is None:
            lost = Lost.nothing(pool)
        # Of the rows held, and of those that are never written.
        block = pool.view("position", extent) // pool.page
        _add(lost, extent, pool.rows_in_place(extent), (block >= ring.sink) & (block <= gone))
        token = torch.arange(count, device=pool.device)
        block = (token + _column(tokens, pool.device)) // pool.page
        leaves = (block >= ring.sink) & (block <= gone) & (token < _column(lengths, pool.device))
        own = {name: of_heads(x, extent.heads) for name, x in values.items()}
        _add(lost, extent, own, leaves.expand(pool.batch, len(extent.heads), -1))
    return lost


def hidden(pool: PagePool) -> Lost:
    """The rows that are held so that tokens may be taken back, which the next token does not read."""
    lost = Lost.nothing(pool)
    for extent in pool.extents:
        if extent.ring is not None:
            out_of_sight = (pool.view("position", extent) >= 0) & (pool.view("bias", extent) == -torch.inf)
            _add(lost, extent, pool.rows_in_place(extent), out_of_sight)
    return lost


def _add(lost: Lost, extent: Extent, rows: Mapping[str, Tensor], which: Tensor) -> None:
    """Adds some rows ``[B, h, R]`` to what their heads have lost."""
    heads = list(extent.heads)
    dtype = lost.mass.dtype
    for name, total in (("k", lost.k), ("v", lost.v)):
        # Rows that stay may hold anything.
        value = rows[name].to(dtype).masked_fill(~which.unsqueeze(-1), 0)
        total[:, heads] += value.sum(2)
    lost.mass[:, heads] += which.sum(-1).to(dtype)
    if "moment" in rows:
        lost.moment[:, heads] += rows["moment"].to(dtype).masked_fill(~which, 0).sum(-1)


def _column(numbers: int | Tensor, device: torch.device) -> int | Tensor:
    """Numbers of items beside ``[B, h, R]``."""
    return numbers if isinstance(numbers, int) else numbers.to(device).view(-1, 1, 1)
