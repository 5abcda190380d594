"""What is remembered between calls: bounded by bytes, freed on demand, never of another layout or rule."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo_kernels import (
    BlockLayout,
    Extras,
    block_sparse_attention,
    clear_memory,
    memory_held,
    memory_limit,
    set_memory_limit,
)
from attnzoo_kernels.cpu import row_tiles, schedule
from attnzoo_kernels.layouts import memo
from attnzoo_kernels.runtime import store, workspace
from attnzoo_kernels.spec.call import Call, Origins
from attnzoo_kernels.spec.token_rule import PackedGQA, TokenRule
from tests.strategies import Numbers

SMALL = 200 << 10


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    """Nothing is remembered before and after, and the limit is put back."""
    before = memory_limit()
    clear_memory()
    yield
    set_memory_limit(before)
    clear_memory()


def inputs(tokens: int, heads: int = 4, seed: int = 0) -> list[Tensor]:
    n = Numbers.of(seed)
    return [n.normal(1, h, tokens, 8).float() for h in (heads, 2, 2)]


def attend(tokens: int, layout: BlockLayout | None = None) -> Tensor:
    layout = layout or BlockLayout.sink_window(16, 16, tokens, tokens, window=40, sink=3)
    leaves = [x.requires_grad_() for x in inputs(tokens)]
    out = block_sparse_attention(*leaves, layout, extras=Extras(window=40, sink=3), impl="blocked")
    return torch.cat([x.reshape(-1) for x in (out, *torch.autograd.grad(out.sum(), leaves))]).detach()


@pytest.mark.parametrize("name", attnzoo.list_variants())
def test_a_layer_of_many_lengths_stays_within_the_limit_and_gives_the_same(name: str) -> None:
    torch.manual_seed(0)
    layer = attnzoo.create(attnzoo.get_config(name).small()).eval()
    calls = [torch.randn(1, tokens, layer.config.dim) for tokens in range(160, 170, 2)]
    with torch.no_grad():
        free = [layer(x) for x in calls]
        clear_memory()
        assert memory_held() == 0
        set_memory_limit(SMALL)
        for _ in range(2):
            for x, expected in zip(calls, free, strict=True):
                assert torch.equal(layer(x), expected)
                assert memory_held() <= SMALL
        set_memory_limit(0)
        assert memory_held() == 0
        assert torch.equal(layer(calls[0]), free[0])
        assert memory_held() == 0


def test_thirty_two_schedules_stay_within_the_limit_and_are_freed_on_call() -> None:
    layouts = [BlockLayout.sink_window(16, 16, n, n, window=40, sink=3) for n in range(200, 232)]
    expected = [attend(x.seq_q, x) for x in layouts]
    assert memory_held() > 2 * SMALL
    clear_memory()
    gc.collect()
    assert memory_held() == 0
    set_memory_limit(SMALL)
    for layout, result in zip(layouts, expected, strict=True):
        assert torch.equal(attend(layout.seq_q, layout), result)
        assert memory_held() <= SMALL


def test_what_was_used_last_is_kept_and_what_was_not_used_for_longest_goes() -> None:
    made: list[int] = []

    def build(call: Call) -> Tensor:
        made.append(call.q.shape[2])
        return torch.zeros(1000, dtype=torch.int64)

    def ask(call: Call) -> None:
        memo.remembered(call, build)

    calls = [call_of(layout_for(n)) for n in (33, 34, 35)]
    set_memory_limit(2 * store.bytes_of(torch.zeros(1000, dtype=torch.int64)) + 8000)
    for at in (0, 1, 0, 2, 0, 2, 1):
        ask(calls[at])
    assert made == [33, 34, 35, 34]


def test_a_value_beyond_the_limit_is_not_kept_and_displaces_nothing() -> None:
    kept, large = call_of(layout_for(33)), call_of(layout_for(34))
    set_memory_limit(20_000)
    first = memo.remembered(kept, _zeros(10))
    memo.remembered(large, _zeros(10_000))
    assert memo.remembered(kept, _zeros(10)) is first


_builds: dict[int, Any] = {}


def _zeros(size: int) -> Any:
    return _builds.setdefault(size, lambda call: torch.zeros(size, dtype=torch.int64))


def test_what_belongs_to_a_layout_goes_with_it() -> None:
    layout = layout_for(200)
    attend(200, layout)
    assert memory_held() > 0
    tables = sum(len(shelf.records) for shelf in store._shelves if shelf is not memo._memo)
    del layout
    gc.collect()
    assert not memo._memo.records
    assert sum(len(shelf.records) for shelf in store._shelves) == tables


def test_what_a_schedule_makes_of_itself_later_is_counted() -> None:
    layout = layout_for(200)
    call = call_of(layout)
    made = schedule.schedule_for(call)
    before, room = memory_held(), store._Budget.room
    made.chunks(1 << 10, call.block_q, call.block_k)
    assert memory_held() > before
    assert store._Budget.room < room


def test_counted_bytes_hold_every_tensor_once() -> None:
    x = torch.zeros(100_000)
    assert 400_000 <= store.bytes_of((x, x[:500], {"again": x})) < 500_000
    made = schedule.schedule_for(call_of(layout_for(200)))
    held = sum(t.nbytes for b in made.buckets for t in (b.rows, b.cols, b.kv, *(b.limits or ())) if t is not None)
    assert store.bytes_of(made) >= held


def test_threads_that_displace_each_other_get_what_one_gets() -> None:
    layouts = [layout_for(n) for n in range(100, 106)]
    alone = [attend(x.seq_q, x) for x in layouts]
    set_memory_limit(40_000)
    stop = threading.Event()

    def disturb() -> None:
        while not stop.wait(0.001):
            clear_memory()

    def work(_: int) -> bool:
        return all(torch.equal(attend(x.seq_q, x), y) for x, y in zip(layouts, alone, strict=True))

    disturber = threading.Thread(target=disturb)
    disturber.start()
    try:
        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(work, range(3)))
    finally:
        stop.set()
        disturber.join()
    assert memory_held() <= 40_000


def test_scratch_memory_of_a_thread_is_bounded_and_freed_from_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "MOST_BYTES", 10_000)
    cpu = torch.device("cpu")
    for i in range(9):
        held = workspace.scratch(f"name {i}", (1000,), torch.float32, cpu)
        assert held.shape == (1000,)
        assert sum(x.nbytes for x in workspace._shelf.kept.values()) <= 10_000
    other = threading.Thread(target=clear_memory)
    other.start()
    other.join()
    assert not workspace._shelf.kept


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError), (None, TypeError)])
def test_a_limit_is_a_number_of_bytes(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="most: expected"):
        set_memory_limit(value)


def test_results_are_remembered_by_arguments_and_at_most_so_many() -> None:
    made: list[int] = []

    @store.remembers(2)
    def double(n: int, *, twice: bool = False) -> Tensor:
        made.append(n)
        return torch.tensor(n * (4 if twice else 2))

    try:
        assert [int(double(n)) for n in (1, 1, 2, 1, 3, 1, 2)] == [2, 2, 4, 2, 6, 2, 4]
        assert made == [1, 2, 3, 2]
        assert int(double(1, twice=True)) == 4
    finally:
        store._shelves.remove(double.shelf)


# What is remembered under one rule must not serve another.


def layout_for(tokens: int, **change: int) -> BlockLayout:
    return BlockLayout.dense(change.get("block_q", 16), change.get("block_k", 16), tokens, tokens)


def call_of(layout: BlockLayout, rule: TokenRule | None = None, sizes: tuple[int, int, int] = (2, 4, 2)) -> Call:
    batch, heads, groups = sizes
    q, k = torch.empty(batch, heads, layout.seq_q, 2), torch.empty(batch, groups, layout.seq_k, 2)
    rule = rule or TokenRule(causal=True, window=9, sink=2)
    return Call(q, k, k, *_lists(layout), None, rule, layout.block_q, layout.block_k, 1.0)


def _lists(layout: BlockLayout) -> tuple[Tensor, Tensor, Tensor]:
    return layout.start, layout.count, layout.col


LAYOUT = layout_for(64)
CALL = call_of(LAYOUT)
ORIGIN = torch.zeros_like(LAYOUT.col)
OTHERS: dict[str, Call] = {
    "B": call_of(LAYOUT, sizes=(3, 4, 2)),
    "H": call_of(LAYOUT, sizes=(2, 8, 2)),
    "G": call_of(LAYOUT, sizes=(2, 4, 4)),
    "T": replace(CALL, q=CALL.q[:, :, :60]),
    "S": replace(CALL, k=CALL.k[:, :, :60], v=CALL.v[:, :, :60]),
    "block_q": replace(CALL, block_q=32),
    "block_k": replace(CALL, block_k=32),
    "causal": replace(CALL, rule=replace(CALL.rule, causal=False)),
    "window": replace(CALL, rule=replace(CALL.rule, window=10)),
    "no window": replace(CALL, rule=replace(CALL.rule, window=None)),
    "sink": replace(CALL, rule=replace(CALL.rule, sink=3)),
    "packed heads": replace(CALL, rule=replace(CALL.rule, packed=PackedGQA(2, 8, 32))),
    "other packed heads": replace(CALL, rule=replace(CALL.rule, packed=PackedGQA(2, 16, 32))),
    "origins": replace(CALL, origins=Origins(ORIGIN, ORIGIN, ORIGIN)),
    "other origins": replace(CALL, origins=Origins(ORIGIN.clone(), ORIGIN, ORIGIN)),
    "start": replace(CALL, start=CALL.start.clone()),
    "count": replace(CALL, count=CALL.count.clone()),
    "col": replace(CALL, col=CALL.col.clone()),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_every_part_of_a_rule_is_a_part_of_the_key(other: Call) -> None:
    def build(call: Call) -> object:
        return _Made(call)

    first = memo.remembered(CALL, build)
    assert memo.remembered(CALL, build) is first
    second = memo.remembered(other, build)
    assert second is not first
    assert memo.remembered(other, build) is second


def test_what_is_made_is_a_part_of_the_key_and_so_is_how() -> None:
    assert memo.remembered(CALL, lambda call: "one") == "one"
    assert memo.remembered(CALL, lambda call: "two") == "two"
    assert row_tiles._finder(1) is not row_tiles._finder(2)
    assert row_tiles._finder(1) is row_tiles._finder(1)


@pytest.mark.parametrize("field", ["q_pos", "window", "sink"])
def test_rules_that_hold_tensors_are_not_remembered(field: str) -> None:
    value = torch.zeros(1, 1, 64, dtype=torch.int32) if field == "q_pos" else torch.full((4,), 9, dtype=torch.int32)
    call = replace(CALL, rule=replace(CALL.rule, **{field: value}))
    assert memo.remembered(call, _Made) is not memo.remembered(call, _Made)
    assert not memo._memo.records


def test_lists_that_are_written_to_are_other_lists() -> None:
    layout = layout_for(64)
    call = call_of(layout)
    first = memo.remembered(call, _Made)
    layout.count.sub_(1)
    assert memo.remembered(call, _Made) is not first


class _Made:
    def __init__(self, call: Call) -> None:
        self.call_shape = call.shape
