"""Exactly which keys a query reads, forward and backward: probes that show every single wrong pair.

With scores of 0 every visible key has a weight above 0, so one-hot values make the output the visible set itself. The
gradient of the log-sum-exp with respect to a score is the weight, so one-hot queries or keys show the same set in dK
and dQ, and one-hot output gradients show it in dV.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from attnzoo_kernels import block_sparse_attention_with_lse
from tests.attnzoo_kernels.op.test_agreement import both
from tests.attnzoo_kernels.oracle import Problem, visible
from tests.strategies import Numbers, extras_of, layout_of, lse_dtype, problems, untidy_layout_of


def one_hot_rows(p: Problem) -> Tensor:
    """``[B, H, T, group * T]``: a column for each query of each head of a group."""
    group = p.heads // p.kv_heads
    columns = torch.eye(group * p.queries, dtype=p.q.dtype).view(group, p.queries, -1)
    return columns.repeat(p.batch, p.kv_heads, 1, 1)


def one_hot_keys(p: Problem) -> Tensor:
    """``[B, G, S, S]``."""
    return torch.eye(p.keys, dtype=p.q.dtype).expand(p.batch, p.kv_heads, -1, -1).contiguous()


def by_query(grad: Tensor, p: Problem) -> Tensor:
    """``[B, G, S, group * T]`` as ``[B, H, T, S]``."""
    group = p.heads // p.kv_heads
    return grad.unflatten(-1, (group, p.queries)).permute(0, 1, 3, 4, 2).flatten(1, 2)


def zeros(p: Problem, heads: int, length: int, width: int) -> Tensor:
    return torch.zeros(p.batch, heads, length, width, dtype=p.q.dtype)


def probe(p: Problem, impl: str, *, poison: Tensor | None = None, untidy: bool = False) -> dict[str, Tensor]:
    """The visible set as each result shows it, and the log-sum-exp; ``poison`` marks slots that hold NaN."""
    layout = untidy_layout_of(p) if untidy else layout_of(p)

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        if poison is not None:
            k, v = (x.masked_fill(poison.unsqueeze(-1), math.nan) for x in (k, v))
        if p.q_pos is not None:
            q = q.masked_fill((p.q_pos == -1).unsqueeze(-1), math.nan)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        results = block_sparse_attention_with_lse(*leaves, layout, causal=p.causal, extras=extras_of(p), impl=impl)
        return *results, leaves

    wide, narrow = p.heads // p.kv_heads * p.queries, p.keys
    out, lse, _ = call(zeros(p, p.heads, p.queries, 4), zeros(p, p.kv_heads, p.keys, 4), one_hot_keys(p))
    found = {"lse": lse.detach(), "out": out.detach() > 0}
    out, _, leaves = call(
        zeros(p, p.heads, p.queries, 4), zeros(p, p.kv_heads, p.keys, 4), zeros(p, p.kv_heads, p.keys, wide)
    )
    found["dv"] = by_query(torch.autograd.grad(out, leaves[2], one_hot_rows(p))[0], p) != 0
    ones = torch.ones(p.batch, p.heads, p.queries, dtype=lse_dtype(p.q.dtype))
    _, lse, leaves = call(one_hot_rows(p), zeros(p, p.kv_heads, p.keys, wide), zeros(p, p.kv_heads, p.keys, 3))
    found["dk"] = by_query(torch.autograd.grad(lse, leaves[1], ones)[0], p) != 0
    _, lse, leaves = call(zeros(p, p.heads, p.queries, narrow), one_hot_keys(p), zeros(p, p.kv_heads, p.keys, 3))
    found["dq"] = torch.autograd.grad(lse, leaves[0], ones)[0] != 0
    return found


def assert_reads(p: Problem, expected: Tensor, impl: str, **options: Any) -> None:
    found = probe(p, impl, **options)
    for name in ("out", "dv", "dk", "dq"):
        wrong = (found[name] != expected).nonzero()
        assert not len(wrong), f"{name}: {len(wrong)} wrong pairs, the first (b, h, t, s) = {wrong[0].tolist()}"
    if p.key_bias is None:
        log = expected.sum(-1, dtype=torch.float64).log()
        torch.testing.assert_close(found["lse"].double(), log, rtol=0, atol=1e-6)


def example(
    batch: int = 2, queries: int = 37, keys: int = 45, heads: int = 4, kv_heads: int = 2, **rule: Any
) -> Problem:
    """A call whose blocks do not divide its lengths; what the tensors hold is the probe's."""
    n = Numbers.of(3)
    block_q, block_k = rule.pop("block_q", 8), rule.pop("block_k", 16)
    keep = rule.pop("keep", torch.ones(1, 1, -(-queries // block_q), -(-keys // block_k), dtype=torch.bool))
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    q, k, v = (n.normal(batch, *shape, 4).to(rule.get("dtype", torch.float32)) for shape in shapes)
    rule.pop("dtype", None)
    return Problem(q, k, v, keep, block_q, block_k, **rule)


def ints(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


SHIFTED = torch.arange(37, dtype=torch.int32).view(1, 1, 37) - 4
POSITIONS = {
    "chunk in the middle": SHIFTED.clamp(min=-1),
    "per item": torch.cat([SHIFTED.clamp(min=-1), SHIFTED + 5]),
    "routed rows": (torch.arange(37).view(1, 1, 37) * torch.arange(1, 5).view(1, 4, 1) % 45).int(),
    "absent here and there": torch.where(torch.arange(37) % 3 == 0, -1, torch.arange(37)).int().view(1, 1, 37),
    "beyond the last key": SHIFTED + 40,
}
PADDING = torch.zeros(2, 1, 45).masked_fill(torch.arange(45) >= torch.tensor([45, 20]).view(2, 1, 1), -math.inf)
HOLES = torch.zeros(1, 4, 45).masked_fill(Numbers.of(8).chance(0.5, 1, 4, 45), -math.inf)
KINDS: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 7},
    "window of one": {"window": 1},
    "window as wide as a block": {"window": 16},
    "window of the whole length": {"window": 45},
    "window per head": {"window": ints(1, 8, 16, 99)},
    "window both ways": {"window": 7, "causal": False},
    "window both ways per head": {"window": ints(1, 2, 17, 99), "causal": False},
    "sink": {"window": 5, "sink": 3},
    "sink over more than a block": {"window": 5, "sink": 17},
    "sink per head": {"window": 5, "sink": ints(0, 1, 16, 60)},
    "sink and window per head": {"window": ints(1, 2, 9, 40), "sink": ints(7, 0, 20, 1)},
    "sink both ways": {"window": 3, "sink": 4, "causal": False},
    "sink alone hides nothing": {"sink": 3},
    "padding": {"key_bias": PADDING},
    "holes per head": {"key_bias": HOLES},
    "holes per group": {"key_bias": HOLES[:, :2]},
    "nothing readable": {"key_bias": torch.full((1, 1, 45), -math.inf)},
    **{name: {"q_pos": q_pos} for name, q_pos in POSITIONS.items()},
    **{f"window, {name}": {"q_pos": q_pos, "window": 6, "sink": 2} for name, q_pos in POSITIONS.items()},
    **{f"full, {name}": {"q_pos": q_pos, "causal": False} for name, q_pos in POSITIONS.items()},
    "everything": {"q_pos": POSITIONS["per item"], "key_bias": PADDING, "window": ints(3, 9, 20, 1), "sink": 2},
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


@every_kind
@both
def test_a_query_reads_the_keys_of_its_rule_and_no_other(kind: dict[str, Any], impl: str) -> None:
    p = example(**kind)
    assert_reads(p, visible(p), impl)


@every_kind
@both
def test_a_query_reads_only_listed_blocks(kind: dict[str, Any], impl: str) -> None:
    p = example(keep=Numbers.of(2).chance(0.5, 2, 2, 5, 3), **kind)
    assert_reads(p, visible(p), impl, untidy=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 2, 4], ids=lambda h: f"{h} layout heads")
@pytest.mark.parametrize("batch", [1, 2], ids=lambda b: f"{b} layout items")
def test_layout_heads_belong_to_query_heads_in_groups(batch: int, heads: int, dtype: torch.dtype) -> None:
    p = example(keep=Numbers.of(4).chance(0.5, batch, heads, 5, 3), dtype=dtype)
    for impl in ("reference", "blocked"):
        assert_reads(p, visible(p), impl)


@given(problems(longest=24))
def test_no_rule_shows_a_key_too_many_or_hides_one(p: Problem) -> None:
    expected = visible(p)
    for impl in ("reference", "blocked"):
        assert_reads(p, expected, impl)


@pytest.mark.parametrize("kind", [KINDS["padding"], KINDS["nothing readable"]], ids=["padding", "nothing readable"])
@both
def test_padded_keys_are_not_read_even_if_they_hold_nan(kind: dict[str, Any], impl: str) -> None:
    p = example(**kind)
    poison = (kind["key_bias"] == -math.inf).expand(2, 2, 45)
    found = probe(p, impl, poison=poison)
    for name in ("out", "dv", "dk", "dq"):
        assert torch.equal(found[name], visible(p)), name


@pytest.mark.parametrize(
    ("queries", "keys", "last"), [(2, 5, [3, 4]), (5, 2, [-1, -1, -1, 0, 1]), (3, 3, [0, 1, 2]), (1, 4, [3])]
)
@both
def test_causality_is_aligned_at_the_last_key(queries: int, keys: int, last: list[int], impl: str) -> None:
    p = example(1, queries, keys, 2, 1)
    expected = torch.arange(keys) <= torch.tensor(last).unsqueeze(1)
    assert_reads(p, expected.expand(1, 2, -1, -1), impl)


@both
def test_a_window_counts_the_own_key(impl: str) -> None:
    p = example(1, 10, 10, 1, 1, window=4)
    assert_reads(p, torch.ones(10, 10).tril().triu(-3).bool().expand(1, 1, -1, -1), impl)


@both
def test_without_causality_even_rows_before_the_first_key_read_everything(impl: str) -> None:
    p = example(1, 9, 4, 1, 1, causal=False)
    assert_reads(p, torch.ones(1, 1, 9, 4, dtype=torch.bool), impl)
