"""Counted pairs against the oracle's visible set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given

from attnzoo_kernels import BlockLayout, Extras, block_sparse_attention, visible_pairs
from tests.attnzoo_kernels.oracle import Problem, visible
from tests.strategies import extras_of, layout_of, problems, untidy_layout_of


def counted(p: Problem, layout: BlockLayout) -> tuple[int, int]:
    return visible_pairs(layout, causal=p.causal, extras=extras_of(p), batch=p.batch, heads=p.heads)


@given(problems(longest=30))
def test_pairs_are_those_of_the_whole_rule_over_those_of_a_dense_call(p: Problem) -> None:
    dense = p.change(window=None, sink=0)
    expected = (int(visible(p).sum()), int(visible(dense, listed=False).sum()))
    assert counted(p, layout_of(p)) == expected
    assert counted(p, untidy_layout_of(p)) == expected


@given(problems(longest=30, plain=True))
def test_without_switches_the_share_is_the_density_of_the_layout(p: Problem) -> None:
    seen, dense = counted(p, layout_of(p))
    share = seen / dense if dense else 1.0
    assert layout_of(p).density(p.causal) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("sizes", [(0, 4, 5, 5), (2, 4, 0, 5), (2, 4, 5, 0)])
def test_there_are_no_pairs_where_there_is_nothing(sizes: tuple[int, int, int, int]) -> None:
    batch, heads, queries, keys = sizes
    layout = BlockLayout.dense(8, 16, queries, keys)
    assert visible_pairs(layout, causal=True, batch=batch, heads=heads) == (0, 0)
    assert layout.density() == (1.0 if queries * keys == 0 else pytest.approx(1.0))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_pairs_at_lengths_beyond_any_mask_are_exact(causal: bool) -> None:
    length, window = 2**18, 1000
    layout = BlockLayout.window(128, 128, length, length, window=window, causal=causal)
    seen, dense = visible_pairs(layout, causal=causal, extras=Extras(window=window), batch=3, heads=4)
    ramp = window * (window - 1) // 2
    assert seen == 12 * (length * window - ramp if causal else length * (2 * window - 1) - 2 * ramp)
    assert dense == 12 * (length * (length + 1) // 2 if causal else length * length)


def test_a_bias_of_each_group_meets_the_positions_of_its_own_heads() -> None:
    # Four heads at positions of their own, two groups whose biases hide different keys: heads 0 and 1 are group 0.
    q_pos = torch.tensor([7, 6, 1, 0], dtype=torch.int32).view(1, 4, 1)
    bias = torch.zeros(1, 2, 8)
    bias[:, 0, :3] = -torch.inf
    layout = BlockLayout.dense(8, 8, 1, 8)
    pairs = visible_pairs(layout, causal=True, extras=Extras(q_pos=q_pos, key_bias=bias), batch=1, heads=4)
    assert pairs == (5 + 4 + 2 + 1, 5 + 4 + 2 + 1)


@pytest.mark.parametrize("field", ["window", "sink"])
def test_numbers_for_each_head_count_each_head(field: str) -> None:
    layout = BlockLayout.dense(8, 8, 32, 32)
    values = [1, 5, 9, 32]

    def pairs(value: Any) -> int:
        rule = {"window": 3, field: value}
        heads = 4 if isinstance(value, torch.Tensor) else 1
        return visible_pairs(layout, causal=True, extras=Extras(**rule), batch=1, heads=heads)[0]

    assert pairs(torch.tensor(values, dtype=torch.int32)) == sum(pairs(value) for value in values)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    "rule", [{}, {"window": 13, "sink": 9}, {"hidden": (5, 11, 24)}], ids=["plain", "window", "bias"]
)
def test_a_landmark_is_no_pair_and_a_block_without_one_vanishes(causal: bool, rule: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    length = 33
    q, k = torch.randn(2, 1, 2, length, 4, generator=generator, dtype=torch.float64)
    v = torch.eye(length, dtype=torch.float64).expand(1, 2, -1, -1)
    keep = torch.rand(1, 2, 9, 6, generator=generator) < 0.7
    layout = BlockLayout.from_mask(keep, 4, 6, length, length)
    bias = torch.zeros(1, 1, length, dtype=torch.float64)
    bias[..., list(rule.get("hidden", ()))] = -torch.inf
    extras = Extras(gate="last", key_bias=bias, **{key: value for key, value in rule.items() if key != "hidden"})
    out = block_sparse_attention(q, k, v, layout, causal=causal, extras=extras, impl="reference")
    seen, _ = visible_pairs(layout, causal=causal, extras=extras, batch=1, heads=2)
    assert seen == int((out > 0).sum())
