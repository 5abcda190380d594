"""Runs of key blocks are read where they lie, and their gradients added there: against the oracle, for any strides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnzoo_kernels.cpu import schedule
from attnzoo_kernels.cpu.gather import Source
from tests.attnzoo_kernels.op.test_agreement import assert_agrees
from tests.attnzoo_kernels.oracle import Problem
from tests.strategies import Numbers, layout_of, problems


@contextmanager
def chunks_of(scores: int) -> Iterator[list[Tensor]]:
    """Chunks of about so many scores; gives the views that are taken meanwhile."""
    found: list[Tensor] = []
    original = Source.view

    def spy(source: Source, firsts: list[int], count: int) -> Tensor | None:
        view = original(source, firsts, count)
        if view is not None:
            found.append(view)
        return view

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Source, "view", spy)
        patch.setattr(schedule, "CHUNK_SCORES", scores)
        yield found


def runs(n: Numbers, batch: int, heads: int, grid: tuple[int, int]) -> Tensor:
    """A mask whose rows each keep neighbouring blocks, or none."""
    first = n.integers(0, grid[1] - 1, batch, heads, grid[0]).unsqueeze(-1)
    count = n.integers(0, grid[1], batch, heads, grid[0]).unsqueeze(-1)
    block = torch.arange(grid[1])
    return (block >= first) & (block < first + count)


@given(problems(), st.integers(0, 2**16), st.sampled_from((1, 1 << 12, 1 << 14)))
def test_runs_in_any_place_are_the_definition(p: Problem, seed: int, scores: int) -> None:
    p = p.change(keep=runs(Numbers.of(seed), *p.keep.shape[:2], p.keep.shape[2:]))
    with chunks_of(scores):
        assert_agrees(p, layout_of(p), ("blocked",))


@pytest.mark.parametrize("scores", [1, 1 << 18])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("keys", [64, 61])
def test_a_dense_call_reads_nothing_twice_out_of_scratch_memory(scores: int, kv_heads: int, keys: int) -> None:
    n = Numbers.of(3)
    q, k, v = n.normal(2, 4, 61, 8), n.normal(2, kv_heads, keys, 8), n.normal(2, kv_heads, keys, 4)
    p = Problem(q, k, v, torch.ones(1, 1, 8, 8, dtype=torch.bool), 8, 8, True, None)
    with chunks_of(scores) as views:
        assert_agrees(p, layout_of(p), ("blocked",))
    assert views


def memory(kind: str) -> Tensor:
    """Keys ``[2, 3, 20, 4]`` that hold their own number."""
    x = torch.arange(2 * 3 * 20 * 4, dtype=torch.float64).view(2, 3, 20, 4)
    return x.transpose(1, 2).contiguous().transpose(1, 2) if kind == "packed" else x


@pytest.mark.parametrize("kind", ["plain", "packed"])
@pytest.mark.parametrize(
    ("firsts", "count"), [([0], 4), ([3], 1), ([9], 2), ([0, 4, 8], 3), ([0, 1], 2), ([5, 5], 1), ([0, 4], 4)]
)
def test_a_view_holds_what_gathering_gives(kind: str, firsts: list[int], count: int) -> None:
    source = Source(memory(kind), 6, torch.float64)  # 4 blocks a head, the last of 2 rows
    view = source.view(firsts, count)
    assert view is not None
    blocks = torch.tensor([[first + i for i in range(count)] for first in firsts])
    gathered = source.gather("k", blocks.reshape(-1)).view(len(firsts), count * 6, 4)
    assert view.shape[1] in (count * 6, count * 6 - 4)
    assert torch.equal(view, gathered[:, : view.shape[1]])
    assert view.untyped_storage().data_ptr() == source.x.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "firsts", [[0, 4, 9], [4, 0], [1, 2, 4], [2, 7]], ids=["unequal", "backwards", "growing", "only one ends ragged"]
)
def test_what_is_no_even_progression_is_not_viewed(firsts: list[int]) -> None:
    assert Source(memory("plain"), 6, torch.float64).view(firsts, 2) is None


def test_values_to_be_converted_are_not_viewed() -> None:
    assert Source(memory("plain"), 6, torch.float32).view([0], 1) is None
    assert Source(memory("plain"), 6, torch.float32, often=True).view([0], 1) is not None


def test_columns_that_do_not_follow_one_another_are_not_viewed() -> None:
    wide = torch.zeros(1, 1, 12, 8)[..., ::2]
    assert Source(wide, 6, torch.float32).view([0], 2) is None
