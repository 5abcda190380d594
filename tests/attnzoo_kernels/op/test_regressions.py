"""What a review found and the other tests had not."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo_kernels import BlockLayout, Extras, block_sparse_attention
from attnzoo_kernels.cpu import scores
from tests.strategies import Numbers

IMPLS = ("reference", "blocked")


@pytest.mark.parametrize("impl", IMPLS)
def test_a_key_of_nan_reaches_only_the_rows_that_see_it(impl: str) -> None:
    n = Numbers.of(1)
    q, k, v = n.normal(1, 2, 16, 8), n.normal(1, 2, 16, 8), n.normal(1, 2, 16, 8)
    k[:, :, 14] = torch.nan
    out = block_sparse_attention(q, k, v, BlockLayout.dense(8, 8, 16, 16), impl=impl)
    assert out.isnan().any(-1).nonzero()[:, 2].unique().tolist() == [14, 15]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("causal", [False, True])
def test_the_largest_int_is_a_window_that_hides_nothing(impl: str, causal: bool) -> None:
    n = Numbers.of(2)
    q, k, v = n.normal(1, 2, 24, 8), n.normal(1, 2, 24, 8), n.normal(1, 2, 24, 8)
    layout = BlockLayout.dense(8, 8, 24, 24)
    wide = Extras(window=sys.maxsize, sink=sys.maxsize)
    expected = block_sparse_attention(q, k, v, layout, causal=causal, impl=impl)
    assert torch.equal(block_sparse_attention(q, k, v, layout, causal=causal, extras=wide, impl=impl), expected)
    covered = BlockLayout.window(8, 8, 24, 24, window=sys.maxsize, causal=causal)
    assert covered.density(causal=causal) == 1


def test_lists_that_were_written_to_are_planned_anew() -> None:
    n = Numbers.of(3)
    q, k, v = n.normal(1, 2, 24, 8), n.normal(1, 2, 24, 8), n.normal(1, 2, 24, 8)
    layout = BlockLayout.dense(8, 8, 24, 24)
    block_sparse_attention(q, k, v, layout, impl="blocked")
    layout.count.fill_(1)
    found, expected = (block_sparse_attention(q, k, v, layout, impl=impl) for impl in ("blocked", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_decoding_step_takes_lists_of_any_strides() -> None:
    n = Numbers.of(4)
    q, k, v = n.normal(2, 3, 1, 8), n.normal(2, 3, 24, 8), n.normal(2, 3, 24, 8)
    start = torch.tensor([[0, 3], [1, 4], [2, 5]], dtype=torch.int32).unsqueeze(2).transpose(0, 1)
    col = torch.tensor([0, 1, 2, 2, 1, 0], dtype=torch.int32)
    layout = BlockLayout(1, 8, 1, 24, start, torch.ones_like(start), col)
    found, expected = (block_sparse_attention(q, k, v, layout, impl=impl) for impl in ("blocked", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block", [1000, 997, 512])
def test_tall_query_blocks_are_cut_and_say_the_same(block: int) -> None:
    n = Numbers.of(5)
    q, k, v = (n.normal(1, heads, 1100, 4).requires_grad_() for heads in (2, 1, 1))
    layout = BlockLayout.sink_window(block, 64, 1100, 1100, window=200, sink=3)
    found, expected = (
        block_sparse_attention(q, k, v, layout, extras=Extras(window=200, sink=3), impl=impl)
        for impl in ("blocked", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    pairs = zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (found, expected)), strict=True)
    for grad, wanted in pairs:
        torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-10)


def test_rope_tables_that_want_a_gradient_are_refused() -> None:
    n = Numbers.of(6)
    x = n.normal(1, 1, 8, 4)
    origin = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    layout = BlockLayout.from_indices(origin, 8, 8, 8, 8, origin=origin)
    tables = (n.normal(3, 2).requires_grad_(), n.normal(3, 2))
    with pytest.raises(ValueError, match="rope cos: expected a table without gradient"):
        block_sparse_attention(x, x, x, layout, extras=Extras(rope=tables))


@pytest.mark.parametrize("width", [8, 7])
def test_a_step_at_rotary_origins_copies_the_keys_that_it_gathers_and_no_others(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Laying columns in pairs is a copy: of a long memory it cost more than the step itself."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, length, width, generator=generator, dtype=torch.float64)
        for heads, length in ((4, 1), (2, 400), (2, 400))
    )
    index = torch.tensor([[[[0, 7, 24]]]])
    layout = BlockLayout.from_indices(index, 1, 16, 1, 400, torch.tensor([[[[0, 3, 9]]]]))
    angles = torch.arange(10).double().unsqueeze(1) * torch.tensor([1.0, 0.1, 0.01])
    extras = Extras(rope=(angles.cos(), angles.sin()))
    q, k = q.requires_grad_(), k.requires_grad_()
    copied, in_pairs = [], scores.Rotation.in_pairs

    def listening(self: Any, x: Tensor, *rest: Any) -> Tensor:
        copied.append(x.numel())
        return in_pairs(self, x, *rest)

    results = []
    for impl in ("reference", "blocked"):
        with monkeypatch.context() as patch:
            patch.setattr(scores.Rotation, "in_pairs", listening)
            out = block_sparse_attention(q, k, v, layout, extras=extras, impl=impl)
            results.append([out, *torch.autograd.grad(out.square().sum(), (q, k))])
    for actual, expected in zip(*reversed(results), strict=True):
        assert (actual - expected).abs().max() <= 1e-12
    assert copied
    assert max(copied) <= 4 * 3 * 16 * width
