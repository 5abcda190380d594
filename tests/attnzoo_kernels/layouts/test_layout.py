"""Layouts against masks made by looping over rows and slots."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from attnzoo_kernels import BlockLayout, ShapeError, UnsupportedError
from tests.strategies import Numbers

sizes = st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(0, 50), st.integers(0, 50))
"""``block_q, block_k, seq_q, seq_k``."""

Size = tuple[int, int, int, int]


def grid(size: Size) -> tuple[int, int]:
    return -(-size[2] // size[0]), -(-size[3] // size[1])


def block_cover(size: Size, sees: Any, q_start: int | None = None) -> Tensor:
    """The blocks ``[M, N]`` in which some row sees some slot by ``sees(own slot, slot)``."""
    block_q, block_k, seq_q, seq_k = size
    first = seq_k - seq_q if q_start is None else q_start
    cover = torch.zeros(*grid(size), dtype=torch.bool)
    for t in range(seq_q):
        for s in range(seq_k):
            if not cover[t // block_q, s // block_k] and sees(first + t, s):
                cover[t // block_q, s // block_k] = True
    return cover


def random_keep(size: Size, seed: int = 0, batch: int = 1, heads: int = 1, density: float = 0.5) -> Tensor:
    return Numbers.of(seed).chance(density, batch, heads, *grid(size))


def assert_covers(layout: BlockLayout, cover: Tensor) -> None:
    assert layout.start.shape == (1, 1, cover.shape[0])
    assert torch.equal(layout.to_mask()[0, 0], cover), f"\n{layout.to_mask()[0, 0].int()}\n{cover.int()}"


@given(sizes, st.integers(0, 999), st.integers(1, 2), st.integers(1, 3), st.sampled_from((0.0, 0.3, 1.0)))
def test_a_mask_comes_back_as_it_was(size: Size, seed: int, batch: int, heads: int, density: float) -> None:
    keep = random_keep(size, seed, batch, heads, density)
    layout = BlockLayout.from_mask(keep, *size)
    assert torch.equal(layout.to_mask(), keep)
    assert torch.equal(layout.count, keep.sum(-1).int())
    layout.validate()


@given(sizes, st.integers(0, 999), st.integers(1, 2), st.integers(1, 3))
def test_indices_in_any_order_with_holes_make_the_mask(size: Size, seed: int, batch: int, heads: int) -> None:
    n = Numbers.of(seed)
    keep = random_keep(size, seed, batch, heads)
    blocks_q, blocks_k = grid(size)
    index = torch.where(keep, torch.arange(blocks_k).expand_as(keep), -1)
    padded = torch.cat([index, torch.full((batch, heads, blocks_q, 2), -1)], -1)[..., n.order(blocks_k + 2)]
    for dtype in (torch.int64, torch.int32):
        assert torch.equal(BlockLayout.from_indices(padded.to(dtype), *size).to_mask(), keep)


@given(sizes)
def test_dense_reads_every_block(size: Size) -> None:
    assert BlockLayout.dense(*size).to_mask().all()
    assert BlockLayout.dense(*size).start.shape == (1, 1, grid(size)[0])


@given(sizes, st.integers(1, 60), st.booleans())
@example((8, 16, 5, 2), 3, True)
def test_window_covers_the_tokens_of_its_rule_and_no_block_more(size: Size, window: int, causal: bool) -> None:
    def sees(own: int, s: int) -> bool:
        return 0 <= own - s < window if causal else abs(own - s) < window

    assert_covers(BlockLayout.window(*size, window=window, causal=causal), block_cover(size, sees))


@given(sizes, st.integers(1, 20), st.integers(0, 60), st.integers(0, 40))
def test_sink_window_covers_the_tokens_of_its_rule_and_no_block_more(
    size: Size, window: int, sink: int, q_start: int
) -> None:
    def sees(own: int, s: int) -> bool:
        return s <= own and (own - s < window or s < sink)

    # Rows past the last slot may list the last block beside what they see.
    q_start = min(q_start, max(size[3] - size[2], 0))
    layout = BlockLayout.sink_window(*size, window=window, sink=sink, q_start=q_start)
    cover = block_cover(size, sees, q_start)
    if size[2] <= size[3]:
        assert_covers(layout, cover)
    else:
        assert (layout.to_mask()[0, 0] >= cover).all()


@given(sizes, st.integers(1, 20), st.integers(0, 60))
@example((16, 16, 48, 48), 1, 48)
def test_sink_window_without_causality_covers_the_sinks_ahead(size: Size, window: int, sink: int) -> None:
    def sees(own: int, s: int) -> bool:
        return abs(own - s) < window or s < sink

    layout = BlockLayout.sink_window(*size, window=window, sink=sink, causal=False)
    assert_covers(layout, block_cover(size, sees))


def strided_sees(block_k: int, local: int, stride: int, shift: int, sinks: int, dense: bool) -> Any:
    def sees(own: int, s: int) -> bool:
        mine, other = own // block_k, s // block_k
        return other <= mine and (mine - other < local or (other + shift) % stride == 0 or other < sinks or dense)

    return sees


def strided_covers(size: Size, pattern: tuple[int, int, int], q_start: int | None) -> None:
    local, stride, sinks = pattern
    shift, dense = (0, 1, 5, -2), (False, False, True, False)
    layout = BlockLayout.strided(
        *size,
        local_blocks=local,
        vert_stride=stride,
        shift=shift,
        sink_blocks=sinks,
        dense_heads=dense,
        q_start=q_start,
    )
    mask = layout.to_mask()
    assert mask.shape[:2] == (1, 4)
    for head, (moved, all_of_it) in enumerate(zip(shift, dense, strict=True)):
        cover = block_cover(size, strided_sees(size[1], local, stride, moved, sinks, all_of_it), q_start)
        assert torch.equal(mask[0, head], cover), f"head {head}\n{mask[0, head].int()}\n{cover.int()}"


patterns = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(0, 2))


@given(st.integers(1, 8), st.integers(1, 3), st.integers(0, 40), st.integers(0, 4), patterns)
def test_strided_reads_the_blocks_of_its_rule(
    block_q: int, ratio: int, seq_q: int, chunks: int, pattern: tuple[int, int, int]
) -> None:
    start = chunks * block_q * ratio
    strided_covers((block_q, block_q * ratio, seq_q, start + seq_q), pattern, start)


@given(sizes, patterns)
@example((32, 8, 64, 64), (1, 4, 0))
def test_strided_reads_what_any_row_of_a_query_block_reads(size: Size, pattern: tuple[int, int, int]) -> None:
    strided_covers(size, pattern, None)


@pytest.mark.parametrize("kind", ["window", "strided"])
def test_a_start_for_each_item_is_a_layout_for_each(kind: str) -> None:
    starts = [0, 7, 24]

    def make(q_start: Any) -> BlockLayout:
        if kind == "window":
            return BlockLayout.sink_window(8, 8, 16, 40, window=6, sink=3, q_start=q_start)
        return BlockLayout.strided(8, 8, 16, 40, local_blocks=2, vert_stride=3, shift=(0, 1), q_start=q_start)

    together = make(torch.tensor(starts)).to_mask()
    for mask, start in zip(together, starts, strict=True):
        assert torch.equal(mask, make(start).to_mask()[0])


@given(sizes, st.integers(0, 999), st.sampled_from(((1, 1), (2, 1), (1, 3), (2, 6))))
def test_or_and_and_are_those_of_the_masks(size: Size, seed: int, rows: tuple[int, int]) -> None:
    a, b = random_keep(size, seed, 2, 3), random_keep(size, seed + 1, *rows)
    one, other = BlockLayout.from_mask(a, *size), BlockLayout.from_mask(b, *size)
    wide = max(3, rows[1])
    a, b = a.repeat_interleave(wide // 3, 1), b.repeat_interleave(wide // rows[1], 1)
    for left, right in ((one, other), (other, one)):
        assert torch.equal((left | right).to_mask(), a | b)
        assert torch.equal((left & right).to_mask(), a & b)


@given(sizes, st.integers(0, 999), st.booleans())
def test_density_is_the_share_of_visible_pairs(size: Size, seed: int, causal: bool) -> None:
    block_q, block_k, seq_q, seq_k = size
    keep = random_keep(size, seed, 2, 3)
    tokens = keep.repeat_interleave(block_q, 2).repeat_interleave(block_k, 3)[:, :, :seq_q, :seq_k]
    rule = torch.ones(seq_q, seq_k, dtype=torch.bool)
    rule = rule.tril(seq_k - seq_q) if causal else rule
    dense = int(rule.sum()) * 6
    share = int((tokens & rule).sum()) / dense if dense else 1.0
    assert BlockLayout.from_mask(keep, *size).density(causal) == pytest.approx(share, abs=1e-12)


@given(sizes, st.integers(0, 999))
def test_kv_rows_counts_the_slots_of_the_listed_blocks(size: Size, seed: int) -> None:
    keep = random_keep(size, seed, 2, 3)
    width = [min(size[1], size[3] - n * size[1]) for n in range(grid(size)[1])]
    rows = BlockLayout.from_mask(keep, *size).kv_rows()
    assert rows.dtype == torch.int64
    assert torch.equal(rows, (keep * torch.tensor(width, dtype=torch.int64)).sum(-1))


def roomy() -> BlockLayout:
    """Lists with gaps, in which nonsense stands, and origins."""
    return BlockLayout(
        8, 8, 16, 24,
        torch.tensor([[[1, 4]]], dtype=torch.int32),
        torch.tensor([[[2, 1]]], dtype=torch.int32),
        torch.tensor([99, 2, 0, -5, 1, 77], dtype=torch.int32),
        torch.arange(6, dtype=torch.int32),
    )  # fmt: skip


def test_compact_keeps_what_is_listed_and_nothing_else() -> None:
    tight = roomy().compact()
    assert torch.equal(tight.to_mask(), roomy().to_mask())
    assert tight.to_mask()[0, 0].tolist() == [[True, False, True], [False, True, False]]
    assert tight.col.tolist() == [2, 0, 1]
    assert tight.origin is not None
    assert tight.origin.tolist() == [1, 2, 4]
    assert tight.kv_rows().tolist() == roomy().kv_rows().tolist() == [[[16, 8]]]


def test_origins_stay_beside_their_blocks() -> None:
    index = torch.tensor([[-1, 2, 0], [1, -1, -1]]).view(1, 1, 2, 3)
    layout = BlockLayout.from_indices(index, 8, 8, 16, 24, origin=torch.tensor([[9, 5, 6], [7, 9, 9]]).view(1, 1, 2, 3))
    assert layout.origin is not None
    listed = [
        {int(layout.col[i]): int(layout.origin[i]) for i in range(start, start + count)}
        for start, count in zip(layout.start.flatten().tolist(), layout.count.flatten().tolist(), strict=True)
    ]
    assert listed == [{2: 5, 0: 6}, {1: 7}]


def test_print_shows_every_block() -> None:
    keep = torch.tensor([[[True, False, True], [False, True, False]], [[False] * 3, [True] * 3]]).unsqueeze(0)
    drawn = str(BlockLayout.from_mask(keep, 8, 8, 16, 24)).splitlines()
    assert [line.strip() for line in drawn[1:]] == ["head 0", "■⬚■", "⬚■⬚", "head 1", "⬚⬚⬚", "■■■"]
    assert "blocks 8x8, tokens 16x24" in drawn[0]


@pytest.mark.parametrize("size", [(1, 1, 0, 0), (8, 8, 5, 0), (1, 1, 900, 900), (64, 16, 5000, 70)])
def test_print_has_a_bounded_length_at_any_size(size: Size) -> None:
    assert len(str(BlockLayout.dense(*size)).splitlines()) <= 40


def test_plot_draws_on_the_given_axes() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, ax = pyplot.subplots()
    assert BlockLayout.dense(8, 8, 16, 24).plot(ax) is ax
    pyplot.close(figure)


def test_layouts_made_while_compiling_read_the_same() -> None:
    def make(size: Tensor) -> Tensor:
        length = size.shape[0]
        a = BlockLayout.sink_window(8, 16, length, length, window=9, sink=3)
        b = BlockLayout.from_mask(size.new_ones(1, 1, -(-length // 8), -(-length // 16)).bool(), 8, 16, length, length)
        return torch.cat([a.kv_rows(), b.kv_rows()])

    compiled = torch.compile(make, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(50)), make(torch.zeros(50)))


SIZE = (8, 16, 40, 48)
ONES = torch.ones(1, 1, 5, 3).bool()
I32 = torch.int32


def lists(**change: Any) -> dict[str, Any]:
    good = {"start": torch.zeros(1, 1, 5, dtype=I32), "count": torch.full((1, 1, 5), 3, dtype=I32)}
    return {**good, "col": torch.arange(3, dtype=I32), **change}


def blocks(*index: int) -> Tensor:
    return torch.tensor(index).expand(1, 1, 5, len(index))


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    **{
        f"block of {block!r}": (lambda b=block: BlockLayout.dense(b, 16, 40, 48), kind, "block_q: expected")
        for block, kind in ((0, ValueError), (-16, ValueError), (16.0, TypeError), (True, TypeError), ("8", TypeError))
    },
    "negative length": (lambda: BlockLayout.dense(8, 16, -1, 48), ValueError, "seq_q: expected at least 0, got -1"),
    "length as float": (lambda: BlockLayout.dense(8, 16, 40, 48.0), TypeError, "seq_k: expected an int, got float"),
    "mask of integers": (lambda: BlockLayout.from_mask(ONES.int(), *SIZE), TypeError, "keep: expected torch.bool"),
    "mask of other blocks": (
        lambda: BlockLayout.from_mask(ONES[..., :2], *SIZE),
        ValueError,
        r"keep: .*\[1, 1, 5, 2\]",
    ),
    "mask of two dimensions": (lambda: BlockLayout.from_mask(ONES[0, 0], *SIZE), ValueError, r"keep: .*got \[5, 3\]"),
    "mask as a list": (lambda: BlockLayout.from_mask([[True]], *SIZE), TypeError, "keep: expected a Tensor, got list"),
    "indices as floats": (lambda: BlockLayout.from_indices(blocks(0).float(), *SIZE), TypeError, "index: expected int"),
    "index beyond int32": (
        lambda: BlockLayout.from_indices(blocks(0, 2**32 + 1), *SIZE),
        ValueError,
        "got 0 to 4294967297",
    ),
    "origin of floats": (
        lambda: BlockLayout.from_indices(blocks(0, 1), *SIZE, origin=blocks(0, 1).float()),
        TypeError,
        "origin: expected integers",
    ),
    "shift of floats": (
        lambda: BlockLayout.strided(*SIZE, local_blocks=1, vert_stride=2, shift=[0.5]),
        TypeError,
        "shift: expected ints",
    ),
    "index too large": (lambda: BlockLayout.from_indices(blocks(0, 3), *SIZE), ValueError, "from -1 to 2, got 0 to 3"),
    "index of -2": (
        lambda: BlockLayout.from_indices(blocks(0, -2), *SIZE),
        ValueError,
        "index: .* from -1 to 2, got -2 to 0",
    ),
    "index twice": (lambda: BlockLayout.from_indices(blocks(1, -1, 1), *SIZE), ValueError, "twice|duplicate"),
    "origin of other shape": (
        lambda: BlockLayout.from_indices(blocks(0, 1), *SIZE, origin=blocks(0)),
        ValueError,
        r"origin: expected \[1, 1, 5, 2\]",
    ),
    "window of 0": (lambda: BlockLayout.window(*SIZE, window=0), ValueError, "window: expected at least 1, got 0"),
    "window as float": (lambda: BlockLayout.window(*SIZE, window=2.0), TypeError, "window: expected an int, got float"),
    "sink below 0": (lambda: BlockLayout.sink_window(*SIZE, window=1, sink=-1), ValueError, "sink: .* 0, got -1"),
    "stride of 0": (
        lambda: BlockLayout.strided(*SIZE, local_blocks=1, vert_stride=0),
        ValueError,
        "vert_stride: expected at least 1, got 0",
    ),
    "no local block": (
        lambda: BlockLayout.strided(*SIZE, local_blocks=0, vert_stride=1),
        ValueError,
        "local_blocks: expected at least 1, got 0",
    ),
    "dense heads too few": (
        lambda: BlockLayout.strided(*SIZE, local_blocks=1, vert_stride=1, shift=(0, 1), dense_heads=[True]),
        ValueError,
        "dense_heads: expected 2 values",
    ),
    "start as float": (
        lambda: BlockLayout.window(*SIZE, window=1, q_start=1.0),
        TypeError,
        "q_start: expected an int, a Tensor or None, got float",
    ),
    "lists of int64": (lambda: BlockLayout(*SIZE, **lists(col=torch.arange(3))), TypeError, "col: expected int32"),
    "lists too short": (
        lambda: BlockLayout(*SIZE, **lists(col=torch.arange(2, dtype=I32))),
        ValueError,
        "start, count: .* 2 entries",
    ),
    "negative counts": (
        lambda: BlockLayout(*SIZE, **lists(count=torch.full((1, 1, 5), -1, dtype=I32))),
        ValueError,
        "start, count: expected lists inside col",
    ),
    "lists of other rows": (
        lambda: BlockLayout(*SIZE, **lists(start=torch.zeros(1, 1, 4, dtype=I32))),
        ValueError,
        r"start: expected \[B, h, 5\], got \[1, 1, 4\]",
    ),
    "block listed twice": (
        lambda: BlockLayout(*SIZE, **lists(col=torch.zeros(3, dtype=I32))),
        ValueError,
        "twice|duplicate",
    ),
    "origins and |": (
        lambda: roomy() | roomy(),
        UnsupportedError,
        "origins",
    ),
    "origins and &": (lambda: BlockLayout.dense(8, 8, 16, 24) & roomy(), UnsupportedError, "origins"),
    "| of other sizes": (
        lambda: BlockLayout.dense(*SIZE) | BlockLayout.dense(8, 16, 40, 47),
        ShapeError,
        r"expected .* = \(8, 16, 40, 48\), got \(8, 16, 40, 47\)",
    ),
    "| of heads that do not fit": (
        lambda: (
            BlockLayout.from_mask(ONES.repeat(1, 2, 1, 1), *SIZE)
            | BlockLayout.from_mask(ONES.repeat(1, 3, 1, 1), *SIZE)
        ),
        ShapeError,
        "do not broadcast",
    ),
    "| with a mask": (lambda: BlockLayout.dense(*SIZE) | ONES, TypeError, "unsupported operand"),
}


@pytest.mark.parametrize(("make", "kind", "words"), BAD.values(), ids=BAD.keys())
def test_what_is_no_layout_is_refused_by_name(make: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        make()
