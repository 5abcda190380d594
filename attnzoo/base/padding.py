"""Moving rows: an item's real tokens to the left, query blocks onto the sequence's own block grid, whole blocks.

Letters: B batch, T tokens of a call, H heads, G KV heads, N chunks, w tokens of a chunk, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from attnzoo.cache.lengths import Lengths
from attnzoo_kernels.errors import UnsupportedError
from attnzoo_kernels.runtime.plain import is_open


@dataclass(frozen=True, eq=False)
class Alignment:
    """Where the tokens of a padded batch go, so that each item's real tokens come first, in their order.

    Attributes:
        order: For each row after moving, the token that comes there, int64 ``[B, T]``; padding comes last.
        row_index: For each token, its row after moving, int64 ``[B, T]``; meaningless at padding.
        lengths: Real tokens, int64 ``[B]``.
    """

    order: Tensor
    row_index: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, padding: Tensor) -> Alignment:
        """The alignment for a mask ``[B, T]`` that is true at padding."""
        real = (~padding).long()
        order = torch.argsort(padding.to(torch.uint8), dim=1, stable=True)
        return cls(order, (real.cumsum(1) - 1).clamp(min=0), real.sum(1))

    def aligned(self, x: Tensor, count: int | None = None) -> Tensor:
        """The first ``count`` rows after moving, or all, of ``x [B, h, T, D]``."""
        return _take_heads_rows(x, self.order if count is None else self.order[:, :count])

    def put_back(self, x: Tensor) -> Tensor:
        """For each token its row of ``x [B, h, T, D]``, which has been moved; anything at padding."""
        return _take_heads_rows(x, self.row_index)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index [B, T']`` of ``x [B, T, C]``."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _take_heads_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index [B, n]`` of ``x [B, h, T, D]``."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def leading_rows(x: Tensor, count: int) -> Tensor:
    """The first rows of ``[B, h, T, D]``."""
    if not torch.compiler.is_compiling():
        return x[:, :, :count]
    # Of a slice a compiler asks whether it is all there is.
    return x.index_select(2, torch.arange(count, device=x.device))


def for_heads(x: Tensor, heads: int) -> Tensor:
    """What KV heads have, ``[B, G, ...]``, for each query head, ``[B, H, ...]``."""
    # Not repeat_interleave: it asks how a length that is left open lies in memory.
    group = torch.arange(heads, device=x.device) // (heads // x.shape[1])
    return x.index_select(1, group)


def in_chunks(x: Tensor, size: int) -> Tensor:
    """Whole chunks ``[B, h, N * w, D]`` apart, ``[B, h, N, w, D]``; a view."""
    if is_open(x.shape[2]):
        # Torch cannot prove that a length that it does not know, divided, multiplies to what it was.
        return x.unfold(2, size, size).transpose(-1, -2)
    chunks: Tensor = x.unflatten(2, (x.shape[2] // size, size))
    return chunks


def attend_in_chunks(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of whole chunks to themselves: ``q [B, H, N, w, D]``, k, v ``[B, G, N, w, D]``; as q."""
    if is_open(q.shape[2]):
        # Nor that chunks, flattened into the batch, unflatten again.
        k, v = (for_heads(x, q.shape[1]) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, scale=scale)
    # [B, h, N, w, D] to [B * N, h, w, D]
    q_rows, k_rows, v_rows = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    rows = scaled_dot_product_attention(q_rows, k_rows, v_rows, scale=scale, enable_gqa=True)
    out: Tensor = rows.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)
    return out


def add_front(q: Tensor, front: int | Tensor, rows: int) -> Tensor:
    """Puts ``front`` rows before each item's first; the result ``[B, H, rows, D]`` has absent rows in front and behind.

    Args:
        q: ``[B, H, T, D]``.
        front: Rows to put in front, an int or int64 ``[B]``.
        rows: Rows of the result.
    """
    absent = Lengths(front)
    if absent.shared is not None:
        return pad(q, (0, 0, absent.shared, rows - absent.shared - q.shape[2])) if rows != q.shape[2] else q
    index = (torch.arange(rows, device=q.device) - absent.column()).clamp(0, q.shape[2] - 1)
    return q.gather(2, index[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))


def drop_front(out: Tensor, front: int | Tensor, tokens: int) -> Tensor:
    """Takes the ``tokens`` rows behind ``front`` again: the inverse of :func:`add_front`."""
    absent = Lengths(front)
    if absent.shared is not None:
        return out[:, :, absent.shared : absent.shared + tokens] if tokens != out.shape[2] else out
    index = torch.arange(tokens, device=out.device) + absent.column()
    return out.gather(2, index[:, None, :, None].expand(-1, out.shape[1], -1, out.shape[3]))


def front_positions(q_pos: Tensor | None, front: int | Tensor, rows: int) -> Tensor | None:
    """Row positions ``[B|1, h, T]`` of the rows that :func:`add_front` makes; -1 at absent ones."""
    if q_pos is None:
        return None
    tokens = q_pos.shape[2]
    absent = Lengths(front)
    if absent.shared is not None:
        return pad(q_pos, (absent.shared, rows - absent.shared - tokens), value=-1) if rows != tokens else q_pos
    index = torch.arange(rows, device=q_pos.device) - absent.column()
    q_pos = q_pos.expand(index.shape[0], -1, -1)
    moved = q_pos.gather(2, index.clamp(0, tokens - 1).unsqueeze(1).expand(-1, q_pos.shape[1], -1))
    present = (index >= 0) & (index < tokens)
    return torch.where(present.unsqueeze(1), moved, -1)


MOST_FILLED = 4096
"""Tokens of the largest block that calls are filled up to: they are computed for nothing."""


@dataclass(frozen=True, eq=False)
class Filled:
    """A sequence of T tokens with others behind them, up to a multiple of a block: T' in all.

    One exported program serves all lengths so. A program that is traced asks of each size that it does not know whether
    it is 1, and then serves one side of the answer. Tokens are 2 or more; blocks of tokens may be one or several.
    Filled up, they are several, and where some of them are chosen more than are chosen.

    Attributes:
        source: The token at each place, int64 ``[T']``: the last one again behind it.
        is_real: Which places are tokens, bool ``[T']``.
    """

    source: Tensor
    is_real: Tensor

    @classmethod
    def of(cls, tokens: int, block: int, device: torch.device, least: int = 2) -> Filled:
        """Of so many tokens, up to whole blocks, of which there are at least so many.

        Raises:
            UnsupportedError: If blocks are too large to be filled.
        """
        if block > MOST_FILLED:
            raise UnsupportedError(
                f"export: expected blocks of at most {MOST_FILLED} tokens where the length is left open, got {block}; "
                "export at a fixed length"
            )
        index = torch.arange((tokens // block + least) * block, device=device)
        return cls(index.clamp(max=tokens - 1), index < tokens)

    def take(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to ``[B, T', C]``."""
        return x.index_select(1, self.source)

    def take_positions(self, positions: Tensor | None) -> Tensor | None:
        """``[T]`` or ``[B, T]``, as far."""
        return None if positions is None else positions.index_select(-1, self.source)

    def take_padding(self, padding: Tensor | None, batch: int) -> Tensor:
        """``[B, T]`` to ``[B, T']``, true at what fills up too."""
        if padding is None:
            return (~self.is_real).expand(batch, -1)
        return padding.index_select(1, self.source) | ~self.is_real
