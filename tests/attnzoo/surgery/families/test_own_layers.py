"""attnzoo's own layers in anybody's model: another layer round the same projections, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import attnzoo
from attnzoo import surgery
from attnzoo.policies import Streaming
from attnzoo.surgery.lookalikes import lookalikes
from tests.attnzoo.surgery.families.hosts.host import VOCAB
from tests.attnzoo.surgery.families.hosts.modules import toy
from tests.attnzoo.surgery.families.test_timm_like import vit
from tests.attnzoo.surgery.tiny import assert_close, convert

EXACT = 1e-10


IDS = torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(3))
TEXT = [torch.randint(0, VOCAB, (4, 40), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]

CONVERSIONS: dict[str, dict[str, Any]] = {
    "mha": {"window": 6, "sink": 2, "block_size": 4},
    "s2": {"block_size": 4, "local_blocks": 2, "vert_stride": 2},
    "moh": {"shared_heads": 2, "active_heads": 1, "router": "norm"},
    "longheads": {},
    "landmark": {"block_size": 8},
    "rcmha": {},
}


def state(model: nn.Module) -> Any:
    modules = {name: (id(module), module.training) for name, module in model.named_modules()}
    return modules, {name: (id(p), p.clone()) for name, p in model.named_parameters()}


def assert_same_state(model: nn.Module, before: Any) -> None:
    modules, parameters = state(model)
    assert modules == before[0]
    assert parameters.keys() == before[1].keys()
    for name, (identity, value) in parameters.items():
        assert identity == before[1][name][0]
        assert torch.equal(value, before[1][name][1])


def test_layers_are_found_and_nothing_inside_replacements_is() -> None:
    model = toy()
    sites = surgery.find(model)
    assert [(site.path, site.host, site.kv_heads) for site in sites] == [
        ("layers.0", "attnzoo", 2),
        ("layers.1", "attnzoo", 2),
    ]
    assert lookalikes(model) == {}
    assert surgery.cache_bytes(model) == 2 * 2 * 2 * 8 * 8


@pytest.mark.parametrize("variant", CONVERSIONS)
@torch.no_grad()
def test_weights_stay_and_the_way_back_is_exact(variant: str) -> None:
    model = toy()
    before = state(model)
    expected = model(IDS)
    report = convert(model, variant, **CONVERSIONS[variant])
    layers: Any = model.layers
    assert [type(layer) for layer in layers] == [type(attnzoo.create(variant, dim=32, num_heads=4))] * 2
    assert {name for name, _ in model.named_parameters()} >= set(before[1])
    for layer, old in zip(layers, ("layers.0", "layers.1"), strict=True):
        assert id(layer.k_proj.weight) == before[1][f"{old}.k_proj.weight"][0]
    found = model(IDS)
    assert bool(found.isfinite().all())
    if variant not in ("longheads", "rcmha"):
        assert not torch.allclose(found, expected)
    report.undo()
    assert torch.equal(model(IDS), expected)
    assert_same_state(model, before)


@pytest.mark.parametrize("variant", ["moh", "rcmha"])
@torch.no_grad()
def test_layers_begin_as_the_layer_that_was_there(variant: str) -> None:
    model = toy()
    expected = model(IDS)
    convert(model, variant)
    assert_close(model(IDS), expected, EXACT)


@torch.no_grad()
def test_a_window_is_the_window_of_a_layer_that_was_built_so() -> None:
    model = toy()
    other = toy(**CONVERSIONS["mha"])
    other.load_state_dict(model.state_dict())
    convert(model, "mha", **CONVERSIONS["mha"])
    assert torch.equal(model(IDS), other(IDS))
    # And back to everything, by a conversion of its own.
    convert(model, "mha")
    assert torch.equal(model(IDS), toy()(IDS))


@pytest.mark.parametrize("method", ["commuting", "latent", "mean"])
def test_fewer_values_lose_nothing_that_was_repeated(method: str) -> None:
    model = toy()
    with torch.no_grad():
        expected = model(IDS)
    convert(model, "lowrank_gqa", method="expand", num_kv_heads=4)
    with torch.no_grad():
        assert_close(model(IDS), expected, EXACT)
    options: dict[str, Any] = {"latent_dim": 32} if method == "latent" else {"num_kv_heads": 2}
    report = convert(model, "lowrank_gqa", method=method, **options, calibration=None if method == "mean" else TEXT)
    with torch.no_grad():
        assert_close(model(IDS), expected, 1e-8)
    assert report.cache_bytes[1] < report.cache_bytes[0]


@torch.no_grad()
def test_a_policy_is_followed_by_caches_that_are_not_told_of_it() -> None:
    policy = Streaming(sink=4, window=8, block=4)
    model, plain = toy(), toy()
    convert(model, "policy", policy=policy)
    layer: Any = model.layers[0]
    other: Any = plain.layers[0]
    x = model.embed(IDS)
    caches = layer.new_cache(2, 64), other.new_cache(2, 64, policy=policy)
    for start, end in ((0, 20), (20, 30), (30, 31)):
        assert torch.equal(layer(x[:, start:end], cache=caches[0]), other(x[:, start:end], cache=caches[1]))
    assert caches[0].rule is not None


@pytest.mark.parametrize("variant", [*CONVERSIONS, "policy", "lowrank_gqa"])
@torch.no_grad()
def test_an_adapter_is_loaded_into_the_model_that_it_was_made_from(variant: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        **CONVERSIONS,
        "policy": {"policy": Streaming(sink=4, window=8, block=4)},
        "lowrank_gqa": {"method": "mean", "num_kv_heads": 1},
    }
    model = toy()
    convert(model, variant, **options[variant])
    expected = model(IDS)
    surgery.save(model, tmp_path / "adapter", adapter_only=True)
    again, _ = surgery.load(tmp_path / "adapter", base=toy())
    assert torch.equal(again(IDS), expected)
    assert [type(layer) for layer in again.layers] == [type(layer) for layer in model.layers]


def _refused(make: Callable[[], nn.Module], variant: str, options: dict[str, Any], message: str) -> None:
    model = make()
    before = state(model)
    with pytest.raises((attnzoo.UnsupportedError, attnzoo.ConfigError), match=message):
        surgery.convert(model, variant, **options)
    assert_same_state(model, before)


def test_what_cannot_be_is_refused_by_name() -> None:
    ahead: dict[str, Any] = {"causal": False}
    policy = {"policy": Streaming(sink=4, window=8, block=4)}
    _refused(lambda: toy("moh", active_heads=1), "s2", {}, r"^layers\.0: .*'moh', whose own weights \(router\.weight\)")
    _refused(lambda: toy(**ahead), "longheads", {}, r"^layers\.0: .* not causal, and 'longheads' chooses")
    _refused(lambda: toy(**ahead), "policy", policy, r"^layers\.0: .* not causal, so that it has no cache")
    _refused(toy, "lowrank_gqa", {"method": "commuting", "num_kv_heads": 1, "refit": True}, r"^refit: expected False")
    _refused(toy, "s2", {"colour": 3}, "colour")
    _refused(toy, "s2", {"block_size": 0}, r"^layers\.0: block_size: expected an int >= 1")
    mixed = nn.ModuleList([toy(), vit()])
    _refused(lambda: mixed, "mha", {}, r"^where: expected sites of 'attnzoo' or of others, got both, attnzoo and timm")
