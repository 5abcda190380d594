"""A compiled call that remembers is made once too: what a backward makes again is refused when it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import attnzoo
from attnzoo.cache.kv_cache import KVCache
from tests.attnzoo.cache.cache_kinds import CACHE_KINDS, CacheKind
from tests.attnzoo.cases import Case, assert_same, tokens

REFUSED = r"^cache: expected None in a call that a backward makes once more \(activation checkpointing\), got a cache"
QUICK = ("mha",)


def kinds() -> list[Any]:
    """Caches that are trained through; compiled, some of them take a while."""
    return [
        pytest.param(kind, id=str(kind), marks=[] if str(kind) in QUICK else [pytest.mark.slow])
        for kind in CACHE_KINDS
        if kind.switch != "offload"
    ]


@pytest.mark.parametrize("kind", kinds())
def test_a_compiled_call_is_refused_where_a_backward_makes_it_again(kind: CacheKind) -> None:
    layer = kind.case.layer()
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compiled: Any = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)

    def run(x: Tensor, cache: KVCache) -> Tensor:
        out: Tensor = compiled(x, cache=cache).sin()
        return out

    graphs = []
    for length in (70, 110):
        x = tokens(layer, 2, length).requires_grad_()
        # Room for two: it is no full cache that stops the second call.
        cache, same = (kind.cache(layer, 2, 400) for _ in range(2))
        out = checkpoint(run, x, cache, use_reentrant=False)
        assert_same(out, run_eagerly(layer, x, same))
        with pytest.raises(attnzoo.UnsupportedError, match=REFUSED):
            out.square().sum().backward()
        assert cache.length == length
        graphs.append(counter.frame_count)
    # Evicting caches look up what is held by the length.
    assert graphs[0] == graphs[1] or kind.switch == "evict"


def run_eagerly(layer: Any, x: Tensor, cache: KVCache) -> Tensor:
    with torch.no_grad():
        out: Tensor = layer(x, cache=cache).sin()
    return out


def test_no_compiler_leaves_the_question_out() -> None:
    layer = Case("mha", "small").layer()
    torch.compiler.reset()
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def run(x: Tensor) -> Tensor:
        out: Tensor = compiled(x, cache=cache).sin()
        return out

    x = tokens(layer, 2, 20).requires_grad_()
    cache = layer.new_cache(2, 40)
    out = checkpoint(run, x, use_reentrant=False)
    with pytest.raises(attnzoo.UnsupportedError, match=REFUSED):
        out.square().sum().backward()
    # A backward that makes nothing once more is as ever.
    x.grad = None
    cache, same = layer.new_cache(2, 40), layer.new_cache(2, 40)
    (expected,) = torch.autograd.grad(layer(x, cache=same).sin().square().sum(), x)
    run(x).square().sum().backward()
    assert x.grad is not None
    assert_same(x.grad, expected)


@pytest.mark.parametrize("reentrant", [pytest.param(True, marks=pytest.mark.slow), False], ids=["reentrant", "hooks"])
def test_a_cache_that_a_compiled_part_makes_belongs_to_its_backward(reentrant: bool) -> None:
    layer = Case("mha", "small").layer()
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def prompt(x: Tensor) -> tuple[Tensor, KVCache]:
        cache = layer.new_cache(2, 60)
        return layer(x, cache=cache), cache

    def run(x: Tensor) -> Tensor:
        first, cache = prompt(x)
        return torch.cat((first, layer(x, cache=cache)), 1).sin()

    x = tokens(layer, 2, 15).requires_grad_()
    (expected,) = torch.autograd.grad(run(x).square().sum(), x)
    checkpoint(run, x, use_reentrant=reentrant).square().sum().backward()
    assert x.grad is not None
    assert_same(x.grad, expected)
    # Kept from before, it is one from outside.
    cache = prompt(x)[1]
    out = checkpoint(lambda x: layer(x, cache=cache).sin(), x, use_reentrant=reentrant)
    with pytest.raises(attnzoo.UnsupportedError, match=REFUSED):
        out.square().sum().backward()
