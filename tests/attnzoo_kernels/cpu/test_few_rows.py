"""Calls of few rows: what they read is found from the lists, touched alone, and kept between lengths."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnzoo_kernels import BlockLayout, Extras, Slots, attend_slots, block_sparse_attention, why_not
from attnzoo_kernels.cpu import few_rows
from attnzoo_kernels.cpu import slots as slots_module
from attnzoo_kernels.cpu.slots import attend_slots_with_lse
from attnzoo_kernels.layouts import runs
from attnzoo_kernels.op import attend_on_path, make_call
from attnzoo_kernels.runtime import store
from attnzoo_kernels.spec.call import Call
from tests.strategies import Numbers, strided

Inputs = tuple[Tensor, Tensor, Tensor]


def inputs_of(sizes: tuple[int, int, int, int, int], width: int = 8, values: int = 8, stride: str = "packed") -> Inputs:
    """Of ``B, G, H / G, T, S``."""
    batch, groups, ratio, rows, slots = sizes
    n = Numbers.of(sum(sizes))
    shapes = ((groups * ratio, rows, width), (groups, slots, width), (groups, slots, values))
    q, k, v = (strided(n.normal(batch, *shape).float(), stride) for shape in shapes)
    return q, k, v


def by_loops(tensors: Inputs, seen: Tensor, scale: float, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Out and log-sum-exp row by row of ``seen [B, H, T, S]``, in fp64."""
    q, k, v = (x.double() for x in tensors)
    batch, heads, rows, _ = q.shape
    each = heads // k.shape[1]
    out = torch.zeros(batch, heads, rows, v.shape[3], dtype=torch.float64)
    lse = torch.full((batch, heads, rows), -math.inf, dtype=torch.float64)
    for b, h, t in ((b, h, t) for b in range(batch) for h in range(heads) for t in range(rows)):
        at = seen[b, h, t].nonzero().flatten()
        if at.numel():
            score = k[b, h // each, at] @ q[b, h, t] * scale + (0.0 if added is None else added[b, h, t, at])
            lse[b, h, t] = score.logsumexp(0)
            out[b, h, t] = score.softmax(0) @ v[b, h // each, at]
    return out, lse


def call_of(tensors: Inputs, layout: BlockLayout, **extras: Any) -> Call:
    return make_call(tensors, layout, causal=True, scale=0.3, extras=Extras(**extras))


@settings(max_examples=25)
@given(data=st.data())
def test_one_row_is_the_definition_and_touches_what_it_sees_alone(data: st.DataObject) -> None:
    n = Numbers.of(data.draw(st.integers(0, 999)))
    batch, groups, ratio = (data.draw(st.integers(1, 3)) for _ in range(3))
    length, block = data.draw(st.integers(1, 90)), data.draw(st.sampled_from((1, 4, 16)))
    window = data.draw(st.sampled_from((None, 1, 9, 40)))
    sink = data.draw(st.sampled_from((0, 3, 20)))
    lists = (data.draw(st.sampled_from((1, batch))), data.draw(st.sampled_from((1, groups, groups * ratio))))
    blocks = -(-length // block)
    keep = n.chance(data.draw(st.sampled_from((0.3, 0.8, 1.0))), *lists, 1, blocks)
    keep[..., -1] = True
    layout = BlockLayout.from_mask(keep, 1, block, 1, length)
    tensors = inputs_of((batch, groups, ratio, 1, length), values=data.draw(st.sampled_from((8, 5))))
    slot = torch.arange(length)
    rule = torch.ones(length, dtype=torch.bool)
    if window is not None:
        rule = (slot >= length - window) | (slot < sink)
    seen = keep.repeat_interleave(block, 3)[..., :length] & rule
    seen = seen.repeat_interleave(groups * ratio // lists[1], 1).expand(batch, -1, -1, -1)
    wanted = by_loops(tensors, seen, 0.3)
    # What a KV head's query heads do not see holds NaN.
    unread = ~seen.unflatten(1, (groups, ratio)).any(2).transpose(2, 3)
    q, k, v = tensors[0], *(x.masked_fill(unread, math.nan) for x in tensors[1:])
    extras = Extras(window=window, sink=sink)
    for need_lse in (False, True):
        found = attend_on_path("few_rows", (q, k, v), layout, scale=0.3, extras=extras, need_lse=need_lse)
        torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=1e-5, atol=1e-5)
    if lists[0] == 1:
        slots = Slots.of_layout(layout, window=window, sink=sink)
        assert slots is not None
        torch.testing.assert_close(attend_slots(q, k, v, slots, scale=0.3).double(), wanted[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [2, 4])
def test_a_call_whose_heads_see_what_others_of_their_group_do_not_is_left_where_that_is_no_number(heads: int) -> None:
    # Query heads of a group that read slots of their own gather them: nothing else is touched either.
    keep = torch.zeros(1, heads, 1, 8, dtype=torch.bool)
    for head in range(heads):
        keep[0, head, 0, [head, 7]] = True
    q, k, v = inputs_of((1, 2, 2, 1, 32))
    k = k.clone()
    k[:, :, 16:28] = math.nan
    layout = BlockLayout.from_mask(keep, 1, 4, 1, 32)
    assert attend_on_path("few_rows", (q, k, v), layout)[0].isfinite().all()


def test_auxiliary_channels_biases_and_work_sets_are_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    n = Numbers.of(3)
    tensors = inputs_of((2, 4, 2, 1, 40))
    q_aux, k_aux = n.normal(2, 8, 1, 3).float(), n.normal(1, 4, 40, 3).float()
    added = 0.3 * torch.matmul(q_aux, k_aux.repeat_interleave(2, 1).transpose(2, 3))
    lists = [[(head, head + 9), (30, 40)] for head in (1, 1, 5, 7)]
    seen = torch.zeros(1, 4, 1, 40, dtype=torch.bool)
    for head, own in enumerate(lists):
        for first, last in own:
            seen[0, head, 0, first:last] = True
    seen = seen.repeat_interleave(2, 1).expand(2, -1, -1, -1)
    wanted = by_loops(tensors, seen, 0.3, added.double())
    every = [Slots.of_lists(lists), Slots(None, torch.stack([_slots(own) for own in lists]))]
    for most in (slots_module.WORK_SET, 1):
        monkeypatch.setattr(slots_module, "WORK_SET", most)
        for long in (slots_module.LONG_RUNS, 1):
            monkeypatch.setattr(slots_module, "LONG_RUNS", long)
            for slots in every:
                found = attend_slots_with_lse(*tensors, slots, scale=0.3, aux=(q_aux, k_aux))
                for mine, true in zip(found, wanted, strict=True):
                    torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-5)
                out = attend_slots(*tensors, slots, scale=0.3, aux=(q_aux, k_aux))
                torch.testing.assert_close(out.double(), wanted[0], rtol=1e-5, atol=1e-5)


def _slots(own: list[tuple[int, int]]) -> Tensor:
    return torch.cat([torch.arange(*run) for run in own])


def test_what_cannot_be_attended_over_slots_is_refused() -> None:
    q, k, v = inputs_of((1, 4, 1, 1, 8))
    with pytest.raises(ValueError, match="slots: expected those of one of 1, 4, 4 heads, got 3"):
        attend_slots(q, k, v, Slots.of_lists([[(0, 2)], [(1, 3)], [(2, 6)]]), scale=1.0)
    apart = Slots.of_lists([[(0, 2)], [(1, 3)], [(2, 6)], [(0, 1)]])
    with pytest.raises(ValueError, match="bias: expected None"):
        attend_slots(q, k, v, apart, scale=1.0, bias=q[..., :1])
    for layout in (BlockLayout.dense(1, 4, 2, 8), BlockLayout.from_mask(torch.zeros(1, 1, 1, 2) > 0, 1, 4, 1, 8)):
        assert Slots.of_layout(layout) is None


def test_lists_are_looked_at_once_for_all_lengths_that_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    store.forget()
    looked: list[int] = []
    original = runs._find

    def spy(lists: Any) -> Any:
        looked.append(lists.seq_k if isinstance(lists, BlockLayout) else lists.k.shape[2])
        return original(lists)

    monkeypatch.setattr(runs, "_find", spy)
    first = BlockLayout.dense(1, 16, 1, 40)
    for length in range(33, 49):
        layout = BlockLayout._trusted((1, 16, 1, length), runs_of(first))
        tensors = inputs_of((1, 2, 1, 1, length))
        expected = by_loops(tensors, torch.ones(1, 2, 1, length, dtype=torch.bool), 0.3)[0]
        out = attend_on_path("few_rows", tensors, layout, scale=0.3)[0]
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert len(looked) == 1
    # Lists that were written to are looked at again.
    first.count.fill_(2)
    assert few_rows.slots_of_row(call_of(tensors, layout)) is not None
    assert len(looked) == 2


def runs_of(layout: BlockLayout) -> Any:
    from attnzoo_kernels.layouts.build import LayoutLists

    return LayoutLists(layout.start, layout.count, layout.col)


def test_rows_that_would_see_little_of_what_they_read_together_are_left_to_blocks() -> None:
    n = Numbers.of(1)
    keep = n.chance(0.05, 1, 2, 16, 64)
    keep[..., 0] = True
    layout = BlockLayout.from_mask(keep, 1, 64, 16, 4096)
    call = call_of(inputs_of((1, 2, 1, 16, 4096)), layout)
    assert few_rows.reasons(call) == ()
    assert few_rows.FewRowsPath().declines(call)
    assert not few_rows.FewRowsPath().declines(
        call_of(inputs_of((1, 2, 1, 16, 4096)), BlockLayout.dense(16, 64, 16, 4096))
    )


REASONS = {
    "65 queries": ((1, 2, 1, 65, 65), {}),
    "pairs at most": ((1, 2, 1, 17, 4096), {}),
    "are tensors": ((1, 2, 1, 1, 9), {"q_pos": torch.full((1, 1, 1), 3, dtype=torch.int32)}),
    "a bias": ((1, 2, 1, 1, 9), {"key_bias": torch.zeros(1, 1, 9)}),
    "auxiliary": ((1, 2, 1, 2, 9), {"aux": (torch.zeros(1, 2, 2, 3), torch.zeros(1, 2, 9, 3))}),
    "gates or origins": ((1, 2, 1, 1, 9), {"gate": "last"}),
}


@pytest.mark.parametrize("said", REASONS)
def test_what_is_not_for_the_path_has_a_reason(said: str) -> None:
    sizes, extras = REASONS[said]
    given_ = inputs_of(sizes)
    layout = BlockLayout.dense(16, 16, *sizes[3:])
    found = why_not("blocked/few_rows", *given_, layout, extras=Extras(**extras))
    assert len(found) == 1
    assert said in found[0]


@pytest.mark.parametrize("slots", [1, 30, 64])
@pytest.mark.parametrize("rows", [1, 30, 64])
def test_the_backward_runs_here_and_gives_what_the_next_path_does(
    rows: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (x.requires_grad_() for x in inputs_of((2, 2, 2, rows, slots)))
    layout = BlockLayout.window(16, 16, rows, slots, window=20)
    dout = Numbers.of(5).normal(2, 4, rows, 8).float()
    results = []
    original = few_rows.backward

    def spy(*args: Any) -> Any:
        results.append(original(*args))
        return results[-1]

    monkeypatch.setattr(few_rows, "backward", spy)
    grads = {}
    for path in ("few_rows", "blocked"):
        out, _ = attend_on_path(path, (q, k, v), layout, extras=Extras(window=20, sink=2))
        grads[path] = torch.autograd.grad(out, (q, k, v), dout)
    assert len(results) == 1
    assert results[0] is not None
    for mine, other in zip(grads["few_rows"], grads["blocked"], strict=True):
        assert mine.is_contiguous()
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_a_small_call_goes_here_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = few_rows.forward

    def spy(call: Call, *, need_lse: bool) -> Any:
        seen.append(call.q.shape[2])
        return original(call, need_lse=need_lse)

    monkeypatch.setattr(few_rows, "forward", spy)
    for rows in (1, 16, 64, 65):
        block_sparse_attention(*inputs_of((1, 2, 1, rows, 70)), BlockLayout.dense(16, 16, rows, 70))
    assert seen == [1, 16, 64]


@pytest.mark.parametrize("block", [1, 4])
def test_runs_are_cut_by_window_and_sink_at_every_length(block: int) -> None:
    listed = [0, 1, 2, 4, 5]
    for length in range(5 * block + 1, 6 * block + 1):
        layout = BlockLayout.from_indices(torch.tensor(listed).view(1, 1, 1, -1), 1, block, 1, length)
        for window in range(1, length + 2):
            for sink in range(length + 2):
                seen = [
                    slot
                    for slot in range(length)
                    if slot // block in listed and (slot >= length - window or slot < sink)
                ]
                slots = Slots.of_layout(layout, window=window, sink=sink)
                assert slots is not None
                assert slots.runs is not None
                assert [slot for run in slots.runs for slot in range(*run)] == seen


def test_shares_that_begin_within_a_group_are_the_definition() -> None:
    near, far = [(20, 30)], [(0, 7), (25, 30)]
    tensors = inputs_of((2, 3, 2, 1, 30))
    for lists in (
        [far, near, near, near, near, far],
        [near, far, far, far, far, far],
        [near, near, far, near, far, far],
    ):
        seen = torch.zeros(1, 6, 1, 30, dtype=torch.bool)
        for head, own in enumerate(lists):
            seen[0, head, 0, _slots(own)] = True
        wanted, lse = by_loops(tensors, seen.expand(2, -1, -1, -1), 0.3)
        out, found = attend_slots_with_lse(*tensors, Slots.of_lists(lists), scale=0.3)
        torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.double(), lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 2])
def test_lists_of_many_gaps_end_with_the_last_slot(heads: int) -> None:
    for length in range(69, 73):
        keep = torch.zeros(1, heads, 1, 18, dtype=torch.bool)
        for head in range(heads):
            keep[0, head, 0, head:17:2] = True
        keep[..., 17] = True
        tensors = inputs_of((1, 2, 1, 1, length))
        seen = keep.repeat_interleave(4, 3)[..., :length].expand(1, 2, -1, -1)
        out = attend_on_path("few_rows", tensors, BlockLayout.from_mask(keep, 1, 4, 1, length), scale=0.3)[0]
        torch.testing.assert_close(out.double(), by_loops(tensors, seen, 0.3)[0], rtol=1e-5, atol=1e-5)


def test_a_hidden_slot_that_is_no_number_leaves_the_call_to_blocks() -> None:
    q, k, v = inputs_of((1, 2, 1, 5, 5))
    k, v = (x.clone() for x in (k, v))
    k[:, :, 4] = v[:, :, 4] = math.nan
    out = attend_on_path("few_rows", (q, k, v), BlockLayout.dense(8, 8, 5, 5))[0]
    assert out[:, :, :4].isfinite().all()
    assert out[:, :, 4].isnan().all()
