"""Which key blocks each query block reads, as data.

Letters: B batch, h heads of the layout (1, G or H), M/N query/key blocks, K blocks listed for a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from attnzoo_kernels.errors import ShapeError, UnsupportedError
from attnzoo_kernels.layouts import build, picture
from attnzoo_kernels.layouts.density import gathered_rows, layout_density
from attnzoo_kernels.layouts.pytree import register_layout
from attnzoo_kernels.runtime.plain import is_readable
from attnzoo_kernels.runtime.tracing import traceable
from attnzoo_kernels.spec.extras import Extras
from attnzoo_kernels.spec.token_rule import bounded


@dataclass(frozen=True, eq=False, repr=False)
class BlockLayout:
    """Lists of key blocks, one for each query block: a new pattern or length is new data, never a new program.

    Row ``(b, h, m)`` reads key blocks ``col[start : start + count]``, in no particular order and each at most once.
    Query block m holds rows ``m * block_q`` onwards. A layout says nothing about causality, which is the call's rule.
    The tensors are copies: changing what was passed in changes no layout. A registered pytree.

    Attributes:
        block_q: Rows in a query block.
        block_k: Slots in a key block.
        seq_q: Rows T.
        seq_k: Slots S.
        start: int32 ``[B|1, h, M]``.
        count: int32 ``[B|1, h, M]``.
        col: int32 ``[cap]``; what no row lists has no meaning.
        origin: int32 ``[cap]`` beside ``col``, the rotary origin of each entry, or ``None``.

    Raises:
        TypeError: If a size is no int.
        ValueError: If a size is out of range, or shapes, dtypes or values do not fit.
    """

    block_q: int
    block_k: int
    seq_q: int
    seq_k: int
    start: Tensor
    count: Tensor
    col: Tensor
    origin: Tensor | None = None

    def __post_init__(self) -> None:
        sizes = build.check_sizes(*self.sizes)
        self.__dict__.update(zip(("block_q", "block_k", "seq_q", "seq_k"), sizes, strict=True))
        lists = build.LayoutLists(self.start, self.count, self.col, self.origin)
        build.check_lists(lists, -(-self.seq_q // self.block_q))
        for name in ("start", "count", "col", "origin"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, value.detach().clone())
        if is_readable(self.col):
            self.validate()

    def rows_from(self, first: int) -> Self:
        """The query blocks from ``first`` on, as a layout of their own that shares this one's memory.

        Raises:
            ShapeError: If there are none.
        """
        rows = self.seq_q - first * self.block_q
        if first < 0 or rows <= 0:
            raise ShapeError(f"first: expected one of {self.start.shape[2]} query blocks, got {first}")
        lists = build.LayoutLists(self.start[:, :, first:], self.count[:, :, first:], self.col, self.origin)
        return self._trusted((self.block_q, self.block_k, rows, self.seq_k), lists)

    @classmethod
    def _trusted(cls, sizes: build.Sizes, lists: build.LayoutLists) -> Self:
        """A layout from parts that are fresh and known to be right."""
        layout = object.__new__(cls)
        names = ("block_q", "block_k", "seq_q", "seq_k", "start", "count", "col", "origin")
        for name, value in zip(names, (*sizes, lists.start, lists.count, lists.col, lists.origin), strict=True):
            object.__setattr__(layout, name, value)
        return layout

    def with_lengths(self, seq_q: int, seq_k: int) -> Self:
        """The same lists for other lengths of as many blocks, as of the next token; they share their tensors.

        Raises:
            TypeError: If a length is no int.
            ValueError: If it has another number of blocks.
        """
        sizes = build.check_sizes(self.block_q, self.block_k, seq_q, seq_k)
        grid = (-(-sizes[2] // self.block_q), -(-sizes[3] // self.block_k))
        if grid != self.grid:
            raise ShapeError(f"seq_q, seq_k: expected {self.grid} blocks of queries and of keys, got {grid}")
        return type(self)._trusted(sizes, build.LayoutLists(self.start, self.count, self.col, self.origin))

    @classmethod
    @traceable("from_mask")
    def from_mask(cls, keep: Tensor, block_q: int, block_k: int, seq_q: int, seq_k: int) -> Self:
        """The layout that reads where a mask is true.

        Args:
            keep: bool ``[B|1, h, M, N]``.
            block_q: Rows in a query block.
            block_k: Slots in a key block.
            seq_q: Rows T.
            seq_k: Slots S.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If a size or value does not fit.
        """
        block_q, block_k, seq_q, seq_k = build.check_sizes(block_q, block_k, seq_q, seq_k)
        build.check_grid("keep", keep, (-(-seq_q // block_q), -(-seq_k // block_k)), torch.bool)
        return cls._trusted((block_q, block_k, seq_q, seq_k), build.lists_of_mask(keep))

    @classmethod
    @traceable("from_indices")
    def from_indices(
        cls,
        index: Tensor,
        block_q: int,
        block_k: int,
        seq_q: int,
        seq_k: int,
        origin: Tensor | None = None,
        *,
        validate: bool = False,
    ) -> Self:
        """The layout that reads listed blocks.

        Args:
            index: Integers ``[B|1, h, M, K]``, key blocks; -1 anywhere means none.
            block_q: Rows in a query block.
            block_k: Slots in a key block.
            seq_q: Rows T.
            seq_k: Slots S.
            origin: Integers of the same shape, the rotary origin of each entry.
            validate: Check values (range, duplicates) off the CPU too, which synchronises. On CPU they always are.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If a size or value does not fit.
        """
        block_q, block_k, seq_q, seq_k = build.check_sizes(block_q, block_k, seq_q, seq_k)
        build.check_grid("index", index, (-(-seq_q // block_q), None), None)
        if origin is not None:
            build.check_grid("origin", origin, (-(-seq_q // block_q), None), None)
            if origin.shape != index.shape:
                raise ShapeError(f"origin: expected {list(index.shape)} as index has it, got {list(origin.shape)}")
        # Before the narrowing to int32, which would make other blocks of values beyond it.
        index = index.long()
        origin = None if origin is None else origin.long()
        if validate or is_readable(index):
            build.check_range("index", index, -1, -(-seq_k // block_k) - 1)
            if origin is not None:
                build.check_range("origin", origin, -(1 << 31), (1 << 31) - 1)
            build.check_unique(index)
        return cls._trusted((block_q, block_k, seq_q, seq_k), build.lists_of_indices(index, origin))

    @classmethod
    def dense(
        cls, block_q: int, block_k: int, seq_q: int, seq_k: int, *, device: torch.device | str | None = None
    ) -> Self:
        """Every block."""
        block_q, block_k, seq_q, seq_k = build.check_sizes(block_q, block_k, seq_q, seq_k)
        lists = build.dense_lists(-(-seq_q // block_q), -(-seq_k // block_k), device)
        return cls._trusted((block_q, block_k, seq_q, seq_k), lists)

    @classmethod
    def window(
        cls,
        block_q: int,
        block_k: int,
        seq_q: int,
        seq_k: int,
        *,
        window: int,
        causal: bool = True,
        q_start: int | Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """The blocks that cover a window; the token rule itself is ``Extras(window=...)``. See :meth:`sink_window`."""
        return cls.sink_window(
            block_q, block_k, seq_q, seq_k, window=window, sink=0, causal=causal, q_start=q_start, device=device
        )

    @classmethod
    def sink_window(  # noqa: PLR0913  (four sizes, the pattern's two numbers, and where it lies)
        cls,
        block_q: int,
        block_k: int,
        seq_q: int,
        seq_k: int,
        *,
        window: int,
        sink: int,
        causal: bool = True,
        q_start: int | Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """The blocks that cover a window and a sink.

        Args:
            block_q: Rows in a query block.
            block_k: Slots in a key block.
            seq_q: Rows T.
            seq_k: Slots S.
            window: Slots seen, the own one included.
            sink: First slots, which stay visible.
            causal: Whether rows see only slots up to their own; else the window reaches as far ahead.
            q_start: The slot of row 0, an int or int ``[B]``; ``None`` aligns the last row at the last slot.
            device: Where the layout lies; by default with ``q_start``.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If a size or value does not fit.
        """
        block_q, block_k, seq_q, seq_k = build.check_sizes(block_q, block_k, seq_q, seq_k)
        build.check_at_least("window", window, 1)
        build.check_at_least("sink", sink, 0)
        first = build.first_slots(q_start, seq_q, seq_k, device)
        sizes = (block_q, block_k, seq_q, seq_k)
        index = build.sink_window_indices(sizes, first, bounded(window), bounded(sink), causal=causal)
        return cls._trusted(sizes, build.lists_of_indices(index, None))

    @classmethod
    def strided(  # noqa: PLR0913  (four sizes, the pattern's numbers, and where it lies)
        cls,
        block_q: int,
        block_k: int,
        seq_q: int,
        seq_k: int,
        *,
        local_blocks: int,
        vert_stride: int,
        shift: Sequence[int] = (0,),
        sink_blocks: int = 0,
        dense_heads: Sequence[bool] | None = None,
        q_start: int | Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Local blocks, every stride-th block with a shift for each head, and first blocks.

        With I the key block that a row's own slot lies in, head n reads block J if ``J <= I`` and: ``I - J <
        local_blocks``, or ``(J + shift[n]) % vert_stride == 0``, or ``J < sink_blocks``, or the head is dense. A query
        block reads what any of its rows reads.

        Args:
            block_q: Rows in a query block; a divisor of ``block_k`` keeps a row's blocks independent of its neighbours.
            block_k: Slots in a key block.
            seq_q: Rows T.
            seq_k: Slots S.
            local_blocks: Nearest blocks, the own one included.
            vert_stride: Every how many blocks one further away is read.
            shift: One number a head.
            sink_blocks: First blocks, which every head reads.
            dense_heads: Which heads read everything.
            q_start: The slot of row 0, an int or int ``[B]``; ``None`` aligns the last row at the last slot.
            device: Where the layout lies; by default with ``q_start``.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If a size or value does not fit.
        """
        block_q, block_k, seq_q, seq_k = build.check_sizes(block_q, block_k, seq_q, seq_k)
        build.check_at_least("local_blocks", local_blocks, 1)
        build.check_at_least("vert_stride", vert_stride, 1)
        build.check_at_least("sink_blocks", sink_blocks, 0)
        if not isinstance(shift, Sequence):
            raise TypeError(f"shift: expected a sequence of ints, got {type(shift).__name__}")
        first = build.first_slots(q_start, seq_q, seq_k, device)
        sizes = (block_q, block_k, seq_q, seq_k)
        keep = build.strided_mask(sizes, first, (local_blocks, vert_stride, sink_blocks), shift, dense_heads)
        return cls._trusted(sizes, build.lists_of_mask(keep))

    @classmethod
    def from_block_mask(cls, block_mask: Any, *, causal: bool | None = None) -> Self:
        """The layout of a FlexAttention ``BlockMask`` whose partial blocks are causal or see everything.

        A layout does not hold the rule: :func:`attnzoo_kernels.read_block_mask` gives it too, and takes more of them.
        ``causal`` is what the call will say; ``None`` takes either, and warns of a mask that needs ``causal=False``.

        Raises:
            UnsupportedError: If a partial block follows another rule.
            ValueError: If the mask is not of the causality that is asked for.
        """
        from attnzoo_kernels.layouts import flex

        return cls.from_mask(*flex.read_bare(block_mask, causal))

    def to_block_mask(self, *, causal: bool = True, extras: Extras | None = None, separate_full: bool = True) -> Any:
        """This layout as a FlexAttention ``BlockMask`` that shows what a call sees with these extras.

        Without ``separate_full``, blocks that are seen whole are not listed apart.

        Raises:
            UnsupportedError: If FlexAttention cannot hold the layout (empty, origins) or the extras.
        """
        if self.origin is not None:
            raise UnsupportedError("origin: a BlockMask has no rotary origins")
        from attnzoo_kernels.layouts import flex

        return flex.make_block_mask(self.lists, self.sizes, flex.Shown(causal, extras, separate_full))

    @property
    def grid(self) -> tuple[int, int]:
        """``M, N``: query blocks and key blocks."""
        return -(-self.seq_q // self.block_q), -(-self.seq_k // self.block_k)

    @property
    def sizes(self) -> build.Sizes:
        """``block_q, block_k, seq_q, seq_k``."""
        return self.block_q, self.block_k, self.seq_q, self.seq_k

    @property
    def lists(self) -> build.LayoutLists:
        """The tensors."""
        return build.LayoutLists(self.start, self.count, self.col, self.origin)

    def validate(self) -> None:
        """Checks the values: lists lie inside ``col``, blocks exist, none is listed twice in a row. Synchronises.

        Raises:
            ShapeError: If one of that does not hold.
        """
        build.check_values(self.lists, self.grid[1])

    def entries(self) -> tuple[Tensor, Tensor]:
        """Flat row and key block of every entry, int64 ``[nnz]`` each. Synchronises."""
        row, index = build.listed_indices(self.lists)
        return row, self.col.long()[index]

    def to_mask(self) -> Tensor:
        """The layout as a mask, bool ``[B|1, h, M, N]``. Synchronises off the CPU."""
        row, col = self.entries()
        keep = torch.zeros(self.start.numel(), self.grid[1], dtype=torch.bool, device=self.col.device)
        keep[row, col] = True
        return keep.view(*self.start.shape, self.grid[1])

    def density(self, causal: bool = True) -> float:
        """Visible (query, key) pairs over those of a dense call under the same rule; 1 where there are none."""
        return layout_density(self.lists, self.sizes, causal=causal)

    def kv_rows(self) -> Tensor:
        """Key rows gathered for each query block, int64 ``[B|1, h, M]``."""
        return gathered_rows(self.lists, self.sizes)

    def compact(self) -> BlockLayout:
        """The same layout with exactly as many entries as are listed. Synchronises."""
        return BlockLayout._trusted(self.sizes, build.compact_lists(self.lists))

    def to(self, device: torch.device | str) -> BlockLayout:
        """The layout on another device."""
        return BlockLayout._trusted(self.sizes, build.lists_on(self.lists, device))

    def __or__(self, other: BlockLayout) -> BlockLayout:
        """What either layout reads; batch and heads broadcast."""
        return self._combine(other, torch.logical_or)

    def __and__(self, other: BlockLayout) -> BlockLayout:
        """What both layouts read; batch and heads broadcast."""
        return self._combine(other, torch.logical_and)

    def _combine(self, other: BlockLayout, operator: Any) -> BlockLayout:
        if not isinstance(other, BlockLayout):
            return NotImplemented
        if self.origin is not None or other.origin is not None:
            raise UnsupportedError("layout: | and & are not defined for layouts with rotary origins")
        if self.sizes != other.sizes:
            raise ShapeError(f"layout: expected block_q, block_k, seq_q, seq_k = {self.sizes}, got {other.sizes}")
        return BlockLayout.from_mask(operator(*build.same_heads(self.to_mask(), other.to_mask())), *self.sizes)

    def __repr__(self) -> str:
        batch, heads, blocks_q = self.start.shape
        return (
            f"BlockLayout(blocks {self.block_q}x{self.block_k}, tokens {self.seq_q}x{self.seq_k}, "
            f"batch {batch}, heads {heads}, grid {blocks_q}x{self.grid[1]})"
        )

    def __str__(self) -> str:
        return picture.draw(self)

    def plot(self, ax: Any = None) -> Any:
        """Draws the layout with matplotlib, heads side by side, and returns the axes.

        Raises:
            ImportError: If matplotlib is missing.
        """
        return picture.plot(self, ax)


register_layout(BlockLayout)
