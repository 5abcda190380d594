"""The oracles against the numbers of the published code, and against facts that need no code."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnzoo.oracles.mha import Recipe, mha
from attnzoo.oracles.moh import Routing, balance_loss, chosen, gates, moh

GOLDEN = Path(__file__).parents[1] / "golden"
FP64 = 1e-10
STORED_AS_FP32 = 3e-6


class Golden:
    """A file of published numbers, as fp64 tensors."""

    def __init__(self, name: str) -> None:
        self.file = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
        self.config: dict[str, Any] = json.loads(str(self.file["config"]))

    def __getitem__(self, key: str) -> Tensor:
        x = torch.from_numpy(self.file[key])
        return x.double() if x.is_floating_point() else x

    def __contains__(self, key: str) -> bool:
        return key in self.file.files

    def projections(self) -> dict[str, Tensor]:
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        return {f"{name}.weight": self[f"w.{name}.weight"] for name in names}


def near(actual: Tensor, expected: Tensor, limit: float = FP64) -> None:
    assert actual.shape == expected.shape
    assert float((actual.detach() - expected.detach()).abs().max()) <= limit


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def projections(recipe: Recipe, dim: int = 16) -> dict[str, Tensor]:
    q, kv = recipe.num_heads * recipe.head_dim, recipe.num_kv_heads * recipe.head_dim
    shapes = {"q_proj": (q, dim), "k_proj": (kv, dim), "v_proj": (kv, dim), "o_proj": (dim, q)}
    return {f"{name}.weight": random(*shape, seed=i, scale=0.5) for i, (name, shape) in enumerate(shapes.items())}


GQA = Recipe(num_heads=4, num_kv_heads=2, head_dim=4)
HOLES = torch.zeros(2, 11, dtype=torch.bool)
HOLES[0, :3] = True
HOLES[1, [0, 5, 10]] = True


# MoH ------------------------------------------------------------------------------------------------------------------

MOH_VIT = ("moh_vit_h4_s4_k0", "moh_vit_h6_s2_k4", "moh_vit_h8_s1_k4", "moh_vit_h8_s3_k2")
ROUTERS = {"router.weight": "wg.weight", "shared_router.weight": "wg_1.weight", "type_router.weight": "wg_0.weight"}


def routers(golden: Golden) -> dict[str, Tensor]:
    return {ours: golden[f"w.{theirs}"].requires_grad_() for ours, theirs in ROUTERS.items() if f"w.{theirs}" in golden}


@pytest.mark.parametrize("name", MOH_VIT)
def test_moh_gates_are_the_published_ones(name: str) -> None:
    golden = Golden(name)
    config, x, head_out = golden.config, golden["x"], golden["head_out"]
    routing = Routing(shared_heads=config["shared_head"], active_heads=config["routed_head"])
    heads = config["num_heads"]
    recipe = Recipe(num_heads=heads, num_kv_heads=heads, head_dim=config["head_dim"], causal=False)
    weights = routers(golden)
    rows = [gates(token, head_out[0, 0], weights, recipe, routing) for token in x.flatten(0, 1)]
    gate = torch.stack([row[0] for row in rows]).unflatten(0, x.shape[:2])
    near(gate, golden["gates"])
    y = (gate.unsqueeze(-1) * head_out).flatten(2) @ golden["w.proj.weight"].T + golden["w.proj.bias"]
    near(y, golden["y"])
    named = [key for key in ROUTERS if key in weights]
    for key, grad in zip(
        named, torch.autograd.grad((y * golden["dy"]).sum(), [weights[key] for key in named]), strict=True
    ):
        near(grad, golden[f"grad.{ROUTERS[key]}"])
    if "l_aux" in golden:
        for (_, _, on), published in zip(rows, golden["selected"].flatten(0, 1), strict=True):
            assert on == set(published.nonzero().flatten().tolist())
        rows = [gates(token, head_out[0, 0], weights, recipe, routing) for token in x.flatten(0, 1)]
        loss = balance_loss([row[1] for row in rows], [row[2] for row in rows], routing)
        near(loss, golden["l_aux"], 1e-7)
        (grad,) = torch.autograd.grad(loss, weights["router.weight"])
        near(grad, golden["grad_l_aux.wg.weight"], 1e-7)


def test_moh_is_the_published_layer_of_the_image_generator() -> None:
    golden = Golden("moh_dit_h6_s2_k2")
    x = golden["x"].requires_grad_()
    qkv = golden["w.qkv.weight"].requires_grad_()
    weights = {f"{name}_proj.weight": w for name, w in zip("qkv", qkv.chunk(3), strict=True)}
    weights |= {f"o_proj.{kind}": golden[f"w.proj.{kind}"].requires_grad_() for kind in ("weight", "bias")}
    weights |= routers(golden)
    recipe = Recipe(num_heads=6, num_kv_heads=6, head_dim=8, causal=False, rotary_base=None)
    result = moh(x, weights, recipe, Routing(shared_heads=2, active_heads=2))
    near(result.out, golden["y"])
    near(result.gates, golden["gates"])
    assert torch.equal(result.selected, golden["gates"] > 0)
    near(result.loss, golden["l_aux"], 1e-7)
    theirs = {"o_proj.weight": "proj.weight", "o_proj.bias": "proj.bias", **ROUTERS}
    total = (result.out * golden["dy"]).sum() + 0.01 * result.loss
    grads = torch.autograd.grad(total, [x, qkv, *(weights[key] for key in theirs)])
    for grad, key in zip(
        grads, ["grad_x", "grad.qkv.weight", *(f"grad.{key}" for key in theirs.values())], strict=True
    ):
        near(grad, golden[key], 1e-5 if key == "grad.proj.bias" else 1e-9)


def test_moh_is_the_published_layer_of_the_language_model() -> None:
    golden = Golden("moh_llama_h8_kv2_s4_k2")
    recipe = Recipe(num_heads=8, num_kv_heads=2, head_dim=8, rotary_base=500000.0)
    routing = Routing(shared_heads=4, active_heads=2, router="norm")
    result = moh(golden["x"], golden.projections(), recipe, routing)
    assert torch.equal(result.gates, golden["gates"].double())
    assert torch.equal(result.selected, golden["gates"].bool())
    near(result.out, golden["y"], STORED_AS_FP32)


@pytest.mark.parametrize("shared", [0, 1, 2, 4])
def test_moh_with_all_heads_and_zero_routers_is_plain_attention(shared: int) -> None:
    weights, x = projections(GQA), random(2, 11, 16, seed=9)
    zero = {"router.weight": 4 - shared, "shared_router.weight": shared, "type_router.weight": 2}
    weights |= {name: x.new_zeros(rows, 16) for name, rows in zero.items()}
    for options in ({}, {"window": 4, "sink": 1}):
        result = moh(
            x, weights, GQA, Routing(shared_heads=shared, active_heads=4 - shared), key_padding=HOLES, **options
        )
        near(result.out, mha(x, weights, GQA, key_padding=HOLES, **options))
        assert torch.equal(result.selected, ~HOLES.unsqueeze(-1).expand(-1, -1, 4))
        near(result.loss, torch.tensor(float(4 - shared)))


def test_moh_gates_sum_as_the_paper_and_the_code_say() -> None:
    weights, x = projections(GQA), random(1, 9, 16, seed=9)
    recipe = replace(GQA, num_heads=6, num_kv_heads=6)
    weights = projections(recipe)
    weights |= {f"{name}.weight": random(n, 16, seed=n) for name, n in
                {"router": 4, "shared_router": 2, "type_router": 2}.items()}  # fmt: skip
    routing = Routing(shared_heads=2, active_heads=3)
    code = moh(x, weights, recipe, routing)
    types = 2 * torch.softmax(x @ weights["type_router.weight"].T, -1)
    near(code.gates[..., :2].sum(-1), 2 * types[..., 0])
    near(code.gates[..., 2:].sum(-1), 3 * types[..., 1])
    paper = moh(x, weights, recipe, replace(routing, gate_norm="paper", aux_scale="paper"))
    p = torch.softmax(x @ weights["router.weight"].T, -1)
    near(paper.gates[..., :2].sum(-1), types[..., 0] / 2)
    near(paper.gates[..., 2:], types[..., 1:] / 2 * p * code.selected[..., 2:])
    near(paper.loss * 4, code.loss)
    near(moh(x, weights, recipe, replace(routing, rescale=True)).gates, code.gates * 6 / 5)


def test_moh_equal_scores_choose_the_lowest_heads_and_groups_are_chosen_whole() -> None:
    recipe = Recipe(num_heads=8, num_kv_heads=4, head_dim=4)
    p = torch.tensor([0.1, 0.2, 0.2, 0.1, 0.2, 0.2])
    assert chosen(p, Routing(shared_heads=2, active_heads=3), recipe) == {1, 2, 4}
    groups = Routing(shared_heads=2, active_heads=2, unit="kv_group")
    assert chosen(p, groups, recipe) == {4, 5}
    assert chosen(torch.full((6,), 1 / 6), groups, recipe) == {0, 1}
    with pytest.raises(ValueError, match="whole groups"):
        chosen(p, replace(groups, active_heads=3), recipe)


@pytest.mark.parametrize("scope", ["selected", "all"])
def test_moh_straight_through_gates_pass_the_gradient_of_the_probabilities(scope: Any) -> None:
    weights, x = projections(GQA), random(1, 1, 16, seed=9)
    q = (x[0, 0] @ weights["q_proj.weight"].T).reshape(4, 4).requires_grad_()
    routing = Routing(shared_heads=1, active_heads=1, router="norm", ste_scope=scope, ste_coefficient=0.5)
    gate, p, on = gates(x[0, 0], q, weights, GQA, routing)
    assert sorted(gate.tolist()) == [0, 0, 1, 1]
    wanted = random(4, seed=3)
    heads = on if scope == "selected" else range(3)
    (grad,) = torch.autograd.grad((gate * wanted).sum(), q, retain_graph=True)
    (expected,) = torch.autograd.grad(0.5 * sum((p[e] * wanted[1 + e] for e in heads), start=0 * p[0]), q)
    near(grad, expected)
