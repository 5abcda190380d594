"""A cache that holds no more than later rows can read: a window and a sink, near blocks and kept ones, whole heads.

Letters: B batch, T tokens of a call, H query heads, G KV heads, h heads of a region, D key width, Dv value width, R
rows of a region.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnzoo.cache.evicting.regions import (
    FullRegion,
    Region,
    StreamingRegion,
    column_of,
    in_order,
    of_heads,
    of_run,
    picked,
    regions_of,
)
from attnzoo.cache.held import HeldCache
from attnzoo.cache.journal import Journal
from attnzoo.cache.kv_cache import Stream
from attnzoo.cache.lengths import Lengths
from attnzoo.cache.owner import Identity
from attnzoo.cache.replay import refuse_transforms
from attnzoo.cache.retention import Retention
from attnzoo.cache.rows import RowCache
from attnzoo.cache.streams import widened, with_rows
from attnzoo_kernels.errors import ConfigError, UnsupportedError


class EvictingCache(HeldCache):
    """A cache that evicts what no later row reads; made by ``new_cache(..., evict=True)``, or for a policy.

    A call's tokens are staged, and written when it has succeeded. How many tokens are held counts those that are gone.

    Attributes:
        retention: What rows can read.
        regions: Where it lies: buffers are named ``<stream>.<region>``, ``[B, h, R + 1, D]``.
        margin: Tokens that may be taken back.
        rules: Whether rows read what is retained whatever their layer's own rule is: the retention is a policy's.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        *,
        retention: Retention,
        margin: int = 0,
        rules: bool = False,
        **options: Any,
    ) -> None:
        self.retention = retention
        self.margin = margin
        self.rules = rules
        self.regions = regions_of(retention, -(-margin // retention.block))
        self._staged: tuple[dict[str, Tensor], int | Tensor] | None = None
        self._placed = False
        self._oldest: int | Tensor = 0
        self._journal: Journal | None = None
        self._pairs = [(region, f"k.{region.name}", f"v.{region.name}") for region in self.regions]
        super().__init__(streams, **options)

    def _allocate(
        self, streams: Mapping[str, Stream], batch: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        for region in self.regions:
            rows = region.rows(self.max_length) + 1
            for name, stream in streams.items():
                shape = (batch, len(region.heads), rows, stream.width)
                self._buffers[f"{name}.{region.name}"] = torch.zeros(shape, device=device, dtype=stream.dtype or dtype)

    @property
    def streams(self) -> dict[str, Tensor]:
        """The buffers by name, each ``[B, h, R, D]``."""
        return {name: x[:, :, :-1] for name, x in self._buffers.items()}

    @property
    def bytes_per_token(self) -> int:
        """Bytes held for each token of an item when it is full, rounded up."""
        item = sum(x.shape[1] * x.shape[2] * x.shape[3] * x.element_size() for x in self.streams.values())
        return -(-item // self.max_length)

    @property
    def held_rows(self) -> int:
        """Rows that the next token's row can read, of all items and KV heads together, itself not counted."""
        lengths = self.lengths.tolist() if self.length is None else [self.length] * self.batch
        return sum(region.read_rows(length) for region in self.regions for length in lengths)

    @property
    def kv_heads(self) -> int:
        """KV heads G."""
        return len(self.retention.full)

    @property
    def row_bytes(self) -> int:
        """Bytes of the values of one token and KV head in all streams."""
        name = self.regions[0].name
        own = (x for stream, x in self._buffers.items() if stream.endswith("." + name))
        return sum(x.shape[3] * x.element_size() for x in own)

    @property
    def held_bytes(self) -> int:
        """Bytes of :attr:`held_rows`."""
        return self.held_rows * self.row_bytes

    def append(self, values: Mapping[str, Tensor], lengths: int | Tensor, *, differentiable: bool) -> NoReturn:
        """Refuses: what is remembered is no sequence; see :meth:`stage`.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError("append: a cache that evicts holds no sequence; its layer stages and commits")

    def grow(self, max_length: int) -> None:
        """Makes room for more tokens of each item; what is held stays.

        Raises:
            TypeError: If ``max_length`` is no int.
            ShapeError: If that would be less room than there is.
        """
        self._check_growth(max_length)
        with torch.inference_mode(False), torch.no_grad():
            for region in self.regions:
                rows = region.rows(max_length)
                for name in self._names(region):
                    if rows + 1 != self._buffers[name].shape[2]:
                        self._buffers[name] = with_rows(self._buffers[name], rows)
        self.max_length = max_length

    def crop(self, length: int | Tensor) -> None:
        """Keeps the first tokens of every item: at most ``length``, which is int64 ``[B]`` where items differ.

        Raises:
            TypeError: If ``length`` is neither.
            ShapeError: If it is negative, or not one number for each item.
            UnsupportedError: If what the tokens left would read may be gone: nothing is changed then. All tokens may
                be taken back from a cache with a margin, and as many as its margin holds.
        """
        if not self.margin:
            raise UnsupportedError(
                "crop: a cache that evicts cannot go back; use one without evict=True, or a policy with slack"
            )
        most = self._check_crop(length)
        before = self.offset
        after = Lengths(before).minimum(Lengths(length).to(self.device)).value
        moved = {}
        with torch.inference_mode(False), torch.no_grad():
            for region in self.regions:
                if isinstance(region, StreamingRegion):
                    row = self._cropped(region, before, after)
                    for name in self._names(region):
                        moved[name] = picked(self._buffers[name], row)
        self._buffers |= moved
        if most:
            block = self.retention.block
            oldest = (before // block - self.retention.local - -(-self.margin // block) + 1) * block
            self._oldest = Lengths(oldest).maximum(Lengths(self._oldest)).value
        else:
            self._oldest = 0
        self._count_left(Lengths(after), most)

    def _cropped(self, region: StreamingRegion, before: int | Tensor, after: int | Tensor) -> Tensor:
        """For each row of a region that holds fewer tokens, the row that it comes from, int64 ``[B|1, h|1, R + 1]``."""
        rows = self._buffers[self._names(region)[0]].shape[2]
        token = region.token_at(rows, Lengths(after).column(3), self.device)
        row = region.row_of(token.clamp(min=0), Lengths(before).column(3))
        is_known = (row >= region.margin) | ((row >= 0) & (token >= Lengths(self._oldest).column(3)))
        needed = (token >= 0) & (torch.arange(rows, device=self.device) >= region.margin)
        if bool((needed & ~is_known).any()):
            raise UnsupportedError(
                f"crop: expected at most {self.margin} tokens to be taken back from a cache that evicts, since the "
                f"last call that took some back, or all; got {after} of {before} to be kept"
            )
        return row.clamp(min=0)

    def reorder(self, index: Tensor) -> None:
        """Takes the items ``index``, int ``[B']``, in their order: beams are chosen, repeated or dropped."""
        super().reorder(index)
        self._oldest = Lengths(self._oldest).select(index.to(self.device)).value

    def state_dict(self) -> dict[str, Any]:
        """As ever; of a policy's cache, what is retained is said too."""
        state = super().state_dict()
        return {**state, "retention": self.retention.as_json()} if self.rules else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As ever; tokens from before the state cannot be taken back.

        Raises:
            ConfigError: If what is retained is something else, too.
        """
        mine = self.retention.as_json() if self.rules else None
        given = state.get("retention") if isinstance(state, Mapping) else None
        if given != mine:
            raise ConfigError(f"policy: expected the state of a cache that holds {mine}, got {given}")
        known = {name: x for name, x in state.items() if name != "retention"} if isinstance(state, Mapping) else state
        super().load_state_dict(known)
        self._oldest = self.max_length

    def _held(self, buffers: Mapping[str, Tensor], bound: int) -> dict[str, Tensor]:
        rows = {name: region.rows(bound) if bound else 0 for region in self.regions for name in self._names(region)}
        return {name: x[:, :, : rows[name]] for name, x in buffers.items()}

    def _clear_behind(self) -> None:
        """Nothing: what lies behind the tokens is read by nobody."""

    def _names(self, region: Region) -> list[str]:
        return [name for name in self._buffers if name.endswith("." + region.name)]

    def _widen(self, values: Mapping[str, Tensor]) -> None:
        if self._rounds:
            return
        with torch.inference_mode(False), torch.no_grad():
            for name, x in self._buffers.items():
                self._buffers[name] = widened(x, values[name.rpartition(".")[0]].dtype)

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Writes what the block staged; if it raises, or writing does, the cache is what it was before."""
        before = dict(self._buffers)
        self._journal = journal = Journal()
        try:
            with super().all_or_nothing():
                yield
                self.commit()
        except BaseException:
            with torch.inference_mode(False), torch.no_grad():
                journal.put_back()
            self._buffers = before
            raise
        finally:
            self._staged = None
            self._placed = False
            self._journal = None

    @property
    def rule(self) -> Retention | None:
        """What is retained, if that is a policy's."""
        return self.retention if self.rules else None

    def stage(self, values: Mapping[str, Tensor], lengths: int | Tensor, *, score: Tensor | None = None) -> None:
        """Takes note of a call's tokens ``[B, G, T, D]``, left-aligned, for :meth:`commit`; scores have no place."""
        refuse_transforms(values)
        self._widen(values)
        self._staged = {name: value.detach() for name, value in values.items()}, lengths
        self._placed = False

    def commit(self) -> None:
        """Writes the staged tokens where a later row may read them; called when the call has succeeded."""
        if self._staged is None:
            return
        values, lengths = self._staged
        placed = self._placed
        self._staged = None
        self._placed = False
        if placed:
            self._count_row()
            return
        tokens = next(iter(values.values())).shape[2]
        before = self.offset
        with torch.inference_mode(False), torch.no_grad():
            for region in self.regions:
                self._write(region, values, before, lengths)
        if self.length is not None and not Lengths(lengths).differ:
            self.length += tokens
            self.bound = self.length
        else:
            self._lengths = self.lengths + lengths
            self.length = None
            self.bound = min(self.bound + tokens, self.max_length)

    def _write(self, region: Region, values: Mapping[str, Tensor], before: int | Tensor, lengths: int | Tensor) -> None:
        """Writes a call's tokens to a region."""
        tokens = next(iter(values.values())).shape[2]
        if isinstance(region, FullRegion):
            token = torch.arange(tokens, device=self.device)
            last = self._buffers[self._names(region)[0]].shape[2] - 1
            row = torch.where(Lengths(lengths).holds(token), Lengths(before).column() + token, last)
            row = row.expand(self.batch, -1)  # [B, T]
            item = torch.arange(self.batch, device=self.device).unsqueeze(1)
            for name in self._names(region):
                value = of_heads(values[name.rpartition(".")[0]], region.heads).transpose(1, 2)
                x = self._buffers[name]
                x.transpose(1, 2).index_put_((item, row), value.to(x.dtype))
            return
        for name in self._names(region):
            x = self._buffers[name]
            held = column_of(before + lengths, self.device)
            token = region.token_at(x.shape[2], held, self.device)
            value = of_heads(values[name.rpartition(".")[0]], region.heads)
            self._buffers[name] = self._gathered(region, x, value.to(x.dtype), token, before)

    def read(self, stream: str, region: Region, own: Tensor, token: Tensor) -> Tensor:
        """The values of some tokens, those of this call among them: a copy ``[B, h, n, D]`` in the dtype of these.

        Args:
            stream: Which stream.
            region: Of which heads.
            own: This call's values for these heads ``[B, h, T, D]``, which gradients reach.
            token: Tokens that are held or this call's, int64 ``[B|1, h|1, n]``; anything elsewhere for -1.
        """
        held = self._buffers[f"{stream}.{region.name}"].to(own.dtype)
        return self._gathered(region, held, own, token, self.offset)

    def _gathered(self, region: Region, held: Tensor, own: Tensor, token: Tensor, before: int | Tensor) -> Tensor:
        if Lengths(before).shared == 0:
            return picked(own, token.clamp(0, max(own.shape[2] - 1, 0)))
        count = column_of(before, self.device)
        behind = held.shape[2] - count
        row = torch.where(token < count, region.row_of(token.clamp(min=0), count), token + behind)
        return picked(torch.cat((held, own), 2), row.clamp(0, held.shape[2] + own.shape[2] - 1))

    def holds_in(self, dtype: torch.dtype) -> bool:
        """Whether everything is held in a dtype."""
        return all(x.dtype == dtype for x in self._buffers.values())

    def takes_row(self, owner: tuple[Identity | None, Any], x: Tensor) -> bool:
        """Whether :meth:`attend_row` can take the next token of a layer."""
        return RowCache.takes_row(self, owner, x)

    def attend_row(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of one row over what it reads, where regions lie; its own token is staged by that.

        Args:
            q: ``[B, H, 1, D]``, in the dtype of the buffers, where items share their length.
            k: The row's own key ``[B, G, 1, D]``.
            v: The row's own value ``[B, G, 1, Dv]``.
            scale: The factor on scores.

        Returns:
            ``[B, H, 1, Dv]``.
        """
        out = self._attend_in_place(q, k, v, scale)
        self._staged = {"k": k, "v": v}, 1
        self._placed = True
        return out

    def decode_row(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """As :meth:`attend_row`, and the token is held: nothing can fail behind it that the caller would undo."""
        out = self._attend_in_place(q, k, v, scale)
        self._count_row()
        return out

    def _attend_in_place(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        batch, heads, _, width = q.shape
        groups = len(self.retention.full)
        # The query heads of a group along the rows: keys and values are read once for all of them.
        rows = q.reshape(batch, groups, heads // groups, width)
        parts: list[Tensor] = []
        for region, (keys, values) in self._regions_held():
            region_q, region_k, region_v = (of_heads(x, region.heads) for x in (rows, k, v))
            for run in region.runs(self.bound):
                first, end = run.heads
                begin, behind = run.rows
                run_keys = of_run(keys, first, end)
                run_values = of_run(values, first, end)
                # The row's own token is written first, where it would lie: what it is written over is read by nobody.
                run_keys.narrow(2, run.own, 1).copy_(of_run(region_k, first, end))
                run_values.narrow(2, run.own, 1).copy_(of_run(region_v, first, end))
                seen_keys = run_keys.narrow(2, begin, behind - begin)
                seen_values = run_values.narrow(2, begin, behind - begin)
                run_q = of_run(region_q, first, end)
                parts.append(scaled_dot_product_attention(run_q, seen_keys, seen_values, scale=scale))
        out = parts[0] if len(parts) == 1 else in_order(torch.cat(parts, 1), self.regions)  # [B, G, H / G, Dv]
        return out.reshape(batch, heads, 1, -1)

    def _count_row(self) -> None:
        """Counts a token whose keys and values are written."""
        held = self.bound + 1
        for region, buffers in self._regions_held():
            region.retire(buffers, held, self._journal)
        self.length = held
        self.bound = held

    def _regions_held(self) -> Iterator[tuple[Region, tuple[Tensor, Tensor]]]:
        for region, key, value in self._pairs:
            yield region, (self._buffers[key], self._buffers[value])

    def in_order(self, parts: list[Tensor]) -> Tensor:
        """The query heads of all regions ``[B, h * H / G, T, D]`` in their order, ``[B, H, T, D]``."""
        if len(parts) == 1:
            return parts[0]
        return in_order(torch.cat(parts, 1).unflatten(1, (len(self.retention.full), -1)), self.regions).flatten(1, 2)

    def fork(self) -> Self:
        """A copy of its own, for the same layer."""
        copy = super().fork()
        copy._staged = None
        return copy
