"""Mixtures of heads whose output's projection multiplies the routed rows alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from attnzoo.variants.moh import layer as moh
from tests.attnzoo.cases import assert_same, tokens
from tests.attnzoo.variants.test_moh import config_of, joined, layer_of


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_rows_projected_alone_are_those_projected_with_all(
    monkeypatch: pytest.MonkeyPatch, bias: bool, kv_heads: int
) -> None:
    config = config_of(num_heads=8, num_kv_heads=kv_heads, shared_heads=4, active_heads=1, bias=bias, compute="routed")
    layer = layer_of(config)
    together = joined(layer)
    x = tokens(layer, 3, 40)
    calls: list[nn.Module] = []
    whole = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: calls.append(self) or whole(self, x))
    results = []
    for one in (layer, together):
        out = one(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), list(one.parameters()), allow_unused=True)))
    assert layer.o_proj not in calls
    assert together.o_proj in calls
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


def double(*given: Any) -> Any:
    """A hook that doubles what it is given last: an output, inputs, gradients."""
    return tuple(x * 2 for x in given[-1]) if isinstance(given[-1], tuple) else given[-1] * 2


def replace_forward(one: nn.Module) -> None:
    before = one.forward
    one.forward = lambda x: before(x) * 2


class Adapter(nn.Module):
    """A low-rank adapter that shows the weight of what it wraps, as adapters do."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "forward of its own": replace_forward,
    "hook": lambda one: one.register_forward_hook(double),
    "hook before": lambda one: one.register_forward_pre_hook(double),
    "hook on the way back": lambda one: one.register_full_backward_hook(lambda _, grads, __: double(grads)),
    "hook before the way back": lambda one: one.register_full_backward_pre_hook(double),
    "everybody's hook": lambda one: torch_module.register_module_forward_hook(
        lambda module, _, out: out * 2 if module is one else None
    ),
    "everybody's hook before": lambda one: torch_module.register_module_forward_pre_hook(
        lambda module, given: double(given) if module is one else None
    ),
    "everybody's hook on the way back": lambda one: torch_module.register_module_full_backward_hook(
        lambda module, grads, _: double(grads) if module is one else None
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_is_done_to_a_projection_is_done(change: Callable[[nn.Module], Any]) -> None:
    config = config_of(num_heads=8, num_kv_heads=8, shared_heads=4, active_heads=1, compute="routed")
    results = []
    for together in (False, True):
        layer = joined(layer_of(config)) if together else layer_of(config)
        handle = change(layer.o_proj)
        try:
            out = layer(tokens(layer, 2, 40))
            results.append((out, torch.autograd.grad(out.square().sum(), layer.v_proj.weight)[0]))
        finally:
            if handle is not None:
                handle.remove()
    plain = layer_of(config)
    out = plain(tokens(plain, 2, 40))
    for found, same in zip(*results, strict=True):
        assert_same(found, same, scale=10)
    before = (out, torch.autograd.grad(out.square().sum(), plain.v_proj.weight)[0])
    assert any((found - x).abs().max() > 1e-3 for found, x in zip(results[0], before, strict=True))


@pytest.mark.parametrize("compute", ["dense", "routed"])
def test_routers_that_are_more_than_a_product_are_called(compute: str) -> None:
    layer = layer_of(config_of(num_heads=8, shared_heads=4, active_heads=1, compute=compute))
    x, calls = tokens(layer, 2, 40), []
    plain = layer(x)
    handle = layer.router.register_forward_hook(lambda *_: calls.append(1))
    assert_same(layer(x), plain)
    handle.remove()
    assert calls == [1]
    adapter = Adapter(layer.router).to(x.dtype)
    layer.router = adapter
    result = layer.attend(x)
    (result.out.sum() + result.plan.aux_loss).backward()
    assert not torch.equal(result.out, plain)
    assert bool(adapter.up.weight.grad.any())


@pytest.mark.parametrize("change", [torch.nn.utils.spectral_norm, torch.nn.utils.parametrizations.weight_norm])
def test_routers_with_a_weight_made_anew_train_for_more_than_a_step(change: Callable[[nn.Module], Any]) -> None:
    layer = layer_of(config_of(num_heads=8, shared_heads=4, active_heads=1))
    change(layer.router)
    for _ in range(3):
        layer.attend(tokens(layer, 2, 20)).plan.aux_loss.backward()


def test_no_item_is_one_token_of_none() -> None:
    layer = layer_of(config_of(num_heads=8, shared_heads=4, active_heads=1, compute="routed"))
    assert layer(tokens(layer, 0, 1)).shape == (0, 1, layer.config.dim)
