"""Keys and values that stay in CPU memory: a call fetches the blocks that its layout lists.

Letters: B batch, T query tokens, S key tokens, H query heads, G KV heads, h heads of a layout, N key blocks, U blocks
fetched, D width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.base.steps import AttentionInputs, Plan
from attnzoo.cache.streams import fetched
from attnzoo_kernels import BlockLayout
from attnzoo_kernels.errors import UnsupportedError
from attnzoo_kernels.layouts.build import listed_indices


def fetch_blocks(inputs: AttentionInputs, plan: Plan) -> tuple[AttentionInputs, Plan]:
    """The same call with the listed blocks alone, side by side in their order, on the device of the queries.

    For each item and KV head the blocks that any row lists are gathered where they lie. Rows keep which keys they see:
    blocks stay in order, and a row's position becomes the place of its own block among those fetched. The output is
    that of the whole call; its ``q_pos`` and the layout's columns count fetched slots.

    Args:
        inputs: Keys and values ``[B, G, S, D]`` wherever they lie; slot s of an item is its s-th token.
        plan: Settled: with the positions of the layout's rows in its extras, where rows are not the last slots.

    Raises:
        UnsupportedError: If the plan is not causal, or has a rule that counts slots or holds something for each of
            them (a window, a sink, a bias, auxiliary channels, gate keys).
    """
    layout = plan.layout
    extras = plan.extras
    by_slot = (extras.window, extras.key_bias, extras.aux, extras.gate if isinstance(extras.gate, Tensor) else None)
    if not plan.causal or any(x is not None for x in by_slot):
        raise UnsupportedError("offload: expected a causal plan without window, bias, auxiliary channels and gate keys")
    batch, groups, slots, _ = inputs.k.shape
    block = layout.block_k
    device = inputs.q.device
    if not slots:
        return replace(inputs, k=inputs.k.to(device), v=inputs.v.to(device)), plan
    used = _used(layout, inputs.q.shape[1], groups).expand(batch, groups, -1)  # [B, G, N]
    upto = used.cumsum(-1)
    most = max(1, int(upto[..., -1].max())) if used.numel() else 1
    order = torch.argsort((~used).to(torch.uint8), dim=-1, stable=True)[..., :most]  # [B, G, U]
    slot = (order.unsqueeze(-1) * block + torch.arange(block, device=device)).flatten(2).clamp(max=max(slots - 1, 0))
    k, v = (_gather(x, slot, device) for x in (inputs.k, inputs.v))
    q_pos = _moved_positions(plan, used, upto, inputs.q.shape[1], slots)
    fetched = replace(inputs, k=k, v=v)
    return fetched, replace(plan, layout=_renumbered(layout, upto, most), extras=replace(extras, q_pos=q_pos))


def _used(layout: BlockLayout, heads: int, groups: int) -> Tensor:
    """Which blocks any row of a KV head lists, bool ``[B|1, G|1, N]``."""
    used = layout.to_mask().any(2)
    if used.shape[1] == heads and heads != groups:
        used = used.unflatten(1, (groups, -1)).any(2)
    return used


def _gather(x: Tensor, slot: Tensor, device: torch.device) -> Tensor:
    """Rows ``slot [B, G, n]`` of ``x [B, G, S, D]``, gathered where x lies and brought to a device."""
    index = slot.to(x.device).unsqueeze(-1).expand(-1, -1, -1, x.shape[3])
    return fetched(x.gather(2, index), device)


def _renumbered(layout: BlockLayout, upto: Tensor, most: int) -> BlockLayout:
    """The layout over the fetched blocks."""
    _, heads, blocks_q = layout.start.shape
    row, index = listed_indices(layout.lists)
    # Where items or heads share their lists, they share what is fetched.
    item = row // (heads * blocks_q)
    head = row // blocks_q % heads
    group = head * upto.shape[1] // heads
    col = layout.col.clone()
    listed = col[index].long()
    col[index] = (upto[item, group, listed] - 1).to(torch.int32)
    seq_k = most * layout.block_k
    sizes = (layout.block_q, layout.block_k, layout.seq_q, seq_k)
    return BlockLayout(*sizes, layout.start, layout.count, col, layout.origin)


def _moved_positions(plan: Plan, used: Tensor, upto: Tensor, heads: int, slots: int) -> Tensor:
    """The rows' positions among the fetched slots, int32 ``[B, H, T]``; a row sees the same keys as before."""
    block = plan.layout.block_k
    rows = plan.layout.seq_q
    batch, groups, blocks = used.shape
    pos = plan.extras.q_pos
    if pos is None:
        pos = (torch.arange(rows, device=used.device) + (slots - rows)).view(1, 1, rows)
    pos = pos.long().expand(batch, heads, rows)
    own = torch.div(pos, block, rounding_mode="floor").clamp(min=0, max=max(blocks - 1, 0))
    before, here = (x.repeat_interleave(heads // groups, 1).gather(-1, own) for x in (upto, used))
    moved = torch.where(here, (before - 1) * block + pos % block, before * block - 1)
    return torch.where(pos < 0, -1, moved).to(torch.int32)
