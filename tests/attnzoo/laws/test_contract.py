"""The laws of attention that every variant obeys, whatever it computes. A new variant is under them by existing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attnzoo
from tests.attnzoo.cases import CASES, LENGTHS, Case, assert_same, tokens

every_variant = pytest.mark.parametrize("case", CASES, ids=str)
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


def overheard(layer: Any, x: Tensor) -> tuple[Any, Any]:
    """The memory and the plan with which one call asks for the operation."""
    seen = []
    operate = layer.operate

    def listening(memory: Any, plan: Any) -> Tensor:
        seen.append((memory, plan))
        out: Tensor = operate(memory, plan)
        return out

    layer.operate = listening
    layer.attend(x)
    del layer.operate
    return seen[0]


def rotated(x: Tensor, base: float = 10000.0) -> Tensor:
    """Heads ``[B, h, T, D]`` turned by their index, written with complex numbers: halves of a head are their parts."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[2])[:, None].double() * base ** (-torch.arange(half).double() / half)
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(
        torch.ones(()).double(), angles
    )
    return torch.cat([turned.real, turned.imag], -1).to(x.dtype)


@every_variant
@pytest.mark.parametrize("length", LENGTHS)
def test_any_length_works_with_any_grouping(case: Case, length: int) -> None:
    for groups in (4, 2, 1):
        layer = case.layer(num_heads=4, num_kv_heads=groups)
        x = tokens(layer, 1 + length % 3, length).requires_grad_()
        out = layer(x)
        assert out.shape == x.shape
        assert out.dtype == x.dtype
        assert out.isfinite().all()
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        assert grad.isfinite().all()


@every_variant
def test_no_tokens_and_no_batch_give_empty_outputs(case: Case) -> None:
    layer = case.layer()
    for batch, length in ((2, 0), (0, 5), (0, 0)):
        x = tokens(layer, batch, length)
        key_padding = torch.zeros(batch, length, dtype=torch.bool)
        positions = torch.zeros(batch, length, dtype=torch.int64)
        assert layer(x).shape == x.shape
        assert layer.attend(x, key_padding=key_padding).out.shape == x.shape
        assert layer.attend(x, key_padding=key_padding, positions=positions).out.shape == x.shape
        cache = layer.new_cache(batch, 8)
        assert layer.attend(x, cache=cache).out.shape == x.shape
        assert layer.attend(x, key_padding=key_padding, cache=cache).out.shape == x.shape


@every_variant
@pytest.mark.parametrize("length", [65, 129])
def test_future_is_not_read(case: Case, length: int) -> None:
    layer = case.layer()
    assert layer.causal_promise != "selection-looks-ahead", "what is read ahead needs a test of its own"
    x = tokens(layer, 2, length)
    before = layer(x)
    for first in (1, 31, 32, 64, length - 1):
        changed = torch.cat([x[:, :first], 3 * tokens(layer, 2, length - first, seed=1)], 1)
        after = layer(changed)
        assert torch.equal(after[:, :first], before[:, :first])
        assert not torch.equal(after[:, first:], before[:, first:])


@every_variant
def test_batch_mates_do_not_matter(case: Case) -> None:
    layer = case.layer()
    x = tokens(layer, 3, 70)
    out = layer(x)
    others = torch.cat([x[:1], tokens(layer, 2, 70, seed=1)])
    assert torch.equal(layer(others)[0], out[0])
    for item in range(3):
        assert_same(layer(x[item : item + 1]), out[item : item + 1])


