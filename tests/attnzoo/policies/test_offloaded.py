"""Policies whose keys and values lie in CPU memory: in attnzoo's own layers, and in hosts."""

from __future__ import annotations

import pytest
import torch

from attnzoo import policies
from attnzoo.cache.pages.cache import PagedCache
from attnzoo_kernels.errors import ConfigError
from tests.attnzoo.policies.lives import ITEMS, layer_of, script, sequences, told_by
from tests.attnzoo.policies.masked import FULL, host
from tests.attnzoo.policies.settings import entry_of, names
from tests.attnzoo.surgery.tiny import ids

TOLD = script([9, 7, 1, 1, 1, 5, 1, 1], "left", seed=3)


@pytest.mark.parametrize("name", names())
def test_what_an_offloaded_policy_says_is_what_it_says(name: str) -> None:
    layer = layer_of()
    items = sequences(layer, TOLD)
    make = entry_of(name).settings[0].make
    far = layer.new_cache(ITEMS, 64, policy=make(), offload=True)
    assert isinstance(far, PagedCache)
    found = told_by(layer, far, TOLD, items)
    expected = told_by(layer, layer.new_cache(ITEMS, 64, policy=make()), TOLD, items)
    assert found.held == expected.held
    for mine, theirs in zip(found.out, expected.out, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    assert far.offloaded_nbytes == far.pool.tensors["k"].nbytes + far.pool.tensors["v"].nbytes


@pytest.mark.parametrize(
    "policy",
    [
        policies.Duo(FULL, sink=4, window=8, block=4),
        policies.Pages(page=2, budget=10),
        policies.SnapKV(budget=20, window=4),
    ],
    ids=lambda policy: policy.name,
)
def test_a_host_with_an_offloaded_cache_generates_the_same(policy: policies.Policy) -> None:
    model = host("llama")
    tokens = ids(2, 30)
    with policies.applied(model, policy) as run:
        found = []
        for offload in (False, True):
            cache = run.new_cache(offload=offload)
            found.append(model.generate(tokens, past_key_values=cache, max_new_tokens=8, do_sample=False).tolist())
            report = run.report(cache)
            assert all((layer.offloaded_bytes > 0) == offload for layer in report.layers)
            assert ("in CPU memory" in str(report)) == offload
        with pytest.raises(TypeError, match="offload: expected a bool"):
            run.new_cache(offload=1)
    assert found[0] == found[1]


def test_nothing_is_offloaded_without_a_policy() -> None:
    layer = layer_of()
    with pytest.raises(ConfigError, match="offload: expected False without a policy"):
        layer.new_cache(1, 9, offload=True)
    with pytest.raises(ConfigError, match="offload: expected False beside evict=True"):
        layer.new_cache(1, 9, offload=True, evict=True)
    with pytest.raises(TypeError, match="offload: expected a bool"):
        layer.new_cache(1, 9, offload=1, policy=policies.KNorm(budget=40))
