"""The laws of remembering that every variant obeys: a cache changes the cost of an answer and nothing else."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.attnzoo.cases import CASES, Case, assert_same, tokens

every_variant = pytest.mark.parametrize("case", CASES, ids=str)
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])

TOTAL = 70


def decode(layer: Any, x: Tensor, ends: list[int], cache: Any = None) -> Tensor:
    """The outputs of calls that end at the given tokens, put together."""
    cache = layer.new_cache(x.shape[0], x.shape[1]) if cache is None else cache
    return torch.cat([layer.attend(x[:, a:b], cache=cache).out for a, b in pairwise([0, *ends])], 1)


def left_padded(rows: list[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Rows ``[1, T, C]`` in one batch, NaN before them, and the padding."""
    x = torch.full((len(rows), length, rows[0].shape[-1]), torch.nan, dtype=rows[0].dtype)
    key_padding = torch.ones(len(rows), length, dtype=torch.bool)
    for item, row in enumerate(rows):
        x[item, length - row.shape[1] :] = row[0]
        key_padding[item, length - row.shape[1] :] = False
    return x, key_padding


@every_variant
@both_precisions
def test_token_by_token_is_prefill(case: Case, dtype: torch.dtype) -> None:
    layer = case.layer(dtype=dtype)
    x = tokens(layer, 2, TOTAL)
    with torch.no_grad():
        assert_same(decode(layer, x, list(range(1, TOTAL + 1))), layer(x))


@every_variant
@settings(max_examples=12, deadline=None)
@given(ends=st.sets(st.integers(1, TOTAL - 1), max_size=6), grad=st.booleans())
@example(ends={32, 64}, grad=False)
@example(ends={31, 33, 63, 65}, grad=True)
@example(ends={69}, grad=False)
def test_prefill_in_chunks_is_prefill(case: Case, ends: set[int], grad: bool) -> None:
    layer = case.layer(dtype=torch.float64)
    x = tokens(layer, 2, TOTAL)
    with torch.set_grad_enabled(grad):
        assert_same(decode(layer, x, [*sorted(ends), TOTAL]), layer(x))


@every_variant
@both_precisions
def test_prompts_of_different_lengths_decode_as_if_alone(case: Case, dtype: torch.dtype) -> None:
    layer = case.layer(dtype=dtype)
    prompts, steps = (64, 5, 37), 8
    rows = [tokens(layer, 1, prompt + steps, seed=prompt) for prompt in prompts]
    x, key_padding = left_padded([row[:, :-steps] for row in rows], 64)
    cache = layer.new_cache(3, 64 + steps)
    with torch.no_grad():
        outs = [layer.attend(x, key_padding=key_padding, cache=cache).out]
        for step in range(steps):
            token = torch.cat([row[:, prompt + step][:, None] for row, prompt in zip(rows, prompts, strict=True)])
            outs.append(layer.attend(token, cache=cache).out)
        out = torch.cat(outs, 1)
        for item, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            assert_same(out[item : item + 1, 64 - prompt :], layer(row))


@every_variant
def test_an_item_may_pause_while_others_go_on(case: Case) -> None:
    layer = case.layer(dtype=torch.float64)
    x = tokens(layer, 2, 40)
    cache = layer.new_cache(2, 40)
    with torch.no_grad():
        expected = layer(x)
        layer.attend(x[:, :30], cache=cache)
        pause = torch.tensor([[True], [False]])
        for t in range(30, 35):
            token = torch.stack([torch.full_like(x[0, :1], torch.nan), x[1, t : t + 1]])
            out = layer.attend(token, key_padding=pause, cache=cache).out
            assert (out[0] == 0).all()
            assert_same(out[1:], expected[1:, t : t + 1])
        chunk = torch.stack([x[0, 30:35], x[1, 35:40]])
        out = layer.attend(chunk, cache=cache).out
        assert_same(out[:1], expected[:1, 30:35])
        assert_same(out[1:], expected[1:, 35:40])