@every_variant
@both_precisions
@pytest.mark.parametrize("side", ["left", "right", "both", "holes"])
def test_padding_does_not_matter(case: Case, dtype: torch.dtype, side: str) -> None:
    layer = case.layer(dtype=dtype)
    lengths, total = (70, 33, 1), 70
    key_padding = torch.ones(3, total, dtype=torch.bool)
    for item, length in enumerate(lengths):
        free = total - length
        first = {"left": free, "right": 0, "both": free // 2, "holes": 0}[side]
        key_padding[item, first : first + length] = False
        if side == "holes":
            order = torch.randperm(total, generator=torch.Generator().manual_seed(item))
            key_padding[item] = key_padding[item, order]
    rows = [tokens(layer, 1, length, seed=item) for item, length in enumerate(lengths)]
    x = torch.full((3, total, layer.config.dim), torch.nan, dtype=dtype)
    for item, row in enumerate(rows):
        x[item, ~key_padding[item]] = row[0]
    x.requires_grad_()
    out = layer.attend(x, key_padding=key_padding).out
    assert (out[key_padding] == 0).all()
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert (grad[key_padding] == 0).all()
    for item, row in enumerate(rows):
        row.requires_grad_()
        alone = layer(row)
        assert_same(out[item][~key_padding[item]], alone[0])
        assert_same(grad[item][~key_padding[item]], torch.autograd.grad(alone.square().sum(), row)[0][0], scale=10)


@every_variant
def test_an_item_of_padding_alone_gives_zeros_and_disturbs_nobody(case: Case) -> None:
    layer = case.layer()
    x = tokens(layer, 2, 40)
    key_padding = torch.tensor([[True], [False]]).expand(2, 40)
    poisoned = torch.where(key_padding.unsqueeze(-1), torch.nan, x)
    out = layer.attend(poisoned, key_padding=key_padding).out
    assert (out[0] == 0).all()
    assert_same(out[1:], layer(x[1:]))


@every_variant
def test_what_padding_holds_reaches_no_weight(case: Case) -> None:
    layer = case.layer(dtype=torch.float64)
    x = tokens(layer, 2, 40)
    key_padding = torch.arange(40) < torch.tensor([[0], [15]])
    found = []
    for held in (0.0, torch.nan):
        filled = torch.where(key_padding.unsqueeze(-1), held, x)
        out = layer.attend(filled, key_padding=key_padding).out
        found.append(torch.autograd.grad(out.square().sum(), list(layer.parameters()), allow_unused=True))
    for clean, poisoned in zip(*found, strict=True):
        assert (clean is None and poisoned is None) or torch.equal(clean, poisoned)


@every_variant
def test_no_padding_is_padding_nowhere(case: Case) -> None:
    layer = case.layer()
    x = tokens(layer, 2, 70)
    nowhere = torch.zeros(2, 70, dtype=torch.bool)
    assert_same(layer.attend(x, key_padding=nowhere).out, layer(x))


@every_variant
def test_positions_travel_with_their_tokens(case: Case) -> None:
    """Given positions turn each real token by its own, wherever padding has put it; those of padding say nothing."""
    layer = case.layer(dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    key_padding = torch.rand(3, 70, generator=generator) < 0.5
    positions = torch.randint(0, 500, (3, 70), generator=generator)
    x = tokens(layer, 3, 70)
    out = layer.attend(x, positions=positions, key_padding=key_padding).out
    for item in range(3):
        real = ~key_padding[item]
        alone = layer.attend(x[item : item + 1, real], positions=positions[item, real]).out
        assert_same(out[item : item + 1, real], alone)
    other = positions.masked_fill(key_padding, 77)
    assert torch.equal(layer.attend(x, positions=other, key_padding=key_padding).out, out)


@every_variant
def test_positions_shift_together_without_effect(case: Case) -> None:
    layer = case.layer(dtype=torch.float64)
    x = tokens(layer, 2, 66)
    places = torch.arange(66).expand(2, 66)
    out = layer(x)
    assert_same(layer.attend(x, positions=places).out, out)
    shifted = layer.attend(x, positions=places + torch.tensor([[100], [7]])).out
    assert_same(shifted, out)
    stretched = layer.attend(x, positions=2 * places).out
    assert not torch.allclose(stretched, out, atol=1e-4)


@every_variant
@both_precisions
@pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "plain"])
def test_dense_limit_is_plain_attention(case: Case, dtype: torch.dtype, rotary: bool) -> None:
    changes = {} if rotary else {"rotary": None}
    layer = case.layer(dtype=dtype, **{**type(case.layer()).dense_limit, **changes})
    config = layer.config
    x = tokens(layer, 2, 129)
    q, k, v = (
        projection(x).unflatten(-1, (heads, config.head_width)).transpose(1, 2)
        for projection, heads in (
            (layer.q_proj, config.num_heads),
            (layer.k_proj, config.kv_heads),
            (layer.v_proj, config.kv_heads),
        )
    )
    if rotary:
        assert config.rotary == attnzoo.RotaryConfig()
        q, k = rotated(q), rotated(k)
    out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=config.scale, enable_gqa=True)
    assert_same(layer(x), layer.o_proj(out.transpose(1, 2).flatten(2)))
    assert layer.attend(x).plan.density == 1


@every_variant
def test_grouped_heads_are_repeated_heads_at_the_same_plan(case: Case) -> None:
    layer = case.layer(num_heads=4, num_kv_heads=2, dtype=torch.float64)
    memory, plan = overheard(layer, tokens(layer, 2, 70))
    grouped = layer.operate(memory, plan)
    wide = replace(memory, k=memory.k.repeat_interleave(2, 1), v=memory.v.repeat_interleave(2, 1))
    layout = plan.layout
    if layout.start.shape[1] == 2:
        start, count = (part.repeat_interleave(2, 1) for part in (layout.start, layout.count))
        layout = replace(layout, start=start, count=count)
    assert_same(layer.operate(wide, replace(plan, layout=layout)), grouped)


@every_variant
def test_gradients_reach_every_trainable_parameter(case: Case) -> None:
    layer = case.layer(bias=True).train()
    x = tokens(layer, 2, 129).requires_grad_()
    weight = tokens(layer, 2, 129, seed=1)
    (layer(x) * weight).sum().backward()
    trainable = [(name, p) for name, p in layer.named_parameters() if p.requires_grad]
    assert trainable
    for name, parameter in [*trainable, ("x", x)]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@every_variant
