"""Mixture-of-head attention against what the published code returns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import attnzoo
from attnzoo.variants.moh import router as routing
from tests.attnzoo.cases import build
from tests.attnzoo.variants.test_moh import config_of

GOLDEN = Path(__file__).parents[2] / "golden"


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "config"}
        return arrays, json.loads(str(file["config"]))


ROUTERS = {"wg": "router", "wg_0": "type_router", "wg_1": "shared_router"}


def fill(layer: Any, arrays: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for theirs, ours in ROUTERS.items():
            if f"w.{theirs}.weight" in arrays:
                getattr(layer, ours).weight.copy_(arrays[f"w.{theirs}.weight"])


@pytest.mark.parametrize(
    ("name", "heads", "shared", "active"),
    [("h4_s4_k0", 4, 4, 0), ("h6_s2_k4", 6, 2, 4), ("h8_s1_k4", 8, 1, 4), ("h8_s3_k2", 8, 3, 2)],
)
def test_routing_is_that_of_the_published_image_model(name: str, heads: int, shared: int, active: int) -> None:
    arrays, _ = golden(f"moh_vit_{name}")
    config = config_of(dim=8 * heads, num_heads=heads, shared_heads=shared, active_heads=active)
    layer = build(config, dtype=torch.float64)
    fill(layer, arrays)
    x = arrays["x"].double()
    found = layer.route(x, x.new_zeros(2, heads, x.shape[1], 8))
    assert float((found.gates - arrays["gates"]).abs().max()) < 1e-10
    if "selected" in arrays:
        assert torch.equal(found.active[..., shared:], arrays["selected"].bool())
        loss = routing.balance_loss(found, config.counts, None, "code")
        assert float((loss - arrays["l_aux"]).abs()) < 1e-6
        (grad,) = torch.autograd.grad(loss, layer.router.weight, retain_graph=True)
        assert float((grad - arrays["grad_l_aux.wg.weight"]).abs().max()) < 1e-7
    weighted = (found.gates.unsqueeze(-1) * arrays["head_out"]).flatten(2)
    y = weighted @ arrays["w.proj.weight"].double().T + arrays["w.proj.bias"].double()
    assert float((y - arrays["y"]).abs().max()) < 1e-10
    for theirs, ours in ROUTERS.items():
        if f"grad.{theirs}.weight" in arrays:
            (grad,) = torch.autograd.grad((y * arrays["dy"]).sum(), getattr(layer, ours).weight, retain_graph=True)
            assert float((grad - arrays[f"grad.{theirs}.weight"]).abs().max()) < 1e-10


@pytest.mark.parametrize("compute", ["routed", "dense"])
def test_a_whole_layer_is_that_of_the_published_image_generator(compute: str) -> None:
    arrays, _ = golden("moh_dit_h6_s2_k2")
    options = {"causal": False, "rotary": None, "compute": compute}
    layer = build(config_of(dim=48, num_heads=6, shared_heads=2, active_heads=2, **options), dtype=torch.float64)
    fill(layer, arrays)
    with torch.no_grad():
        for role, weight in zip("qkv", arrays["w.qkv.weight"].chunk(3), strict=True):
            getattr(layer, f"{role}_proj").weight.copy_(weight)
        layer.o_proj.weight.copy_(arrays["w.proj.weight"])
        layer.o_proj.bias = nn.Parameter(arrays["w.proj.bias"].double())
    x = arrays["x"].double().requires_grad_()
    found = layer.attend(x)
    assert float((found.out - arrays["y"]).abs().max()) < 1e-10
    assert float((found.plan.info["gates"] - arrays["gates"]).abs().max()) < 1e-10
    ((found.out * arrays["dy"]).sum() + 0.01 * found.plan.aux_loss).backward()
    grads = {
        "grad_x": x.grad,
        "grad.qkv.weight": torch.cat([getattr(layer, f"{role}_proj").weight.grad for role in "qkv"]),
        "grad.proj.weight": layer.o_proj.weight.grad,
        "grad.proj.bias": layer.o_proj.bias.grad,
        **{f"grad.{theirs}.weight": getattr(layer, ours).weight.grad for theirs, ours in ROUTERS.items()},
    }
    for key, grad in grads.items():
        assert grad is not None
        assert float((grad - arrays[key]).abs().max()) < (1e-4 if key == "grad.proj.bias" else 1e-8), key


@pytest.mark.parametrize("compute", ["routed", "dense"])
def test_the_router_without_weights_is_that_of_the_published_language_model(compute: str) -> None:
    arrays, _ = golden("moh_llama_h8_kv2_s4_k2")
    config = config_of(
        dim=64, num_heads=8, num_kv_heads=2, shared_heads=4, active_heads=2, router="norm", compute=compute,
        rotary=attnzoo.RotaryConfig(base=500000.0),
    )  # fmt: skip
    layer = build(config, dtype=torch.float64)
    layer.load_state_dict({key[2:]: x.double() for key, x in arrays.items() if key.startswith("w.")})
    found = layer.attend(arrays["x"].double())
    assert torch.equal(found.plan.info["gates"], arrays["gates"].double())
    assert float((found.out - arrays["y"]).abs().max()) < 3e-6
