"""Wrong RCMHA on purpose: a small set of checks that the right one passes must fail on every mutant."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from attnzoo.variants.rcmha import convolution, relative
from attnzoo.variants.rcmha import layer as rcmha
from tests.attnzoo.cases import assert_same, tokens
from tests.attnzoo.variants.test_rcmha import definition, layer_of
from tests.attnzoo_kernels.test_mutants import rewrite

SETTINGS: tuple[dict[str, Any], ...] = (
    {"num_kv_heads": 2},
    {"conv_pos": "pre_proj", "num_kv_heads": 2},
    {"causal": False, "bias": True},
    {"rel": "learned", "max_distance": 4},
    {"rel": "learned", "max_distance": 4, "causal": False},
    {"rotary": rcmha.RotaryConfig()},
)


def whole(layer: Any) -> None:
    x = tokens(layer, 2, 23)
    assert_same(layer(x), definition(layer, x))


def padded(layer: Any) -> None:
    key_padding = torch.rand(2, 23, generator=torch.Generator().manual_seed(0)) < 0.4
    x = torch.where(key_padding.unsqueeze(-1), math.nan, tokens(layer, 2, 23))
    out = layer.attend(x, key_padding=key_padding).out
    for item, real in enumerate(~key_padding):
        assert_same(out[item, real], definition(layer, x[item : item + 1, real])[0])


def remembered(layer: Any) -> None:
    if not layer.config.causal:
        return
    x = tokens(layer, 2, 23)
    cache = layer.new_cache(2, 23)
    parts = [layer(part, cache=cache) for part in x.split([9, 1, 6, 7], 1)]
    assert_same(torch.cat(parts, 1), definition(layer, x))


def placed(layer: Any) -> None:
    if layer.config.rel != "sinusoidal" or not layer.config.causal:
        return
    x = tokens(layer, 2, 23)
    moved, stretched = torch.arange(23) + 40, torch.arange(23) * 3
    expected = {moved: definition(layer, x), stretched: layer.attend(x, positions=stretched).out}
    late = torch.cat([torch.arange(9), stretched[9:] + 5])
    expected[late] = layer.attend(x, positions=late).out
    for positions, whole_call in expected.items():
        cache = layer.new_cache(2, 23)
        first = None if positions is late else positions[:9]
        parts = [layer.attend(x[:, :9], positions=first, cache=cache).out]
        parts.append(layer.attend(x[:, 9:], positions=positions[9:], cache=cache).out)
        assert_same(torch.cat(parts, 1), whole_call)


def passes() -> bool:
    relative._shared_waves.cache_clear()
    try:
        for options in SETTINGS:
            layer = layer_of(**options)
            for check in (whole, padded, remembered, placed):
                check(layer)
    except (AssertionError, ValueError, IndexError, RuntimeError):
        return False
    finally:
        relative._shared_waves.cache_clear()
    return True


def test_the_right_one_passes() -> None:
    assert passes()


MUTANTS: dict[str, tuple[Any, str, str, str]] = {
    "the other sign of the sines": (relative, "query_channels", "c * sin - a * cos", "a * cos - c * sin"),
    "sines and cosines swapped": (relative, "query_channels", "a * sin + c * cos", "a * cos + c * sin"),
    "frequencies of half the width": (relative, "waves", ") / width", ") / (width / 2)"),
    "a table one place late": (relative, "waves_behind", "[size - slots :]", "[size - slots - 1 : -1]"),
    "rows one place late": (
        rcmha,
        "channels_by_slot",
        "slots - gamma.shape[2] :",
        "slots - gamma.shape[2] - 1 : -1",
    ),
    "keys counted from elsewhere": (rcmha, "channels_by_position", "keys - last", "keys - last + 1"),
    "the farthest distance not told apart": (rcmha, "attend_clipped", "-1, q_pos - reach)", "-1, q_pos - reach + 1)"),
    "far keys without their vector": (relative, "_far", "lse + call.scale", "lse + 0 * call.scale"),
    "the far vector not scaled": (relative, "_far", "call.scale * shift", "shift"),
    "what lies ahead not turned round": (rcmha, "attend_clipped", "v=call.v.flip(2)", "v=call.v"),
    "hidden keys not turned round": (rcmha, "attend_clipped", "bias.flip(-1)", "bias"),
    "the far vectors swapped": (rcmha, "attend_clipped", "tau[..., 0]", "tau[..., -1]"),
    "residues from the wrong end": (relative, "_near", "% period + least", "% period"),
    "taps the other way": (convolution.DepthwiseConvolution, "forward", "size - 1 - r :", "r - 1 :"),
    "history at the wrong end": (
        convolution.DepthwiseConvolution,
        "forward",
        "(history.to(acc), wide)",
        "(history.to(acc).flip(2), wide)",
    ),
    "padding not silenced before a look ahead": (rcmha.RCMHAAttention, "_convolve", "not self.config.causal", "False"),
    "no memory of the convolution": (
        rcmha.RCMHAAttention,
        "_convolve",
        "step.cache is not None",
        "False",
    ),
    "u missing": (rcmha.RCMHAAttention, "remember", "self.config.rel is not None", "False"),
    "u in the distance's part": (rcmha.RCMHAAttention, "plan", "self.rel_v", "self.rel_u"),
    "given positions forgotten": (rcmha.RCMHAAttention, "remember", "if placed else None", "if False else None"),
    "positions before the first given ones forgotten": (
        rcmha.PlacedCache,
        "_slots",
        "torch.arange(",
        "0 * torch.arange(",
    ),
    "what is cached lies behind the convolution": (
        rcmha.RCMHAAttention,
        "project",
        "given[name] for name in self._convolved()",
        "made[name] for name in self._convolved()",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(monkeypatch, *MUTANTS[name])
    assert not passes()