def test_gradients_are_those_of_finite_differences(case: Case) -> None:
    layer = case.layer(dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]
    x = tokens(layer, 1, 13).requires_grad_()

    def call(x: Tensor, *values: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))
        return out

    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    torch.autograd.gradcheck(call, (x, *values), fast_mode=True, nondet_tol=0.0)


@every_variant
@both_precisions
def test_blocked_is_reference(case: Case, dtype: torch.dtype) -> None:
    layer = case.layer(dtype=dtype)
    x = tokens(layer, 2, 129).requires_grad_()
    weight = tokens(layer, 2, 129, seed=1)
    results = []
    for impl in ("blocked", "reference"):
        layer.impl = impl
        out = layer(x)
        results.append((out, torch.autograd.grad((out * weight).sum(), [x, *layer.parameters()])))
    (out, grads), (expected, expected_grads) = results
    assert_same(out, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_same(grad, expected_grad)


@every_variant
def test_strides_do_not_matter(case: Case) -> None:
    layer = case.layer()
    x = tokens(layer, 2, 70)
    out = layer(x)
    for view in (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x.repeat_interleave(2, -1)[..., ::2],
    ):
        assert not view.is_contiguous()
        assert_same(layer(view), out)
    assert_same(layer(x[:1].expand(3, -1, -1)), out[:1].expand(3, -1, -1))


@every_variant
def test_earlier_calls_leave_nothing_behind(case: Case) -> None:
    layer = case.layer()
    x = tokens(layer, 2, 129)
    expected = {length: layer(x[:, :length]) for length in (64, 96)}
    for length in (64, 129, 96, 1, 64, 33, 96):
        out = layer(x[:, :length])
        assert length not in expected or torch.equal(out, expected[length])


@every_variant
def test_threads_do_not_disturb_each_other(case: Case) -> None:
    layer = case.layer()
    inputs = [tokens(layer, 2, length) for length in (33, 64, 70, 129)]
    expected = [layer(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for out, same in zip(pool.map(layer, 4 * inputs), 4 * expected, strict=True):
            assert torch.equal(out, same)


@every_variant
def test_a_call_is_repeatable_bit_for_bit(case: Case) -> None:
    layer = case.layer()
    x = tokens(layer, 2, 70).requires_grad_()
    first, second = layer(x), layer(x)
    assert torch.equal(first, second)
    inputs = [x, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(out.sum(), inputs) for out in (first, second)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("length", [129, 300])
@pytest.mark.parametrize(("name", "most"), [("landmark", 0.6), ("longheads", 0.6), ("moh", 1), ("s2", 0.6)])
def test_a_sparse_variant_is_sparse_where_it_is_small(name: str, most: float, length: int) -> None:
    layer = Case(name, "small").layer()
    plan = layer.attend(tokens(layer, 1, length)).plan
    assert 0 < plan.density < most


@every_variant
def test_density_counts_what_the_output_depends_on(case: Case) -> None:
    layer = case.layer(dtype=torch.float64)
    memory, plan = overheard(layer, tokens(layer, 1, 70))
    one_hot = torch.eye(70, dtype=torch.float64).expand(1, memory.v.shape[1], 70, 70)
    read = layer.operate(replace(memory, v=one_hot), plan) > 0
    dense = memory.q.shape[1] * 70 * 71 // 2
    assert plan.density == pytest.approx(int(read.sum()) / dense)


@every_variant
def test_density_does_not_count_padding(case: Case) -> None:
    layer = case.layer()
    lengths = (70, 41, 3)
    x = tokens(layer, 3, 70)
    key_padding = torch.arange(70) >= torch.tensor(lengths)[:, None]
    pairs = [length * (length + 1) / 2 for length in lengths]
    alone = [layer.attend(x[:1, :length]).plan.density for length in lengths]
    expected = sum(share * count for share, count in zip(alone, pairs, strict=True)) / sum(pairs)
    assert layer.attend(x, key_padding=key_padding).plan.density == pytest.approx(expected)
    assert layer.attend(x, key_padding=torch.ones(3, 70, dtype=torch.bool)).plan.density == 1


@every_variant
def test_what_cannot_be_computed_is_refused_by_name(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = case.layer()
    x = tokens(layer, 2, 5)
    with pytest.raises(ValueError, match="x: expected"):
        layer(x[..., :-1])
    with pytest.raises(ValueError, match="x: expected"):
        layer(x[0, 0])
    with pytest.raises(ValueError, match="key_padding: expected"):
        layer.attend(x, key_padding=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises((TypeError, ValueError), match="key_padding: expected"):
        layer.attend(x, key_padding=torch.zeros(2, 5))
    with pytest.raises(ValueError, match="positions: expected"):
        layer.attend(x, positions=torch.arange(4))
    with pytest.raises((TypeError, ValueError), match="positions: expected"):
        layer.attend(x, positions=torch.zeros(2, 5))
    with pytest.raises((TypeError, ValueError), match="x: expected"):
        layer(x.double())
    layer.impl = "fastest"
    with pytest.raises(ValueError, match="impl"):
        layer(x)
    layer.impl = "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(attnzoo.UnsupportedError) as refusal:
        layer(x)
    assert refusal.value.reasons
