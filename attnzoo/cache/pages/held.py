"""Calls of a cache of pages: rows are chosen first, then the call's own are staged, read with the others, and written.

Letters: B batch, T tokens of a call, H query heads, G KV heads, h heads of an extent, D key width, Dv value width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from attnzoo.cache.held import HeldCache
from attnzoo.cache.journal import Journal
from attnzoo.cache.kv_cache import Stream
from attnzoo.cache.pages.apply import Lost, apply, hidden, leaving
from attnzoo.cache.pages.beginning import empty_pages, full_heads_of, page_rows_of, rings_of
from attnzoo.cache.pages.extents import with_room
from attnzoo.cache.pages.pool import PagePool
from attnzoo.cache.pages.records import Moment, PagesRead, Progress, Staged, is_any, without
from attnzoo.cache.pages.rows import grouped
from attnzoo.cache.pages.seen import LastQueries, query_ring, seen_of
from attnzoo.cache.policies.protocol import Policy, Seen
from attnzoo.cache.replay import refuse_transforms
from attnzoo.cache.retention import Retention
from attnzoo.cache.streams import Ring
from attnzoo_kernels.errors import ConfigError, ShapeError, UnsupportedError

NAMES = ("k", "v")


class HeldRows(HeldCache):
    """What a :class:`attnzoo.cache.pages.cache.PagedCache` does in a call: rows are chosen, written and counted."""

    def __init__(self, streams: Mapping[str, Stream], *, policy: Policy, **options: Any) -> None:
        self.policy = policy
        self.lost: Lost | None = None
        self.choice: PagesRead | None = None
        self.progress = Progress()
        self.last_queries: Ring | None = None
        self.scale = 1.0
        self._staged: Staged | None = None
        self._earlier: list[Moment] = []
        self._oldest: int | Tensor = 0
        self._beside: tuple[Tensor, Tensor, Tensor] | None = None
        self._journal: Journal | None = None
        super().__init__(streams, **options)

    def _allocate(
        self, streams: Mapping[str, Stream], batch: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        if set(streams) != set(NAMES):
            raise ConfigError(f"streams: expected k and v, got {', '.join(streams) or 'none'}")
        heads = streams["k"].heads
        self._rings = {}
        self.block_rings = rings_of(self.policy, heads)
        self._full = full_heads_of(self.policy, heads)
        page = page_rows_of(self.policy, self.block_rings)
        pages = empty_pages(streams, self.policy, page, device=device, dtype=dtype)
        self._hold(self._empty(PagePool(pages, (), batch=batch, page=page)))

    def _empty(self, like: PagePool) -> PagePool:
        """A pool of no rows."""
        nothing = torch.zeros(like.batch, len(self.block_rings), dtype=torch.int64, device="cpu")
        extents = grouped(nothing, self.block_rings, like.page)
        return like.for_extents(extents, [with_room(0, extent.ring) for extent in extents])

    def _hold(self, pool: PagePool) -> None:
        self.pool = pool
        self._buffers = pool.tensors

    @property
    def batch(self) -> int:
        """Items B."""
        return self.pool.batch

    @property
    def device(self) -> torch.device:
        """Where the pool lies."""
        return self.pool.device

    @property
    def streams(self) -> dict[str, Tensor]:
        """Keys, values and what lies beside them, by page: ``[P, w, ...]``, bounds of pages ``[P, D]``."""
        return dict(self.pool.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of the pool, free pages among them, of the last queries and of compensation rows."""
        beside = [] if self.last_queries is None else [self.last_queries.values]
        if self.lost is not None:
            beside += self.lost.tensors
        return self.pool.nbytes + sum(x.numel() * x.element_size() for x in beside)

    @property
    def rule(self) -> Retention | None:
        """What the policy holds by place."""
        return self.policy.retention(self.pool.heads)

    def scores_of(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        """The score of each row of a call, where the policy needs one."""
        return self.policy.scores_of(q, k, v) if "score" in self.policy.needs else None

    @property
    def kv_heads(self) -> int:
        """KV heads G."""
        return self.pool.heads

    @property
    def row_bytes(self) -> int:
        """Bytes of a key and a value."""
        return sum(self.pool.tensors[name].shape[2] * self.pool.tensors[name].element_size() for name in NAMES)

    @property
    def held_rows(self) -> int:
        """Rows that the next token may read, of all items and KV heads together, itself not counted."""
        return int(self.pool.counts().sum())

    @property
    def held_bytes(self) -> int:
        """Bytes of the rows that the next token may read."""
        return self.pool.held_bytes

    @property
    def bytes_per_token(self) -> int:
        """Bytes of held rows for each token that was seen, rounded up."""
        tokens = self.progress.tokens
        seen = self.batch * tokens if isinstance(tokens, int) else int(tokens.sum())
        return -(-self.held_bytes // max(1, seen))

    def append(self, values: Mapping[str, Tensor], lengths: int | Tensor, *, differentiable: bool) -> NoReturn:
        """Refuses: what is remembered is no sequence; see :meth:`stage`.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError("append: a cache that evicts holds no sequence; its layer stages and commits")

    def stage(self, values: Mapping[str, Tensor], lengths: int | Tensor, *, score: Tensor | None = None) -> None:
        """Takes note of a call's tokens for :meth:`commit`; rows are chosen first where that is due.

        Args:
            values: "k" and "v" ``[B, G, T, D]``, left-aligned.
            lengths: Real tokens of each item; T as an int where there are no others.
            score: The score of each row ``[B, G, T]``, where the policy needs one.

        Raises:
            ShapeError: If shapes do not fit.
            ConfigError: If the policy needs scores and there are none, or none and there are some.
            UnsupportedError: In programs that are compiled, and inside transforms of torch.func.
        """
        refuse_transforms(values)
        if torch.compiler.is_compiling():
            raise UnsupportedError("cache: expected no compiler where rows are kept in pages, got one")
        tokens = self._check_call(values)
        if ("score" in self.policy.needs) != (score is not None):
            wanted = "scores of rows" if score is None else "none"
            raise ConfigError(f"score: expected {wanted}, as the policy {self.policy.name!r} says, got the other")
        known = self._known(lengths, tokens)
        self._staged = None
        if tokens == 1:
            self._choose(self.progress.due(known, self.policy.every))
        else:
            self.choice = without(self.choice, known > 0)
        self._widen(values)
        held = {name: value.detach() for name, value in values.items()}
        moment = self.policy.moment_of(held["k"]) if "moment" in self.pool.tensors else None
        held |= {name: x.detach() for name, x in (("score", score), ("moment", moment)) if x is not None}
        self._staged = Staged(held, known)

    def _check_call(self, values: Mapping[str, Tensor]) -> int:
        if set(values) != set(NAMES):
            raise ShapeError(f"values: expected streams {sorted(NAMES)}, got {sorted(values)}")
        tokens = values["k"].shape[2]
        for name, value in values.items():
            shape = [self.batch, self.pool.heads, tokens, self.pool.tensors[name].shape[2]]
            if list(value.shape) != shape:
                raise ShapeError(f"cache: expected {name} {shape}, got {list(value.shape)}")
        return tokens

    def _known(self, lengths: int | Tensor, tokens: int) -> int | Tensor:
        """The tokens of each item, on the CPU; an int where all that are given are tokens."""
        if isinstance(lengths, int):
            return lengths if lengths == tokens else torch.full((self.batch,), lengths, device="cpu")
        near = lengths.cpu()
        return tokens if bool((near == tokens).all()) else near

    def _widen(self, values: Mapping[str, Tensor]) -> None:
        if self._rounds:
            return
        wider = self.pool.wider_dtypes(values)
        if not wider:
            return
        with torch.inference_mode(False), torch.no_grad():
            self._hold(self.pool.widened(wider))
            if self.last_queries is not None:
                self.last_queries.values = self.last_queries.values.to(self.pool.tensors["k"].dtype)

    def note(self, q: Tensor, scale: float) -> None:
        """Takes note of a call's rotated queries ``[B, H, T, D]``, where the policy asks for the last ones' shares."""
        if self._staged is not None and "window_mass" in self.policy.needs:
            self.scale = scale
            self._staged.q = q.detach()

    def note_mass(self, mass: list[Tensor]) -> None:
        """Takes note of the attention that rows receive from a call.

        Args:
            mass: For each extent of the pool ``[B, h, n, g]``: its first rows, and the call's own behind these; among
                them where that is placed.
        """
        if self._staged is not None:
            self._staged.mass = [x.detach() for x in mass]

    @property
    def counts_mass(self) -> bool:
        """Whether the policy asks for the attention that rows receive from all queries."""
        return "mass" in self.policy.needs

    def write_ahead(self) -> None:
        """Writes a staged token of each item where it will be read, without counting it."""
        staged = self._staged
        if staged is None or staged.placed:
            return
        with torch.no_grad():
            self._write(staged)
        staged.placed = True

    def commit(self) -> None:
        """Writes and counts the staged tokens; called when the call has succeeded."""
        staged = self._staged
        if staged is None:
            return
        self._staged = None
        with torch.no_grad():
            if staged.mass:
                self._add_mass(staged)
            if not staged.placed:
                self._write(staged)
            self.pool.count(staged.lengths)
            if not staged.placed or self.pool.begins_pages:
                self.pool.hide()
                self._beside = None
            if staged.q is not None:
                self._keep_queries(staged.q, staged.lengths)
        self._advance(self.progress.after(staged.lengths, longer=staged.values["k"].shape[2] > 1))

    def _write(self, staged: Staged) -> None:
        with torch.inference_mode(False):
            pool = self.pool.with_room_for(staged.lengths)
        if pool is not self.pool:
            self._hold(pool)
        if self.policy.folds:
            self._join(leaving(pool, staged.values, staged.lengths, self.progress.tokens))
        pool.put(staged.values, staged.lengths, self.progress.tokens)

    def _add_mass(self, staged: Staged) -> None:
        """Adds what rows received; what the call's own did is written with them."""
        tokens = staged.values["k"].shape[2]
        width = staged.mass[0].shape[3]
        if "mass" not in self.pool.tensors:
            with torch.inference_mode(False):
                like = self.pool.tensors["bias"].new_empty(0, self.pool.page, width)
                self._hold(self.pool.with_sidecar("mass", like))
        own = self.pool.tensors["bias"].new_zeros(self.batch, self.pool.heads, tokens, width)
        for extent, mass in zip(self.pool.extents, staged.mass, strict=True):
            held = mass.shape[2] if staged.placed else mass.shape[2] - tokens
            received = self.pool.view("mass", extent).narrow(2, 0, held)
            if self.pool.journal is not None:
                self.pool.journal.keep(received)
            received.add_(mass[:, :, :held])
            if not staged.placed:
                own[:, list(extent.heads)] = mass[:, :, held:].to(own.dtype)
        staged.values["mass"] = own

    def _keep_queries(self, q: Tensor, lengths: int | Tensor) -> None:
        """Keeps the last queries of each item, before the call's tokens are counted."""
        if self.last_queries is None:
            with torch.inference_mode(False):
                self.last_queries = query_ring(self.policy, q)
        ring = self.last_queries
        tokens = self.progress.tokens
        if q.shape[2] == 1 and isinstance(lengths, int) and isinstance(tokens, int):
            if self._journal is not None:
                self._journal.keep(ring.values.narrow(2, tokens % ring.rows, 1))
            ring.write_one(q, tokens)
            return
        if self._journal is not None:
            self._journal.keep(ring.values)
        ring.write(q, self._near(tokens), self._near(lengths))

    def _near(self, numbers: int | Tensor) -> int | Tensor:
        """Numbers where the pool lies."""
        return numbers if isinstance(numbers, int) else numbers.to(self.device)

    def _advance(self, progress: Progress) -> None:
        """Counts tokens, as every cache does."""
        self.progress = progress
        tokens = progress.tokens
        if self._earlier:
            # No further back than slack.
            self._earlier = [moment for moment in self._earlier if self._may_return(moment)]
        if isinstance(tokens, int):
            self.length = tokens
            self.bound = tokens
            self._lengths = None
        else:
            self.length = None
            self.bound = int(tokens.max())
            self._lengths = tokens.to(self.device)

    def _may_return(self, moment: Moment) -> bool:
        """Whether slack reaches back to when rows were chosen."""
        behind = self.progress.tokens - moment.progress.tokens
        return is_any(behind <= self.policy.slack)

    def take_over(self, pool: PagePool, progress: Progress, lost: Lost | None) -> None:
        """Holds what a pool does, instead of what is held."""
        self._hold(pool)
        self.lost = lost
        self.choice = None
        self._beside = None
        self._staged = None
        self._earlier = []
        self._oldest = 0
        self._advance(progress)

    def moment(self) -> Moment:
        """What the cache is now."""
        counts = tuple((extent.live, extent.rows) for extent in self.pool.extents)
        return Moment(self.pool, counts, self.progress, self.lost)

    def compact(self) -> None:
        """Has the policy choose rows now, for all items, if it does: what it does not keep is given back."""
        self._staged = None
        if self.policy.compacts and self.batch:
            self._choose(True)
        with torch.inference_mode(False), torch.no_grad():
            self._hold(self.pool.trimmed())

    def _choose(self, due: bool | Tensor) -> None:
        """Chooses rows of some items."""
        if not self.policy.compacts or not is_any(due):
            return
        before = self.moment()
        with torch.inference_mode(False), torch.no_grad():
            keep = self.policy.keep(self.seen())
            if keep is not None:
                full = torch.tensor(self._full, device="cpu")
                stays = full.expand(self.batch, -1)
                if isinstance(due, Tensor):
                    stays = stays | ~due.unsqueeze(1)
                pool, lost = apply(self.pool, keep, stays)
                self._hold(pool)
                self._beside = None
                self._join(lost)
                self.choice = without(self.choice, due)
                if self.policy.slack:
                    self._earlier = [*self._earlier, before]
        self.progress = self.progress.choosing(due)

    def _join(self, lost: Lost | None) -> None:
        """Adds to what compensation rows stand for."""
        if lost is not None:
            self.lost = lost if self.lost is None else self.lost.plus(lost)
            self._beside = None

    def seen(self) -> Seen:
        """What the policy is shown."""
        last = None
        if self.last_queries is not None:
            queries = self.last_queries.last(self.policy.window, self._near(self.progress.tokens))
            last = LastQueries(queries, self.scale)
        beside = self.beside()
        rows = None if beside is None else (beside[0], beside[2])
        return seen_of(self.pool, self.policy, self.lengths, last=last, beside=rows)

    def beside(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Compensation rows as the next token reads them: keys ``[B, G, D]``, values and biases ``[B, G]``."""
        if self._beside is None:
            lost = self.lost
            if self.policy.folds and self.policy.slack:
                out_of_sight = hidden(self.pool)
                lost = out_of_sight if lost is None else lost.plus(out_of_sight)
            if lost is None:
                return None
            self._beside = self.shown(lost)
        return self._beside

    def shown(self, lost: Lost) -> tuple[Tensor, Tensor, Tensor]:
        """Compensation rows for what heads have lost ``[B', G]``: keys, values and biases."""
        k, v, moment = lost.mean()
        bias = self.policy.fold_bias(k, lost.mass, moment if "moment" in self.pool.tensors else None)
        return k, v, torch.where(lost.mass > 0, bias, -torch.inf)
