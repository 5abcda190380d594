"""A cache is carried: to a twin of its layer, to disk and back, and with its layer when both are copied."""

from __future__ import annotations

import copy
import io
import json
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnzoo
from attnzoo.cache.kv_cache import KVCache
from tests.attnzoo.cache.cache_kinds import CACHE_KINDS, CacheKind
from tests.attnzoo.cases import Case, tokens

every_kind = pytest.mark.parametrize("kind", CACHE_KINDS, ids=str)
TOKENS, MORE = 150, 6


def padding(ragged: bool) -> Tensor | None:
    return torch.arange(TOKENS) < torch.tensor([[0], [31]]) if ragged else None


def prompt(layer: Any, kind: CacheKind, *, ragged: bool = False, room: int = 200, **options: Any) -> KVCache:
    """A cache that has seen a prompt in two pieces, of which the last tokens were taken back where that is possible."""
    cache = kind.cache(layer, 2, room, **options)
    x, padded = tokens(layer, 2, TOKENS), padding(ragged)
    for part in torch.arange(TOKENS).split([140, 10]):
        layer(x[:, part], cache=cache, key_padding=None if padded is None else padded[:, part])
    if kind.switch != "evict":
        cache.crop(torch.tensor([145, 100]) if ragged else 145)
    return cache


def decode(layer: Any, cache: KVCache) -> Tensor:
    """What comes next: a chunk, and tokens one by one."""
    x = tokens(layer, 2, MORE, seed=5)
    return torch.cat([layer(part, cache=cache) for part in x.split([MORE - 2, 1, 1], 1)], 1)


