"""Reading blocks of rows out of tensors of any strides without copying the tensors, and writing blocks back.

Letters: B batch, h heads, L rows, D width, R rows of a chunk (query blocks), n key blocks of each.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_zeros

from attnzoo_kernels.runtime.plain import is_plain
from attnzoo_kernels.runtime.workspace import scratch


class Source:
    """A tensor ``[B, h, L, D]`` from which blocks of rows are gathered.

    A ragged last block repeats row L - 1: whoever reads it has to hide what lies beyond.

    Args:
        x: The tensor.
        block: Rows in a block.
        dtype: What gathered rows are converted to.
        often: Whether rows are read more than once on average: then they are laid out and converted beforehand.
    """

    def __init__(self, x: Tensor, block: int, dtype: torch.dtype, *, often: bool = False) -> None:
        if often and (x.dtype != dtype or x.stride(2) != x.shape[3] or x.stride(3) != 1):
            x = x.to(dtype).contiguous()
        self.x = x
        self.block = block
        self.dtype = dtype
        self.length = x.shape[2]
        self.batch, self.heads = x.shape[:2]
        self.blocks = -(-self.length // block)
        self.tiles: Tensor | None = None
        if x.numel() == 0:
            self.tiles = x.new_empty(0, block, x.shape[3])
        elif x.is_contiguous() and self.length % block == 0:
            self.tiles = x.view(-1, block, x.shape[3])
        else:
            self._lay_out(x)

    def view(self, firsts: list[int], count: int) -> Tensor | None:
        """Runs of ``count`` blocks where they lie, by their first blocks (flat indices): ``[R, count * block, D]``.

        What a ragged last block lacks is cut off. ``None`` where the runs do not begin at equal distances or end
        differently, or where the values have to be converted.
        """
        x = self.x
        if x.dtype != self.dtype or x.numel() == 0 or (x.stride(3) != 1 and x.shape[3] > 1):
            return None
        item, head, row, _ = x.stride()
        beyond = self.blocks * self.block - self.length
        rows = count * self.block
        offsets = []
        missing = 0
        for first in firsts:
            of_head, block = divmod(first, self.blocks)
            offsets.append(of_head // self.heads * item + of_head % self.heads * head + block * self.block * row)
            missing += block + count == self.blocks
        if beyond and missing:
            if missing != len(firsts):
                return None
            rows -= beyond
        # A single run gets the stride of a batch that is one block of memory.
        distance = offsets[1] - offsets[0] if len(offsets) > 1 else rows * x.shape[3]
        if distance < 0 or any(later - earlier != distance for earlier, later in pairwise(offsets)):
            return None
        return x.as_strided((len(firsts), rows, x.shape[3]), (distance, row, 1), x.storage_offset() + offsets[0])

    def _lay_out(self, x: Tensor) -> None:
        """Views the tensor as rows of memory, and notes where each (batch, head) begins and how rows follow."""
        if x.stride(3) != 1 and x.shape[3] > 1:
            x = x.contiguous()
        strides = [stride if size > 1 else 0 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
        unit = math.gcd(*strides) or 1
        steps = [stride // unit for stride in strides]
        count = 1 + sum((size - 1) * step for size, step in zip(x.shape[:3], steps, strict=True))
        self.rows = x.as_strided((count, x.shape[3]), (unit, 1))
        self.step = steps[2]
        item = torch.arange(self.batch, device=x.device).unsqueeze(1) * steps[0]
        self.base = (item + torch.arange(self.heads, device=x.device) * steps[1]).reshape(-1)

    def gather(self, name: str, blocks: Tensor) -> Tensor:
        """Blocks by their flat index in ``[B, h, blocks]``: int64 ``[n]`` to ``[n, block, D]``, in scratch memory."""
        if self.tiles is not None:
            return self._convert(name, self.tiles, blocks, (blocks.shape[0], self.block))
        inside = torch.arange(self.block, device=blocks.device)
        slot = (blocks % self.blocks).unsqueeze(1) * self.block + inside
        slot = slot.clamp_(max=self.length - 1).mul_(self.step)
        slot += self.base[blocks // self.blocks].unsqueeze(1)
        return self._convert(name, self.rows, slot.view(-1), (blocks.shape[0], self.block))

    def _convert(self, name: str, rows: Tensor, index: Tensor, shape: tuple[int, int]) -> Tensor:
        width = rows.shape[-1]
        raw = scratch(name, (index.shape[0], *rows.shape[1:]), rows.dtype, rows.device)
        torch.index_select(rows, 0, index, out=raw)
        if rows.dtype != self.dtype:
            raw = scratch(name, tuple(raw.shape), self.dtype, rows.device).copy_(raw)
        return raw.view(*shape, width)


def gather_slots(name: str, x: Tensor, index: Tensor, whole: tuple[Tensor, int] | None = None, *, lines: int) -> Tensor:
    """Slots ``[B, lines, n, D]`` of ``x [B, h, S, D]``, in scratch memory.

    Args:
        name: What it is for.
        x: The tensor.
        index: int64 ``[l, n]``, l lines for equal shares of ``lines``.
        whole: Blocks that each line of the index begins with, int64 ``[l, m]``, and their slots: read at once.
        lines: Lines of the result, a multiple of h and of l.
    """
    batch, heads, length, width = x.shape
    if not is_plain(x) or (x.requires_grad and torch.is_grad_enabled()):
        every = torch.arange(lines, device=x.device)
        return x[:, (every * heads // lines).unsqueeze(1), index[every * index.shape[0] // lines]]
    done = 0
    block = 1
    if whole is not None and x.stride(3) == 1 and x.stride(2) == width:
        block = whole[1]
        done = whole[0].shape[1] * block
    # Fresh memory would fault its pages in at every step, and leave the cache.
    out = scratch(f"slots of {name}", (batch, lines, index.shape[1], width), x.dtype, x.device)
    for item in range(batch):
        for line in range(lines):
            at = line * index.shape[0] // lines
            own = x[item, line * heads // lines]
            to = out[item, line]
            if done and whole is not None:
                tall = own[: length // block * block].view(-1, block * width)
                torch.index_select(tall, 0, whole[0][at], out=to[:done].view(-1, block * width))
            if done < index.shape[1]:
                torch.index_select(own, 0, index[at, done:], out=to[done:])
    return out


def tile(x: Tensor, block: int) -> Tensor:
    """``[B, h, L, D]`` as ``[B * h * blocks, block, D]``; a ragged tail is filled with zeros."""
    blocks = -(-x.shape[2] // block)
    beyond = blocks * block - x.shape[2]
    x = pad_zeros(x, (0, 0, 0, beyond)) if beyond else x
    return x.reshape(x.shape[0] * x.shape[1] * blocks, block, x.shape[3])


def untile(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`tile`, for a tensor whose first three dimensions are ``shape``'s; a view."""
    batch, heads, length = shape[:3]
    return x.view(batch, heads, -(-length // x.shape[1]) * x.shape[1], x.shape[-1])[:, :, :length]