@every_variant
def test_padding_may_come_with_any_call(case: Case) -> None:
    layer = case.layer(dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    key_padding = torch.rand(3, TOTAL, generator=generator) < 0.4
    x = torch.where(key_padding.unsqueeze(-1), torch.nan, tokens(layer, 3, TOTAL))
    cache = layer.new_cache(3, TOTAL)
    whole = layer.attend(x, key_padding=key_padding).out
    parts = [
        layer.attend(x[:, a:b], key_padding=key_padding[:, a:b], cache=cache).out
        for a, b in pairwise([0, 33, 34, 64, TOTAL])
    ]
    assert_same(torch.cat(parts, 1), whole)


@every_variant
def test_positions_may_come_with_any_call(case: Case) -> None:
    layer = case.layer(dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x = tokens(layer, 2, TOTAL)
    positions = torch.randint(0, 1000, (2, TOTAL), generator=generator)
    whole = layer.attend(x, positions=positions).out
    cache = layer.new_cache(2, TOTAL)
    parts = [
        layer.attend(x[:, a:b], positions=positions[:, a:b], cache=cache).out
        for a, b in pairwise([0, 33, 34, 64, TOTAL])
    ]
    assert_same(torch.cat(parts, 1), whole)


@every_variant
def test_a_cropped_cache_forgets_the_end(case: Case) -> None:
    layer = case.layer(dtype=torch.float64)
    x, other = tokens(layer, 2, TOTAL), tokens(layer, 2, TOTAL, seed=1)
    with torch.no_grad():
        for keep in (0, 1, 33, 64):
            cache = layer.new_cache(2, TOTAL)
            layer.attend(torch.cat([x[:, :keep], other[:, keep:]], 1), cache=cache)
            cache.crop(keep)
            assert_same(layer.attend(x[:, keep:], cache=cache).out, layer(x)[:, keep:])


@every_variant
def test_a_ragged_cache_is_cropped_for_each_item(case: Case) -> None:
    layer = case.layer(dtype=torch.float64)
    rows = [tokens(layer, 1, 50, seed=1), tokens(layer, 1, 20, seed=2)]
    x, key_padding = left_padded(rows, 50)
    cache = layer.new_cache(2, 80)
    new = tokens(layer, 2, 9, seed=3)
    with torch.no_grad():
        layer.attend(x, key_padding=key_padding, cache=cache)
        cache.crop(33)
        out = layer.attend(new, cache=cache).out
        for item, kept in enumerate((33, 20)):
            alone = layer(torch.cat([rows[item][:, :kept], new[item : item + 1]], 1))
            assert_same(out[item : item + 1], alone[:, kept:])


@every_variant
def test_a_reordered_cache_continues_the_chosen_items(case: Case) -> None:
    layer = case.layer(dtype=torch.float64)
    rows = [tokens(layer, 1, length, seed=length) for length in (40, 7, 23)]
    x, key_padding = left_padded(rows, 40)
    cache = layer.new_cache(3, 64)
    chosen = [2, 0, 0, 1]
    new = tokens(layer, len(chosen), 3, seed=5)
    with torch.no_grad():
        layer.attend(x, key_padding=key_padding, cache=cache)
        cache.reorder(torch.tensor(chosen))
        out = layer.attend(new, cache=cache).out
        for item, source in enumerate(chosen):
            alone = layer(torch.cat([rows[source], new[item : item + 1]], 1))
            assert_same(out[item : item + 1], alone[:, rows[source].shape[1] :])


@every_variant
def test_a_cache_that_is_full_or_of_another_layer_is_refused_and_left_alone(case: Case) -> None:
    layer, twin = case.layer(), case.layer()
    other = case.layer(num_heads=2, num_kv_heads=1)
    x = tokens(layer, 2, 20)
    cache = layer.new_cache(2, 20)
    with torch.no_grad():
        expected = layer(x)
        layer.attend(x[:, :19], cache=cache)
        with pytest.raises(ValueError, match=r"cache: expected at most max_length 20 tokens, got 21"):
            layer.attend(x[:, :2], cache=cache)
        for stranger in (twin, other):
            with pytest.raises(ValueError, match="cache: expected"):
                stranger.attend(x[:, 19:], cache=cache)
        with pytest.raises(ValueError, match="cache: expected batch 1"):
            layer.attend(x[:1, 19:], cache=cache)
        with pytest.raises((TypeError, ValueError), match="cache: expected"):
            layer.attend(x[:, 19:], cache={})
        assert_same(layer.attend(x[:, 19:], cache=cache).out, expected[:, 19:])


@every_variant
def test_a_cache_written_earlier_trains_the_later_tokens(case: Case) -> None:
    """The gradient through a memory is that of the loss with the remembered values held fixed."""
    layer = case.layer(dtype=torch.float64)
    x = tokens(layer, 2, 60)
    weight = tokens(layer, 2, 20, seed=1)
    cache = layer.new_cache(2, 60)
    with torch.no_grad():
        layer.attend(x[:, :40], cache=cache)
    parameters = list(layer.parameters())

    def loss() -> Tensor:
        return (layer.attend(x[:, 40:], cache=cache.fork()).out * weight).sum()

    grads = torch.autograd.grad(loss(), parameters)
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    step, values = 1e-5, []
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=sign * step)
            values.append(float(loss()))
    slope = (values[0] - values[1]) / (2 * step)
    along = float(sum((g * d).sum() for g, d in zip(grads, directions, strict=True)))
    # Central differences err by step^2 times a third derivative of order the slope's, and by rounding over the step.
    assert slope == pytest.approx(along, rel=1e-6, abs=1e-6)


@every_variant
def test_later_writes_break_no_earlier_backward(case: Case) -> None:
    layer = case.layer(dtype=torch.float64)
    x = tokens(layer, 2, 60)
    parameters = list(layer.parameters())

    def first_chunks() -> tuple[Any, Tensor]:
        cache = layer.new_cache(2, 60)
        with torch.no_grad():
            layer.attend(x[:, :10], cache=cache)
        return cache, layer.attend(x[:, 10:40], cache=cache).out

    _, out = first_chunks()
    expected = torch.autograd.grad(out.square().sum(), parameters)
    cache, out = first_chunks()
    later = layer.attend(x[:, 40:], cache=cache).out
    cache.crop(0)
    with torch.no_grad():
        layer.attend(tokens(layer, 2, 60, seed=1), cache=cache)
    for grad, same in zip(torch.autograd.grad(out.square().sum(), parameters), expected, strict=True):
        assert torch.equal(grad, same)
    assert all(g.isfinite().all() for g in torch.autograd.grad(later.square().sum(), parameters))


@every_variant
def test_ragged_memory_trains_as_each_item_alone(case: Case) -> None:
    layer = case.layer(dtype=torch.float64)
    rows = [tokens(layer, 1, 30, seed=1), tokens(layer, 1, 12, seed=2)]
    x, key_padding = left_padded(rows, 30)
    new = tokens(layer, 2, 10, seed=3)
    parameters = list(layer.parameters())
    cache = layer.new_cache(2, 40)
    with torch.no_grad():
        layer.attend(x, key_padding=key_padding, cache=cache)
    grads = torch.autograd.grad(layer.attend(new, cache=cache).out.square().sum(), parameters)
    total = [torch.zeros_like(p) for p in parameters]
    for item, row in enumerate(rows):
        alone = layer.new_cache(1, 40)
        with torch.no_grad():
            layer.attend(row, cache=alone)
        out = layer.attend(new[item : item + 1], cache=alone).out
        for sum_, grad in zip(total, torch.autograd.grad(out.square().sum(), parameters), strict=True):
            sum_.add_(grad)
    for grad, expected in zip(grads, total, strict=True):
        assert_same(grad, expected)


@every_variant
def test_a_cache_crosses_inference_mode(case: Case) -> None:
    layer = case.layer(dtype=torch.float64)
    x = tokens(layer, 2, 40)
    with torch.inference_mode():
        cache = layer.new_cache(2, 40)
        first = layer.attend(x[:, :20], cache=cache).out.clone()
        ragged = layer.new_cache(2, 40)
        layer.attend(x[:, :20], key_padding=torch.arange(20) < torch.tensor([[0], [4]]), cache=ragged)
    later = layer.attend(x[:, 20:], cache=cache).out
    assert_same(torch.cat([first, later], 1), layer(x))
    for out in (later, layer.attend(x[:, 20:], cache=ragged).out):
        grads = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
        assert all(g.isfinite().all() for g in grads)


@every_variant
def test_a_call_without_tokens_changes_nothing(case: Case) -> None:
    layer = case.layer(dtype=torch.float64)
    x = tokens(layer, 2, 20)
    cache = layer.new_cache(2, 20)
    with torch.no_grad():
        layer.attend(x[:, :11], cache=cache)
        assert layer.attend(x[:, :0], cache=cache).out.shape == (2, 0, layer.config.dim)
        assert cache.lengths.tolist() == [11, 11]
        assert_same(layer.attend(x[:, 11:], cache=cache).out, layer(x)[:, 11:])


@every_variant
def test_autocast_decodes_as_it_prefills(case: Case) -> None:
    layer = case.layer()
    x = tokens(layer, 2, 40)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        out = decode(layer, x, [30, *range(31, 41)])
    assert_same(out, expected, scale=4)


@every_variant
def test_gradients_do_not_reach_earlier_calls_through_the_buffers(case: Case) -> None:
    layer = case.layer()
    cache = layer.new_cache(1, 20)
    x = tokens(layer, 1, 10).requires_grad_()
    layer.attend(x, cache=cache)
    later = tokens(layer, 1, 10, seed=1).requires_grad_()
    layer.attend(later, cache=cache).out.sum().backward()
    assert x.grad is None
    assert later.grad is not None
    assert all(not stream.requires_grad for stream in cache.streams.values())


@every_variant
def test_a_fork_goes_its_own_way(case: Case) -> None:
    layer = case.layer(dtype=torch.float64)
    x, other = tokens(layer, 1, 40), tokens(layer, 1, 20, seed=1)
    cache = layer.new_cache(1, 40)
    with torch.no_grad():
        layer.attend(x[:, :20], cache=cache)
        branch = cache.fork()
        forked = torch.cat([x[:, :20], other], 1)
        # By turns: each would read what the other has written last.
        for begin, end in ((20, 30), (30, 40)):
            assert_same(layer.attend(forked[:, begin:end], cache=branch).out, layer(forked[:, :end])[:, begin:])
            assert_same(layer.attend(x[:, begin:end], cache=cache).out, layer(x[:, :end])[:, begin:])
