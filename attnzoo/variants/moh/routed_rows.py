"""Leaving out rows that a head does not compute: gathered in front of the operation, scattered behind it.

Letters: B batch, T tokens, H heads, R rows of the longest head, D width, M query blocks, N key blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo_kernels import BlockLayout
from attnzoo_kernels.runtime.plain import is_readable


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows that each head computes, in the tokens' order.

    Attributes:
        token: The token of each row, int64 ``[B, H, R]``, -1 behind a head's last.
        tokens: T.
    """

    token: Tensor
    tokens: int

    @classmethod
    def of(cls, wanted: Tensor) -> Rows:
        """The rows where a mask ``[B, H, T]`` is true. Where values may not be read, R is T."""
        batch, heads, tokens = wanted.shape
        longest = tokens
        if is_readable(wanted) and wanted.numel():
            longest = int(wanted.sum(-1).max())
        # A row that is not wanted is written behind the last, which is cut off.
        row = torch.where(wanted, wanted.cumsum(-1) - 1, longest)
        index = torch.arange(tokens, device=wanted.device).expand(batch, heads, tokens)
        token = torch.full((batch, heads, longest + 1), -1, dtype=torch.int64, device=wanted.device)
        return cls(token.scatter(-1, row, index)[..., :longest], tokens)

    @property
    def present(self) -> Tensor:
        """Which rows there are, bool ``[B, H, R]``."""
        return self.token >= 0

    def _flat(self, *, heads_first: bool) -> Tensor:
        """Each row's index in ``[B, H, T]`` or ``[B, T, H]``; absent rows go to a head's first token."""
        batch, heads, _ = self.token.shape
        item = torch.arange(batch, device=self.token.device).view(-1, 1, 1)
        head = torch.arange(heads, device=self.token.device).view(1, -1, 1)
        token = self.token.clamp(min=0)
        if heads_first:
            return (item * heads + head) * self.tokens + token
        return (item * self.tokens + token) * heads + head

    def gather(self, x: Tensor) -> Tensor:
        """The rows ``[B, H, R, D]`` of ``[B, H, T, D]``; absent ones hold what some token has."""
        batch, heads, tokens, width = x.shape
        if tokens == 0:
            return x
        # Either order is a view of the tensors that layers make; the wrong one copies them.
        heads_first = x.stride(1) >= x.stride(2)
        rows = (x if heads_first else x.transpose(1, 2)).reshape(batch * tokens * heads, width)
        index = self._flat(heads_first=heads_first).reshape(-1)
        return rows.index_select(0, index).view(batch, heads, self.token.shape[2], width)

    def scatter(self, rows: Tensor) -> Tensor:
        """``[B, H, T, D]`` from rows ``[B, H, R, D]``; 0 where there is none."""
        batch, heads, _, width = rows.shape
        size = batch * self.tokens * heads
        flat = rows.reshape(batch * heads * self.token.shape[2], width)
        # Absent rows are written behind the last one, which is cut off.
        index = torch.where(self.present, self._flat(heads_first=False), size).reshape(-1)
        whole = rows.new_zeros(size + 1, width).index_copy_(0, index, flat)
        return whole[:size].view(batch, self.tokens, heads, width).transpose(1, 2)

    def add_products(self, total: Tensor, rows: Tensor, weights: Sequence[Tensor]) -> None:
        """Adds the products of rows ``[B, H, R, D]`` with their head's ``[C, D]`` to their tokens' ``[B * T, C]``.

        Rows that are absent have to be 0.
        """
        item = torch.arange(rows.shape[0], device=rows.device).view(-1, 1, 1)
        indices = (item * self.tokens + self.token.clamp(min=0)).unbind(1)
        for index, of_head, weight in zip(indices, rows.unbind(1), weights, strict=True):
            total.index_add_(0, index.flatten(), of_head.flatten(0, 1) @ weight.t())

    def positions(self, q_pos: Tensor | None, first: int) -> Tensor:
        """The slot of each row, int32 ``[B, H, R]``, from those of the tokens (``None``: token t has ``first + t``)."""
        if q_pos is None:
            return torch.where(self.present, self.token + first, -1).to(torch.int32)
        batch, heads, count = self.token.shape
        if self.tokens == 0:
            return q_pos.new_full((batch, heads, count), -1)
        of_item = q_pos.expand(batch, heads, self.tokens).gather(2, self.token.clamp(min=0))
        return torch.where(self.present, of_item, -1).to(torch.int32)


def windowed_layout(q_pos: Tensor, blocks: tuple[int, int], slots: int, window: int, sink: int) -> BlockLayout:
    """The key blocks that hold a slot of some row's causal window, or of the sink, for rows at ``q_pos [B, H, R]``."""
    block_q, block_k = blocks
    rows = q_pos.shape[2]
    tile = torch.nn.functional.pad(q_pos, (0, -rows % block_q), value=-1).unflatten(-1, (-1, block_q)).long()
    last = tile.amax(-1)  # [B, H, M]; -1 where a tile has no row
    earliest = torch.where(tile < 0, slots, tile).amin(-1)
    low = (torch.div(earliest - window + 1, block_k, rounding_mode="floor")).clamp(min=0)
    high = torch.div(last, block_k, rounding_mode="floor")
    blocks_k = -(-slots // block_k)
    width = blocks_k
    if is_readable(q_pos) and q_pos.numel():
        width = max(1, int((high - low).max()) + 1)
    near = low.unsqueeze(-1) + torch.arange(width, device=q_pos.device)
    near = torch.where(near <= high.unsqueeze(-1), near, -1)
    sinks = torch.arange(min(-(-sink // block_k), blocks_k), device=q_pos.device)
    beside = (sinks < low.unsqueeze(-1)) & (sinks <= high.unsqueeze(-1))
    return BlockLayout.from_indices(
        torch.cat([torch.where(beside, sinks, -1), near], -1), block_q, block_k, rows, slots
    )
