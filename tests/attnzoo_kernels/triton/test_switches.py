"""Auxiliary channels, rotary origins and gates in the Triton kernels: against the oracle, and what must not leak."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.attnzoo_kernels.op.test_switches import (
    GATES,
    LIMIT,
    MIXES,
    assert_is,
    call,
    poisoned_pair,
    seeds_of,
    solved,
    switched,
)
from tests.attnzoo_kernels.oracle import Problem
from tests.attnzoo_kernels.oracle_switches import Switched, attend, gradients, leaves_of
from tests.attnzoo_kernels.triton.interpreted import (
    TILES,
    grid,
    only_interpreted,
    slow,
    some,
    split_lists,
    stepped,
    tiles_of,
)
from tests.strategies import Numbers, problems

pytestmark = only_interpreted


def agrees(p: Switched) -> None:
    assert_is(p, solved(p), "triton")


def plain(seed: int = 5, **rule: Any) -> Problem:
    """Twelve tiles: four heads on two, the last blocks not full."""
    n = Numbers.of(seed)
    shapes = {"keep": n.chance(0.8, 1, 2, 2, 3), "block_q": 16, "block_k": 10, **rule}
    return Problem(n.normal(1, 4, 21, 6), n.normal(1, 2, 27, 6), n.normal(1, 2, 27, 3), **shapes)


@some(0.1)
@given(
    problems(longest=20, most_tiles=TILES),
    st.integers(0, 9999),
    st.booleans(),
    st.booleans(),
    st.sampled_from(GATES),
    st.sampled_from(MIXES),
    st.booleans(),
)
def test_every_mixture_of_switches_is_the_definition(
    p: Problem, seed: int, aux: bool, rope: bool, gate: str | None, mix: Any, split: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        split_lists(patch, 1000 if split else 1)
        agrees(switched(p, seed, aux=aux, rope=rope, gate=gate, mix=mix))


@grid(causal=[True, False], gate=["last", "tensor"], mix=["per head", 0.3, 1.0])
def test_gates_of_every_kind_are_the_definition(gate: str, mix: Any, causal: bool) -> None:
    agrees(switched(plain(causal=causal), 4, aux=False, rope=False, gate=gate, mix=mix))


@grid(gate=["last", "tensor"], block=[1, 16, 33])
def test_gated_blocks_of_any_size_are_the_definition(gate: str, block: int) -> None:
    blocks = -(-27 // block)
    keep = Numbers.of(block).chance(0.4 if block == 1 else 1.0, 1, 1, 1, blocks)
    agrees(switched(plain(keep=keep, block_q=24, block_k=block), 4, aux=True, rope=False, gate=gate, mix=0.4))


@pytest.mark.parametrize("width", [1, slow(2), slow(5), slow(6), 9, slow(20)])
def test_origins_turn_any_width(width: int) -> None:
    n = Numbers.of(width)
    p = plain().change(q=n.normal(1, 4, 21, width), k=n.normal(1, 2, 27, width))
    agrees(switched(p, 7, aux=True, rope=True, gate="tensor", mix=0.5))
    agrees(switched(p, 9, aux=False, rope=True, gate=None, mix=1.0))


@grid(gate=GATES, sizes=[(3, True), (20, True), (40, False)])
def test_products_over_a_few_channels_at_a_time_are_the_definition(
    gate: str | None, sizes: tuple[int, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    width, rope = sizes
    tiles_of(monkeypatch, stepped)
    n = Numbers.of(width)
    bias = n.normal(1, 2, 27)
    q, k, v = n.normal(1, 4, 21, width), n.normal(1, 2, 27, width), n.normal(1, 2, 27, width + 9)
    p = plain(key_bias=bias, window=12, sink=2).change(q=q, k=k, v=v)
    agrees(switched(p, width + 14, aux=True, rope=rope, gate=gate, mix=0.5))


@grid(scale=[0.0, -0.7, 5.0], gate=GATES)
def test_scales_of_any_sign_are_the_definition(scale: float, gate: str | None) -> None:
    agrees(switched(plain(scale=scale), 8, aux=True, rope=True, gate=gate, mix=0.5))


def test_a_scale_below_zero_is_the_definition_where_its_exponents_would_overflow() -> None:
    # From the largest score instead of the least, exponents reach thousands, and the weights infinity.
    agrees(switched(plain(scale=-3000.0), 0, aux=False, rope=False, gate=None, mix=1.0))


def test_a_gate_mixed_in_by_zero_is_plain_attention() -> None:
    p = switched(plain(), 4, aux=True, rope=False, gate="tensor", mix=0.0)
    for mine, true in zip(call(p, "triton"), call(p.change(gate=None), "triton"), strict=True):
        torch.testing.assert_close(mine, true, rtol=LIMIT, atol=LIMIT)


@pytest.mark.parametrize("name", [slow("q_aux"), slow("k_aux"), "gate", "key_bias"])
def test_one_gradient_alone_is_the_one_beside_others(name: str) -> None:
    bias = Numbers.of(3).normal(1, 2, 27)
    p = switched(plain(key_bias=bias), 7, aux=True, rope=True, gate="tensor", mix=0.5)
    truth = solved(p)[name]
    leaf = getattr(p, name).clone().requires_grad_()
    (mine,) = torch.autograd.grad(call(p.change(**{name: leaf}), "triton"), leaf, seeds_of(p))
    torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-10)


@grid(gate=GATES, form=["whole", "split", "stepped"])
def test_nan_where_nobody_reads_does_not_leak_through_any_switch(
    gate: str | None, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_lists(monkeypatch, 1000 if form == "split" else 1)
    if form == "stepped":
        tiles_of(monkeypatch, stepped)
    p, poisoned = poisoned_pair(plain, gate)
    dout, dlse = seeds_of(p)
    assert p.q_pos is not None
    dead = p.q_pos.expand(1, 4, 21) == -1
    found = []
    for q, seeds in ((p, (dout, dlse)), (poisoned, (dout.masked_fill(dead.unsqueeze(-1), math.nan), dlse))):
        leaves = leaves_of(q)
        results = call(q.change(**leaves), "triton")  # type: ignore[arg-type]
        found.append([x.detach() for x in results] + list(gradients(results, leaves, seeds).values()))
    for mine, clean in zip(found[1], found[0], strict=True):
        assert torch.equal(mine, clean)


@grid(gate=GATES, dtype=[torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision_is_near_the_definition(gate: str | None, dtype: torch.dtype) -> None:
    exact = switched(plain(), 4, aux=True, rope=True, gate=gate, mix=0.5)
    cast = {n: getattr(exact, n).to(dtype) for n in ("q", "k", "v", "q_aux", "k_aux")}
    if isinstance(exact.gate, Tensor):
        cast["gate"] = exact.gate.to(dtype)
    assert exact.cos is not None and exact.sin is not None
    low = exact.change(**cast, cos=exact.cos.float(), sin=exact.sin.float())
    wide = exact.change(**{n: x.double() for n, x in cast.items()})
    truth = attend(wide)  # type: ignore[arg-type]
    unit = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    leaves = leaves_of(low)  # type: ignore[arg-type]
    out, lse = call(low.change(**leaves), "triton")  # type: ignore[arg-type]
    assert float((out.detach().double() - truth[0]).abs().max()) <= (64 if dtype == torch.float32 else 2) * unit * 8
    # Turned queries are rounded to their dtype before the product.
    rounding = 2.0**-24 if dtype == torch.float32 else unit / 16
    assert float((lse.detach().double() - truth[1]).nan_to_num(0.0).abs().max()) <= 64 * rounding * 8
    grads = gradients(
        (out, lse), leaves, tuple(x.to(y.dtype) for x, y in zip(seeds_of(p=low), (out, lse), strict=True))
    )  # type: ignore[arg-type]
    true = gradients(*_wide_gradients(wide))  # type: ignore[arg-type]
    for name, grad in grads.items():
        size = 1 + float(true[name].abs().max())
        assert float((grad.double() - true[name]).abs().max()) <= (512 if dtype == torch.float32 else 16) * unit * size


def _wide_gradients(p: Switched) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor], tuple[Tensor, Tensor]]:
    leaves = leaves_of(p)
    return attend(p.change(**leaves)), leaves, seeds_of(p)  # type: ignore[arg-type]
