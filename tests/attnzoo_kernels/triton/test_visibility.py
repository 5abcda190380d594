"""Exactly which keys a query reads in the Triton kernels, forward and backward: probes that show every wrong pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.attnzoo_kernels.op.test_visibility import HOLES, KINDS, PADDING, assert_reads, example, probe
from tests.attnzoo_kernels.oracle import Problem, visible
from tests.attnzoo_kernels.triton.interpreted import TILES, grid, only_interpreted, slow, some, split_lists
from tests.strategies import Numbers, problems

pytestmark = only_interpreted


def sparse(**rule: Any) -> Problem:
    """Few blocks: 37 queries on 45 keys, one item unless the rule is of two, a list for each group."""
    batch = max([1, *(len(rule[name]) for name in ("q_pos", "key_bias") if name in rule)])
    keep = Numbers.of(2).chance(0.7, batch, 2, 1, 3)
    return example(batch, **{"block_q": 40, "block_k": 16, "keep": keep, **rule})


def poisonable(p: Problem) -> Tensor:
    """Slots ``[B, G, S]`` of blocks that no row of a group reads, or that a bias hides from all of them."""
    group = p.heads // p.kv_heads
    unread = ~visible(p).unflatten(1, (p.kv_heads, group)).any(3).any(2)
    padded = torch.nn.functional.pad(unread, (0, -p.keys % p.block_k), value=True)
    whole = padded.unflatten(-1, (-1, p.block_k)).all(-1).repeat_interleave(p.block_k, -1)[..., : p.keys]
    if p.key_bias is None:
        return whole
    heads = p.key_bias.expand(p.batch, -1, -1)
    hidden = heads.repeat_interleave(p.heads // heads.shape[1], 1) == -torch.inf
    return whole | hidden.unflatten(1, (p.kv_heads, group)).all(2)


QUICK = (
    "causal",
    "bidirectional",
    "window both ways per head",
    "sink and window per head",
    "holes per head",
    "everything",
)


def each_kind() -> list[Any]:
    """Every kind of rule; most of them in the slow run."""
    return [
        pytest.param(kind, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, kind in KINDS.items()
    ]


@pytest.mark.parametrize("kind", each_kind())
def test_a_query_reads_the_listed_keys_of_its_rule_and_no_other(kind: dict[str, Any]) -> None:
    p = sparse(**kind)
    assert_reads(p, visible(p), "triton", poison=poisonable(p))


@pytest.mark.parametrize("kind", [slow("causal"), "window both ways per head", slow("everything")])
def test_lists_in_any_order_with_gaps_show_the_same_keys(kind: str) -> None:
    p = sparse(**KINDS[kind])
    assert_reads(p, visible(p), "triton", untidy=True)


@pytest.mark.parametrize(
    "kind", [slow("causal"), "sink and window per head", slow("holes per head"), slow("everything")]
)
def test_lists_cut_into_parts_show_the_same_keys(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    split_lists(monkeypatch)
    p = sparse(**KINDS[kind])
    assert_reads(p, visible(p), "triton", poison=poisonable(p))


@pytest.mark.parametrize(("heads", "batch"), [(2, 2), (4, 1), slow(1, 1), slow(1, 2), slow(2, 1), slow(4, 2)])
def test_layout_heads_belong_to_query_heads_in_groups(batch: int, heads: int) -> None:
    p = example(block_q=19, keep=Numbers.of(4).chance(0.5, batch, heads, 2, 3), dtype=torch.bfloat16)
    assert_reads(p, visible(p), "triton")


@some(0.15)
@given(problems(longest=24, most_tiles=TILES // 2), st.booleans())
def test_no_rule_shows_a_key_too_many_or_hides_one(p: Problem, split: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        split_lists(patch, 1000 if split else 1)
        assert_reads(p, visible(p), "triton", poison=poisonable(p))


@pytest.mark.parametrize(
    "bias", [pytest.param(PADDING, marks=pytest.mark.slow), HOLES[:, :2]], ids=["padding", "holes"]
)
def test_hidden_keys_are_not_read_even_if_they_hold_nan(bias: Tensor) -> None:
    p = sparse(key_bias=bias)
    found = probe(p, "triton", poison=(bias == -torch.inf).expand(p.batch, 2, 45))
    for name in ("out", "dv", "dk", "dq"):
        assert torch.equal(found[name], visible(p)), name


@pytest.mark.parametrize(
    ("queries", "keys", "last"), [(2, 5, [3, 4]), (5, 2, [-1, -1, -1, 0, 1]), (3, 3, [0, 1, 2]), (1, 4, [3])]
)
def test_causality_is_aligned_at_the_last_key(queries: int, keys: int, last: list[int]) -> None:
    p = example(1, queries, keys, 2, 1)
    expected = torch.arange(keys) <= torch.tensor(last).unsqueeze(1)
    assert_reads(p, expected.expand(1, 2, -1, -1), "triton")


@grid(queries=[1, 37], window=[2**31 - 1, 2**31, 2**40])
def test_windows_of_any_size_hide_nothing_from_rows_of_any_position(queries: int, window: int) -> None:
    most = torch.iinfo(torch.int32).max
    q_pos = torch.tensor([0, 40, most - 1])[torch.arange(queries) % 3].int().view(1, 1, queries)
    p = example(1, queries, 45, 2, 1, block_q=19, window=window, q_pos=q_pos)
    assert_reads(p, visible(p), "triton")
