"""What the public functions make of their arguments before anything is computed."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from attnzoo_kernels import BlockLayout, Extras, block_sparse_attention, block_sparse_attention_with_lse, visible_pairs
from attnzoo_kernels.op import make_call
from tests.strategies import Numbers

SIZES = (4, 4, 10, 10)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize(("width", "value_width"), [(4, 9), (9, 4)])
def test_the_default_scale_is_that_of_the_queries_width(width: int, value_width: int, impl: str) -> None:
    n = Numbers.of(1)
    q, k, v = n.normal(1, 2, 10, width), n.normal(1, 2, 10, width), n.normal(1, 2, 10, value_width)
    layout = BlockLayout.dense(*SIZES)
    found = block_sparse_attention(q, k, v, layout, impl=impl)
    torch.testing.assert_close(found, scaled_dot_product_attention(q, k, v, is_causal=True), rtol=1e-10, atol=1e-10)
    double = block_sparse_attention(q, k, v, layout, scale=2 * width**-0.5, impl=impl)
    torch.testing.assert_close(double, block_sparse_attention(2 * q, k, v, layout, impl=impl), rtol=1e-10, atol=1e-10)
    plain, lse = block_sparse_attention_with_lse(q, k, v, layout, impl=impl)
    torch.testing.assert_close(plain, found, rtol=1e-12, atol=1e-12)
    assert lse.shape == (1, 2, 10)


def test_a_call_is_precise_unless_it_is_asked_to_be_fast() -> None:
    x = torch.zeros(1, 1, 10, 4)
    made = [
        make_call((x, x, x), BlockLayout.dense(*SIZES), causal=True, scale=1.0, extras=extras)
        for extras in (Extras(), Extras(precision="precise"), Extras(precision="fast"))
    ]
    assert [call.fast for call in made] == [False, False, True]


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_pairs_of_layouts_that_differ_by_head_are_those_of_their_masks(heads: int) -> None:
    keep = Numbers.of(2).chance(0.5, 2, heads, 3, 3)
    layout = BlockLayout.from_mask(keep, *SIZES)
    rows = keep.repeat_interleave(4, 2)[:, :, :10].repeat_interleave(4, 3)[..., :10].repeat_interleave(4 // heads, 1)
    lower = torch.ones(10, 10, dtype=torch.bool).tril()
    assert visible_pairs(layout, causal=True, batch=2, heads=4) == (int((rows & lower).sum()), 55 * 8)
    assert visible_pairs(layout, causal=False, batch=2, heads=4) == (int(rows.sum()), 100 * 8)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_inputs_and_rounds_nothing_inside(low: torch.dtype, impl: str) -> None:
    n = Numbers.of(3)
    leaves = [n.normal(1, 2, 10, 4).float().requires_grad_() for _ in range(3)]
    layout = BlockLayout.dense(*SIZES)
    with torch.autocast("cpu", low):
        found = block_sparse_attention_with_lse(*leaves, layout, impl=impl)
        grads = torch.autograd.grad(found[0].float().sum() + found[1].sum(), leaves)
    outside = [x.detach().to(low).requires_grad_() for x in leaves]
    wanted = block_sparse_attention_with_lse(*outside, layout, impl=impl)
    true = torch.autograd.grad(wanted[0].float().sum() + wanted[1].sum(), outside)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    if impl == "blocked":
        assert all(torch.equal(a, b.float()) for a, b in zip(grads, true, strict=True))


@pytest.mark.parametrize("bias_heads", [1, 2, 4])
@pytest.mark.parametrize("layout_heads", [1, 2, 4])
def test_keys_hidden_in_some_heads_are_not_counted_there(layout_heads: int, bias_heads: int) -> None:
    n = Numbers.of(4)
    keep = n.chance(0.6, 1, layout_heads, 3, 3)
    bias = torch.zeros(2, bias_heads, 10).masked_fill(n.chance(0.4, 2, bias_heads, 10), -torch.inf)
    rows = keep.repeat_interleave(4, 2)[:, :, :10].repeat_interleave(4, 3)[..., :10]
    alive = (bias == 0).unsqueeze(2).repeat_interleave(4 // bias_heads, 1).expand(2, 4, 10, 10)
    lower = torch.ones(10, 10, dtype=torch.bool).tril()
    seen = rows.repeat_interleave(4 // layout_heads, 1) & alive & lower
    found = visible_pairs(
        BlockLayout.from_mask(keep, *SIZES), causal=True, extras=Extras(key_bias=bias), batch=2, heads=4
    )
    assert found == (int(seen.sum()), int((alive & lower).sum()))


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize(("queries", "block"), [(1, 4), (3, 4), (24, 4), (24, 24), (24, 7)])
def test_slices_of_larger_memory_are_read_where_they_lie(queries: int, block: int, impl: str) -> None:
    n = Numbers.of(5)
    # As a layer cuts them out of one product, or a cache out of its buffer.
    fused, cache = n.normal(2, 24, 3, 4, 4), n.normal(2, 2, 40, 8)
    q, k, v = fused[:, 24 - queries :, 1].transpose(1, 2), cache[:, :, 9:33, :4], cache[:, :, 9:33, 4:]
    assert all(x.storage_offset() > 0 for x in (q, k, v))
    layout = BlockLayout.dense(block, block, queries, 24)
    found = block_sparse_attention_with_lse(q, k, v, layout, impl=impl)
    wanted = block_sparse_attention_with_lse(q.clone(), k.clone(), v.clone(), layout, impl="reference")
    for mine, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_shows_in_the_rows_that_read_it_and_no_others(bad: float) -> None:
    n = Numbers.of(6)
    q, k, v = (n.normal(1, 2, 10, 4) for _ in range(3))
    v[0, 1, 6, 2] = bad
    out = block_sparse_attention(q, k, v, BlockLayout.dense(*SIZES), extras=Extras(window=3), impl="reference")
    spoilt = torch.zeros(1, 2, 10, 4, dtype=torch.bool)
    spoilt[0, 1, 6:9, 2] = True
    assert torch.equal(~out.isfinite() & (torch.arange(4) == 2), spoilt)
    assert bool(out[0, 0].isfinite().all()) and bool(out[0, 1, :6].isfinite().all() & out[0, 1, 9:].isfinite().all())
