"""What is remembered of a call serves calls like it alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnzoo_kernels import BlockLayout, Extras, block_sparse_attention_with_lse
from tests.strategies import Numbers

T = 40
RULES: dict[str, list[dict[str, Any]]] = {
    "causal": [{"causal": True}, {"causal": False}],
    "window": [{"window": 9}, {"window": 17}, {}],
    "sink": [{"window": 9, "sink": 0}, {"window": 9, "sink": 7}, {"window": 9, "sink": 12}],
    "windows by head": [
        {"window": torch.tensor(x, dtype=torch.int32)} for x in ([3, 9, 3, 9], [9, 3, 9, 3], [20, 20, 20, 20])
    ],
    "positions": [
        {"q_pos": torch.arange(T, dtype=torch.int32).view(1, 1, T) - shift, "window": 9} for shift in (0, 5, 8)
    ],
    "batch": [{"shape": (1, 4, 2)}, {"shape": (3, 4, 2)}, {"shape": (2, 4, 2)}],
    "heads": [{"shape": (1, 4, 2)}, {"shape": (1, 2, 2)}, {"shape": (1, 6, 2)}, {"shape": (1, 6, 1)}],
}


def attend(layout: BlockLayout, impl: str, rule: dict[str, Any]) -> tuple[Tensor, Tensor]:
    batch, heads, groups = rule.get("shape", (1, 4, 2))
    n = Numbers.of(3)
    q, k, v = n.normal(batch, heads, T, 4), n.normal(batch, groups, T, 4), n.normal(batch, groups, T, 4)
    extras = Extras(**{name: x for name, x in rule.items() if name not in ("shape", "causal")})
    return block_sparse_attention_with_lse(q, k, v, layout, causal=rule.get("causal", True), extras=extras, impl=impl)


@pytest.mark.parametrize("name", RULES)
def test_calls_that_differ_in_one_thing_share_a_layout_and_no_plan(name: str) -> None:
    expected = [attend(BlockLayout.dense(8, 8, T, T), "reference", rule) for rule in RULES[name]]
    for order in pairwise([*range(len(expected)), 0]):
        layout = BlockLayout.dense(8, 8, T, T)
        for at in (*order, order[0]):
            for found, wanted in zip(attend(layout, "blocked", RULES[name][at]), expected[at], strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["start", "count", "col"])
def test_lists_that_were_written_to_are_read_anew(name: str) -> None:
    keep = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    layout = BlockLayout.from_mask(keep, 8, 8, T, T)
    attend(layout, "blocked", {"causal": False})
    if name == "start":
        layout.start[..., 1:3] = torch.tensor([10, 5])
        layout.col[5:10] = torch.tensor([4, 3, 2, 1, 0])
        layout.count[..., 2] = 2
    elif name == "count":
        layout.count[..., 1:] = 3
    else:
        layout.col[:5] = torch.tensor([4, 0, 1, 2, 3])
        layout.count[..., 0] = 1
    found, wanted = (attend(layout, impl, {"causal": False}) for impl in ("blocked", "reference"))
    for mine, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["window", "sink", "q_pos"])
def test_numbers_by_head_that_were_written_to_are_read_anew(name: str) -> None:
    value = torch.arange(T).view(1, 1, T).int() if name == "q_pos" else torch.tensor([3, 5, 7, 9], dtype=torch.int32)
    extras = Extras(**{"window": 4, name: value})
    n, layout = Numbers.of(3), BlockLayout.dense(8, 8, T, T)
    q, k, v = n.normal(1, 4, T, 4), n.normal(1, 2, T, 4), n.normal(1, 2, T, 4)
    for shift in (0, 6):
        value.add_(shift)
        found, wanted = (
            block_sparse_attention_with_lse(q, k, v, layout, extras=extras, impl=impl)
            for impl in ("blocked", "reference")
        )
        for mine, true in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-10)


def test_layouts_that_share_their_lists_and_no_origins_share_no_plan() -> None:
    n, index = Numbers.of(3), torch.arange(5).expand(1, 1, 5, 5)
    first = BlockLayout.from_indices(index, 8, 8, T, T, origin=torch.zeros_like(index))
    leaves, spec = pytree.tree_flatten(first)
    other = n.integers(0, 9, *first.col.shape)
    second = pytree.tree_unflatten([other if leaf is first.origin else leaf for leaf in leaves], spec)
    assert second.col is first.col and second.origin is other
    q, k, v = n.normal(1, 4, T, 4), n.normal(1, 2, T, 4), n.normal(1, 2, T, 4)
    angle = n.normal(10, 2)
    extras = Extras(rope=(angle.cos(), angle.sin()))
    expected = [
        block_sparse_attention_with_lse(q, k, v, x, extras=extras, impl="reference")[0] for x in (first, second)
    ]
    for at in (0, 1, 0):
        found = block_sparse_attention_with_lse(q, k, v, (first, second)[at], extras=extras, impl="blocked")[0]
        torch.testing.assert_close(found, expected[at], rtol=1e-10, atol=1e-10)
