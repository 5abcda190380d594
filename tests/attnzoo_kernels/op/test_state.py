"""What a call leaves behind, and what it takes from its surroundings: threads, processes, modes, copies, memory."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree

from attnzoo_kernels import (
    BlockLayout,
    Extras,
    ShapeError,
    block_sparse_attention,
    block_sparse_attention_with_lse,
    why_not,
)
from tests.attnzoo_kernels.op.test_agreement import both, run, seeds_of
from tests.attnzoo_kernels.op.test_torture import answer, assert_bitwise, problem
from tests.attnzoo_kernels.oracle import Answer, Problem
from tests.strategies import Numbers, layout_of


@pytest.fixture
def threads() -> Iterator[Any]:
    """Sets the number of threads and puts the old one back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def large(dtype: torch.dtype = torch.float32) -> Problem:
    """Enough work that two threads share it."""
    n = Numbers.of(9)
    keep = n.chance(0.5, 1, 2, 8, 8)
    shapes = ((4, 500, 32), (2, 500, 32), (2, 500, 32))
    return Problem(*(n.normal(2, *shape).to(dtype) for shape in shapes), keep, 64, 64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@both
def test_a_call_repeated_is_the_same_to_the_bit(dtype: torch.dtype, impl: str) -> None:
    p = large(dtype)
    layout = layout_of(p)
    first = run(p, layout, seeds_of(p), impl)
    assert_bitwise(run(p, layout, seeds_of(p), impl), first)
    assert_bitwise(run(p, layout_of(p), seeds_of(p), impl), first)


@both
def test_the_number_of_threads_changes_no_bit(impl: str, threads: Any) -> None:
    p = large()
    threads(1)
    one = answer(p, impl)
    threads(2)
    assert_bitwise(answer(p, impl), one)


@both
def test_four_python_threads_at_once_get_what_one_gets(impl: str) -> None:
    calls = [
        problem(queries=q, keys=k, window=w) for q, k, w in ((40, 40, None), (33, 70, 5), (8, 64, 20), (64, 64, 1))
    ]
    alone = [answer(p, impl) for p in calls]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            together = list(pool.map(lambda p: answer(p, impl), calls))
            for mine, serial in zip(together, alone, strict=True):
                assert_bitwise(mine, serial)


def test_scratch_memory_belongs_to_a_thread() -> None:
    """Threads at the same work with different windows: with shared memory, one would read what another wrote."""
    n, tokens = Numbers.of(2), 1024
    q, k, v = (n.normal(1, 2, tokens, 32).float() for _ in range(3))

    def attend(window: int) -> Tensor:
        # A sink keeps the call with the blocks, whose scratch memory is large.
        layout = BlockLayout.sink_window(64, 64, tokens, tokens, window=window, sink=1)
        return block_sparse_attention(q, k, v, layout, extras=Extras(window=window, sink=1), impl="blocked")

    windows = (450, 520, 590, 675)
    alone = [attend(window) for window in windows]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(attend, 12 * windows))
    assert all(torch.equal(mine, true) for mine, true in zip(together, 12 * alone, strict=True))


def _in_child(pipe: Any, p: Problem, impl: str) -> None:
    torch.set_num_threads(1)
    pipe.send([x.tolist() for x in answer(p, impl)[:2]])


@both
def test_a_forked_process_computes_the_same(impl: str) -> None:
    p = problem()
    parent = answer(p, impl)
    here, there = multiprocessing.Pipe()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        child = multiprocessing.get_context("fork").Process(target=_in_child, args=(there, p, impl))
        child.start()
    assert here.poll(60), "the child hangs"
    out, lse = here.recv()
    child.join(10)
    assert torch.equal(torch.tensor(out), parent.out)
    assert torch.equal(torch.tensor(lse), parent.lse)


@both
def test_training_works_after_inference_mode_with_the_same_layout(impl: str) -> None:
    p = problem(window=9)
    layout = layout_of(p)
    with torch.inference_mode():
        out = block_sparse_attention(p.q, p.k, p.v, layout, extras=Extras(window=9), impl=impl)
    assert not out.requires_grad
    got = run(p, layout, seeds_of(p), impl)
    assert_bitwise(got, answer(p, impl))
    assert torch.equal(out, got.out)


@both
def test_a_layout_made_in_inference_mode_can_be_trained_with(impl: str) -> None:
    p = problem(window=9)
    with torch.inference_mode():
        layout = layout_of(p)
    assert_bitwise(run(p, layout, seeds_of(p), impl), answer(p, impl))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@both
def test_without_gradients_the_numbers_are_the_same_and_nothing_is_kept(mode: Any, impl: str) -> None:
    p = problem()
    with mode():
        out, lse = block_sparse_attention_with_lse(p.q.requires_grad_(), p.k, p.v, layout_of(p), impl=impl)
    assert out.grad_fn is None
    assert lse.grad_fn is None
    p.q.requires_grad_(False)
    got = answer(p, impl)
    assert torch.equal(out, got.out)
    assert torch.equal(lse, got.lse)


def _torch_saved(layout: BlockLayout) -> BlockLayout:
    buffer = io.BytesIO()
    torch.save(layout, buffer)
    buffer.seek(0)
    loaded: BlockLayout = torch.load(buffer, weights_only=False)
    return loaded


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda layout: pickle.loads(pickle.dumps(layout)),
    "torch.save": _torch_saved,
    "pytree": lambda layout: pytree.tree_map_only(Tensor, torch.clone, layout),
    "to": lambda layout: layout.to("cpu"),
    "compact": lambda layout: layout.compact(),
}


