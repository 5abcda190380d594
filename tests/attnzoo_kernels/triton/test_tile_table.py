"""Tables of tiles: every architecture has one, and what a width and a dtype find in it. And calls without keys."""

from __future__ import annotations

import pytest
import torch

from attnzoo_kernels import BlockLayout, block_sparse_attention_with_lse
from attnzoo_kernels._triton import tile_table
from tests.attnzoo_kernels.triton.interpreted import only_interpreted


def test_widths_are_padded_to_powers_of_two_from_sixteen() -> None:
    found = {width: tile_table.padded(width) for width in (0, 1, 15, 16, 17, 32, 33, 64, 65, 128, 200, 256)}
    assert found == {
        0: 0, 1: 16, 15: 16, 16: 16, 17: 32, 32: 32, 33: 64, 64: 64, 65: 128, 128: 128, 200: 256, 256: 256,
    }  # fmt: skip


@pytest.mark.parametrize("architecture", ["default", "sm_80", "sm_89", "sm_90", "sm_100", "gfx942", "sm_77"])
@pytest.mark.parametrize("of", tile_table.PASSES)
def test_every_width_and_dtype_has_tiles(of: tile_table.Pass, architecture: str) -> None:
    for width in (16, *tile_table.WIDTHS):
        for size in (1, 2, 4, 8):
            tiles = tile_table.tiles_for(architecture, of, width, size)
            assert tiles.rows >= 16 and tiles.keys >= 16
            assert tiles == tile_table.tiles_for(architecture, of, max(width, 32), {1: 2, 8: 4}.get(size, size))
    assert tile_table.table("sm_77") == tile_table.table("default")


@pytest.mark.parametrize(("capability", "name"), [
    ((8, 0), "sm_80"), ((8, 6), "sm_89"), ((8, 9), "sm_89"), ((9, 0), "sm_90"), ((10, 0), "sm_100"), ((12, 0), "sm_89"),
])  # fmt: skip
def test_consumer_chips_have_tiles_of_their_own(capability: tuple[int, int], name: str) -> None:
    assert tile_table._nvidia(*capability) == name


@only_interpreted
@pytest.mark.parametrize(("queries", "keys"), [(5, 0), (0, 5)])
def test_without_keys_or_queries_nothing_of_memory_comes_out(
    queries: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *a, **k: real(x, *a, **k).fill_(7))
    q, k = torch.ones(1, 2, queries, 4), torch.ones(1, 2, keys, 4)
    out, lse = block_sparse_attention_with_lse(q, k, k, BlockLayout.dense(4, 4, queries, keys), impl="triton")
    assert out.shape == q.shape and not bool(out.any())
    assert bool((lse == -torch.inf).all())
