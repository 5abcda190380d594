"""Token masks by the published formulas, in loops and plain torch: what a converted host must have read."""

from __future__ import annotations

import torch
from torch import Tensor


def window_mask(tokens: int, window: int, sink: int) -> Tensor:
    """Bool ``[1, T, T]``: the last ``window`` tokens, the own one included, and the first ``sink``."""
    t, s = torch.arange(tokens).unsqueeze(1), torch.arange(tokens).unsqueeze(0)
    return ((s <= t) & ((t - s < window) | (s < sink))).unsqueeze(0)


def s2_mask(
    tokens: int,
    groups: list[int],
    *,
    block: int,
    local: int,
    stride: int,
    sink: int = 1,
    dense: int = 0,
    offset: int = 0,
    step: int | None = None,
) -> Tensor:
    """Bool ``[H, T, T]``: near blocks, sink blocks, and each KV head's own strided blocks.

    Args:
        tokens: T.
        groups: For each query head, its KV head.
        block: Tokens in a block.
        local: Near blocks, the own one included.
        stride: Every how many blocks one further away is read.
        sink: First blocks, which all heads read.
        dense: Last KV heads, which read everything.
        offset: Shift of all strided blocks.
        step: Shift from head to head; by default heads that are not dense are spread evenly over the stride.
    """
    kv_heads = max(groups) + 1
    step = max(1, stride // max(1, kv_heads - dense)) if step is None else step
    mask = torch.zeros(len(groups), tokens, tokens, dtype=torch.bool)
    for head, group in enumerate(groups):
        for t in range(tokens):
            for s in range(t + 1):
                row, column = t // block, s // block
                near = row - column < local or column < sink
                far = (column + group * step + offset) % stride == 0
                mask[head, t, s] = near or far or group >= kv_heads - dense
    return mask


def groups_of(heads: int, kv_heads: int) -> list[int]:
    """The KV head of each query head: neighbours share one."""
    return [head // (heads // kv_heads) for head in range(heads)]


def for_host(mask: Tensor, padding: list[int], dtype: torch.dtype) -> Tensor:
    """The additive mask ``[B, h, T, T]`` of items with so many padded tokens on the left.

    Rules go by an item's own tokens, so that each item's mask is the upper left part of the whole, moved. A padded row
    reads itself, so that the host's softmax gives no NaN.
    """
    heads, tokens, _ = mask.shape
    seen = torch.zeros(len(padding), heads, tokens, tokens, dtype=torch.bool)
    for item, left in enumerate(padding):
        seen[item, :, left:, left:] = mask[:, : tokens - left, : tokens - left]
        seen[item, :, torch.arange(left), torch.arange(left)] = True
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def padding_mask(padding: list[int], tokens: int) -> Tensor:
    """The 2-D mask that hosts take: 1 at real tokens."""
    return (torch.arange(tokens).unsqueeze(0) >= torch.tensor(padding).unsqueeze(1)).long()
