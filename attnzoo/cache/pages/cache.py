"""A cache of pages: what a policy keeps for each KV head, in a pool that gives memory back.

Letters: B batch, G KV heads, R rows of the head that holds most, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor

from attnzoo.cache.journal import Journal
from attnzoo.cache.lengths import Lengths
from attnzoo.cache.pages.held import HeldRows
from attnzoo.cache.pages.records import Moment, Progress, is_any
from attnzoo.cache.pages.state import load_state, state_of
from attnzoo.cache.replay import Birth
from attnzoo_kernels.errors import UnsupportedError


class PagedCache(HeldRows):
    """A cache that holds the rows that a policy keeps; made by ``new_cache(..., policy=...)``.

    A call's tokens are staged, and written when it has succeeded. Rows are chosen (:meth:`compact`) at the start of a
    call of one token behind a longer one, and every ``policy.every`` tokens while decoding. How many tokens are held
    counts those that are gone: positions go on from there.

    What is counted is known on the CPU; a tensor of lengths is read once, by the call that brings it.

    Attributes:
        policy: What is remembered, of one layer.
        pool: Where it lies.
        lost: What compensation rows stand for; ``None`` where there are none.
        choice: Pages that the next row may read again.
    """

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Writes what the block staged; if it raises, or writing does, the cache is what it was before."""
        before = self.moment()
        rest = self._earlier, self.choice, self.scale
        queries = self.last_queries
        queries_state = None if queries is None else queries.state()
        journal = Journal()
        self._journal = journal
        self.pool.journal = journal
        try:
            yield
            self.commit()
        except BaseException:
            self._return_to(before, journal)
            self._earlier, self.choice, self.scale = rest
            self.last_queries = queries
            if queries is not None and queries_state is not None:
                queries.return_to(queries_state)
            raise
        finally:
            self._staged = None
            self._journal = None
            self.pool.journal = None
            before.pool.journal = None

    def _return_to(self, moment: Moment, journal: Journal) -> None:
        """Holds again what the cache held then."""
        with torch.inference_mode(False), torch.no_grad():
            journal.put_back()
            for extent, (live, rows) in zip(moment.pool.extents, moment.counts, strict=True):
                extent.live = max(live, extent.live)
                extent.rows = rows
            moment.pool.forget_behind()
        self._hold(moment.pool)
        self.lost = moment.lost
        self._beside = None
        self._advance(moment.progress)

    def grow(self, max_length: int) -> None:
        """Allows more tokens of each item; pages are made when rows come.

        Raises:
            TypeError: If ``max_length`` is no int.
            ShapeError: If that would be fewer than now.
        """
        self._check_growth(max_length)
        self.max_length = max_length

    def trim(self) -> None:
        """Gives memory back where more than a quarter of the pages are free."""
        with torch.inference_mode(False), torch.no_grad():
            self._hold(self.pool.trimmed())

    def crop(self, length: int | Tensor) -> None:
        """Keeps the first tokens of every item: at most ``length``, which is int64 ``[B]`` where items differ.

        What is left is as if the others had never come; but pages that a row taken back has chosen are chosen anew.
        All tokens may be taken back, those that have come since rows were chosen, and as many as the policy's
        ``slack``.

        Raises:
            TypeError: If ``length`` is neither.
            ShapeError: If it is negative, or not one number for each item.
            UnsupportedError: If what the tokens left would read may be gone, or a policy counts the attention that
                rows have received: nothing is changed then.
        """
        most = self._check_crop(length)
        before = self.progress.tokens
        wanted = length if isinstance(length, int) else length.cpu()
        after = Lengths(before).minimum(Lengths(wanted)).value
        if most == 0:
            self._empty_all()
            return
        cut = before - after
        if not is_any(cut > 0):
            return
        back = self._moment_before(after, cut)
        self._check_blocks(after)
        with torch.inference_mode(False), torch.no_grad():
            if back is not None:
                self._hold(back.pool.clone())
                for extent, (live, rows) in zip(self.pool.extents, back.counts, strict=True):
                    extent.live = max(live, extent.live)
                    extent.rows = rows
                self.lost = back.lost
                self.progress = back.progress
                self._earlier = self._earlier[: self._earlier.index(back)]
            self.pool.take_back(self.progress.tokens - after)
            if self.last_queries is not None:
                self.last_queries.crop(self._near(after))
        # Pages that are chosen among rows of before a choice are none of those that are held now.
        self.choice = (
            None if self.choice is None or back is not None else self.choice.back(cut, self.pool.page_counts())
        )
        self._staged = None
        self._beside = None
        self._advance(self.progress.back(self.progress.tokens - after))

    def _empty_all(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            pool = self._empty(self.pool)
            if self.last_queries is not None:
                self.last_queries.crop(0)
        self.take_over(pool, Progress(), None)

    def _moment_before(self, after: int | Tensor, cut: int | Tensor) -> Moment | None:
        """What the cache was when it saw so many tokens, if rows have been chosen since."""
        if "mass" in self.policy.needs:
            raise UnsupportedError("crop: expected no policy that counts the attention of all queries, got one")
        chosen = self.progress.chosen
        # Rows that were chosen when the last token left had come, would not have been chosen yet.
        behind = (after <= chosen) & (cut > 0)
        if is_any(behind):
            for moment in self._earlier:
                tokens = moment.progress.tokens
                if not is_any(after > tokens):
                    return moment
            given = int(cut.max()) if isinstance(cut, Tensor) else cut
            raise UnsupportedError(
                f"crop: expected at most slack={self.policy.slack} tokens to be taken back where rows have been chosen "
                f"since, by all items alike, got {given}"
            )
        if self.last_queries is not None and not self.last_queries.can_crop(self.lengths, self._near(after)):
            raise UnsupportedError("crop: expected fewer tokens, since the last queries of what is left are gone")
        return None

    def _check_blocks(self, after: int | Tensor) -> None:
        """Raises where a block is gone that the tokens left would read."""
        rings = [extent.ring for extent in self.pool.extents if extent.ring is not None]
        if not rings:
            return
        ring = rings[0]
        last = (self.progress.tokens + ring.rows - 1) // ring.rows - 1
        oldest = Lengths(last - ring.local - ring.spare + 1).maximum(Lengths(self._oldest)).value
        needed = Lengths(after // ring.rows - ring.local + 1).maximum(Lengths(ring.sink)).value
        if is_any(oldest > needed):
            raise UnsupportedError(
                f"crop: expected at most slack={self.policy.slack} tokens to be taken back, or all, got more"
            )
        self._oldest = oldest

    def reorder(self, index: Tensor) -> None:
        """Takes the items ``index``, int ``[B']``, in their order: beams are chosen, repeated or dropped."""
        self._check_items(index)
        differs = self.progress.differs or isinstance(self._oldest, Tensor)
        differs = differs or (self.choice is not None and self.choice.differs)
        near = index.cpu() if differs else None
        with torch.inference_mode(False), torch.no_grad():
            index = index.to(self.device, torch.int64)
            self._hold(self.pool.moved(items=index))
            if self.last_queries is not None:
                self.last_queries = self.last_queries.select(index)
            if self.lost is not None:
                self.lost = self.lost.select(index)
            if self.choice is not None:
                self.choice = self.choice.select(index, near)
        if near is not None:
            self.progress = self.progress.select(near)
            self._oldest = Lengths(self._oldest).select(near).value
        self._earlier = []
        self._staged = None
        self._beside = None
        self._advance(self.progress)

    def state_dict(self) -> dict[str, Any]:
        """What is held, as tensors and plain numbers: see :mod:`attnzoo.cache.pages.state`."""
        return state_of(self, self._config)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Holds what :meth:`state_dict` gave, instead of what is held; it may have had another ``max_length``.

        Raises:
            TypeError: If ``state`` is no mapping.
            ConfigError: If it is of another kind of cache, of a layer of another configuration or of another policy.
            ShapeError: If batch, room, names, shapes or dtypes do not fit. Nothing is changed then.
        """
        load_state(self, self._config, state)

    def fork(self) -> Self:
        """A copy of its own, for the same layer."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy._born = Birth(self.device)
        copy._staged = None
        with torch.inference_mode(False), torch.no_grad():
            copy._hold(self.pool.clone())
            copy.last_queries = None if self.last_queries is None else self.last_queries.clone()
        return copy
