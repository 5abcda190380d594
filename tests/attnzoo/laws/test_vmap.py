"""Ensembles: a layer of every variant under torch.func, each of its weights mapped over."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

import attnzoo
from tests.attnzoo.cache.cache_kinds import CACHE_KINDS, CacheKind
from tests.attnzoo.cases import CASES, Case, assert_same, tokens

TOKENS = 45


# Torch maps over two of its own functions one by one.
@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_ensemble_is_its_layers_one_by_one(case: Case, impl: str) -> None:
    layers = [case.layer(seed=seed) for seed in range(3)]
    for layer in layers:
        layer.impl = impl
    parameters, buffers = stack_module_state(layers)
    base = copy.deepcopy(layers[0])
    x = tokens(base, 2, TOKENS)
    each = torch.stack([x, x.flip(1), -x])
    padding = torch.arange(TOKENS) < torch.tensor([[0], [9]])

    def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, **more: Any) -> Tensor:
        out: Tensor = functional_call(base, (parameters, buffers), (x,), more)
        return out

    found = vmap(run, in_dims=(0, 0, None))(parameters, buffers, x)
    assert_same(found, torch.stack([layer(x) for layer in layers]))
    own = vmap(lambda p, b, x: run(p, b, x, key_padding=padding))(parameters, buffers, each)
    expected = torch.stack([layer(x, key_padding=padding) for layer, x in zip(layers, each, strict=True)])
    assert_same(own, expected)
    # Gradients of the whole ensemble at once, and where the input alone differs.
    weight = torch.linspace(-1, 1, own.numel()).view_as(own)
    grads = torch.autograd.grad((own * weight).sum(), list(parameters.values()))
    theirs = [
        torch.autograd.grad((y * w).sum(), list(layer.parameters()))
        for y, w, layer in zip(expected, weight, layers, strict=True)
    ]
    for grad, same in zip(grads, zip(*theirs, strict=True), strict=True):
        assert_same(grad, torch.stack(same))
    assert_same(vmap(base)(each), torch.stack([base(x) for x in each]))


@pytest.mark.parametrize("kind", CACHE_KINDS, ids=str)
@torch.no_grad()
def test_a_cache_inside_a_transform_is_refused_and_untouched(kind: CacheKind) -> None:
    layer = kind.case.layer()
    each = tokens(layer, 2, 10).unsqueeze(1).expand(-1, 2, -1, -1)
    cache = kind.cache(layer, 2, 20)
    with pytest.raises(attnzoo.UnsupportedError, match=r"^cache: expected None inside torch.func's transforms"):
        vmap(lambda x: layer(x, cache=cache))(each)
    assert cache.lengths.tolist() == [0, 0]
    assert all((stream == 0).all() for stream in cache.streams.values())
