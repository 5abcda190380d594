"""Mixtures of heads whose output's projection multiplies the routed rows alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnzoo.variants import moh
from tests.attnzoo.cases import assert_same, tokens
from tests.attnzoo.variants.test_moh import config_of, joined, layer_of


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_rows_projected_alone_are_those_projected_with_all(bias: bool, kv_heads: int) -> None:
    config = config_of(num_heads=8, num_kv_heads=kv_heads, shared_heads=4, active_heads=1, bias=bias, compute="routed")
    layer = layer_of(config)
    together = joined(layer)
    x = tokens(layer, 3, 40)
    calls: list[int] = []
    layer.o_proj.forward = lambda *_: calls.append(1)
    results = []
    for one in (layer, together):
        out = one(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), list(one.parameters()), allow_unused=True)))
    assert not calls
    for found, same in zip(*results, strict=True):
        assert (found is None) == (same is None)
        if found is not None:
            assert_same(found, same, scale=10)


def test_a_projection_that_is_more_than_a_product_is_called() -> None:
    plain, x = nn.Linear(4, 4), torch.zeros(1)
    assert moh.is_plain(plain, x)
    assert not moh.is_plain(nn.Sequential(plain), x)
    assert not moh.is_plain(plain, x.double())
    assert not moh.is_plain(plain.to(torch.bfloat16), x.to(torch.bfloat16))
    plain.to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert not moh.is_plain(plain, x)
    handles = [plain.register_forward_hook(print), plain.register_forward_pre_hook(print)]
    for handle in handles:
        assert not moh.is_plain(plain, x)
        handle.remove()
    with plain.register_full_backward_hook(print):
        assert not moh.is_plain(plain, x)
    torch.nn.utils.parametrizations.weight_norm(plain)
    assert not moh.is_plain(plain, x)
