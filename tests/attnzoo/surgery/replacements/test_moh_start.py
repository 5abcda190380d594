"""What a replacement starts from: routers at zero, whichever heads are active; the host's scale; warnings."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from attnzoo import surgery
from attnzoo.variants.moh.layer import MoHAttention
from tests.attnzoo.surgery.tiny import assert_close, ids, logits, tiny

OPTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "some": {"active_heads": 2, "shared_heads": 2},
    "without shared ones": {"active_heads": 3, "shared_heads": 0},
    "the paper's form": {"active_heads": 2, "shared_heads": 2, "gate_norm": "paper"},
}


def converted(options: dict[str, Any]) -> tuple[Any, list[str]]:
    model = tiny()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        surgery.convert(model, "moh", **options)
    return model, [str(x.message) for x in caught]


def layers(model: Any) -> list[MoHAttention]:
    return [layer.self_attn.layer for layer in model.model.layers]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_router_starts_at_zero(name: str) -> None:
    model, _ = converted(OPTIONS[name])
    for layer in layers(model):
        routers = {key: x for key, x in layer.named_parameters() if "router" in key}
        assert ("router.weight" in routers) and ("shared_router.weight" in routers) == (layer.config.counts.shared > 1)
        assert not any(bool(x.any()) for x in routers.values())


def test_two_conversions_are_the_same_function() -> None:
    torch.manual_seed(1)
    first, _ = converted(OPTIONS["some"])
    torch.manual_seed(2)
    second, _ = converted(OPTIONS["some"])
    tokens = ids(2, 12)
    assert torch.equal(logits(first, tokens), logits(second, tokens))
    # A router at zero has no opinion: among equal heads the first are taken.
    for layer in layers(first):
        counts = layer.config.counts
        active = layer.attend(torch.randn(1, 5, 96, dtype=torch.float64)).plan.extras.q_pos
        if active is not None:
            assert bool((active[:, : counts.shared + counts.active] >= 0).all())
            assert not bool((active[:, counts.shared + counts.active :] >= 0).any())


def test_without_options_all_heads_are_active() -> None:
    model, told = converted({})
    assert not told
    assert all(layer.config.counts.active == layer.config.counts.routed for layer in layers(model))


@pytest.mark.parametrize(("options", "words"), [
    ({"window": 9}, "without a sink"),
    ({"window": 9, "sink": 2}, None),
    ({"active_heads": 2, "shared_heads": 2}, "4 of 6 heads"),
    ({"gate_norm": "paper"}, "gates less than 1"),
])  # fmt: skip
def test_what_makes_another_function_is_warned_of(options: dict[str, Any], words: str | None) -> None:
    _, told = converted(options)
    assert [words in text for text in told] == [True] if words is not None else not told


def test_a_hosts_own_scale_stays() -> None:
    model, tokens = tiny(), ids(2, 12)
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.7
    expected = logits(model, tokens)
    surgery.convert(model, "moh")
    assert_close(logits(model, tokens), expected, 1e-11)
