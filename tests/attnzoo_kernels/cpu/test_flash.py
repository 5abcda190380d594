"""Calls that torch's fused kernel computes tile by tile: against the oracle, and which calls are of that kind."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from attnzoo_kernels import BlockLayout, Extras, block_sparse_attention, block_sparse_attention_with_lse, dispatch
from attnzoo_kernels.cpu import few_rows, flash, row_tiles
from attnzoo_kernels.layouts import row_spans
from attnzoo_kernels.spec.call import Call
from attnzoo_kernels.spec.token_rule import TokenRule
from tests.attnzoo_kernels.cpu.cpu_classes import PROCESSORS, answering
from tests.attnzoo_kernels.op.test_agreement import assert_agrees, seeds_of
from tests.attnzoo_kernels.op.test_in_place import runs
from tests.attnzoo_kernels.oracle import Answer, Problem, solve, visible
from tests.attnzoo_kernels.test_mutants import rewrite
from tests.bounds import assert_near
from tests.strategies import STRIDES, Numbers, extras_of, layout_of, problems, strided, unread


@pytest.fixture(autouse=True)
def _from_one_row_on() -> Iterator[None]:
    with answering("amx"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_rows, "MOST_ROWS", 0)
        patch.setattr(flash, "LEAST_ROWS", 1)
        patch.setattr(flash, "LEAST_SLOTS", 0)
        patch.setattr(flash, "MOST_WASTE", {torch.float32: 1e9, torch.bfloat16: 1e9})
        patch.setattr(row_tiles, "CELL", 3)
        patch.setattr(row_tiles, "LEAST_INSIDE", 4)
        yield


def problem(sizes: tuple[int, int, int, int, int], width: int, stride: str = "contiguous", **rule: Any) -> Problem:
    """Of ``B, G, H / G, T, S``, in blocks of 7 by 5, all of them listed."""
    batch, groups, ratio, queries, keys = sizes
    n = Numbers.of(sum(sizes))
    shapes = ((groups * ratio, queries, width), (groups, keys, width), (groups, keys, width))
    q, k, v = (strided(n.normal(batch, *shape).float(), stride) for shape in shapes)
    keep = torch.ones(1, 1, -(-queries // 7), -(-keys // 5), dtype=torch.bool)
    return Problem(q, k, v, keep, 7, 5, **{"causal": queries <= keys, "scale": None, **rule})


def layout_for(p: Problem) -> BlockLayout:
    """The layout of a problem; where all blocks are listed, that of dense calls."""
    if bool(p.keep.all()):
        return BlockLayout.dense(p.block_q, p.block_k, p.queries, p.keys)
    return layout_of(p)


def count_calls(patch: pytest.MonkeyPatch) -> list[str]:
    """The names of the two passes, each time one gives a result."""
    found: list[str] = []

    def spy(name: str) -> Callable[..., Any]:
        original = getattr(flash, name)

        def counted(*args: Any, **options: Any) -> Any:
            result = original(*args, **options)
            found.extend([name] if result is not None else [])
            return result

        return counted

    for name in ("forward", "backward"):
        patch.setattr(flash, name, spy(name))
    return found


def without_lse(p: Problem, dout: Tensor) -> Answer:
    layout, extras = layout_for(p), extras_of(p)
    leaves = [x.detach().requires_grad_() for x in (p.q, p.k, p.v)]
    rule: dict[str, Any] = {"causal": p.causal, "scale": p.scale, "extras": extras, "impl": "blocked"}
    out = block_sparse_attention(*leaves, layout, **rule)
    with torch.no_grad():
        lse = block_sparse_attention_with_lse(*leaves, layout, **rule)[1]
    return Answer(out.detach(), lse, *torch.autograd.grad(out, leaves, dout))


def check(p: Problem) -> None:
    dout, dlse = seeds_of(p)
    nothing = torch.zeros_like(dlse)
    mask = visible(p)
    assert_near(without_lse(p, dout), solve(p, dout, nothing, mask), p, (dout, nothing), mask)


def passes(p: Problem) -> list[str]:
    if p.scale is not None and p.scale < flash.LEAST_SCALE:
        return []
    return ["forward", "forward", "backward"] if p.q.dtype == torch.float32 else ["forward"]


few = st.integers(1, 3)


@given(
    few, few, few, st.integers(1, 40), st.integers(0, 40), st.integers(1, 20), st.sampled_from(STRIDES), st.booleans()
)
def test_dense_calls_are_the_definition(
    batch: int, groups: int, ratio: int, queries: int, more: int, width: int, stride: str, causal: bool
) -> None:
    p = problem((batch, groups, ratio, queries, queries + more), width, stride, causal=causal)
    with pytest.MonkeyPatch.context() as patch:
        calls = count_calls(patch)
        check(p)
        assert calls == passes(p)


@st.composite
def striped(draw: Any, dtype: torch.dtype = torch.float32) -> Problem:
    """Calls whose rows read one run of slots each."""
    p: Problem = draw(problems(dtypes=(dtype,), longest=60))
    n = Numbers.of(draw(st.integers(0, 2**16)))
    keep = torch.ones_like(p.keep) if draw(st.booleans()) else runs(n, *p.keep.shape[:2], p.keep.shape[2:])
    v = n.normal(p.batch, p.kv_heads, p.keys, p.q.shape[3]).to(dtype)
    return p.change(keep=keep, v=v, key_bias=None, sink=0 if p.window is not None else p.sink)


@given(striped(), st.integers(1, 3))
@example(problem((1, 2, 1, 40, 40), 4, window=6), 1)
@example(problem((2, 2, 2, 30, 50), 4, q_pos=Numbers.of(1).integers(-1, 60, 2, 4, 30)), 2)
def test_runs_of_slots_are_the_definition(p: Problem, threads: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        calls = count_calls(patch)
        check(p)
        quick = p.batch * p.kv_heads >= threads
        assert calls == (passes(p) if quick else passes(p)[:2])


def covered(p: Problem) -> Problem:
    """With the blocks alone in which something is visible, as layers list those of a sink and a window."""
    mask = visible(p).any(0, keepdim=True).any(1, keepdim=True)
    rows, slots = p.keep.shape[2:]
    mask = pad(mask, (0, slots * p.block_k - p.keys, 0, rows * p.block_q - p.queries))
    return p.change(keep=mask.unflatten(3, (slots, p.block_k)).unflatten(2, (rows, p.block_q)).any(5).any(3))


def sink_calls() -> list[Problem]:
    """Rows before, at and behind the one whose window leaves the sink, in lists with and without a gap."""
    found = []
    for queries, keys, window, sink in (
        (40, 40, 6, 2),
        (30, 70, 12, 7),
        (12, 50, 4, 1),
        (45, 30, 9, 3),
        (9, 60, 20, 4),
    ):
        p = problem((2, 2, 2, queries, keys), 4, causal=True, window=window, sink=sink)
        found += [p, covered(p), p.change(causal=False)]
    return found


@pytest.mark.parametrize("number", range(len(sink_calls())))
def test_a_sink_beside_a_window_is_the_definition(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    p = sink_calls()[number]
    check(p)
    assert calls == passes(p)


@given(
    few,
    few,
    st.integers(1, 40),
    st.integers(-8, 40),
    st.integers(1, 30),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
)
def test_sinks_of_all_sizes_are_the_definition(
    groups: int, ratio: int, queries: int, more: int, window: int, sink: int, causal: bool, cover: bool
) -> None:
    keys = max(queries + more, 1)
    p = problem((1, groups, ratio, queries, keys), 4, causal=causal, window=window, sink=sink)
    check(covered(p) if cover else p)


@pytest.mark.parametrize("missing", ["the sink", "where windows begin"])
def test_what_of_a_sink_and_a_window_is_not_listed_is_not_read(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    p = covered(problem((1, 2, 1, 12, 50), 4, window=9, sink=1))
    keep = p.keep.clone()
    if missing == "the sink":
        keep[..., 0] = False
    else:
        first = keep[..., 1:].int().argmax(-1, keepdim=True) + 1
        keep.scatter_(-1, first, torch.zeros_like(first, dtype=torch.bool))
    check(p.change(keep=keep))
    assert calls == passes(p)


def test_what_lies_between_sink_and_window_may_be_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    p = problem((1, 2, 1, 9, 60), 4, window=12, sink=3)
    k = p.k.clone()
    v = p.v.clone()
    k[:, :, 3:40] = math.nan
    v[:, :, 3:40] = math.nan
    check(p.change(k=k, v=v))
    assert calls == passes(p)


@given(striped(torch.bfloat16))
def test_in_half_precision_the_forward_is_the_definition(p: Problem) -> None:
    with pytest.MonkeyPatch.context() as patch:
        calls = count_calls(patch)
        check(p)
        assert calls == passes(p)


@given(striped())
def test_what_nobody_sees_may_be_no_number(p: Problem) -> None:
    mask = visible(p)
    k, v = (x.masked_fill(unread(p, mask).unsqueeze(-1), math.nan) for x in (p.k, p.v))
    check(p.change(q=p.q.masked_fill(~mask.any(-1, keepdim=True), math.nan), k=k, v=v))


def test_where_something_is_spoiled_blocks_compute_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    p = problem((1, 1, 1, 30, 30), 4)
    row = torch.arange(30, dtype=torch.int32).view(1, 1, 30)
    # Nobody sees the last block, and no tile reads it.
    before_it = p.change(q_pos=row.clamp(max=24), window=4)
    # Nobody sees the third block, but a tile has rows on both sides of it.
    around_it = p.change(q_pos=torch.where(row < 16, row // 2, row), window=2)
    for other, block, wanted in ((before_it, slice(25, 30), passes(p)), (around_it, slice(10, 15), [])):
        for name in ("k", "v"):
            spoiled = getattr(p, name).clone()
            spoiled[:, :, block] = math.nan
            check(other.change(**{name: spoiled}))
            assert calls == wanted
            calls.clear()


def test_a_gradient_of_the_log_sum_exp_is_made_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    p = problem((2, 2, 3, 23, 23), 8)
    assert_agrees(p, layout_for(p), ("blocked",))
    assert calls == ["forward"]


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_the_gradients_that_are_asked_for_come_back(wanted: tuple[int, ...]) -> None:
    p = problem((1, 2, 2, 19, 19), 4)
    given_ = [x.clone().requires_grad_(i in wanted) for i, x in enumerate((p.q, p.k, p.v))]
    out = block_sparse_attention(*given_, layout_for(p), impl="blocked")
    grads = torch.autograd.grad(out.sum(), [given_[i] for i in wanted])
    whole = [x.clone().requires_grad_() for x in (p.q, p.k, p.v)]
    every = torch.autograd.grad(block_sparse_attention(*whole, layout_for(p), impl="reference").sum(), whole)
    for i, grad in zip(wanted, grads, strict=True):
        torch.testing.assert_close(grad, every[i], rtol=1e-5, atol=1e-5)


BASE = (1, 2, 1, 21, 21)
OTHERS: dict[str, Callable[[], tuple[Problem, Extras]]] = {
    "a gap between blocks": lambda: (_without_a_block(problem(BASE, 4)), Extras()),
    "a sink beside windows of rows at positions of their own": lambda: (
        problem(BASE, 4),
        Extras(window=5, sink=1, q_pos=torch.arange(21, dtype=torch.int32).view(1, 1, 21)),
    ),
    "a sink of each head": lambda: (problem(BASE, 4), Extras(window=5, sink=torch.tensor([0, 1], dtype=torch.int32))),
    "a bias": lambda: (problem(BASE, 4), Extras(key_bias=torch.zeros(1, 1, 21))),
    "double precision": lambda: (_as(problem(BASE, 4), torch.float64), Extras()),
    "half precision of the other kind": lambda: (_as(problem(BASE, 4), torch.float16), Extras()),
    "narrower values": lambda: (problem(BASE, 4).change(v=torch.randn(1, 2, 21, 3)), Extras()),
    "gates": lambda: (problem(BASE, 4), Extras(gate="last")),
}


def _without_a_block(p: Problem) -> Problem:
    keep = p.keep.clone()
    keep[..., -1, 1] = False
    return p.change(keep=keep)


def _as(p: Problem, dtype: torch.dtype) -> Problem:
    return p.change(q=p.q.to(dtype), k=p.k.to(dtype), v=p.v.to(dtype))


@pytest.mark.parametrize("name", OTHERS)
def test_other_calls_stay_with_the_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    p, extras = OTHERS[name]()
    q, k, v = (x.clone().requires_grad_() for x in (p.q, p.k, p.v))
    layout = layout_for(p)
    out = block_sparse_attention(q, k, v, layout, causal=p.causal, extras=extras, impl="blocked")
    wanted = block_sparse_attention(q, k, v, layout, causal=p.causal, extras=extras, impl="reference")
    torch.testing.assert_close(out, wanted, rtol=2e-2, atol=2e-2)
    out.sum().backward()
    assert not calls


def test_a_shared_list_with_a_gap_stays_with_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    p = problem(BASE, 4)
    layout = layout_for(p)
    col = layout.col.clone()
    col[-2:] = layout.col[-2:].flip(0)
    count = layout.count.clone()
    count[..., -1] -= 1  # lists 0, 1, 2 and 4
    holed = BlockLayout(7, 5, 21, 21, layout.start, count, col)
    q = p.q.clone().requires_grad_()
    out = block_sparse_attention(q, p.k, p.v, holed, impl="blocked")
    torch.testing.assert_close(out, block_sparse_attention(q, p.k, p.v, holed, impl="reference"), rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(block_sparse_attention(q, p.k, p.v, holed, impl="reference").sum(), q)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), q), wanted, rtol=1e-5, atol=1e-5)
    assert not calls


@pytest.mark.parametrize("cpu", PROCESSORS)
def test_single_precision_goes_here_on_every_cpu_and_half_where_its_units_are(
    cpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(monkeypatch)
    single, low = problem(BASE, 4), _as(problem(BASE, 4), torch.bfloat16)
    with answering(cpu):
        check(single)
        assert calls == passes(single)
        calls.clear()
        check(low)
    assert calls == (passes(low) if cpu == "amx" else [])


@pytest.mark.parametrize(
    ("limit", "value"), [("LEAST_ROWS", 61), ("LEAST_SLOTS", 10), ("MOST_WASTE", {torch.float32: 1.1})]
)
def test_calls_for_which_it_does_not_pay_stay_with_the_blocks(
    limit: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, limit, value)
    calls = count_calls(monkeypatch)
    check(problem((1, 2, 1, 60, 60), 4, window=9))
    assert not calls


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled_dense_calls_are_those_of_eager_mode(dynamic: bool) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layout = BlockLayout.dense(8, 8, q.shape[2], k.shape[2])
        dense = block_sparse_attention(q, k, v, layout).square().sum()
        return dense + block_sparse_attention(q, k, v, layout, extras=Extras(window=9)).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (24, 31):
        n = Numbers.of(tokens)
        leaves = [n.normal(1, h, tokens, 8).float().requires_grad_() for h in (4, 2, 2)]
        found = torch.autograd.grad(compiled(*leaves), leaves)
        torch.testing.assert_close(found, torch.autograd.grad(step(*leaves), leaves), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
def test_the_op_keeps_its_promises_of_shape_and_stride(window: int | None) -> None:
    p = problem((2, 2, 2, 16, 16), 8)
    layout = layout_for(p)
    call = Call(
        p.q, p.k, p.v, layout.start, layout.count, layout.col, None, TokenRule(p.causal, window=window), p.block_q,
        p.block_k, 0.25,
    )  # fmt: skip
    for need_lse in (False, True):
        out, lse = dispatch.forward("blocked", call, need_lse=need_lse)
        assert out.is_contiguous()
        assert lse.is_contiguous()
        assert lse.shape == ((2, 4, 16) if need_lse else (0,))


def test_row_tiles_are_cut_where_it_costs_least() -> None:
    def height(seen: int, rows: int, heads: int) -> int:
        hi = torch.arange(1, rows + 1).view(1, 1, rows)
        shape = torch.empty(1, heads, rows, 4)
        rule = TokenRule(True, window=seen)
        layout = BlockLayout.dense(64, 64, rows, rows)
        call = Call(shape, shape, shape, layout.start, layout.count, layout.col, None, rule, 64, 64, 1.0)
        found = row_tiles.row_tiles_of(call, 1)
        assert found is not None
        assert torch.equal(found.spans.hi, hi.expand_as(found.spans.hi))
        # Where the window fills and at the end there may be others.
        return statistics.mode(tile.rows.stop - tile.rows.start for tile in found.head_groups[0].tiles)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_tiles, "CELL", 64)
        assert height(128, 3072, 8) == 192
        assert height(2048, 3072, 1) != 192


MUTANTS = {
    "causality aligned at the first key": (row_tiles, "_find_row_tiles", "inside = seq_k - seq_q if", "inside = 0 if"),
    "lists that are not looked at": (row_spans, "_find_runs", "not bool(", "False and bool("),
    "sinks overlooked": (flash, "_rule_reasons", "and not rule.is_static", "and False"),
    "a run that goes on": (row_tiles, "row_spans", "torch.minimum(hi, last)", "hi"),
    "a run that began before": (row_tiles, "row_spans", "torch.maximum(lo, first)", "lo"),
    "one row's beginning for all": (row_tiles, "_key_ranges", "late=late, early", "early"),
    "one row's end for all": (row_tiles, "_key_ranges", ", early=early", ""),
    "the slots inside a tile left out": (row_tiles, "_key_ranges", ", KeyRange(begin, end))", ",)"),
    "query heads in another order": (row_tiles, "_head_groups", "cells[item, head::ratio][here]", "cells[item, here]"),
    "the first item's tiles for all": (row_tiles, "_head_groups", "own = cells[item] if", "own = cells[0] if"),
    "key ranges that are added up": (flash, "_merged", "share)", "share.new_tensor(0.5))"),
    "the larger share for the smaller range": (flash, "_merged", "(other[1] - one[1])", "(one[1] - other[1])"),
    "rows that see nothing": (flash, "forward", "out.masked_fill_(tiles.dead.unsqueeze(-1), 0.0)", "pass"),
    "rows that see nothing, on the way back": (flash, "backward", "if tiles.dead is not None", "if False"),
    "the log-sum-exp of half precision": (flash, "reasons", "if need_lse", "if False"),
    "no second look at what comes out": (flash, "forward", "_is_spoiled(out, tiles)", "False"),
    "no second look on the way back": (
        flash,
        "backward",
        "None if _is_spoiled(dq, tiles) else (dq, dk, dv)",
        "(dq, dk, dv)",
    ),
    "the scale forgotten": (flash, "forward", ", scale=call.scale", ""),
    "the scale forgotten on the way back": (
        flash,
        "backward",
        "attn_mask=edges.mask(tile, keys), scale=call.scale",
        "attn_mask=edges.mask(tile, keys)",
    ),
    "all causal where they are one range": (flash, "backward", "0.0, lone.causal", "0.0, call.rule.causal"),
    "the edge a slot too far": (flash, "_edge", "index.neg_()", "index.add_(1).neg_()"),
}


def battery(monkeypatch: pytest.MonkeyPatch) -> None:
    n = Numbers.of(5)
    p = problem((1, 2, 2, 60, 60), 4)
    calls = count_calls(monkeypatch)
    for one in (
        problem((1, 2, 3, 21, 21), 4, scale=0.3),
        problem((1, 2, 1, 9, 30), 4),
        problem((1, 2, 1, 9, 9), 4),
        problem((1, 2, 1, 9, 30), 4, q_pos=torch.full((1, 1, 9), 29, dtype=torch.int32)),
        problem((2, 2, 2, 40, 40), 4, window=6),
        problem((2, 1, 2, 40, 40), 4, window=25, causal=False),
        problem((2, 2, 2, 90, 150), 4, q_pos=n.integers(-1, 160, 2, 4, 90).sort(-1).values),
        problem((2, 2, 1, 90, 150), 4, q_pos=n.integers(0, 160, 2, 1, 90).sort(-1).values),
        p.change(keep=runs(n, 1, 4, p.keep.shape[2:])),
        _as(problem((1, 1, 1, 60, 60), 4, window=30), torch.bfloat16),
    ):
        check(one)
        assert calls == passes(one)
        calls.clear()
    for one in sink_calls()[:6]:
        check(one)
        assert calls == passes(one)
        calls.clear()
    test_other_calls_stay_with_the_blocks("a sink of each head", monkeypatch)
    test_a_shared_list_with_a_gap_stays_with_the_blocks(monkeypatch)
    test_where_something_is_spoiled_blocks_compute_the_call(monkeypatch)


def test_the_battery_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    battery(monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
def test_a_wrong_one_is_found_out(mutant: tuple[Any, str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(monkeypatch, *mutant)
    row_tiles._finder.cache_clear()
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        battery(monkeypatch)
    row_tiles._finder.cache_clear()
