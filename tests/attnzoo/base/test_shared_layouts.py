"""Layouts that layers share: the right ones, made once, and never between what may not share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnzoo.base.shared_layouts import Cover, dense_layout, sink_window_layout
from attnzoo_kernels import BlockLayout, Extras, block_sparse_attention

LIKE = torch.zeros(1)
COVER = Cover(5, 2, True, 3)


def made(kind: str, cover: Cover = COVER, like: torch.Tensor = LIKE) -> BlockLayout:
    return dense_layout(4, 9, 21, like) if kind == "dense" else sink_window_layout(4, 9, 21, cover, like)


@pytest.mark.parametrize("kind", ["dense", "window"])
def test_equal_sizes_are_one_object_and_others_are_not(kind: str) -> None:
    assert made(kind) is made(kind)
    assert made(kind) is not dense_layout(4, 9, 22, LIKE)
    for other in (Cover(6, 2, True, 3), Cover(5, 1, True, 3), Cover(5, 2, False, 3), Cover(5, 2, True, 4)):
        assert sink_window_layout(4, 9, 21, other, LIKE) is not made("window")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("first", [0, 3, 12, torch.tensor([0, 7, 12])], ids=str)
def test_a_window_is_covered_from_its_first_slot(first: Any, causal: bool) -> None:
    found = made("window", Cover(5, 2, causal, first))
    wanted = BlockLayout.sink_window(4, 4, 9, 21, window=5, sink=2, causal=causal, q_start=first)
    assert torch.equal(found.to_mask(), wanted.to_mask())
    assert bool(made("dense").to_mask().all())


@pytest.mark.parametrize("kind", ["dense", "window"])
def test_a_layout_first_used_in_inference_serves_training(kind: str) -> None:
    with torch.inference_mode():
        layout = dense_layout(4, 9, 23, LIKE) if kind == "dense" else made("window", Cover(5, 1, True, 14))
    assert not layout.col.is_inference()
    slots = layout.seq_k
    x = torch.randn(1, 1, slots, 4, requires_grad=True)
    out = block_sparse_attention(x[:, :, -9:], x, x, layout, extras=Extras(window=5, sink=1))
    out.sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


def test_other_devices_get_their_own() -> None:
    assert made("dense", like=torch.zeros(1, device="meta")).col.device.type == "meta"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("window", "sink"), [(1, 0), (5, 2), (9, 8), (40, 3), (2, 99)])
def test_a_single_row_lists_what_a_window_of_one_row_does(window: int, sink: int, causal: bool) -> None:
    for slots in range(1, 26):
        for first in {0, slots // 2, slots - 1}:
            found = sink_window_layout(4, 1, slots, Cover(window, sink, causal, first), LIKE)
            wanted = BlockLayout.sink_window(4, 4, 1, slots, window=window, sink=sink, causal=causal, q_start=first)
            assert torch.equal(found.to_mask(), wanted.to_mask()), (slots, first)


def test_lists_outlive_a_step_between_two_block_borders() -> None:
    for made_of in (
        lambda slots: dense_layout(4, 1, slots, LIKE),
        lambda slots: sink_window_layout(4, 1, slots, Cover(9, 2, True, slots - 1), LIKE),
    ):
        steps = [made_of(slots) for slots in range(17, 21)]
        assert [layout.seq_k for layout in steps] == [17, 18, 19, 20]
        assert len({id(layout.col) for layout in steps}) == len({id(layout.start) for layout in steps}) == 1
        assert made_of(21).col is not steps[0].col
    with pytest.raises(ValueError, match="seq_q, seq_k: expected"):
        steps[0].with_lengths(1, 21)


def test_a_step_reads_nothing_back_from_where_its_lists_lie() -> None:
    # Meta tensors have no values: whatever would wait for a device raises.
    like = torch.zeros(1, device="meta")
    for slots in range(9, 14):
        for layout in (
            dense_layout(4, 1, slots, like),
            sink_window_layout(4, 1, slots, Cover(5, 2, True, slots - 1), like),
        ):
            assert layout.col.device.type == "meta"
            q = torch.zeros(1, 2, 1, 8, device="meta")
            k = torch.zeros(1, 1, slots, 8, device="meta")
            assert block_sparse_attention(q, k, k, layout).shape == q.shape
