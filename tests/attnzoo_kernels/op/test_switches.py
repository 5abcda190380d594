"""Auxiliary channels, rotary origins and gates: both implementations against the oracle, and what must not leak."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnzoo_kernels import BlockLayout, Extras, block_sparse_attention_with_lse
from tests.attnzoo_kernels.op.test_agreement import both
from tests.attnzoo_kernels.oracle import Problem
from tests.attnzoo_kernels.oracle_switches import Switched, attend, gradients, leaves_of
from tests.strategies import Numbers, lse_dtype, problems

ORIGINS = 40
LIMIT = 1e-11
"""Of the largest number in a tensor: one more softmax and one more sum than without switches."""


def layout_of(p: Switched) -> BlockLayout:
    sizes = (p.block_q, p.block_k, p.queries, p.keys)
    if p.origin is None:
        return BlockLayout.from_mask(p.keep, *sizes)
    index = torch.where(p.keep, torch.arange(p.keep.shape[-1]).expand_as(p.keep), -1)
    return BlockLayout.from_indices(index, *sizes, origin=p.origin)


def extras_of(p: Switched) -> Extras:
    aux = None if p.q_aux is None or p.k_aux is None else (p.q_aux, p.k_aux)
    rope = None if p.cos is None or p.sin is None else (p.cos, p.sin)
    return Extras(
        q_pos=p.q_pos,
        key_bias=p.key_bias,
        window=p.window,
        sink=p.sink,
        aux=aux,
        gate=p.gate,  # type: ignore[arg-type]
        gate_mix=p.gate_mix,
        rope=rope,
    )


def call(p: Switched, impl: str) -> tuple[Tensor, Tensor]:
    return block_sparse_attention_with_lse(
        p.q, p.k, p.v, layout_of(p), causal=p.causal, scale=p.scale, extras=extras_of(p), impl=impl
    )


def seeds_of(p: Switched) -> tuple[Tensor, Tensor]:
    n = Numbers.of(1)
    shape = (p.batch, p.heads, p.queries)
    return n.normal(*shape, p.v.shape[3]).to(p.q.dtype), n.normal(*shape).to(lse_dtype(p.q.dtype))


def switched(p: Problem, seed: int, *, aux: bool, rope: bool, gate: str | None, mix: Any) -> Switched:
    n = Numbers.of(seed)
    fields: dict[str, Any] = {**vars(p), "gate_mix": n.chance(0.5, p.heads).float() if mix == "per head" else mix}
    blocks = -(-p.keys // p.block_k)
    if aux:
        shared = (1, 1) if seed % 2 else (p.batch, p.kv_heads)
        fields |= {"q_aux": n.normal(p.batch, p.heads, p.queries, 3), "k_aux": n.normal(*shared, p.keys, 3)}
    width = p.q.shape[3] // 2 if seed % 3 else -(-(p.q.shape[3] // 2) // 2)
    if rope and width:
        angle = n.normal(ORIGINS, width)
        origin = n.integers(0, ORIGINS - 1, *p.keep.shape)
        fields |= {"cos": angle.cos(), "sin": angle.sin(), "origin": origin}
    if gate is not None:
        fields["gate"] = "last" if gate == "last" else n.normal(p.batch, p.kv_heads, blocks, p.q.shape[3])
    return Switched(**fields)


def near(mine: Tensor, true: Tensor, name: str) -> None:
    assert torch.equal(mine == -math.inf, true == -math.inf), f"{name}: -inf in other places"
    assert torch.equal(mine.isnan(), true.isnan()), f"{name}: NaN in other places"
    limit = LIMIT * (1 + float(true.nan_to_num(0, 0, 0).abs().max())) if true.numel() else 0.0
    off = float((mine - true)[mine != true].nan_to_num(0.0).abs().max()) if (mine != true).any() else 0.0
    assert off <= limit, f"{name}: off by {off:.3g}, {limit:.3g} allowed"


def solved(p: Switched) -> dict[str, Tensor]:
    """The oracle's results and gradients by name."""
    leaves = leaves_of(p)
    out, lse = attend(p.change(**leaves))  # type: ignore[arg-type]
    return {"out": out.detach(), "lse": lse.detach(), **gradients((out, lse), leaves, seeds_of(p))}