@pytest.mark.parametrize("way", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used before"])
def test_copies_of_a_layout_read_the_same(way: Any, used: bool) -> None:
    p = problem()
    layout = layout_of(p)
    original = answer(p, "blocked")
    if used:
        run(p, layout, seeds_of(p), "blocked")
    other = way(layout)
    assert other.col.dtype == torch.int32
    assert torch.equal(other.to_mask(), layout.to_mask())
    assert_bitwise(run(p, other, seeds_of(p), "blocked"), original)


def test_changing_what_a_layout_was_made_of_changes_no_layout() -> None:
    keep = torch.ones(1, 1, 5, 3, dtype=torch.bool)
    index = torch.tensor([0, 1, 2], dtype=torch.int32).expand(1, 1, 5, 3).clone()
    parts = BlockLayout.dense(8, 16, 40, 40)
    lists = [parts.start.clone(), parts.count.clone(), parts.col.clone()]
    layouts = [
        BlockLayout.from_mask(keep, 8, 16, 40, 40),
        BlockLayout.from_indices(index, 8, 16, 40, 40),
        BlockLayout(8, 16, 40, 40, *lists),
    ]
    for tensor in (keep, index, *lists):
        tensor.zero_()
    assert all(layout.to_mask().all() for layout in layouts)


def test_a_layout_cannot_be_changed() -> None:
    layout = BlockLayout.dense(8, 16, 40, 40)
    with pytest.raises(AttributeError, match="cannot assign"):
        layout.block_q = 4  # type: ignore[misc]


@both
def test_autocast_computes_in_the_low_dtype_and_trains_the_full_one(impl: str) -> None:
    p = problem()
    leaves = [x.clone().requires_grad_() for x in (p.q, p.k, p.v)]
    layout = layout_of(p)
    with torch.autocast("cpu", torch.bfloat16):
        dense = torch.nn.functional.scaled_dot_product_attention(*leaves, enable_gqa=True)
        out = block_sparse_attention(*leaves, layout, impl=impl)
    assert out.dtype == dense.dtype == torch.bfloat16
    low = [x.to(torch.bfloat16) for x in (p.q, p.k, p.v)]
    assert torch.equal(out, block_sparse_attention(*low, layout, impl=impl))
    out.float().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in leaves)


@both
def test_autocast_brings_queries_keys_and_values_to_one_dtype(impl: str) -> None:
    p = problem()
    low = [x.to(torch.bfloat16) for x in (p.q, p.k, p.v)]
    with torch.autocast("cpu", torch.bfloat16):
        out = block_sparse_attention(p.q, p.k, low[2], layout_of(p), impl=impl)
        assert why_not("blocked", p.q, p.k, low[2], layout_of(p)) == ()
        with pytest.raises(ShapeError, match=r"expected one dtype, got .*float32, .*float64"):
            block_sparse_attention(p.q, p.k, p.v.double(), layout_of(p), impl=impl)
    assert torch.equal(out, block_sparse_attention(*low, layout_of(p), impl=impl))
    with pytest.raises(ShapeError, match="expected one dtype"):
        block_sparse_attention(p.q, p.k, low[2], layout_of(p), impl=impl)


@both
def test_autocast_leaves_double_precision_alone(impl: str) -> None:
    p = problem(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = block_sparse_attention(p.q, p.k, p.v, layout_of(p), impl=impl)
    assert torch.equal(out, answer(p, impl).out)


@both
def test_backward_inside_autocast_is_that_outside(impl: str) -> None:
    p = problem()
    with torch.autocast("cpu", torch.bfloat16):
        inside = answer(p.change(q=p.q.double(), k=p.k.double(), v=p.v.double()), impl)
    assert_bitwise(inside, answer(p.change(q=p.q.double(), k=p.k.double(), v=p.v.double()), impl))


@both
def test_a_call_touches_no_global_setting(impl: str) -> None:
    def settings() -> tuple[Any, ...]:
        return (
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.backends.mkldnn.enabled,
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            len(warnings.filters),
        )

    p = problem()
    before, dice = settings(), torch.get_rng_state()
    answer(p, impl)
    assert settings() == before
    assert torch.equal(torch.get_rng_state(), dice)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@both
def test_the_default_dtype_plays_no_part(default: torch.dtype, impl: str) -> None:
    p = problem(window=9, key_bias=torch.zeros(1, 1, 40))
    usual = answer(p, impl)
    seeds, layout = seeds_of(p), layout_of(p)
    torch.set_default_dtype(default)
    try:
        got = run(p, layout, seeds, impl)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_bitwise(got, usual)


@both
def test_results_are_not_overwritten_by_the_next_call(impl: str) -> None:
    p = problem()
    first = answer(p, impl)
    kept = Answer(*(x.clone() for x in first[:5]))
    answer(p.change(q=-p.q, v=p.v + 1), impl)
    assert_bitwise(first, kept)


def _largest_allocation(work: Any) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        work()
    return max(event.self_cpu_memory_usage for event in prof.key_averages())


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_at_long_lengths_is_far_from_tokens_squared(backward: bool) -> None:
    length, width = 16384, 4
    q, k, v = (Numbers.of(i).normal(1, 1, length, width).float().requires_grad_(backward) for i in range(3))
    layout = BlockLayout.sink_window(64, 64, length, length, window=256, sink=64)
    extras = Extras(window=256, sink=64)

    def work() -> None:
        out: Tensor = block_sparse_attention(q, k, v, layout, extras=extras, impl="blocked")
        if backward:
            out.sum().backward()

    work()
    assert _largest_allocation(work) < length * length // 4
