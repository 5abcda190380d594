"""Blocks on the host's memory: what a layer reads by blocks, fetched for the call that reads it.

The device holds one key for each complete block, by which blocks are chosen, and the tokens of each item's unfinished
block. Everything else lies on the host.

Letters: B batch, T tokens of a call, G KV heads, H query heads, K blocks listed for a query, U blocks fetched, R slots
on the device, w tokens of a block, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from attnzoo.cache import KVCache, Stream
from attnzoo.records import Memory, Plan
from attnzoo_kernels import BlockLayout
from attnzoo_kernels.errors import ShapeError

_TOKEN, _LANDMARK = "token", "landmark"


class OffloadedCache(KVCache):
    """A cache whose keys and values lie on the host, but for the last key of each block and the unfinished block.

    Attributes:
        block: Tokens of a block, w.
        host: All keys and values, on the CPU.
    """

    def __init__(self, streams: dict[str, Stream], block: int, *, batch: int, max_length: int, **options: Any) -> None:
        keys = streams["k"]
        # The stream of width 0 holds nothing: lengths are those of a token's stream.
        own = {_TOKEN: Stream(1, 0), _LANDMARK: Stream(keys.heads, keys.width, keys.dtype, every=block)}
        super().__init__(own, batch=batch, max_length=max_length, **options)
        self.block = block
        self.host = KVCache(streams, batch=batch, max_length=max_length, **{**options, "device": "cpu"})
        self._pin()
        with torch.inference_mode(False):
            self._tail = {
                name: torch.zeros(batch, x.shape[1], block, x.shape[3], dtype=x.dtype, device=self.device)
                for name, x in self.host._buffers.items()
            }

    @property
    def streams(self) -> dict[str, Tensor]:
        """The buffers by name, those on the host among them."""
        return {_LANDMARK: super().streams[_LANDMARK], **self.host.streams}

    @property
    def landmarks(self) -> Tensor:
        """The last key of each block, ``[B, G, N, D]``, zeros where it is not complete."""
        return self.groups(_LANDMARK)

    @property
    def bytes_per_token(self) -> int:
        """Bytes held for each token of an item, most of them on the host."""
        return super().bytes_per_token + self.host.bytes_per_token

    @property
    def nbytes(self) -> int:
        """Bytes on the device; ``host.nbytes`` are those on the host."""
        landmarks = super().streams[_LANDMARK]
        return sum(x.numel() * x.element_size() for x in (landmarks, *self._tail.values()))

    def bound_with(self, tokens: int) -> int:
        """What ``bound`` will be once a call's tokens are stored."""
        return min(self.bound + tokens, self.max_length)

    def store(
        self, values: dict[str, Tensor], lengths: int | Tensor, *, differentiable: bool, everything: bool
    ) -> dict[str, Tensor]:
        """Writes a call's tokens, and gives back what lies on the device then.

        Args:
            values: "k" and "v", ``[B, G, T, D]``, left-aligned.
            lengths: Real tokens of each item; T as an int where there are no others.
            differentiable: Whether the current tokens are to be in the graph.
            everything: Whether to give all slots, brought to the device.

        Returns:
            "k" and "v" ``[B, G, R, D]``: from the first slot of the block that was unfinished before the call on, or
            from slot 0 on.
        """
        before = self.offset
        recent = self._behind_tail(values, before, differentiable=differentiable)
        device = self.device
        seen = self.host.append(
            {name: x.to("cpu") for name, x in values.items()},
            lengths.to("cpu") if isinstance(lengths, Tensor) else lengths,
            differentiable=differentiable and everything,
        )
        batch, _, tokens, _ = values["k"].shape
        self.append({_TOKEN: values["k"].new_empty(batch, 1, tokens, 0)}, lengths, differentiable=False)
        self.complete({_LANDMARK: recent["k"][:, :, self.block - 1 :: self.block]}, before)
        self._keep_tail(recent, before)
        return {name: x.to(device) for name, x in seen.items()} if everything else recent

    def fetch(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, G, U * w, D]`` of blocks ``[B, G, U]``, from the host."""
        places = blocks.to("cpu")
        batch, groups, _ = places.shape
        item, group = torch.arange(batch).view(-1, 1, 1), torch.arange(groups).view(1, -1, 1)
        complete = self.max_length // self.block
        found = []
        for name in ("k", "v"):
            held = self.host.streams[name][:, :, : complete * self.block].unflatten(2, (complete, self.block))
            found.append(held[item, group, places].to(self.device).flatten(2, 3))
        return found[0], found[1]

    def grow(self, max_length: int) -> None:
        """As any cache."""
        super().grow(max_length)
        self.host.grow(max_length)
        self._pin()

    def crop(self, length: int | Tensor) -> None:
        """As any cache; the block that becomes unfinished is brought back to the device."""
        super().crop(length)
        self.host.crop(length.to("cpu") if isinstance(length, Tensor) else length)
        self._reload_tail()

    def reorder(self, index: Tensor) -> None:
        """As any cache."""
        super().reorder(index)
        self.host.reorder(index.to("cpu"))
        self._pin()
        with torch.inference_mode(False), torch.no_grad():
            self._tail = {name: x.index_select(0, index.to(x.device)) for name, x in self._tail.items()}

    def fork(self) -> Self:
        """A copy of its own, on the host too."""
        copy = super().fork()
        copy.host = self.host.fork()
        copy._pin()
        with torch.inference_mode(False), torch.no_grad():
            copy._tail = {name: x.clone() for name, x in self._tail.items()}
        return copy

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Forgets what the block stored if it raises."""
        try:
            with super().all_or_nothing(), self.host.all_or_nothing():
                yield
        except BaseException:
            self._reload_tail()
            raise

    def _pin(self) -> None:
        """Lets the device copy from the host's memory by itself."""
        if self.device.type == "cuda":
            with torch.inference_mode(False):
                self.host._buffers = {name: x.pin_memory() for name, x in self.host._buffers.items()}

    def _behind_tail(
        self, values: dict[str, Tensor], before: int | Tensor, *, differentiable: bool
    ) -> dict[str, Tensor]:
        """A call's tokens behind those of the unfinished block, from the block's first slot on."""
        recent = {}
        for name, value in values.items():
            tail = self._tail[name].to(value.dtype, copy=True)
            if self._rounds and not differentiable:
                value = value.to(self._tail[name].dtype).to(value.dtype)
            if not isinstance(before, Tensor):
                recent[name] = torch.cat((tail[:, :, : before % self.block], value), 2)
                continue
            held = (before % self.block).unsqueeze(1)  # [B, 1]
            slot = torch.arange(self.block - 1 + value.shape[2], device=value.device)
            place = torch.where(slot < held, slot, self.block + slot - held)
            recent[name] = _rows(torch.cat((tail, value), 2), place.clamp(max=self.block + value.shape[2] - 1))
        return recent

    def _keep_tail(self, recent: dict[str, Tensor], before: int | Tensor) -> None:
        """Keeps the tokens of the block that is unfinished now."""
        after, block = self.offset, self.block
        with torch.no_grad():
            for name, tail in self._tail.items():
                rows = recent[name].detach()
                if not isinstance(before, Tensor) and not isinstance(after, Tensor):
                    begin = (after // block - before // block) * block
                    tail[:, :, : after % block].copy_(rows[:, :, begin : begin + after % block])
                    continue
                start = torch.as_tensor(after // block - before // block, device=tail.device).reshape(-1, 1) * block
                place = (start + torch.arange(block, device=tail.device)).clamp(max=rows.shape[2] - 1)
                tail.copy_(_rows(rows, place.expand(tail.shape[0], -1)))

    def _reload_tail(self) -> None:
        """Brings the unfinished blocks back from the host."""
        lengths = self.lengths.to("cpu").unsqueeze(1)
        slot = lengths - lengths % self.block + torch.arange(self.block)  # [B, w]
        with torch.no_grad():
            for name, tail in self._tail.items():
                tail.copy_(_rows(self.host.streams[name], slot.clamp(max=self.max_length - 1)))


@dataclass(frozen=True, eq=False)
class OffloadedMemory(Memory):
    """What the operation may see: k and v hold the slots on the device alone, from each item's unfinished block on.

    Attributes:
        cache: Where the other slots lie.
        slots: Slots that there are, on the host and on the device.
        landmarks: The last key of each complete block, ``[B, G, N, D]``.
        first: The block that k and v begin with, an int or int64 ``[B]``.
    """

    cache: OffloadedCache | None = None
    slots: int = 0
    landmarks: Tensor = field(default_factory=lambda: torch.empty(0))
    first: int | Tensor = 0


@dataclass(frozen=True, eq=False)
class ListedPlan(Plan):
    """A plan with one list for each query.

    Attributes:
        index: The blocks that the layout lists, int64 ``[B, H, T, K]``, -1 where there is none.
        origin: Their rotary origins, as ``index``; ``None`` where nothing is rotated.
    """

    index: Tensor | None = None
    origin: Tensor | None = None


def bring(memory: OffloadedMemory, plan: ListedPlan) -> tuple[Memory, Plan]:
    """Memory and plan over what the plan reads: the blocks fetched from the host, then those on the device.

    Raises:
        ShapeError: If memory or plan lack what this needs.
    """
    cache, index = memory.cache, plan.index
    if cache is None or index is None or plan.extras.key_bias is not None:
        raise ShapeError("plan: expected a cache on the host and listed blocks, got none")
    groups, block = memory.k.shape[1], cache.block
    first = memory.first.view(-1, 1, 1, 1) if isinstance(memory.first, Tensor) else memory.first
    away = (index >= 0) & (index < first)  # [B, H, T, K]
    blocks = -(-memory.slots // block)
    wanted = torch.where(away, index, blocks).unflatten(1, (groups, -1)).flatten(2)  # [B, G, h * T * K]
    used = torch.zeros(*wanted.shape[:2], blocks + 1, dtype=torch.bool, device=index.device)
    used = used.scatter(-1, wanted, True)[..., :blocks]
    # Copying from the host waits for the device anyway.
    most = int(used.sum(-1).max()) if used.numel() else 0
    taken = torch.argsort((~used).to(torch.uint8), dim=-1, stable=True)[..., :most]  # [B, G, U]
    # Places that an item has no use for repeat a block that it has, and are listed by nobody.
    k, v = cache.fetch(taken.clamp(max=max(0, cache.max_length // block - 1)))
    rank = (used.cumsum(-1) - 1).repeat_interleave(index.shape[1] // groups, 1)  # [B, H, N]
    at = rank.gather(-1, index.clamp(min=0).flatten(2)).view_as(index)
    moved = torch.where(away, at, torch.where(index < 0, -1, most + index - first))
    seen = replace(
        memory,
        k=torch.cat((k.to(memory.k.dtype), memory.k), 2),
        v=torch.cat((v.to(memory.v.dtype), memory.v), 2),
    )
    layout = BlockLayout.from_indices(
        moved, plan.layout.block_q, block, plan.layout.seq_q, seen.k.shape[2], plan.origin
    )
    place = plan.extras.q_pos
    if place is None:
        rows = memory.slots - memory.q.shape[2] + torch.arange(memory.q.shape[2], device=index.device)
        place = rows.view(1, 1, -1).to(torch.int32)
    begin = memory.first.view(-1, 1, 1) if isinstance(memory.first, Tensor) else memory.first
    q_pos = torch.where(place < 0, -1, place + (most - begin) * block).to(torch.int32)
    return seen, replace(plan, layout=layout, extras=replace(plan.extras, q_pos=q_pos))


def _rows(x: Tensor, place: Tensor) -> Tensor:
    """Rows ``place [B, n]`` of ``x [B, G, L, D]``."""
    return x.gather(2, place[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