def assert_is(p: Switched, truth: dict[str, Tensor], impl: str) -> None:
    leaves = leaves_of(p)
    out, lse = call(p.change(**leaves), impl)  # type: ignore[arg-type]
    mine = {"out": out.detach(), "lse": lse.detach(), **gradients((out, lse), leaves, seeds_of(p))}
    for name, true in truth.items():
        near(mine[name], true, f"{impl}: {name if name in ('out', 'lse') else f'gradient of {name}'}")


def assert_agrees(p: Switched) -> None:
    truth = solved(p)
    for impl in ("reference", "blocked"):
        assert_is(p, truth, impl)


GATES = (None, "last", "tensor")
MIXES = (1.0, 0.0, 0.3, "per head")


@given(
    problems(longest=18),
    st.integers(0, 9999),
    st.booleans(),
    st.booleans(),
    st.sampled_from(GATES),
    st.sampled_from(MIXES),
)
def test_every_mixture_of_switches_is_the_definition(
    p: Problem, seed: int, aux: bool, rope: bool, gate: str | None, mix: Any
) -> None:
    assert_agrees(switched(p, seed, aux=aux, rope=rope, gate=gate, mix=mix))


def plain(seed: int = 5, **rule: Any) -> Problem:
    n = Numbers.of(seed)
    keep = n.chance(0.7, 1, 2, 3, 4)
    return Problem(n.normal(1, 4, 21, 6), n.normal(1, 2, 27, 6), n.normal(1, 2, 27, 3), keep, 8, 7, **rule)


@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["causal", "full"])
@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_gates_of_every_kind_are_the_definition(gate: str | None, mix: Any, causal: bool) -> None:
    assert_agrees(switched(plain(causal=causal), 4, aux=False, rope=False, gate=gate, mix=mix))


@pytest.mark.parametrize("width", [1, 2, 5, 6, 9])
def test_origins_turn_any_width(width: int) -> None:
    p = plain()
    n = Numbers.of(width)
    p = p.change(q=n.normal(1, 4, 21, width), k=n.normal(1, 2, 27, width))
    assert_agrees(switched(p, 7, aux=True, rope=True, gate="tensor", mix=0.5))


def test_origins_of_zero_turn_nothing_and_move_with_the_queries() -> None:
    p = switched(plain(), 7, aux=False, rope=True, gate=None, mix=1.0)
    assert p.cos is not None and p.sin is not None and p.origin is not None
    p.cos[0], p.sin[0] = 1.0, 0.0
    still = p.change(origin=torch.zeros_like(p.origin))
    for mine, true in zip(
        call(still, "blocked"), call(p.change(origin=None, cos=None, sin=None), "blocked"), strict=True
    ):
        torch.testing.assert_close(mine, true, rtol=LIMIT, atol=LIMIT)


def test_a_gate_mixed_in_by_zero_is_plain_attention() -> None:
    p = switched(plain(), 4, aux=True, rope=False, gate="tensor", mix=0.0)
    for impl in ("reference", "blocked"):
        for mine, true in zip(call(p, impl), call(p.change(gate=None), impl), strict=True):
            torch.testing.assert_close(mine, true, rtol=LIMIT, atol=LIMIT)


def test_auxiliary_channels_are_wider_heads() -> None:
    p = switched(plain(scale=0.4), 4, aux=True, rope=False, gate=None, mix=1.0)
    assert p.q_aux is not None and p.k_aux is not None
    wide = p.change(q=torch.cat([p.q, p.q_aux], -1), k=torch.cat([p.k, p.k_aux], -1), q_aux=None, k_aux=None)
    for mine, true in zip(call(p, "blocked"), call(wide, "blocked"), strict=True):
        torch.testing.assert_close(mine, true, rtol=LIMIT, atol=LIMIT)


