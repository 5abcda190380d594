"""Choosing key blocks by their scores, so that everybody who computes the same scores chooses the same blocks.

Letters: N blocks, K blocks chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo_kernels.runtime.plain import is_open


def top_blocks(scores: Tensor, count: int, *, allowed: Tensor | None = None, forced: Tensor | None = None) -> Tensor:
    """The blocks with the highest scores, ascending; ties go to the lowest index.

    The choice is a pure function of each row: neither other rows nor blocks that are not allowed change it, whatever
    they hold. Scores that are not finite are taken for the largest or the lowest finite ones, NaN for the lowest.

    Args:
        scores: ``[..., N]``.
        count: Blocks to choose, K.
        allowed: bool, broadcastable to ``scores``: which blocks there are to choose from; ``None`` means all.
        forced: bool, broadcastable to ``scores``: blocks that come before every other, whether allowed or not. Where
            there are more than K, the first K of them.

    Returns:
        int64 ``[..., K]``, ascending, with -1 behind where fewer are allowed: a block's place in its row is its rank
        among the chosen, which is its slot where blocks are read as if they lay side by side. No gradient.

    Example:
        >>> top_blocks(torch.tensor([1.0, 3.0, 3.0, 2.0]), 2)
        tensor([1, 2])
        >>> top_blocks(torch.tensor([1.0, 3.0, 3.0, 2.0]), 2, forced=torch.tensor([False, False, False, True]))
        tensor([1, 3])
    """
    blocks = scores.shape[-1]
    open_ended = is_open(blocks)
    key = scores.detach()
    key = key if key.is_floating_point() else key.double()
    largest = torch.finfo(key.dtype).max
    key = torch.nan_to_num(key, nan=-largest, posinf=largest, neginf=-largest)
    if allowed is not None:
        key = key.masked_fill(~allowed, -torch.inf)
    if forced is not None:
        key = key.masked_fill(forced, torch.inf)
    if open_ended:
        # Whether there are so many is not asked.
        key = torch.nn.functional.pad(key, (0, count), value=-torch.inf)
    # Not topk: which of two equal scores it takes is not defined.
    value, index = torch.sort(key, dim=-1, descending=True, stable=True)
    value = value[..., :count]
    index = index[..., :count]
    index = index.masked_fill(value == -torch.inf, blocks).sort(-1).values
    index = index.masked_fill(index == blocks, -1)
    if not open_ended and count > blocks:
        index = torch.nn.functional.pad(index, (0, count - blocks), value=-1)
    return index
