"""A cache that frees blocks: a pool in which a static pattern's live blocks have places, and attention over it.

Some blocks of a sequence are read for ever, by some heads; the others only while they are among the nearest. So each KV
head of each item has a region of the pool: a place for every block that it keeps, and a ring for the near ones that it
does not, in which a new block takes the place of one that no later row reads.

Letters: B batch, T tokens of a call, H query heads, G KV heads, D head width, M query blocks, N blocks of a sequence, K
blocks listed for a query block, P blocks of an item's regions, w tokens in a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from attnzoo.base.layer import is_training
from attnzoo.base.padding import add_front, drop_front, front_positions
from attnzoo.base.shared_layouts import dense_layout
from attnzoo.base.steps import AttentionInputs
from attnzoo.cache.kv_cache import KVCache, Stream
from attnzoo.cache.lengths import Lengths
from attnzoo.cache.replay import refuse_transforms
from attnzoo_kernels import BlockLayout, Extras, block_sparse_attention_with_lse, merge_states
from attnzoo_kernels.errors import ShapeError, UnsupportedError


@dataclass(frozen=True, eq=False)
class Pattern:
    """Which blocks are read: the nearest ones by all heads, and some by a head for ever.

    Attributes:
        block: Tokens in a block, w.
        local: Nearest blocks that every head reads, the own one included.
        kept: Blocks that a KV head reads from any distance, bool ``[G, N]``, on the CPU.
    """

    block: int
    local: int
    kept: Tensor


class PoolCache(KVCache):
    """A cache that holds what its layer's pattern can still read; made by ``new_cache(..., evict=True)``.

    A buffer is ``[B, 1, (P + 1) w, D]``: the regions of an item's KV heads, and a block for rows without a token. What
    lies behind an item's tokens in their block is what lay there before, and is hidden. Nothing can be taken back.
    """

    def __init__(self, streams: Mapping[str, Stream], *, pattern: Pattern, max_length: int, **options: Any) -> None:
        index, blocks = _pool_indices(pattern)
        width = {name: Stream(1, stream.width, stream.dtype) for name, stream in streams.items()}
        super().__init__(width, max_length=(blocks + 1) * pattern.block - 1, **options)
        self.max_length = max_length
        self.pattern = pattern
        self.blocks = blocks
        kept = pattern.kept
        count = kept.sum(1)
        order = torch.argsort(kept.to(torch.uint8), dim=1, descending=True, stable=True)
        order = torch.where(torch.arange(kept.shape[1], device=kept.device) < count.unsqueeze(1), order, -1)
        self._most_kept = kept.cumsum(1).amax(0).tolist()
        self._kept, self._order, self._index = (x.to(self.device) for x in (kept, order, index))
        self._staged: tuple[dict[str, Tensor], int | Tensor] | None = None

    @property
    def streams(self) -> dict[str, Tensor]:
        """The buffers by name, each ``[B, 1, (P + 1) w, D]``."""
        return dict(self._buffers)

    @property
    def bytes_per_token(self) -> int:
        """Bytes held for each token of an item when it is full, rounded up."""
        item = sum(x.shape[2] * x.shape[3] * x.element_size() for x in self._buffers.values())
        return -(-item // self.max_length)

    def crop(self, length: int | Tensor) -> NoReturn:
        """Refuses: blocks that the tokens left would read may be gone.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError("crop: a cache that frees blocks cannot go back; use one without evict=True")

    def grow(self, max_length: int) -> NoReturn:
        """Refuses: regions have the sizes that ``max_length`` needs.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError("grow: a cache that frees blocks has places for max_length tokens; make a longer one")

    def append(self, values: Mapping[str, Tensor], lengths: int | Tensor, *, differentiable: bool) -> NoReturn:
        """Refuses: what is remembered is no sequence; see :meth:`stage`.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError("append: a cache that frees blocks holds no sequence; its layer stages and commits")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As ever; a pool has places for one ``max_length``."""
        if isinstance(state, Mapping) and state.get("max_length") != self.max_length:
            raise ShapeError(f"max_length: expected the cache's {self.max_length}, got {state.get('max_length')}")
        super().load_state_dict(state)

    def _held(self, buffers: Mapping[str, Tensor], bound: int) -> dict[str, Tensor]:
        return dict(buffers)

    def _clear_behind(self) -> None:
        """Nothing: what lies behind the tokens is hidden, whatever it is."""

    def stage(self, values: Mapping[str, Tensor], lengths: int | Tensor) -> None:
        """Takes note of a call's tokens ``[B, G, T, D]``, left-aligned, for :meth:`commit`."""
        refuse_transforms(values)
        self._widen(values)
        self._staged = {name: value.detach() for name, value in values.items()}, lengths

    def commit(self) -> None:
        """Writes the staged tokens where a later row may read them; called when the call has succeeded."""
        if self._staged is None:
            return
        values, lengths = self._staged
        self._staged = None
        tokens = next(iter(values.values())).shape[2]
        device = self.device
        token = torch.arange(tokens, device=device)
        count = Lengths(lengths)
        offset = Lengths(self.offset).column()
        slot = (token + offset).expand(self.batch, -1)  # [B, T]
        block = (slot // self.pattern.block).clamp(max=self._kept.shape[1] - 1)
        last = torch.as_tensor((offset + count.column() - 1) // self.pattern.block, device=device)
        near = block > last - self.pattern.local
        real = count.holds(token)
        written = (self._kept[:, block] | near) & real  # [G, B, T]
        row = self._index[:, block] * self.pattern.block + slot % self.pattern.block
        row = torch.where(written, row, self.blocks * self.pattern.block).transpose(0, 1)  # [B, G, T]
        item = torch.arange(self.batch, device=device).view(-1, 1, 1)
        with torch.no_grad():
            for name, value in values.items():
                self._buffers[name].squeeze(1).index_put_((item, row), value.to(self._buffers[name].dtype))
        if self.length is not None and not count.differ:
            self.length += tokens
            self.bound = self.length
        else:
            self._lengths = self.lengths + lengths
            self.length = None
            self.bound = min(self.bound + tokens, self.max_length)

    def past(self, call: PoolInputs, scale: float | None, impl: str) -> tuple[Tensor, Tensor]:
        """The state of a call's rows over what is held: ``[B, H, T, Dv]`` and ``[B, H, T]``."""
        batch, heads, tokens, width = call.q.shape
        grid = _Grid.of(self.pattern.block, self.offset, tokens)
        rows = grid.front_tokens + tokens
        q = add_front(call.q, grid.front, rows).reshape(1, batch * heads, rows, width)
        real = call.q_pos if call.q_pos is not None else call.q.new_zeros(1, 1, tokens, dtype=torch.int32)
        present = front_positions(real, grid.front, rows)
        index = self._listed(grid.blocks(rows, call.q.device))  # [B, G, M, K]
        index = index.repeat_interleave(heads // index.shape[1], 1).flatten(0, 1).unsqueeze(0)  # [1, B * H, M, K]
        k, v = (self._pool(name, call) for name in ("k", "v"))
        extras = Extras(
            q_pos=None if present is None else present.expand(batch, heads, -1).reshape(1, batch * heads, rows),
            key_bias=self._unfilled(call.q.dtype),
        )
        layout = BlockLayout.from_indices(index, grid.block_q, self.pattern.block, rows, k.shape[2])
        out, lse = block_sparse_attention_with_lse(q, k, v, layout, causal=False, scale=scale, extras=extras, impl=impl)
        out = out.view(batch, heads, rows, -1)
        lse = lse.view(batch, heads, rows, 1)
        return drop_front(out, grid.front, tokens), drop_front(lse, grid.front, tokens).squeeze(-1)

    def _pool(self, name: str, call: PoolInputs) -> Tensor:
        """All regions, ``[1, 1, B (P + 1) w, D]``; a copy where a later write would break a backward."""
        pool = self._buffers[name]
        pool = pool.clone() if is_training(call.q, call.k, call.v) else pool
        return pool.to(call.q.dtype).view(1, 1, -1, pool.shape[3])

    def _listed(self, own: Tensor) -> Tensor:
        """The pool's blocks that rows in blocks ``own [B|1, M]`` read, int64 ``[B, G, M, K]``; -1 for none."""
        last = -(-self.bound // self.pattern.block) - 1
        kept = self._order[:, : self._most_kept[last]]  # [G, K']
        kept = kept.view(1, kept.shape[0], 1, -1).expand(self.batch, -1, own.shape[1], -1)
        near = own.unsqueeze(-1) - torch.arange(self.pattern.local, device=own.device)
        near = near.unsqueeze(1).expand(self.batch, kept.shape[1], -1, -1)
        block = torch.cat((kept, near), -1)
        head = torch.arange(kept.shape[1], device=own.device).view(1, -1, 1, 1)
        held = (block >= 0) & (block * self.pattern.block < Lengths(self.offset).column(4))
        at = block.clamp(0, self._kept.shape[1] - 1)
        # A near block that is kept is listed among those.
        twice = self._kept[head, at]
        twice[..., : kept.shape[-1]] = False
        item = torch.arange(self.batch, device=own.device).view(-1, 1, 1, 1)
        return torch.where(held & ~twice, self._index[head, at] + item * (self.blocks + 1), -1)

    def _unfilled(self, dtype: torch.dtype) -> Tensor:
        """A bias ``[1, 1, B (P + 1) w]`` that hides what lies behind the tokens in the block that is being filled."""
        block = self.pattern.block
        device = self.device
        offset = torch.as_tensor(self.offset, device=device).expand(self.batch)
        # An item that is full fills no block, and has no row that could read one.
        filling = (offset // block).clamp(max=self._kept.shape[1] - 1)
        item = torch.arange(self.batch, device=device)
        index = (self._index[:, filling] + item * (self.blocks + 1)).T  # [B, G]
        hidden = torch.arange(block, device=device) >= (offset % block).unsqueeze(1)  # [B, w]
        bias = torch.zeros(self.batch * (self.blocks + 1), block, dtype=_bias_dtype(dtype), device=device)
        part = bias.new_zeros(hidden.shape).masked_fill(hidden, -torch.inf)
        bias[index] = part.unsqueeze(1).expand(-1, index.shape[1], -1)
        return bias.view(1, 1, -1)

    def own(self, call: PoolInputs, scale: float | None, impl: str) -> tuple[Tensor, Tensor]:
        """The state of a call's rows over the call's own tokens: ``[B, H, T, Dv]`` and ``[B, H, T]``."""
        tokens = call.q.shape[2]
        size = self.pattern.block
        held = Lengths(self.offset).shared
        if tokens == 1 or (held is not None and held % size + tokens <= size):
            # One block, in which causality is the whole rule.
            token = torch.arange(tokens, device=call.q.device, dtype=torch.int32)
            q_pos = None if call.q_pos is None else torch.where(call.q_pos < 0, -1, token)
            layout = dense_layout(size, tokens, tokens, call.q)
            return block_sparse_attention_with_lse(
                call.q, call.k, call.v, layout, scale=scale, extras=Extras(q_pos=q_pos), impl=impl
            )
        keys = _Grid.of(size, self.offset, size)
        grid = _Grid.of(size, self.offset, tokens)
        slots = keys.front_tokens + tokens
        rows = grid.front_tokens + tokens
        k, v = (add_front(x, keys.front, slots) for x in (call.k, call.v))
        # Rows and keys count from the edge of the block in which the call begins.
        q_pos = torch.arange(tokens, device=call.q.device) + Lengths(keys.front).column()
        q_pos = q_pos.to(torch.int32).expand(self.batch, -1).unsqueeze(1)
        if call.q_pos is not None:
            q_pos = torch.where(call.q_pos < 0, -1, q_pos)
        slot = torch.arange(slots, device=call.q.device)
        bias = torch.zeros(self.batch, slots, dtype=_bias_dtype(call.q.dtype), device=call.q.device)
        bias = bias.masked_fill(Lengths(keys.front).holds(slot), -torch.inf).unsqueeze(1)
        block = (keys.blocks(slots, call.q.device)).unsqueeze(1)  # [B|1, 1, N]
        own = grid.blocks(rows, call.q.device).unsqueeze(-1)  # [B|1, M, 1]
        kept = self._kept[:, block.squeeze(1).clamp(max=self._kept.shape[1] - 1)].transpose(0, 1)  # [B|1, G, N]
        near = own - block < self.pattern.local
        keep = (near.unsqueeze(1) | kept.unsqueeze(2)) & (block <= own).unsqueeze(1)
        out, lse = block_sparse_attention_with_lse(
            add_front(call.q, grid.front, rows),
            k,
            v,
            BlockLayout.from_mask(keep, grid.block_q, size, rows, slots),
            scale=scale,
            extras=Extras(q_pos=front_positions(q_pos, grid.front, rows), key_bias=bias),
            impl=impl,
        )
        return drop_front(out, grid.front, tokens), drop_front(lse.unsqueeze(-1), grid.front, tokens).squeeze(-1)


@dataclass(frozen=True, eq=False)
class PoolInputs(AttentionInputs):
    """A call's own tokens and rows, ``[B, G|H, T, D]``; what is remembered lies in a pool.

    Attributes:
        cache: The pool.
        held: Slots, those of this call's tokens included.
    """

    cache: PoolCache = field(kw_only=True)
    held: int = field(kw_only=True)

    @property
    def slots(self) -> int:
        """Of the call's tokens and of all before it, kept or not."""
        return self.held

    @property
    def in_cache(self) -> bool:
        """True."""
        return True


def attend_pool(call: PoolInputs, cache: PoolCache, scale: float | None, impl: str) -> Tensor:
    """Attention over a pool and the call's own tokens, ``[B, H, T, Dv]``."""
    if 0 in call.q.shape:
        return call.q.new_zeros(*call.q.shape[:3], call.v.shape[3])
    own = cache.own(call, scale, impl)
    if cache.bound == 0:
        return own[0]
    past = cache.past(call, scale, impl)
    return merge_states([past[0], own[0]], [past[1], own[1]])[0]


@dataclass(frozen=True, eq=False)
class _Grid:
    """How a call's tokens lie on their sequence's block grid.

    Attributes:
        block: Tokens in a block, w.
        block_q: Rows in a query block: w, or 1 where there are fewer rows than that.
        first: The token before which no row lies, an int or int64 ``[B]``; a multiple of ``block_q``.
        front: Rows before the first token, an int or int64 ``[B]``.
        front_tokens: Rows that are more than tokens.
    """

    block: int
    block_q: int
    first: int | Tensor
    front: int | Tensor
    front_tokens: int

    @classmethod
    def of(cls, block: int, offset: int | Tensor, tokens: int) -> _Grid:
        block_q = block if tokens >= block else 1
        front = offset % block_q
        return cls(
            block=block,
            block_q=block_q,
            first=offset - front,
            front=front,
            front_tokens=Lengths(front).most(block_q - 1),
        )

    def blocks(self, rows: int, device: torch.device) -> Tensor:
        """The sequence's block that each query block lies in, int64 ``[B|1, M]``."""
        begin = torch.arange(-(-rows // self.block_q), device=device) * self.block_q
        return (Lengths(self.first).column() + begin.unsqueeze(0)) // self.block


def _pool_indices(pattern: Pattern) -> tuple[Tensor, int]:
    """Where each head's blocks lie in an item's regions, int64 ``[G, N]``, and how many blocks these have."""
    kept = pattern.kept
    free = (~kept).long().cumsum(1)
    before = torch.nn.functional.pad(free, (pattern.local, 0))[:, : free.shape[1]]
    # As many near blocks as a head ever needs beside those that it keeps.
    ring = (free - before).amax(1, keepdim=True)
    held = kept.sum(1, keepdim=True)
    sizes = held + ring
    index = torch.where(kept, kept.cumsum(1) - 1, held + (free - 1) % ring.clamp(min=1))
    return index + sizes.cumsum(0) - sizes, int(sizes.sum())


def _bias_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