def poisoned_pair(make: Callable[..., Problem], gate: str | None) -> tuple[Switched, Switched]:
    """A call of 21 queries on 27 slots, and the same with NaN wherever nobody reads: its second block is not listed."""
    bias = torch.zeros(1, 1, 27, dtype=torch.float64)
    bias[..., 24:] = -math.inf
    q_pos = torch.arange(21, dtype=torch.int32).view(1, 1, 21) + 6
    q_pos[..., ::4] = -1
    base = make(key_bias=bias, q_pos=q_pos.contiguous())
    base.keep[..., 1] = False
    p = switched(base, 4, aux=True, rope=True, gate=gate, mix=0.5)
    assert p.q_aux is not None and p.k_aux is not None
    absent = (q_pos == -1).unsqueeze(-1)
    slots = torch.arange(27)
    unread = ((slots >= 24) | (slots // base.block_k == 1)).view(1, 1, 27, 1)
    poisoned = p.change(
        q=p.q.masked_fill(absent, math.nan),
        q_aux=p.q_aux.masked_fill(absent, math.nan),
        k=p.k.masked_fill(unread, math.nan),
        v=p.v.masked_fill(unread, math.nan),
        k_aux=p.k_aux.masked_fill(unread, math.nan),
    )
    if isinstance(p.gate, Tensor):
        gate_keys = p.gate.clone()
        gate_keys[:, :, 1] = math.nan
        poisoned = poisoned.change(gate=gate_keys)
    return p, poisoned  # type: ignore[return-value]


@pytest.mark.parametrize("gate", GATES, ids=str)
@both
def test_nan_where_nobody_reads_does_not_leak_through_any_switch(gate: str | None, impl: str) -> None:
    p, poisoned = poisoned_pair(plain, gate)
    found = []
    for q in (p, poisoned):
        leaves = leaves_of(q)  # type: ignore[arg-type]
        results = call(q.change(**leaves), impl)  # type: ignore[arg-type]
        found.append([x.detach() for x in results] + list(gradients(results, leaves, seeds_of(p)).values()))
    for mine, clean in zip(found[1], found[0], strict=True):
        assert torch.equal(mine, clean)


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_near_the_definition(gate: str | None, dtype: torch.dtype) -> None:
    exact = switched(plain(), 4, aux=True, rope=True, gate=gate, mix=0.5)
    cast = {n: getattr(exact, n).to(dtype) for n in ("q", "k", "v", "q_aux", "k_aux")}
    if isinstance(exact.gate, Tensor):
        cast["gate"] = exact.gate.to(dtype)
    assert exact.cos is not None and exact.sin is not None
    low = exact.change(**cast, cos=exact.cos.float(), sin=exact.sin.float())
    truth = attend(exact.change(**{n: x.double() for n, x in cast.items()}))  # type: ignore[arg-type]
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-24
    for impl in ("reference", "blocked"):
        out, lse = call(low, impl)  # type: ignore[arg-type]
        assert float((out.double() - truth[0]).abs().max()) <= (2 if dtype == torch.bfloat16 else 64) * unit * 8
        assert float((lse.double() - truth[1]).nan_to_num(0.0).abs().max()) <= 64 * 2.0**-24 * 8


EMPTY = [(2, 0, 5), (2, 5, 0), (0, 5, 5), (2, 0, 0), (0, 0, 0)]


@pytest.mark.parametrize("impl", ["reference", "blocked", "triton"])
@pytest.mark.parametrize(("batch", "queries", "keys"), EMPTY)
@pytest.mark.parametrize("gate", [None, "last", "keys"])
def test_every_switch_takes_nothing_and_gives_nothing(
    gate: str | None, batch: int, queries: int, keys: int, impl: str
) -> None:
    n, grid = Numbers.of(3), (-(-queries // 4), -(-keys // 4))
    q, k, v = (n.normal(batch, h, rows, 6).float() for h, rows in ((4, queries), (2, keys), (2, keys)))
    index = torch.arange(grid[1]).expand(1, 1, *grid)
    layout = BlockLayout.from_indices(index, 4, 4, queries, keys, origin=torch.zeros_like(index))
    # Tables of no places serve where no entry names one.
    for places in (3,) if queries and keys else (0, 3):
        extras = Extras(
            q_pos=torch.zeros(batch, 1, queries, dtype=torch.int32),
            key_bias=torch.zeros(batch, 1, keys),
            window=3,
            sink=1,
            aux=(torch.zeros(batch, 4, queries, 2), torch.zeros(batch, 1, keys, 2)),
            gate=torch.zeros(batch, 2, grid[1], 6) if gate == "keys" else gate,  # type: ignore[arg-type]
            rope=(torch.ones(places, 3), torch.zeros(places, 3)),
        )
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = block_sparse_attention_with_lse(*leaves, layout, extras=extras, impl=impl)
        assert out.shape == (batch, 4, queries, 6)
        assert torch.equal(lse, torch.full((batch, 4, queries), -math.inf))
        assert not out.any()
        for x, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves, allow_unused=True), strict=True):
            assert grad is None or (grad.shape == x.shape and not grad.any())
