"""A layout stays what it is on its way: to other devices, through pytrees, into print."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

from attnzoo_kernels import BlockLayout

SIZES = (8, 16, 40, 70)


def with_origins() -> BlockLayout:
    index = torch.tensor([[0, 2, -1], [-1, 1, 4], [3, -1, 0], [1, 2, 3], [-1, -1, 4]]).view(1, 1, 5, 3)
    return BlockLayout.from_indices(index, *SIZES, origin=index.clamp(min=0) * 3)


def parts(layout: BlockLayout) -> list[torch.Tensor | None]:
    return [layout.start, layout.count, layout.col, layout.origin]


@pytest.mark.parametrize("layout", [with_origins(), BlockLayout.dense(*SIZES)], ids=["origins", "plain"])
def test_everything_moves_along(layout: BlockLayout) -> None:
    moved = layout.to("meta")
    assert moved.grid == layout.grid
    for there, here in zip(parts(moved), parts(layout), strict=True):
        assert (there is None) == (here is None)
        assert there is None or here is None or (there.device.type == "meta" and there.shape == here.shape)
    back = layout.to("cpu")
    assert torch.equal(back.to_mask(), layout.to_mask())
    assert (back.origin is None) == (layout.origin is None)


@pytest.mark.parametrize("layout", [with_origins(), BlockLayout.dense(*SIZES)], ids=["origins", "plain"])
def test_a_pytree_gives_back_sizes_and_lists(layout: BlockLayout) -> None:
    leaves, spec = pytree.tree_flatten(layout)
    again = pytree.tree_unflatten(leaves, spec)
    assert (again.block_q, again.block_k, again.seq_q, again.seq_k) == SIZES
    assert all(a is b for a, b in zip(parts(again), parts(layout), strict=True))
    saved = pytree.treespec_loads(pytree.treespec_dumps(spec))
    assert repr(pytree.tree_unflatten(leaves, saved)) == repr(layout)
    named = {str(path[-1]): leaf for path, leaf in pytree.tree_flatten_with_path(layout)[0]}
    assert named[".count"] is layout.count and named[".start"] is layout.start


def test_print_says_how_dense_and_how_many_heads() -> None:
    keep = torch.ones(1, 6, 4, 4, dtype=torch.bool).tril()
    text = str(BlockLayout.from_mask(keep, 8, 8, 32, 32))
    assert "density 1.000 of causal" in text
    assert "... and 2 more heads" in text
    assert text.count("head ") == 4


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sink", [0, 1, 16, 17, 40, 70])
@pytest.mark.parametrize("window", [1, 16, 17, 50])
def test_no_block_is_listed_twice_where_a_sink_meets_a_window(window: int, sink: int, causal: bool) -> None:
    for first in (None, 0, 5, torch.tensor([0, 30])):
        BlockLayout.sink_window(*SIZES, window=window, sink=sink, causal=causal, q_start=first).validate()
