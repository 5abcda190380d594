"""What rows may not see may hold anything: NaN, infinity, values that overflow; and scales that turn scores round."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnzoo_kernels import BlockLayout, Extras, block_sparse_attention, block_sparse_attention_with_lse
from attnzoo_kernels.runtime.products import product

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2}


def normal(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(rows: int, slots: int, dtype: torch.dtype, width: int = 16) -> list[Tensor]:
    return [normal(1, 2, n, width, dtype=dtype, seed=seed) for seed, n in enumerate((rows, slots, slots))]


def run(tensors: list[Tensor], layout: BlockLayout, impl: str, dout: Tensor, **call: object) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = block_sparse_attention(*leaves, layout, impl=impl, **call)  # type: ignore[arg-type]
    return (out.detach(), *torch.autograd.grad(out, leaves, dout))


def assert_same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x.isnan(), y.isnan())
        torch.testing.assert_close(x.nan_to_num(), y.nan_to_num(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, -0.5, -1e-3, 1e-46, 1e-40, 0.3])
@pytest.mark.parametrize("slots", [600, 900])
def test_scales_of_any_sign_in_long_causal_calls(dtype: torch.dtype, scale: float, slots: int) -> None:
    tensors, layout = inputs(600, slots, dtype), BlockLayout.dense(64, 64, 600, slots)
    dout = normal(1, 2, 600, 16, dtype=dtype, seed=9)
    found, wanted = (run(tensors, layout, impl, dout, scale=scale) for impl in ("blocked", "reference"))
    assert bool(found[0].isfinite().all())
    assert_same(found, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_whose_keys_the_bias_hides_may_hold_anything(dtype: torch.dtype, bad: float) -> None:
    q, k, v = inputs(8, 8, dtype, width=4)
    bias = torch.zeros(1, 1, 8, dtype=torch.promote_types(dtype, torch.float32))
    bias[..., :3] = -math.inf  # causal: rows 0 to 2 see nothing
    q[:, :, :3] = bad
    call = {"extras": Extras(key_bias=bias)}
    out, lse = block_sparse_attention_with_lse(q, k, v, BlockLayout.dense(8, 8, 8, 8), impl="blocked", **call)
    assert not bool(out[:, :, :3].any())
    assert bool((lse[:, :, :3] == -math.inf).all())
    found = run([q, k, v], BlockLayout.dense(8, 8, 8, 8), "blocked", torch.ones_like(q), **call)
    assert all(bool(x.isfinite().all()) for x in found)
    assert not bool(found[1][:, :, :3].any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_score_that_overflows_is_hidden_by_the_bias(dtype: torch.dtype) -> None:
    q, k, v = inputs(8, 8, dtype, width=4)
    clean = (BlockLayout.dense(8, 8, 8, 8), "blocked", torch.ones_like(q))
    bias = torch.zeros(1, 1, 8, dtype=dtype).index_fill_(2, torch.tensor([5]), -math.inf)
    wanted = run([q, k, v], *clean, causal=False, extras=Extras(key_bias=bias))
    k[:, :, 5] = torch.finfo(dtype).max
    found = run([q, k, v], *clean, causal=False, extras=Extras(key_bias=bias))
    assert torch.equal(found[0], wanted[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "slots", "first"), [(4, 8, 4), (600, 1024, 300)])
def test_keys_behind_every_row_spoil_no_gradient(dtype: torch.dtype, rows: int, slots: int, first: int) -> None:
    q, k, v = inputs(rows, slots, dtype)
    pos = torch.arange(rows, dtype=torch.int32).clamp(max=slots - first - 2) + first
    aux = (normal(1, 2, rows, 3, dtype=dtype, seed=5), normal(1, 2, slots, 3, dtype=dtype, seed=6))
    k[:, :, int(pos.max()) + 1 :] = math.nan
    aux[1][:, :, int(pos.max()) + 1 :] = math.nan
    layout = BlockLayout.dense(min(64, rows), min(64, rows), rows, slots)
    dout = normal(1, 2, rows, 16, dtype=dtype, seed=9)
    for extras in (Extras(q_pos=pos.view(1, 1, -1)), Extras(q_pos=pos.view(1, 1, -1), aux=aux)):
        found, wanted = (run([q, k, v], layout, impl, dout, extras=extras) for impl in ("blocked", "reference"))
        assert all(bool(x.isfinite().all()) for x in found)
        assert_same(found, wanted, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [64, 600])
def test_a_key_that_only_later_rows_see_spoils_only_these(dtype: torch.dtype, rows: int) -> None:
    q, k, v = inputs(rows, rows, dtype)
    k[:, :, rows - 3, 0] = math.nan
    layout = BlockLayout.dense(32, 32, rows, rows)
    _, dq, _, _ = run([q, k, v], layout, "blocked", normal(1, 2, rows, 16, dtype=dtype, seed=9))
    assert bool(dq[:, :, : rows - 3].isfinite().all())
    assert bool(dq[:, :, rows - 3 :, 0].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [None, 0.0])
def test_absent_rows_of_long_calls_may_hold_infinity(dtype: torch.dtype, scale: float | None) -> None:
    q, k, v = inputs(600, 600, dtype)
    dout = normal(1, 2, 600, 16, dtype=dtype, seed=9)
    pos = torch.arange(600, dtype=torch.int32)
    pos[5] = -1
    layout, call = BlockLayout.dense(64, 64, 600, 600), {"extras": Extras(q_pos=pos.view(1, 1, -1)), "scale": scale}
    q[:, :, 5] = 0
    k[..., 0] = k[..., 0].abs() + 0.1
    wanted = run([q, k, v], layout, "blocked", dout, **call)
    # Every score of the row becomes -inf, or NaN where the scale is 0.
    q[:, :, 5, 0] = -math.inf
    dout[:, :, 5] = math.nan
    found = run([q, k, v], layout, "blocked", dout, **call)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@pytest.mark.parametrize("precision", ["precise", "fast"])
@pytest.mark.parametrize("width", [64, 80])
@pytest.mark.parametrize(("rows", "slots", "block"), [(52, 100, 100), (100, 100, 50), (300, 300, 100), (64, 64, 64)])
def test_in_half_precision_a_bad_row_stays_alone(precision: str, width: int, rows: int, slots: int, block: int) -> None:
    q, k, v = inputs(rows, slots, torch.bfloat16, width)
    q[:, :, 22] = math.nan
    layout = BlockLayout.dense(min(block, rows), block, rows, slots)
    out, lse = block_sparse_attention_with_lse(
        q, k, v, layout, causal=False, extras=Extras(precision=precision), impl="blocked"
    )
    only = torch.arange(rows) == 22
    assert torch.equal(lse.isnan(), only.expand(1, 2, rows))
    assert torch.equal(out.isnan().any(-1), only.expand(1, 2, rows))


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("inner", [3, 16, 100])
@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_products_in_half_precision(add: bool, inner: int, bad: float | None) -> None:
    a = normal(2, 52, inner, dtype=torch.bfloat16, seed=1)
    b = normal(2, inner, 64, dtype=torch.bfloat16, seed=2)
    if bad is not None:
        a[:, 22] = bad
    before = normal(2, 52, 64, dtype=torch.bfloat16, seed=3)
    found = product("test", a, b, out=before.clone(), scale=0.5, add=add)
    wanted = (a.double() @ b.double()) * 0.5 + (before.double() if add else 0)
    rest = torch.arange(52) != 22
    torch.testing.assert_close(found[:, rest].double(), wanted[:, rest], rtol=2e-2, atol=5e-2)
    assert bool(found[:, rest].isfinite().all())
    if bad is not None:
        assert not bool(found[:, 22].isfinite().any())
