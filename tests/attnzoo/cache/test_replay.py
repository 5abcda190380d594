"""A call that remembers is made once: replays by activation checkpointing are right or refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnzoo
from attnzoo import surgery
from attnzoo.cache.kv_cache import KVCache
from tests.attnzoo.cache.cache_kinds import CACHE_KINDS, CacheKind
from tests.attnzoo.cases import assert_same, tokens
from tests.attnzoo.surgery.tiny import converted, tiny

TRAINED = [kind for kind in CACHE_KINDS if kind.switch != "offload"]
"""Offloaded keys and values have no gradients."""

every_kind = pytest.mark.parametrize("kind", CACHE_KINDS, ids=str)
REFUSED = r"expected None in a call that a backward makes once more \(activation checkpointing\), got a cache"


def held(cache: KVCache) -> dict[str, Any]:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in cache.state_dict().items()}


def assert_holds(cache: KVCache, before: dict[str, Any]) -> None:
    now = cache.state_dict()
    assert now.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(now[name], value) if isinstance(value, Tensor) else now[name] == value, name


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "hooks"])
@every_kind
def test_a_replayed_call_with_a_cache_is_refused_and_writes_nothing(kind: CacheKind, reentrant: bool) -> None:
    # Offloaded keys and values have no gradient, so that the layer's own call is no part of the graph.
    layer = nn.Sequential(kind.case.layer(), nn.GELU())
    frozen = kind.switch == "offload"
    layer[0].requires_grad_(not frozen)
    x = tokens(layer[0], 2, 20)
    cache = kind.cache(layer[0], 2, 40)
    with torch.no_grad():
        layer[0](x[:, :10], cache=cache)
    weight = torch.ones(1, requires_grad=True)

    def run(part: Tensor, weight: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            y = layer[0](part, cache=cache)
        return layer[1](y * weight)

    out = checkpoint(run, x[:, 10:].requires_grad_(not frozen), weight, use_reentrant=reentrant)
    before = held(cache)
    with pytest.raises(attnzoo.UnsupportedError, match=rf"^cache: {REFUSED}"):
        out.square().sum().backward()
    assert_holds(cache, before)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "hooks"])
@pytest.mark.parametrize("kind", TRAINED, ids=str)
def test_a_cache_made_inside_the_checkpointed_part_is_right(kind: CacheKind, reentrant: bool) -> None:
    layer = kind.case.layer()
    x = tokens(layer, 2, 20).requires_grad_()

    def run(x: Tensor) -> Tensor:
        cache = kind.cache(layer, 2, 20)
        parts = [layer(part, cache=cache) for part in x.split([13, 7], 1)]
        return torch.cat(parts, 1).sin()

    (expected,) = torch.autograd.grad(run(x).square().sum(), x)
    checkpoint(run, x, use_reentrant=reentrant).square().sum().backward()
    assert x.grad is not None
    assert_same(x.grad, expected)


@every_kind
def test_a_failed_call_is_repeated_as_if_it_were_the_first(kind: CacheKind) -> None:
    layer = kind.case.layer()
    x = tokens(layer, 2, 30)
    with torch.no_grad():
        cache, other = kind.cache(layer, 2, 30), kind.cache(layer, 2, 30)
        for one in (cache, other):
            layer(x[:, :17], cache=one)

        def fail(*_: Any) -> None:
            raise RuntimeError("no room")

        hook = layer.o_proj.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="no room"):
            layer(x[:, 17:], cache=cache)
        hook.remove()
        assert torch.equal(layer(x[:, 17:], cache=cache), layer(x[:, 17:], cache=other))


class Doubled:
    """Saved tensors that are kept as something else."""

    def __enter__(self) -> None:
        self.hooks: AbstractContextManager[Any] = torch.autograd.graph.saved_tensors_hooks(
            lambda x: x.detach().clone(), lambda x: x
        )
        self.hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)


@pytest.mark.parametrize("kind", TRAINED, ids=str)
def test_later_calls_break_no_earlier_backward(kind: CacheKind) -> None:
    layer = kind.case.layer()
    x = tokens(layer, 2, 24)

    def gradient(context: Callable[[], Any], *, alone: str | None = None) -> list[Tensor | None]:
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(alone in (None, name))
        cache = kind.cache(layer, 2, 24)
        parameters = [p for p in layer.parameters() if p.requires_grad]
        with context():
            outs = [layer(part, cache=cache) for part in x.split([10, 9, 5], 1)]
        return list(torch.autograd.grad(outs[1].square().sum(), parameters, allow_unused=True))

    everything = gradient(nullcontext)
    for mine, theirs in zip(gradient(Doubled), everything, strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)
    for name, expected in zip(dict(layer.named_parameters()), everything, strict=True):
        (found,) = gradient(nullcontext, alone=name)
        if expected is not None:
            assert found is not None
            assert_same(found, expected)
    layer.requires_grad_(True)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "hooks"])
@pytest.mark.parametrize("name", ["latent", "moh", "longheads", "landmark", "rcmha"])
def test_replaced_blocks_refuse_replays_with_a_cache(name: str, reentrant: bool) -> None:
    from transformers import DynamicCache

    if name == "latent":
        model = converted("latent", layers=1)
    else:
        model = tiny(layers=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            surgery.convert(model, name)
    x = torch.randn(1, 6, model.config.hidden_size, dtype=torch.float64, requires_grad=True)
    cache = DynamicCache(config=model.config)

    def run(x: Tensor, kept: Any) -> Tensor:
        out: Tensor = model.model(inputs_embeds=x, past_key_values=kept, use_cache=kept is not None).last_hidden_state
        return out

    out = checkpoint(run, x, cache, use_reentrant=reentrant)
    length = cache.get_seq_length()
    with pytest.raises(attnzoo.UnsupportedError, match=rf"^past_key_values: {REFUSED}"):
        out.square().sum().backward()
    assert cache.get_seq_length() == length
    # Without a cache from outside there is nothing that could be written twice.
    expected = torch.autograd.grad(run(x, None).square().sum(), x)[0]
    x.grad = None
    checkpoint(run, x, None, use_reentrant=reentrant).square().sum().backward()
    assert_same(x.grad, expected)
