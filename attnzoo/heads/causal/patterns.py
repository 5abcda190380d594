"""The weights of a block's attention, as its own rule and implementation have them.

Letters: B batch, T query tokens, R rows that are asked for, S key slots, H query heads, G KV heads, D head width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.surgery.hosts.calls import AttentionCall
from attnzoo.surgery.hosts.site import Site
from attnzoo_kernels.errors import UnsupportedError


def pattern_and_lse(site: Site, call: AttentionCall, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weights ``[B, R, H, S]`` and the logarithms of the sums of exponentials ``[B, R, H]``.

    Attention is linear in its values: over values that are columns of the identity it gives its weights, whatever is
    read, and by whom. The sums follow from the score of each row's strongest key and its weight.

    Args:
        site: Where.
        call: The call; it is answered anew, as wide as a value's columns at a time.
        rows: int64 ``[B, R]``; ``None`` for all.

    Raises:
        UnsupportedError: If the block reads what a cache that evicts has kept, and is not handed that.
    """
    if call.held:
        raise UnsupportedError(
            f"what: 'pattern' and 'lse' at {site.path} need all keys, which a cache that evicts does not hand over; "
            "call the model without a cache (use_cache=False)"
        )
    wide = torch.promote_types(call.q.dtype, torch.float32)
    q = call.q.to(wide)
    k = call.k.to(wide)
    call = replace(call, q=q, k=k)
    slots = k.shape[2]
    width = call.v.shape[3]
    parts = []
    for start in range(0, slots, width):
        columns = torch.zeros(slots, width, dtype=wide, device=k.device)
        count = min(width, slots - start)
        columns[start : start + count, :count] = torch.eye(count, dtype=wide, device=k.device)
        v = columns.expand(*k.shape[:2], -1, -1)  # [B, G, S, D]
        parts.append(_rows(replace(call, v=v).answered()[..., :count].transpose(1, 2), rows))
    pattern = torch.cat(parts, -1)  # [B, R, H, S]
    # The strongest key of each row: the logarithm of its weight is its score less that of the sum.
    weight, slot = pattern.max(-1)  # [B, R, H]
    group = q.shape[1] // k.shape[1]
    keys = k.repeat_interleave(group, 1).gather(2, slot.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, k.shape[3]))
    queries = _rows(q.transpose(1, 2), rows)
    score = (queries * keys.transpose(1, 2)).sum(-1) * call.scale
    # A row that reads nothing has no weights, and the sum of nothing.
    return pattern, torch.where(weight > 0, score - weight.log(), -torch.inf)


def _rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """Some rows of ``[B, T, H, n]``, or all."""
    if rows is None:
        return x
    return x.gather(1, rows[:, :, None, None].expand(-1, -1, *x.shape[2:]))
