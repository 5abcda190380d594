"""Distances in scores: channels against Transformer-XL's rel-shift, at any offset, and how little they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from attnzoo.variants.rcmha.relative import channels_by_position, channels_by_slot
from tests.attnzoo.cases import build, tokens
from tests.attnzoo.variants.test_rcmha import config_of, layer_of, limit_of, sinusoids


def rel_shift_scores(gamma: Tensor, slots: int) -> Tensor:
    """Transformer-XL's own way: scores of every row with every distance, moved into place; rows are the last T."""
    tokens_, width = gamma.shape[2:]
    by_distance = gamma.double() @ sinusoids(torch.arange(slots - 1, -1, -1), width).T  # [B, H, T, S], far to near
    padded = pad(by_distance, (1, 0))
    shifted = padded.reshape(*gamma.shape[:2], slots + 1, tokens_)[:, :, 1:].reshape(by_distance.shape)
    ahead = torch.arange(slots) > torch.arange(tokens_)[:, None] + slots - tokens_
    return shifted.masked_fill(ahead, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("length", "slots"), [(7, 7), (64, 64), (300, 300), (5, 999), (2, 1 << 20)])
def test_channels_are_the_rel_shift_definition(length: int, slots: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(slots)
    many = slots > 999
    gamma = 6 * torch.randn(2, 1 if many else 3, length, 16 if many else 64, generator=generator, dtype=dtype)
    q_aux, k_aux = channels_by_slot(gamma, None, slots)
    assert q_aux.dtype == k_aux.dtype == dtype
    assert k_aux.shape == (1, 1, slots, gamma.shape[3])
    scores = (q_aux @ k_aux.transpose(-1, -2)).double().tril(slots - length)
    expected = rel_shift_scores(gamma, slots)
    error, largest = float((scores - expected).abs().max()), max(1.0, float(expected.abs().max()))
    assert error <= limit_of(dtype, slots) * largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0, 1000, 32_768, 131_072, 1_000_000])
def test_channels_are_exact_at_any_offset(offset: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(offset)
    gamma = 6 * torch.randn(2, 3, 100, 64, generator=generator, dtype=dtype)
    keys = torch.arange(150)[None] + offset
    q_aux, k_aux = channels_by_position(gamma, keys[:, 50:], keys, None)
    scores = (q_aux @ k_aux.transpose(-1, -2)).double().tril(50)
    expected = rel_shift_scores(gamma, 150)
    error, largest = float((scores - expected).abs().max()), max(1.0, float(expected.abs().max()))
    assert error <= limit_of(dtype, offset) * largest


def peak_growth(run: Callable[[], Any]) -> int:
    """Bytes that torch's allocator holds at most while a call runs, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        held = run()
    del held
    raw = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    events = sorted((e for e in raw if e.name() == "[memory]"), key=lambda e: e.start_ns())
    now = peak = 0
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def test_distances_take_little_memory_at_four_thousand_tokens() -> None:
    """Against Transformer-XL's rel-shift with as little as it can do with: one matrix, moved in place."""
    length, heads, width = 4096, 1, 64
    sizes = {"dim": heads * width, "num_heads": heads}
    plain, relative = (build(config_of(**sizes, rel=rel)).train() for rel in (None, "sinusoidal"))
    x = tokens(plain, 1, length).requires_grad_()

    def step(layer: Any) -> Callable[[], Any]:
        def run() -> Any:
            layer.zero_grad()
            out = layer(x)
            out.sum().backward()
            return out

        run()  # what is kept for all calls is made
        return run

    extra = peak_growth(step(relative)) - peak_growth(step(plain))
    gamma, vectors = torch.zeros(1, heads, length, width), torch.zeros(width, length)
    with torch.no_grad():
        by_distance = peak_growth(lambda: gamma @ vectors)
    assert by_distance == heads * length * length * 4
    assert 0 < extra <= by_distance / 4


def test_learned_distances_stay_in_proportion_to_their_number() -> None:
    """The table's form needs rows times distances, not rows times keys."""
    layer = layer_of(torch.float32, rel="learned", max_distance=16)
    x = tokens(layer, 1, 2048)
    with torch.no_grad():
        layer(x)
        assert peak_growth(lambda: layer(x)) < 2048 * 2048 * 4
