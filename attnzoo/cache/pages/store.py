"""A pool of pages: the rows that all items and KV heads of a layer hold.

A *row* is a key, a value, a bias (the logarithm of its mass) and a position; what a policy needs beside lies in
sidecars of the same pages. Rows that hold nothing have bias -inf, position -1, and zeros: they may be read and weigh
nothing. Page 0 is never given out; rows without a token are written there.

Letters: B batch, G KV heads, h heads of an extent, P pages of the pool, C pages of an extent's head, w rows of a page,
T tokens of a call, R rows of the head that holds most, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from attnzoo.cache.journal import Journal
from attnzoo.cache.pages.extents import Extent, placed, shared, with_room
from attnzoo.cache.streams import room_on_cpu
from attnzoo_kernels.runtime.plain import is_plain

NOTHING: Mapping[str, float] = {
    "k": 0,
    "v": 0,
    "bias": -torch.inf,
    "position": -1,
    "score": 0,
    "mass": 0,
    "moment": 0,
    "least": torch.inf,
    "most": -torch.inf,
}
"""What lies where there is no row; in pages without one."""

ROWS = ("k", "v")
"""What may lie in CPU memory while all else lies on a device."""

PER_PAGE = ("least", "most")
"""Sidecars with one value for a page."""


class PageStore:
    """Pages in one piece of memory, and whose they are; what changes rows is in :mod:`attnzoo.cache.pages.pool`.

    Keys and values may lie in CPU memory while all else lies on a device.

    Attributes:
        tensors: Keys "k" ``[P, w, D]``, values "v" ``[P, w, Dv]``, "bias" (fp64 beside fp64, else fp32) and "position"
            (int32) ``[P, w]``; sidecars: "score" and "moment" ``[P, w]``, "mass" ``[P, w, n]``, n query heads apart,
            "least" and "most" of a page's keys ``[P, D]``.
        extents: Whose pages they are.
        batch: Items B.
        page: Rows of a page, w.
        weighed: Whether there may be a row with a bias other than 0.
        journal: Where what a call writes over is noted; ``None`` outside of calls.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        extents: Sequence[Extent],
        *,
        batch: int,
        page: int,
        weighed: bool = False,
    ) -> None:
        self.tensors = dict(tensors)
        self.extents = tuple(extents)
        self.batch = batch
        self.page = page
        self.weighed = weighed
        self.journal: Journal | None = None
        self._views: dict[tuple[str, int], Tensor] = {}
        self._table: tuple[tuple[object, ...], Tensor] | None = None

    @classmethod
    def like(cls, tensors: Mapping[str, Tensor], extents: Sequence[Extent], batch: int, page: int) -> Self:
        """An empty pool with tensors of the same widths, dtypes and device."""
        pages = 1 + sum(batch * len(extent.heads) * extent.pages for extent in extents)
        made = {}
        for name, x in tensors.items():
            shape = (pages, *x.shape[1:])
            # Pages are cleared when they are begun.
            made[name] = _empty_like(x, shape, tensors["bias"]) if name in ROWS else x.new_full(shape, NOTHING[name])
            made[name][0] = NOTHING[name]
        return cls(made, extents, batch=batch, page=page)

    def for_extents(self, extents: Sequence[Extent], pages: Sequence[int]) -> Self:
        """An empty pool for other heads, with tensors of the same widths, dtypes and device."""
        return self.like(self.tensors, placed(extents, pages, self.batch), self.batch, self.page)

    @property
    def begins_pages(self) -> bool:
        """Whether the next token is the first of a page somewhere."""
        for extent in self.extents:
            rows = extent.rows
            if not rows % self.page if isinstance(rows, int) else bool((rows % self.page == 0).any()):
                return True
        return False

    @property
    def heads(self) -> int:
        """KV heads G."""
        return sum(len(extent.heads) for extent in self.extents)

    @property
    def device(self) -> torch.device:
        """Where it lies, but for keys and values that are kept in CPU memory."""
        return self.tensors["bias"].device

    @property
    def nbytes(self) -> int:
        """Bytes of the pool, free pages among them."""
        return sum(x.numel() * x.element_size() for x in self.tensors.values())

    @property
    def held_bytes(self) -> int:
        """Bytes of the rows that may be read."""
        pages = sum(x[0].numel() * x.element_size() for x in self.tensors.values())
        return int(self.counts().sum()) * pages // self.page

    @property
    def free(self) -> list[int]:
        """Pages that nobody holds."""
        found: list[int] = []
        for extent in self.extents:
            for base in extent.bases(self.batch).flatten().tolist():
                found.extend(range(base + extent.live, base + extent.pages))
        return found

    def counts(self) -> Tensor:
        """Rows that each head lets the next token read, int64 ``[B, G]`` on the CPU."""
        counts = torch.zeros(self.batch, self.heads, dtype=torch.int64, device="cpu")
        for extent in self.extents:
            each = extent.each(self.batch)
            counts[:, list(extent.heads)] = each if extent.ring is None else extent.ring.count(each)
        return counts

    def table(self) -> Tensor:
        """The pages of each head in the order of what they hold, int64 ``[B, G, C]`` on the CPU, 0 behind."""
        most = max((extent.live for extent in self.extents), default=0)
        table = torch.zeros(self.batch, self.heads, most, dtype=torch.int64, device="cpu")
        for extent in self.extents:
            order = self.page_order(extent) + extent.bases(self.batch).unsqueeze(-1)
            table[:, list(extent.heads), : extent.live] = order
        return table

    def table_near(self) -> Tensor:
        """The same where the pool lies; made anew where pages have changed hands."""
        key = tuple(
            (extent.live, None if extent.ring is None else -(-extent.rows // self.page))
            for extent in self.extents
            if not (extent.ring is not None and isinstance(extent.rows, Tensor))
        )
        if self._table is None or self._table[0] != key or len(key) < len(self.extents):
            self._table = (key, self.table().to(self.device))
        return self._table[1]

    def page_counts(self) -> Tensor:
        """Pages with a row of each head, int64 ``[B, G]`` on the CPU."""
        counts = torch.zeros(self.batch, self.heads, dtype=torch.int64, device="cpu")
        for extent in self.extents:
            pages = (extent.each(self.batch) + self.page - 1) // self.page
            counts[:, list(extent.heads)] = pages if extent.ring is None else pages.clamp(max=extent.ring.pages)
        return counts

    def page_order(self, extent: Extent) -> Tensor:
        """The pages in use of each head, of those of its own, in the order of what they hold, ``[B, h, C]``."""
        page = torch.arange(extent.live, device="cpu").expand(self.batch, len(extent.heads), -1)
        if extent.ring is None:
            return page
        block = self.blocks(extent)
        return torch.where(block < 0, torch.iinfo(torch.int64).max, block).argsort(dim=-1, stable=True)

    def blocks(self, extent: Extent) -> Tensor:
        """The block that each page in use holds, of heads that remember by place, ``[B, h, C]`` on the CPU; or -1."""
        ring = extent.ring
        if ring is None:
            raise AssertionError("blocks are those of heads that remember by place")
        page = torch.arange(extent.live, device="cpu")
        last = ((extent.each(self.batch) + self.page - 1) // self.page - 1).unsqueeze(-1)
        around = last - (last - page) % (ring.local + ring.spare)
        block = torch.where(page < ring.sink, page, around)
        there = (block <= last) & ((page < ring.sink) | (block >= ring.sink))
        return torch.where(there, block, -1)

    def view(self, name: str, extent: Extent) -> Tensor:
        """What an extent has of a tensor: ``[B, h, C * w, ...]``, of one with a value for a page ``[B, h, C, ...]``."""
        key = (name, extent.first)
        found = self._views.get(key)
        if found is None:
            x = self.tensors[name]
            heads = len(extent.heads)
            part = x.narrow(0, extent.first, self.batch * heads * extent.pages)
            length = extent.pages * (1 if name in PER_PAGE else self.page)
            trailing = x.shape[1:] if name in PER_PAGE else x.shape[2:]
            found = part.view(self.batch, heads, length, *trailing)
            self._views[key] = found
        return found

    def rows_in_place(self, extent: Extent) -> dict[str, Tensor]:
        """What an extent has for each row, where it lies, ``[B, h, C * w, ...]``."""
        return {name: self.view(name, extent) for name in self.tensors if name not in PER_PAGE}

    def is_masked(self, extent: Extent) -> bool:
        """Whether rows of an extent's pages in use are told from nothing by their bias alone."""
        return self.weighed or extent.ring is not None or isinstance(extent.rows, Tensor)

    def moved(self, pages: Sequence[int] | None = None, items: Tensor | None = None) -> Self:
        """A copy with other numbers of pages for the heads of each extent, and some items alone.

        Args:
            pages: At least those in use; ``None`` leaves them.
            items: Which items, int64 ``[B']`` where the pool lies; ``None`` takes all.
        """
        batch = self.batch if items is None else items.shape[0]
        extents = placed(self.extents, pages or [extent.pages for extent in self.extents], batch)
        if items is not None and any(isinstance(extent.rows, Tensor) for extent in extents):
            near = items.cpu()
            for extent in extents:
                extent.rows = shared(extent.each(self.batch).index_select(0, near))
        made = self.like(self.tensors, extents, batch, self.page)
        made.weighed = self.weighed
        for old, new in zip(self.extents, extents, strict=True):
            for name in self.tensors:
                rows = old.live * (1 if name in PER_PAGE else self.page)
                part = self.view(name, old).narrow(2, 0, rows)
                part = part if items is None else part.index_select(0, items.to(part.device))
                made.view(name, new).narrow(2, 0, rows).copy_(part)
        return made

    def trimmed(self) -> Self:
        """A copy with little room, where more than a quarter of the pages are free; else itself."""
        pages = sum(self.batch * len(extent.heads) * extent.pages for extent in self.extents)
        if 4 * len(self.free) <= pages:
            return self
        least = [min(extent.pages, with_room(extent.live, extent.ring)) for extent in self.extents]
        if all(count == extent.pages for count, extent in zip(least, self.extents, strict=True)):
            return self
        return self.moved(least)

    def clone(self) -> Self:
        """A copy of its own."""
        return self._with({name: x.clone() for name, x in self.tensors.items()})

    def wider_dtypes(self, values: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
        """Which tensors need a wider dtype so that keys "k" and values "v" of a call lose nothing; none is usual."""
        wider = {}
        for name, value in values.items():
            held = self.tensors[name].dtype
            wide = torch.promote_types(held, value.dtype)
            if wide != held:
                wider[name] = wide
        if wider:
            for name, x in self.tensors.items():
                if name in PER_PAGE:
                    wider[name] = torch.promote_types(x.dtype, values["k"].dtype)
                elif name not in values and x.dtype == torch.float32 and torch.float64 in wider.values():
                    wider[name] = torch.float64
        return wider

    def widened(self, dtypes: Mapping[str, torch.dtype]) -> Self:
        """The same rows with some tensors in other dtypes."""
        return self._sharing({name: x.to(dtypes.get(name, x.dtype)) for name, x in self.tensors.items()})

    def with_sidecar(self, name: str, like: Tensor) -> Self:
        """The same rows with one more sidecar, of nothing, as ``like [0, w, ...]``."""
        x = like.new_full((self.tensors["k"].shape[0], *like.shape[1:]), NOTHING[name])
        return self._sharing(self.tensors | {name: x})

    def _sharing(self, tensors: Mapping[str, Tensor]) -> Self:
        """The same rows in tensors some of which are this pool's own, and so are written for both."""
        made = self._with(tensors)
        made.journal = self.journal
        return made

    def _with(self, tensors: Mapping[str, Tensor]) -> Self:
        if self.device.type == "cuda":
            # Copies of what is pinned are not.
            far = {name: tensors[name] for name in ROWS if tensors[name].device.type == "cpu"}
            tensors = {**tensors, **{name: x.pin_memory() for name, x in far.items()}}
        extents = [extent.copy() for extent in self.extents]
        return type(self)(tensors, extents, batch=self.batch, page=self.page, weighed=self.weighed)


def _empty_like(x: Tensor, shape: Sequence[int], near: Tensor) -> Tensor:
    """A tensor of another shape where one lies; pinned if that is CPU memory, and its device a GPU."""
    if x.device.type == "cpu" and near.device.type == "cpu" and is_plain(x):
        return room_on_cpu(shape, x.dtype)
    return x.new_empty(shape, pin_memory=x.device.type == "cpu" and near.device.type == "cuda")
