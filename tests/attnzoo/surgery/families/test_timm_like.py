"""Attention of timm's shape, known by its attributes: timm itself cannot be imported everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import attnzoo
from attnzoo import surgery
from tests.attnzoo.surgery.families.hosts.modules import TimmAttention
from tests.attnzoo.surgery.tiny import assert_close, convert

EXACT = 1e-10


class DistanceAttention(TimmAttention):
    """The same with weights of its own."""

    def __init__(self) -> None:
        super().__init__(norms=False, bias=True)
        self.bias_by_distance = nn.Parameter(torch.zeros(3, 5))


def vit(norms: bool = False, bias: bool = True) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(TimmAttention(norms, bias), nn.GELU(), TimmAttention(norms, bias)).double().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(std=2 * parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.2)
                parameter.add_("norm" in name and name.endswith("weight"))
    return model


X = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("variant", ["mha", "s2", "moh", "rcmha"])
@torch.no_grad()
def test_layers_begin_as_the_module(norms: bool, variant: str) -> None:
    model = vit(norms)
    assert [site.host for site in surgery.find(model)] == ["timm", "timm"]
    modules = {name: id(module) for name, module in model.named_modules()}
    expected = model(X)
    options: dict[str, Any] = {"vert_stride": 1} if variant == "s2" else {}
    report = convert(model, variant, **options)
    assert_close(model(X), expected, EXACT)
    report.undo()
    assert torch.equal(model(X), expected)
    assert {name: id(module) for name, module in model.named_modules()} == modules


@torch.no_grad()
def test_a_window_reads_what_a_mask_lets_the_module_read() -> None:
    model = vit(norms=True)
    place = torch.arange(17)
    near = (place[:, None] - place).abs() < 4
    first, between, second = model
    expected = second(between(first(X, near)), near)
    convert(model, "mha", window=4, sink=0)
    assert_close(model(X), expected, EXACT)


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_fewer_heads_and_latents(bias: bool) -> None:
    model = vit(bias=bias)
    expected = model(X)
    convert(model, "lowrank_gqa", method="mean", num_kv_heads=3).undo()
    report = convert(model, "lowrank_gqa", method="expand", num_kv_heads=3)
    assert_close(model(X), expected, EXACT)
    report.undo()
    convert(model, "lowrank_gqa", method="mean", num_kv_heads=1)
    assert model(X).shape == expected.shape
    assert {site.kv_heads for site in surgery.find(model)} == {1}


def test_what_is_not_expressible_is_refused_by_name_or_not_known() -> None:
    with pytest.raises(attnzoo.UnsupportedError, match=r"^0: cannot be converted: it has a q_norm"):
        surgery.convert(vit(norms=True), "lowrank_gqa", method="expand", num_kv_heads=3)
    with pytest.raises(attnzoo.UnsupportedError, match=r"^0: .* not causal, and 'longheads' chooses"):
        surgery.convert(vit(), "longheads")
    with pytest.raises(attnzoo.ConfigError, match="found 1 DistanceAttention at"):
        surgery.convert(nn.Sequential(DistanceAttention()), "mha")
    model = vit()
    convert(model, "mha")
    with pytest.raises(attnzoo.UnsupportedError, match=r"^attn_mask: expected None"):
        model[0](X, torch.ones(17, 17, dtype=torch.bool))
