"""Rows of a pool are written, counted, hidden and taken back.

Letters: B batch, G KV heads, h heads of an extent, C pages of an extent's head, w rows of a page, T tokens of a call, D
width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attnzoo.cache.evicting.regions import of_heads
from attnzoo.cache.pages.extents import Extent, shared, with_room
from attnzoo.cache.pages.store import NOTHING, PER_PAGE, PageStore

LEAST_GROWTH = 32
"""Rows that a head has room for at least when its room was used up: all that it holds is copied then."""


class PagePool(PageStore):
    """A pool of pages whose heads hold more and more rows."""

    def with_room_for(self, lengths: int | Tensor) -> PagePool:
        """A pool with free pages for so many tokens more of each item, int64 ``[B]`` on the CPU; itself if it has."""
        pages = []
        for extent in self.extents:
            after = extent.rows + _column(lengths)
            most = after if isinstance(after, int) else int(after.max()) if after.numel() else 0
            needed = extent.needs(most, self.page)
            pages.append(extent.pages if needed <= extent.pages else self._grown(needed, extent))
        if all(count == extent.pages for count, extent in zip(pages, self.extents, strict=True)):
            return self
        return self.moved(pages)

    def _grown(self, needed: int, extent: Extent) -> int:
        """Pages for each head of an extent whose room is used up."""
        grown = max(with_room(needed, extent.ring), needed + LEAST_GROWTH // self.page)
        return grown if extent.ring is None else min(grown, extent.ring.pages)

    def put(self, values: Mapping[str, Tensor], lengths: int | Tensor, tokens: int | Tensor) -> None:
        """Writes a call's rows behind those held, without counting them; there must be room.

        Args:
            values: "k", "v" and sidecars of rows, each ``[B, G, T, ...]``, left-aligned.
            lengths: Tokens of each item among them, an int or int64 ``[B]`` on the CPU.
            tokens: Tokens seen before, likewise.
        """
        count = values["k"].shape[2]
        if count == 1 and isinstance(lengths, int) and isinstance(tokens, int):
            self._put_one(values, tokens)
            return
        device = self.device
        begin = tokens if isinstance(tokens, int) else tokens.to(device).view(-1, 1, 1)
        position = torch.arange(count, device=device).view(1, 1, -1) + begin
        for extent in self.extents:
            self._begin_pages(extent, lengths)
            where = self._target(extent, count, lengths)
            for name, value in values.items():
                self._put(name, extent, where, of_heads(value, extent.heads))
            heads = len(extent.heads)
            self._put("bias", extent, where, self.tensors["bias"].new_zeros(()).expand(self.batch, heads, count))
            self._put("position", extent, where, position.expand(self.batch, heads, count))

    def _put_one(self, values: Mapping[str, Tensor], token: int) -> None:
        """The same for one token of each item, all at the same position."""
        for extent in self.extents:
            self._begin_pages(extent, 1)
            where = self._target(extent, 1, 1)
            heads = len(extent.heads)
            own = {name: of_heads(value, extent.heads) for name, value in values.items()}
            if isinstance(where, int):
                for name, value in own.items():
                    self.view(name, extent).narrow(2, where, 1).copy_(value)
                self.view("bias", extent).narrow(2, where, 1).zero_()
                self.view("position", extent).narrow(2, where, 1).fill_(token)
                continue
            for name, value in own.items():
                self._put(name, extent, where, value)
            self._put("bias", extent, where, self.tensors["bias"].new_zeros(()).expand(self.batch, heads, 1))
            position = torch.full((self.batch, heads, 1), token, dtype=torch.int32, device=self.device)
            self._put("position", extent, where, position)

    def count(self, lengths: int | Tensor) -> None:
        """Counts rows that are written."""
        for extent in self.extents:
            before = extent.rows
            after = before + _column(lengths)
            extent.rows = after if isinstance(after, int) else shared(after.expand(self.batch, len(extent.heads)))
            if "least" in self.tensors:
                if isinstance(before, int) and isinstance(lengths, int) and lengths == 1:
                    self._bound_one(extent, before)
                else:
                    self._bound_pages(extent, before)

    def _bound_one(self, extent: Extent, row: int) -> None:
        """Widens the bounds of pages by one row more of each head."""
        row = row if extent.ring is None else extent.ring.row_of(row)
        k = self.view("k", extent).narrow(2, row, 1).to(self.device)
        for name, wider in (("least", torch.minimum), ("most", torch.maximum)):
            bound = self.view(name, extent).narrow(2, row // self.page, 1)
            bound.copy_(wider(bound, k))

    def hide(self) -> None:
        """Hides the blocks that the next token does not read, of those held so that tokens may be taken back."""
        for extent in self.extents:
            ring = extent.ring
            if ring is None or not ring.spare:
                continue
            position = self.view("position", extent)
            own = extent.rows // self.page
            if isinstance(own, Tensor):
                own = own.to(self.device).unsqueeze(-1)
            read = (position >= 0) & ring.is_read(position // self.page, own)
            bias = self.view("bias", extent)
            bias.copy_(torch.where(read, 0.0, -torch.inf))

    def forget_behind(self) -> None:
        """Clears what was written and not counted."""
        for extent in self.extents:
            rows = extent.live * self.page
            if not rows:
                continue
            each = extent.each(self.batch).to(self.device).unsqueeze(-1)
            if extent.ring is None:
                least = self._least(extent)
                behind = torch.arange(least, rows, device=self.device) >= each
            else:
                least = 0
                position = self.view("position", extent).narrow(2, 0, rows)
                # Of a row whose writing was cut short the position may be missing.
                behind = (position >= each) | (position < 0)
            for name in self.tensors:
                if name not in PER_PAGE:
                    x = self.view(name, extent).narrow(2, least, rows - least)
                    x.masked_fill_(behind.view(*behind.shape, *[1] * (x.dim() - 3)).to(x.device), NOTHING[name])
            extent.live = extent.needs(extent.most, self.page)
            if "least" in self.tensors:
                self._bound_pages(extent, (extent.each(self.batch) - 1).clamp(min=0))
        self.hide()

    def _least(self, extent: Extent) -> int:
        """Rows of the head that holds fewest."""
        return extent.rows if isinstance(extent.rows, int) else int(extent.rows.min())

    def take_back(self, tokens: int | Tensor) -> None:
        """Forgets the last tokens of each item, an int or int64 ``[B]`` on the CPU, which must be rows of their own."""
        for extent in self.extents:
            after = extent.rows - _column(tokens)
            extent.rows = after if isinstance(after, int) else shared(after.expand(self.batch, len(extent.heads)))
        self.forget_behind()

    def _begin_pages(self, extent: Extent, lengths: int | Tensor) -> None:
        """Clears the pages that the rows of a call are the first of."""
        before = extent.rows
        if isinstance(before, int) and isinstance(lengths, int) and 0 < before % self.page <= self.page - lengths:
            return
        after = before + _column(lengths)
        most = after if isinstance(after, int) else int(after.max()) if after.numel() else 0
        live = max(extent.live, extent.needs(most, self.page))
        if live > extent.live:
            for name in self.tensors:
                each = 1 if name in PER_PAGE else self.page
                self.view(name, extent).narrow(2, extent.live * each, (live - extent.live) * each).fill_(NOTHING[name])
        extent.live = live
        if extent.ring is not None and most > extent.ring.pages * self.page:
            self._turn(extent, lengths)

    def _turn(self, extent: Extent, lengths: int | Tensor) -> None:
        """Clears the pages of a ring that new blocks take over."""
        ring = extent.ring
        if ring is None:
            return
        before = extent.each(self.batch)
        after = before + _column(lengths)
        begin = (before + self.page - 1) // self.page
        end = (after + self.page - 1) // self.page
        # No more than go round once: the others leave no trace.
        begin = begin.maximum(end - ring.local - ring.spare)
        most = int((end - begin).max())
        block = begin.unsqueeze(-1) + torch.arange(most, device="cpu")
        page = extent.bases(self.batch).unsqueeze(-1) + ring.page_of(block)
        page = page[block < end.unsqueeze(-1)]
        for name, x in self.tensors.items():
            entries = page.to(x.device)
            if self.journal is not None:
                self.journal.keep_entries(x, entries)
            x.index_fill_(0, entries, NOTHING[name])

    def _target(self, extent: Extent, count: int, lengths: int | Tensor) -> int | Tensor:
        """Where rows go: to the first one and those behind it, or to rows of the pool ``[B, h, T]``."""
        rows = extent.rows
        ring = extent.ring
        if isinstance(rows, int) and isinstance(lengths, int) and (ring is None or count == 1):
            return rows if ring is None else ring.row_of(rows)
        before = extent.each(self.batch).to(self.device).unsqueeze(-1)
        length = lengths if isinstance(lengths, int) else lengths.to(self.device).view(-1, 1, 1)
        token = torch.arange(count, device=self.device)
        row = before + token
        there = token < length
        if ring is not None:
            block = row // self.page
            last = (before + length + self.page - 1) // self.page - 1
            there = there & ring.is_held(block, last)
            row = ring.page_of(block) * self.page + row % self.page
        first = extent.bases(self.batch).to(self.device).unsqueeze(-1) * self.page
        return torch.where(there, first + row, 0)

    def _put(self, name: str, extent: Extent, where: int | Tensor, value: Tensor) -> None:
        """Writes values ``[B, h, T, ...]`` to their rows."""
        if isinstance(where, int):
            self.view(name, extent).narrow(2, where, value.shape[2]).copy_(value)
            return
        x = self.tensors[name].flatten(0, 1)
        where = where.to(x.device)
        there = (where > 0).view(*where.shape, *[1] * (value.dim() - 3))
        # Rows without a token go to page 0, as nothing.
        x[where] = torch.where(there, value.to(x), torch.tensor(NOTHING[name], dtype=x.dtype, device=x.device))

    def bound_all(self) -> None:
        """Works out the bounds of all pages in use."""
        for extent in self.extents:
            self._bound_pages(extent, 0)

    def _bound_pages(self, extent: Extent, before: int | Tensor) -> None:
        """Works out the bounds of the pages with rows from ``before`` on."""
        first = torch.as_tensor(before, device="cpu").expand(self.batch, len(extent.heads)) // self.page
        last = (extent.each(self.batch) + self.page - 1) // self.page - 1
        if extent.ring is not None:
            first = first.maximum(last - extent.ring.local - extent.ring.spare + 1)
        most = int((last - first).max()) + 1 if last.numel() else 0
        if most <= 0:
            return
        page = first.unsqueeze(-1) + torch.arange(most, device="cpu")
        own = page if extent.ring is None else extent.ring.page_of(page)
        number = torch.where(page <= last.unsqueeze(-1), extent.bases(self.batch).unsqueeze(-1) + own, 0)
        # Where the keys lie, so that bounds alone are moved.
        keys = self.tensors["k"]
        k = keys[number.to(keys.device)]
        number = number.to(self.device)
        hidden = (self.tensors["position"][number] < 0).unsqueeze(-1).to(keys.device)
        self.tensors["least"][number] = k.masked_fill(hidden, torch.inf).amin(-2).to(self.device)
        self.tensors["most"][number] = k.masked_fill(hidden, -torch.inf).amax(-2).to(self.device)


def _column(numbers: int | Tensor) -> int | Tensor:
    """Numbers of items beside ``[B, h]``."""
    return numbers if isinstance(numbers, int) else numbers.unsqueeze(-1)
