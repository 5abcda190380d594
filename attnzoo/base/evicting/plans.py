"""The plan of a call that reads what a retention lets a cache hold: the same blocks, however the sequence is split.

Letters: B batch, T tokens of a call, h heads of the lists, M/N query/key blocks, w tokens in a block, L near blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.base.shared_layouts import dense_layout, may_share
from attnzoo.base.steps import AttentionInputs, Plan
from attnzoo.cache.lengths import Lengths
from attnzoo.cache.retention import Retention
from attnzoo_kernels import BlockLayout, Extras, remembers


@dataclass(frozen=True)
class _CallRows:
    """Where the rows of one layout lie.

    Attributes:
        first: Slot of the first row, absent ones included, an int or int64 ``[B]``.
        block_q: Rows in a query block.
        rows: Rows, absent ones included.
        slots: Keys.
    """

    first: int | Tensor
    block_q: int
    rows: int
    slots: int


def retained_plan(retention: Retention, inputs: AttentionInputs, offset: int | Tensor) -> Plan:
    """What a call's rows read: the near blocks and those that are kept, and everything for full heads.

    Args:
        retention: The rule, of as many KV heads as there are keys for.
        inputs: The call.
        offset: The slot of each item's first row.
    """
    tokens = inputs.q.shape[2]
    slots = inputs.slots
    size = retention.block
    held = Lengths(offset).shared
    # Query blocks lie on the sequence's own grid.
    block_q = size if held == 0 or tokens >= size else 1
    front = offset % block_q
    rows = tokens + Lengths(front).most(block_q - 1)
    all_near = slots <= retention.local * size
    if all(retention.full) or (all_near and held is not None):
        # Nothing is far: every head reads everything.
        return Plan(dense_layout(block_q, rows, slots, inputs.q), Extras(), True, front=front)
    extent = _CallRows(offset - front, block_q, rows, slots)
    build = _shared_layout if held is not None and may_share(inputs.q) else _layout
    return Plan(build(retention, extent, inputs.q.device), Extras(), True, front=front)


def _layout(retention: Retention, extent: _CallRows, device: torch.device) -> BlockLayout:
    size = retention.block
    begin = torch.arange(-(-extent.rows // extent.block_q), device=device) * extent.block_q
    own = ((Lengths(extent.first).column() + begin.unsqueeze(0)) // size)[:, None, :, None]  # [B|1, 1, M, 1]
    block = torch.arange(-(-extent.slots // size), device=device)
    full = retention.full
    phases = retention.phases if retention.stride is not None else (0,) * len(full)
    if len(set(zip(full, phases, strict=True))) == 1:
        # One list for all heads.
        full = full[:1]
        phases = phases[:1]
    shape = (1, -1, 1, 1)
    kept = retention.kept.holds(block, torch.tensor(phases, device=device).view(shape))  # [1|, h|, 1|, N]
    near = own - block < retention.local
    keep = (block <= own) & (near | kept | torch.tensor(full, device=device).view(shape))
    return BlockLayout.from_mask(keep, extent.block_q, size, extent.rows, extent.slots)


@remembers(32)
def _shared_layout(retention: Retention, extent: _CallRows, device: torch.device) -> BlockLayout:
    """One layout, and thereby one schedule, for all layers of a model that hold alike."""
    with torch.inference_mode(False):
        return _layout(retention, extent, device)
