"""Layers whose caches follow a policy of place: any split says what a masked layer says, and holds what is said."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo.cache.evicting.cache import EvictingCache
from attnzoo.cache.pages.cache import PagedCache
from attnzoo.cache.policies.known import Duo, KNorm, Streaming
from tests.attnzoo.surgery.tiny import assert_close

EXACT = 1e-12
TOKENS = 61
POLICY = Duo([True, False], sink=4, window=8, block=4)  # type: ignore[arg-type]
LAYERS: dict[str, dict[str, Any]] = {"mha": {"num_kv_heads": 2}, "lowrank_gqa": {"num_kv_heads": 2}}


def layer_of(name: str) -> Any:
    torch.manual_seed(0)
    return attnzoo.create(name, dim=32, num_heads=4, **LAYERS[name]).double()


def masked(layer: Any, x: Tensor, positions: Tensor | None = None) -> Tensor:
    """The layer by the rule of :data:`POLICY`, in plain torch."""
    q, k, v = (
        getattr(layer, name)(x).unflatten(-1, (-1, 8)).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj")
    )
    t = torch.arange(x.shape[1])
    q, k = layer.rotate(t.unsqueeze(0), q, k)
    causal = t.unsqueeze(1) >= t
    block = t // 4
    streams = causal & ((block.unsqueeze(1) - block < 3) | (block < 1))
    mask = torch.stack((causal, causal, streams, streams))
    k, v = (y.repeat_interleave(2, 1) for y in (k, v))
    weights = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    result: Tensor = layer.o_proj((weights @ v).transpose(1, 2).flatten(-2))
    return result


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("chunks", [[61], [1] * 61, [20, 1, 1, 30, 9], [3, 5, 53]], ids=lambda x: str(len(x)))
def test_any_split_is_a_masked_layer(name: str, chunks: list[int]) -> None:
    layer = layer_of(name)
    x = torch.randn(2, TOKENS, 32, dtype=torch.float64)
    expected = masked(layer, x)
    cache = layer.new_cache(2, TOKENS, policy=POLICY)
    with torch.no_grad():
        found = torch.cat([layer(part, cache=cache) for part in x.split(chunks, 1)], 1)
        dense = layer(x)
    assert_close(found, expected.detach(), EXACT)
    assert float((dense - found).abs().max()) > 1e-2
    # Sinks, two near blocks, and what is in the own one.
    assert cache.held_rows == 2 * (TOKENS + 4 + 2 * 4 + 1)
    assert cache.held_bytes == cache.held_rows * 2 * 8 * 8
    assert cache.nbytes < layer.new_cache(2, TOKENS).nbytes
    # Gradients reach the call's own tokens, through the plan that the policy makes.
    cache = layer.new_cache(2, TOKENS, policy=POLICY)
    layer(x, cache=cache).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_padding_and_a_record_of_a_policy_s_plan() -> None:
    layer = layer_of("mha")
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    padding = torch.zeros(2, 40, dtype=torch.bool)
    padding[0, :7] = True
    cache = layer.new_cache(2, 60, policy=POLICY)
    more = torch.randn(2, 12, 32, dtype=torch.float64)
    with torch.no_grad(), attnzoo.record(layer) as recorded:
        first = layer(x, key_padding=padding, cache=cache)
        rest = torch.cat([layer(part, cache=cache) for part in more.split([1, 10, 1], 1)], 1)
    for item, begin in enumerate((7, 0)):
        alone = torch.cat((x[item : item + 1, begin:], more[item : item + 1]), 1)
        found = torch.cat((first[item : item + 1, begin:], rest[item : item + 1]), 1)
        assert_close(found, masked(layer, alone).detach(), EXACT)
    (plans,) = recorded.plans.values()
    assert [plan.layout.block_k for plan in plans] == [4] * 4


def test_a_policy_of_scores_has_pages_and_one_of_place_has_none() -> None:
    layer = layer_of("mha")
    assert type(layer.new_cache(1, 50, policy=Streaming())) is EvictingCache
    assert type(layer.new_cache(1, 50, policy=KNorm(budget=40, page=8))) is PagedCache


def test_so_many_tokens_are_taken_back_as_the_slack_says() -> None:
    layer = layer_of("mha")
    x = torch.randn(1, TOKENS, 32, dtype=torch.float64)
    slack = Duo([True, False], sink=4, window=8, block=4, slack=6)  # type: ignore[arg-type]
    cache = layer.new_cache(1, TOKENS, policy=slack)
    with torch.no_grad():
        layer(x[:, :50], cache=cache)
        cache.crop(44)
        found = torch.cat([layer(part, cache=cache) for part in x[:, 44:].split([1, 16], 1)], 1)
    assert_close(found, masked(layer, x)[:, 44:].detach(), EXACT)
    with pytest.raises(attnzoo.UnsupportedError, match="crop: a cache that evicts cannot go back"):
        layer.new_cache(1, TOKENS, policy=POLICY).crop(0)


def test_what_is_held_is_carried_to_a_cache_of_the_same_policy_alone() -> None:
    layer = layer_of("mha")
    x = torch.randn(1, TOKENS, 32, dtype=torch.float64)
    cache = layer.new_cache(1, TOKENS, policy=POLICY)
    with torch.no_grad():
        layer(x[:, :40], cache=cache)
        other = layer.new_cache(1, TOKENS, policy=POLICY)
        other.load_state_dict(cache.state_dict())
        twin = copy.deepcopy(cache)
        expected = layer(x[:, 40:], cache=cache)
        assert torch.equal(layer(x[:, 40:], cache=other), expected)
        assert torch.equal(layer(x[:, 40:], cache=twin), expected)
    wider = layer.new_cache(1, TOKENS, policy=Duo([True, False], sink=8, window=4, block=4))  # type: ignore[arg-type]
    with pytest.raises(attnzoo.ConfigError, match="policy: expected the state of a cache that holds"):
        wider.load_state_dict(cache.state_dict())


def test_layers_with_a_rule_of_their_own_refuse_policies_by_name() -> None:
    variants: dict[str, dict[str, Any]] = {
        "s2": {"block_size": 4, "local_blocks": 2, "vert_stride": 2},
        "moh": {"shared_heads": 2, "active_heads": 1},
        "landmark": {},
        "longheads": {},
        "rcmha": {},
        "lowrank_gqa": {"num_kv_heads": 2, "latent_dim": 12},
    }
    for name, options in variants.items():
        layer = attnzoo.create(name, dim=32, num_heads=4, **options)
        with pytest.raises(attnzoo.UnsupportedError, match=f"policy: expected None for '{name}'"):
            layer.new_cache(1, 9, policy=POLICY)
    window = attnzoo.create("mha", dim=32, num_heads=4, window=9, sink=2)
    with pytest.raises(attnzoo.UnsupportedError, match="its window is a rule of its own"):
        window.new_cache(1, 9, policy=POLICY)
    layer = layer_of("mha")
    with pytest.raises(attnzoo.ConfigError, match=r"full: expected \[1, 2\], .*got \[3, 2\]"):
        layer.new_cache(1, 9, policy=Duo(torch.ones(3, 2, dtype=torch.bool)))
    with pytest.raises(TypeError, match="policy: expected a Policy or None, got str"):
        layer.new_cache(1, 9, policy="duo")
    with pytest.raises(attnzoo.ConfigError, match="evict: expected False beside a policy"):
        layer.new_cache(1, 9, policy=POLICY, evict=True)
