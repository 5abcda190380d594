"""Which KV heads are merged: costs against spectra of the heads themselves, and what the search promises."""

from __future__ import annotations

from itertools import combinations, permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnzoo.surgery.lowrank import grouping
from tests.attnzoo.surgery.tiny import WIDTH, assert_close, calibration, convert, ids, logits, tiny

FEW = settings(max_examples=30, deadline=None, derandomize=True)
SIZES = st.sampled_from([(4, 2), (6, 2), (6, 3), (8, 4), (9, 3), (5, 1), (5, 5)])


def random_costs(heads: int, seed: int) -> grouping.Cost:
    """A cost that is different for every set of heads, and the same whenever it is asked."""
    table = torch.rand(1 << heads, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lambda group: float(table[sum(1 << head for head in group)])


@FEW
@given(SIZES, st.integers(0, 99))
def test_groups_hold_every_head_once_and_are_equally_large(sizes: tuple[int, int], seed: int) -> None:
    heads, groups = sizes
    found = grouping.find_groups(heads, groups, random_costs(heads, seed))
    assert sorted(head for group in found for head in group) == list(range(heads))
    assert {len(group) for group in found} == {heads // groups}
    assert len(found) == groups


@FEW
@given(SIZES, st.integers(0, 99))
def test_groups_cost_no_more_than_neighbours_and_no_swap_makes_them_cheaper(sizes: tuple[int, int], seed: int) -> None:
    heads, groups = sizes
    cost = random_costs(heads, seed)
    found = grouping.find_groups(heads, groups, cost)
    total = sum(cost(group) for group in found)
    neighbours = grouping.consecutive(heads, groups)
    assert total <= sum(cost(group) for group in neighbours) * (1 + 1e-9)
    if found == neighbours:
        return
    for a, b in combinations(range(len(found)), 2):
        for x in found[a]:
            for y in found[b]:
                swapped = [cost(tuple({*found[a]} - {x} | {y})), cost(tuple({*found[b]} - {y} | {x}))]
                assert sum(swapped) >= cost(found[a]) + cost(found[b]) - 1e-11


@FEW
@given(st.permutations(range(9)))
def test_groups_that_cost_nothing_are_found_wherever_they_hide(order: list[int]) -> None:
    hidden = [set(order[3 * g : 3 * g + 3]) for g in range(3)]

    def cost(group: tuple[int, ...]) -> float:
        # What each member finds beside it that belongs elsewhere.
        return float(sum(1 for pair in combinations(group, 2) if not any(set(pair) <= whole for whole in hidden)))

    found = grouping.find_groups(9, 3, cost)
    assert {frozenset(group) for group in found} == {frozenset(whole) for whole in hidden}


def test_heads_that_are_grouped_already_keep_their_order() -> None:
    assert grouping.find_groups(6, 3, lambda group: 0.0) == ((0, 1), (2, 3), (4, 5))


@FEW
@given(st.integers(2, 4), st.integers(0, 99))
def test_a_cost_is_the_energy_beyond_one_head_in_keys_and_values(heads: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(20, heads, 3, 2, generator=generator, dtype=torch.float64)
    values = torch.randn(20, heads, 4, generator=generator, dtype=torch.float64)
    whole = torch.view_as_complex(keys)
    planes = torch.einsum("naf,nbf->fab", whole.conj(), whole)
    cost = grouping.tail_cost(planes, torch.einsum("nad,nbe->adbe", values, values), 4)
    group = tuple(range(heads - 1, -1, -1))[:2]
    lost = [float(torch.linalg.svdvals(whole[:, group, f]).square()[1:].sum()) for f in range(3)]
    tail = torch.linalg.svdvals(values[:, group].flatten(1)).square()[4:]
    expected = sum(lost) / float(keys.square().sum()) + float(tail.sum() / values.square().sum())
    assert cost(group) == pytest.approx(expected, rel=1e-9)
    assert all(cost(other) == cost(group) for other in permutations(group))


def test_a_lone_head_costs_nothing() -> None:
    planes, values = torch.eye(3).to(torch.complex128).repeat(2, 1, 1), torch.eye(6).double().view(3, 2, 3, 2)
    cost = grouping.tail_cost(planes, values, 2)
    assert [cost((head,)) for head in range(3)] == pytest.approx([0, 0, 0])


def shuffle_heads(model: Any, seed: int) -> None:
    """Puts the heads of each block of a model without groups into another order; the same function."""
    for layer, block in enumerate(model.model.layers):
        attention, heads = block.self_attn, model.config.num_attention_heads
        order = torch.randperm(heads, generator=torch.Generator().manual_seed(seed + layer))
        rows = (order[:, None] * WIDTH + torch.arange(WIDTH)).flatten()
        with torch.no_grad():
            for name in ("q_proj", "k_proj", "v_proj"):
                linear = getattr(attention, name)
                linear.weight.copy_(linear.weight[rows])
                if linear.bias is not None:
                    linear.bias.copy_(linear.bias[rows])
            attention.o_proj.weight.copy_(attention.o_proj.weight[:, rows])


def turn_heads(model: Any, seed: int) -> None:
    """Gives the heads of each block other bases, which hide that they are copies; the same function.

    Rotary planes of keys by a complex number each, undone in the queries; values by any matrix, undone in the outputs.
    """
    generator = torch.Generator().manual_seed(seed)
    half = WIDTH // 2
    for block in model.model.layers:
        attention = block.self_attn
        for head in range(model.config.num_attention_heads):
            rows = slice(head * WIDTH, (head + 1) * WIDTH)
            phase = torch.view_as_complex(torch.randn(half, 2, generator=generator, dtype=torch.float64))
            mix = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) + 8 * torch.eye(WIDTH)
            with torch.no_grad():
                for name, factor in (("k_proj", phase), ("q_proj", 1 / phase.conj())):
                    for x in _with_bias(getattr(attention, name)):
                        turned = torch.complex(x[rows][:half], x[rows][half:]) * factor[:, None]
                        x[rows] = torch.cat([turned.real, turned.imag])
                for x in _with_bias(attention.v_proj):
                    x[rows] = mix @ x[rows]
                attention.o_proj.weight[:, rows] = attention.o_proj.weight[:, rows] @ torch.linalg.inv(mix)


def _with_bias(linear: Any) -> list[Tensor]:
    return [linear.weight] if linear.bias is None else [linear.weight, linear.bias.unsqueeze(1)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", [{}, {"refit": False}, {"refit": False, "gradients": False}])
@pytest.mark.parametrize("hide", ["in order", "shuffled", "shuffled and turned"])
def test_expanding_nine_heads_from_three_and_back_is_lossless(hide: str, options: dict[str, Any], bias: bool) -> None:
    model, tokens = tiny(9, 3, attention_bias=bias), ids(2, 30)
    expected = logits(model, tokens)
    convert(model, "lowrank_gqa", method="expand", num_kv_heads=9)
    assert_close(logits(model, tokens), expected, 1e-11)
    if hide != "in order":
        shuffle_heads(model, seed=3)
    if hide == "shuffled and turned":
        turn_heads(model, seed=5)
    assert_close(logits(model, tokens), expected, 1e-10)
    text = calibration(3, 4, 40)
    report = convert(model, "lowrank_gqa", method="commuting", num_kv_heads=3, calibration=text, **options)
    assert_close(logits(model, tokens), expected, 1e-9)
    assert all(site.kept == pytest.approx(1, abs=1e-9) for site in report.sites)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 2.0**-4), (torch.float16, 2.0**-7)]
)
def test_the_round_trip_is_lossless_up_to_the_dtype(dtype: torch.dtype, limit: float) -> None:
    model: Any = tiny(9, 3, dtype=dtype)
    tokens = ids(2, 30)
    expected: Tensor = logits(model, tokens)
    convert(model, "lowrank_gqa", method="expand", num_kv_heads=9)
    shuffle_heads(model, seed=3)
    convert(model, "lowrank_gqa", method="commuting", num_kv_heads=3, calibration=calibration(3, 4, 40), refit=False)
    assert logits(model, tokens).dtype == dtype
    assert_close(logits(model, tokens), expected, limit)
