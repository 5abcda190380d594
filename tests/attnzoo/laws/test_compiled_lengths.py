"""Compiled for sizes that vary, a layer is one program, however many lengths it meets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import attnzoo
from attnzoo.cache.kv_cache import KVCache, Stream
from tests.attnzoo.cases import Case, assert_same, tokens

LENGTHS = (70, 110, 230)
"""Whole chunks or not, up to the margin of a ring and beyond it."""


def test_a_cache_with_every_kind_of_stream_is_one_program() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")

    def append(cache: KVCache, value: Any) -> Any:
        seen = cache.append({"k": value, "v": value, "last": value}, value.shape[2], differentiable=False)
        return seen["k"] + seen["v"], cache.history("last", 3)

    compiled = torch.compile(append, fullgraph=True, dynamic=True, backend=counter)
    streams = {"k": Stream(2, 4), "v": Stream(2, 4), "last": Stream(2, 4, ring=3)}
    for length in LENGTHS:
        value = torch.randn(2, 2, length, 4)
        cache, same = (KVCache(streams, batch=2, max_length=400) for _ in range(2))
        for found, expected in zip(compiled(cache, value), append(same, value), strict=True):
            assert torch.equal(found, expected)
        # What a ring still holds is known as in eager mode.
        for one in (cache, same):
            one.crop(length - 100 if length > 100 else length)
        assert torch.equal(cache.history("last", 3), same.history("last", 3))
    assert counter.frame_count == 1


QUICK = ("lowrank_gqa",)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in attnzoo.list_variants()],
)
@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
@torch.no_grad()
def test_prompts_of_all_lengths_are_one_program(name: str, cached: bool) -> None:
    layer = Case(name, "small").layer()
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for length in LENGTHS:
        x = tokens(layer, 2, length)
        found = compiled(x, cache=layer.new_cache(2, 400)) if cached else compiled(x)
        assert_same(found, layer(x))
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]
