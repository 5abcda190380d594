"""Rows with lists of their own, key block by key block: gates, origins, tiles, windows; which calls are computed so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnzoo_kernels import BlockLayout, Extras, dispatch, why_not
from attnzoo_kernels.cpu import few_rows, key_major
from attnzoo_kernels.key_major import inputs, pairs
from attnzoo_kernels.op import attend_on_path, make_call
from tests.strategies import Numbers

POSITIONS = 40


@pytest.fixture(autouse=True)
def _where_few_rows_are_enough() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_major, "LEAST_ROWS", 0)
        patch.setattr(few_rows, "MOST_ROWS", 0)
        yield


def drawn_call(data: st.DataObject, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor], BlockLayout, Any]:
    """Rows that each list blocks of their own, some of them nothing, with and without gates and origins."""
    n = Numbers.of(data.draw(st.integers(0, 999)))
    batch, groups, ratio = (data.draw(st.integers(1, 2)) for _ in range(3))
    rows, slots, block = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 60)), data.draw(st.integers(2, 9))
    heads = groups * ratio
    lists = data.draw(st.sampled_from((1, groups, heads)))
    keep = n.chance(data.draw(st.sampled_from((0.2, 0.6, 1.0))), batch, lists, rows, -(-slots // block))
    index = torch.where(keep, torch.arange(keep.shape[3]), -1)
    rope = origin = None
    if data.draw(st.booleans()):
        angle = n.normal(POSITIONS, 3).double()
        rope = (angle.cos().to(dtype), angle.sin().to(dtype))
        origin = torch.arange(index.numel()).view(index.shape) % POSITIONS
    layout = BlockLayout.from_indices(index, 1, block, rows, slots, origin)
    gate = data.draw(st.sampled_from((None, 1.0, 0.3, 0.0)))
    q_pos = None
    if rows > slots or data.draw(st.booleans()):
        q_pos = torch.arange(-1, rows - 1, dtype=torch.int32).clamp(max=slots - 1).view(1, 1, -1)
    extras = Extras(
        gate=None if gate is None else "last", gate_mix=1.0 if gate is None else gate, rope=rope, q_pos=q_pos
    )
    widths = (7, 7, data.draw(st.sampled_from((7, 4, 9))))
    shapes = ((heads, rows), (groups, slots), (groups, slots))
    q, k, v = (n.normal(batch, *shape, width).to(dtype) for shape, width in zip(shapes, widths, strict=True))
    rule = {
        "causal": data.draw(st.booleans()),
        "scale": data.draw(st.sampled_from((None, 0.4, -0.3))),
        "extras": extras,
    }
    return (q, k, v), layout, rule


def results(path: str, tensors: tuple[Tensor, Tensor, Tensor], layout: BlockLayout, rule: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = attend_on_path(path, (leaves[0], leaves[1], leaves[2]), layout, **rule, need_lse=True)
    seeds = Numbers.of(7)
    dout, dlse = (seeds.normal(*x.shape).to(x.dtype) for x in (out, lse))
    seen = lse.isfinite()
    total = (out * dout).sum() + torch.where(seen, lse, 0.0).mul(dlse).sum()
    return [out.detach(), torch.where(seen, lse, -9.0).detach(), *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("small", [False, True], ids=["one window", "windows"])
@settings(max_examples=25)
@given(data=st.data())
def test_pairs_sorted_by_key_block_are_the_same_call(small: bool, data: st.DataObject) -> None:
    tensors, layout, rule = drawn_call(data, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        if small:
            # Some rows at once, a tile or two of them.
            patch.setattr(pairs, "PAIRS_AT_ONCE", 24)
            patch.setattr(pairs, "FULL", 1)
            patch.setattr(pairs, "SHORTEST", 2)
            patch.setattr(inputs, "SCORES_AT_ONCE", 32)
        found = results("key_major", tensors, layout, rule)
    for one, other in zip(found, results("blocked", tensors, layout, rule), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


@settings(max_examples=6)
@given(data=st.data())
def test_half_precision_is_computed_in_single(data: st.DataObject) -> None:
    tensors, layout, rule = drawn_call(data, torch.float32)
    low = tuple(x.to(torch.bfloat16) for x in tensors)
    out, lse = attend_on_path("key_major", (low[0], low[1], low[2]), layout, **rule, need_lse=True)
    wide, wide_lse = attend_on_path("key_major", tuple(x.float() for x in low), layout, **rule, need_lse=True)  # type: ignore[arg-type]
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(out, wide.to(torch.bfloat16))
    torch.testing.assert_close(lse, wide_lse)


def sparse_call(rows: int, **options: Any) -> Any:
    n = Numbers.of(3)
    q, k, v = (n.normal(1, 2, length, 8).float() for length in (rows, 64, 64))
    index = torch.arange(2 * rows * 2).view(1, 2, rows, 2) * 3 % 8
    return (q, k, v), BlockLayout.from_indices(index, 1, 8, rows, 64), options


def test_rows_that_share_key_blocks_are_computed_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_major, "LEAST_ROWS", 8)
    for rows, name in ((31, "blocked"), (32, "key_major"), (64, "key_major")):
        tensors, layout, _ = sparse_call(rows)
        assert dispatch.path_of(make_call(tensors, layout, causal=True, scale=0.3, extras=Extras())) == name


@pytest.mark.parametrize(
    "extras",
    [
        Extras(window=9), Extras(key_bias=torch.zeros(1, 1, 64)), Extras(gate=torch.zeros(1, 2, 8, 8)),
        Extras(gate="last", gate_mix=torch.ones(2)), Extras(aux=(torch.zeros(1, 2, 40, 4), torch.zeros(1, 2, 64, 4))),
    ],
    ids=["window", "bias", "gate keys", "gate of each head", "channels"],
)  # fmt: skip
def test_what_it_does_not_know_is_a_reason(extras: Extras) -> None:
    tensors, layout, _ = sparse_call(40)
    assert why_not("blocked/key_major", *tensors, layout) == ()
    assert why_not("blocked/key_major", *tensors, layout, extras=extras)
    assert why_not("blocked/key_major", *tensors, BlockLayout.dense(4, 8, 40, 64))


def test_the_query_blocks_from_one_on_are_a_layout_of_their_own() -> None:
    _, layout, _ = sparse_call(40)
    rest = layout.rows_from(33)
    assert (rest.seq_q, rest.seq_k) == (7, 64)
    assert torch.equal(rest.to_mask(), layout.to_mask()[:, :, 33:])
    for first in (-1, 40):
        with pytest.raises(ValueError, match="first: expected one of 40 query blocks"):
            layout.rows_from(first)