def on_disk(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def in_two_files(state: dict[str, Any]) -> dict[str, Any]:
    """Tensors as safetensors takes them, and the rest as JSON."""
    from safetensors.torch import load, save

    tensors = {name: x for name, x in state.items() if isinstance(x, Tensor)}
    rest = {name: x for name, x in state.items() if name not in tensors}
    return {**load(save(tensors)), **json.loads(json.dumps(rest))}


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@every_kind
@torch.no_grad()
def test_a_twin_goes_on_from_a_state(kind: CacheKind, ragged: bool) -> None:
    layer, twin = kind.case.layer(), kind.case.layer()
    cache = prompt(layer, kind, ragged=ragged)
    state = cache.state_dict()
    held = sum(x.numel() * x.element_size() for x in state.values() if isinstance(x, Tensor))
    assert held <= cache.nbytes + 16 * len(state)
    expected = decode(layer, cache)
    # Others may have more room, so that rings are longer, or just enough.
    for carry, room in zip((on_disk, in_two_files), (160, 400), strict=True):
        other = kind.cache(twin, 2, room)
        # What was held before is gone.
        twin(tokens(layer, 2, 20, seed=9), cache=other)
        other.load_state_dict(carry(state))
        assert torch.equal(decode(twin, other), expected)
        if kind.switch != "evict":
            other.crop(140 if not ragged else torch.tensor([140, 90]))
            assert other.lengths.tolist() == ([140, 90] if ragged else [140, 140])
    assert all(x.is_contiguous() for x in state.values() if isinstance(x, Tensor))


@torch.no_grad()
def test_positions_that_were_given_are_carried() -> None:
    layer, kind = Case("rcmha", "small").layer(), CacheKind("rcmha")
    x = tokens(layer, 2, 20)
    cache = layer.new_cache(2, 40)
    layer(x, positions=3 * torch.arange(20), cache=cache)
    state, plain = cache.state_dict(), prompt(layer, kind).state_dict()
    expected = decode(layer, cache)
    for before in (None, plain):
        other = layer.new_cache(2, 200)
        if before is not None:
            other.load_state_dict(before)
        other.load_state_dict(state)
        assert torch.equal(decode(layer, other), expected)
    # And positions that another state had are forgotten.
    other.load_state_dict(plain)
    assert torch.equal(decode(layer, other), decode(layer, prompt(layer, kind)))


def refusals(state: dict[str, Any]) -> list[tuple[dict[str, Any], type[Exception], str]]:
    name = next(name for name in state if name.startswith("stream."))
    value = state[name]
    config = {**state["config"], "scale": 0.3}
    return [
        ({**state, "format": 2}, attnzoo.ConfigError, "format: expected"),
        ({**state, "cache": "Other"}, attnzoo.ConfigError, "cache: expected"),
        ({**state, "config": config}, attnzoo.ConfigError, "config: expected a layer with scale=None, got .* 0.3"),
        ({**state, "batch": 3}, attnzoo.ShapeError, "batch: expected the cache's 2, got 3"),
        ({**state, "bound": -1}, attnzoo.ShapeError, "bound: expected"),
        ({**state, "lengths": torch.tensor([1, 500])}, attnzoo.ShapeError, "lengths: expected"),
        ({**state, name: value.double()}, attnzoo.ShapeError, rf"{name}: expected torch.float32"),
        ({**state, name: value[:, :, 1:]}, attnzoo.ShapeError, rf"{name}: expected"),
        ({**state, name: None}, attnzoo.ShapeError, rf"{name}: expected .* got NoneType"),
        ({key: x for key, x in state.items() if key != name}, attnzoo.ShapeError, f"state: expected {name}, got none"),
        ({**state, "stream.other": value}, attnzoo.ShapeError, "state: expected no stream.other"),
    ]


@every_kind
@torch.no_grad()
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(kind: CacheKind) -> None:
    layer = kind.case.layer()
    cache, other = prompt(layer, kind), prompt(layer, kind)
    for state, error, match in refusals(cache.state_dict()):
        with pytest.raises(error, match=f"^{match}"):
            cache.load_state_dict(state)
    with pytest.raises(TypeError, match=r"^state: expected"):
        cache.load_state_dict([])  # type: ignore[arg-type]
    with pytest.raises(attnzoo.ShapeError, match=r"^max_length: expected"):
        kind.cache(layer, 2, 100).load_state_dict(cache.state_dict())
    with pytest.raises(attnzoo.ShapeError, match=r"^stream\..*: expected torch.bfloat16"):
        kind.cache(layer, 2, 200, dtype=torch.bfloat16).load_state_dict(cache.state_dict())
    assert torch.equal(decode(layer, cache), decode(layer, other))


def test_kinds_of_caches_are_told_apart() -> None:
    layer = Case("s2", "small").layer()
    plain, evicting = layer.new_cache(1, 40), layer.new_cache(1, 40, evict=True)
    with pytest.raises(attnzoo.ConfigError, match=r"^cache: expected the state of 'EvictingCache', got 'KVCache'"):
        evicting.load_state_dict(plain.state_dict())
    with pytest.raises(attnzoo.ConfigError, match=r"^cache: expected the state of 'KVCache', got 'EvictingCache'"):
        plain.load_state_dict(evicting.state_dict())


class Held(nn.Module):
    """A module that keeps its cache, as some do; in either order."""

    def __init__(self, layer: Any, cache: KVCache) -> None:
        super().__init__()
        self.cache = cache
        self.layer = layer


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@every_kind
@torch.no_grad()
def test_a_copied_cache_belongs_to_the_layer_that_was_copied_with_it(kind: CacheKind, carry: Any) -> None:
    layer = kind.case.layer()
    cache = prompt(layer, kind)
    held = Held(layer, cache)
    both = [
        tuple(carry({"layer": layer, "cache": cache}).values()),
        tuple(carry({"cache": cache, "layer": layer}).values())[::-1],
        (lambda module: (module.layer, module.cache))(carry(held)),
    ]
    # A copy of a copy, and of a copy's cache alone.
    both.append(tuple(carry([both[1][1], both[1][0]]))[::-1])
    both.append((both[1][0], copy.deepcopy(both[1][1])))
    for twin, copied in both:
        with pytest.raises(attnzoo.ConfigError, match=r"^cache: expected one that this layer's new_cache made"):
            layer(tokens(layer, 2, 1), cache=copied)
        with pytest.raises(attnzoo.ConfigError, match=r"^cache: expected one that this layer's new_cache made"):
            twin(tokens(layer, 2, 1), cache=cache)
    outs = [decode(twin, copied) for twin, copied in both]
    expected = decode(layer, copy.deepcopy(cache))
    assert torch.equal(decode(layer, cache), expected)
    assert all(torch.equal(out, expected) for out in outs)
