"""The oracles of MoH and LongHeads against the published code's numbers, and against facts that need no code."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo.oracles.longheads import Chunks, chunk_key, longheads
from attnzoo.oracles.mha import Recipe, mha
from attnzoo.oracles.moh import MoHRouting, balance_loss, chosen, gates, moh
from tests.attnzoo.oracles.published import GQA, HOLES, STORED_AS_FP32, Golden, near, projections, random

# MoH ------------------------------------------------------------------------------------------------------------------

MOH_VIT = ("moh_vit_h4_s4_k0", "moh_vit_h6_s2_k4", "moh_vit_h8_s1_k4", "moh_vit_h8_s3_k2")
ROUTERS = {"router.weight": "wg.weight", "shared_router.weight": "wg_1.weight", "type_router.weight": "wg_0.weight"}


def routers(golden: Golden) -> dict[str, Tensor]:
    return {ours: golden[f"w.{theirs}"].requires_grad_() for ours, theirs in ROUTERS.items() if f"w.{theirs}" in golden}


@pytest.mark.parametrize("name", MOH_VIT)
def test_moh_gates_are_the_published_ones(name: str) -> None:
    golden = Golden(name)
    config, x, head_out = golden.config, golden["x"], golden["head_out"]
    routing = MoHRouting(shared_heads=config["shared_head"], active_heads=config["routed_head"])
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
    result = moh(x, weights, recipe, MoHRouting(shared_heads=2, active_heads=2))
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
    routing = MoHRouting(shared_heads=4, active_heads=2, router="norm")
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
            x, weights, GQA, MoHRouting(shared_heads=shared, active_heads=4 - shared), key_padding=HOLES, **options
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
    routing = MoHRouting(shared_heads=2, active_heads=3)
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
    assert chosen(p, MoHRouting(shared_heads=2, active_heads=3), recipe) == {1, 2, 4}
    groups = MoHRouting(shared_heads=2, active_heads=2, unit="kv_group")
    assert chosen(p, groups, recipe) == {4, 5}
    assert chosen(torch.full((6,), 1 / 6), groups, recipe) == {0, 1}
    with pytest.raises(ValueError, match="whole groups"):
        chosen(p, replace(groups, active_heads=3), recipe)


@pytest.mark.parametrize("scope", ["selected", "all"])
def test_moh_straight_through_gates_pass_the_gradient_of_the_probabilities(scope: Any) -> None:
    weights, x = projections(GQA), random(1, 1, 16, seed=9)
    q = (x[0, 0] @ weights["q_proj.weight"].T).reshape(4, 4).requires_grad_()
    routing = MoHRouting(shared_heads=1, active_heads=1, router="norm", ste_scope=scope, ste_coefficient=0.5)
    gate, p, on = gates(x[0, 0], q, weights, GQA, routing)
    assert sorted(gate.tolist()) == [0, 0, 1, 1]
    wanted = random(4, seed=3)
    heads = on if scope == "selected" else range(3)
    (grad,) = torch.autograd.grad((gate * wanted).sum(), q, retain_graph=True)
    (expected,) = torch.autograd.grad(0.5 * sum((p[e] * wanted[1 + e] for e in heads), start=0 * p[0]), q)
    near(grad, expected)


def test_moh_router_without_parameters_ranks_by_length_whatever_the_scale() -> None:
    recipe = Recipe(num_heads=5, num_kv_heads=5, head_dim=2)
    q = torch.tensor([[9.0, 0], [0, 3], [-4, 0], [0.6, 0.8], [3, 4]], dtype=torch.float64)
    routing = MoHRouting(shared_heads=1, active_heads=2, router="norm", eps=0.0)
    for factor in (1.0, 10.0):
        gate, p, on = gates(q.new_zeros(16), factor * q, {}, recipe, routing)
        assert gate.tolist() == [1, 0, 1, 0, 1]
        assert on == {1, 3}
        # Lengths 3, 4, 1, 5: the standard deviation is the root of 35 / 12.
        near(p, torch.softmax(torch.tensor([3.0, 4, 1, 5], dtype=torch.float64) / math.sqrt(35 / 12), 0))
    same = gates(q.new_zeros(16), torch.ones_like(q), {}, recipe, replace(routing, eps=1e-6))
    assert same[0].tolist() == [1, 1, 1, 0, 0]
    alone = gates(q.new_zeros(16), q, {}, recipe, replace(routing, shared_heads=4, active_heads=1))
    near(alone[0], q.new_ones(5))


@pytest.mark.parametrize("router", ["learned", "norm"])
def test_moh_padding_is_not_there(router: Any) -> None:
    weights, x = projections(GQA), random(2, 11, 16, seed=9)
    weights |= {"router.weight": random(3, 16, seed=6), "type_router.weight": random(2, 16, seed=7)}
    routing = MoHRouting(shared_heads=1, active_heads=1, router=router)
    padded = moh(x.masked_fill(HOLES.unsqueeze(-1), torch.nan), weights, GQA, routing, key_padding=HOLES)
    alone = [moh(x[b : b + 1, ~HOLES[b]], weights, GQA, routing) for b in range(2)]
    for b in range(2):
        for name in ("out", "gates", "selected"):
            mine, its = getattr(padded, name)[b], getattr(alone[b], name)[0]
            near(mine[~HOLES[b]].double(), its.double())
            assert not bool(mine[HOLES[b]].any())
    tokens = torch.cat([x[b, ~HOLES[b]] for b in range(2)])[None]
    near(padded.loss, moh(tokens, weights, GQA, routing).loss)
    assert float((padded.loss - alone[0].loss).abs()) > 1e-4


# LongHeads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["longheads_prefill_w32_a256_t256", "longheads_prefill_w64_a256_t320"])
def test_longheads_is_the_published_layer(name: str) -> None:
    golden = Golden(name)
    config, x, weights = golden.config, golden["x"][None], golden.projections()
    heads, begin, prefilled = config["num_heads"], config["begin_selective_length"], config["decode_prefill_length"]
    recipe = Recipe(num_heads=heads, num_kv_heads=heads, head_dim=config["head_dim"])
    chunks = Chunks(size=config["window_size"], slots=config["slots"], begin=begin)
    ours = longheads(x, weights, recipe, chunks)
    near(ours.chunk_keys[0], golden["chunk_keys"])
    prefill = longheads(x, weights, recipe, replace(chunks, official_quirks=True))
    near(prefill.out[0], golden["out_prefill"])
    published = golden["selected_prefill"].tolist()
    for result in (ours, prefill):
        assert [[list(row) for row in head[begin:]] for head in result.chunks[0]] == published
    near(ours.out[0, :begin], golden["out_prefill"][:begin])
    # The published prefill leaves out a token's own key: ours must differ in every row that selects.
    assert bool(((ours.out[0, begin:] - golden["out_prefill"][begin:]).abs().amax(-1) > 1e-6).all())

    steps = longheads(x, weights, recipe, replace(chunks, official_quirks=True, prefilled=prefilled))
    near(steps.out[0, prefilled:], golden["out_decode"])
    padded = [[[c for c in row if c >= 0] for row in head] for head in golden["selected_decode"].tolist()]
    assert [[list(row) for row in head[prefilled:]] for head in steps.chunks[0]] == padded
    usual = golden["decode_quirk"] == 0
    assert torch.equal(usual, (golden["decode_positions"] + 1) % chunks.size != 0)
    near(ours.out[0, prefilled:][usual], golden["out_decode"][usual])


@pytest.mark.parametrize("length", [1, 4, 11, 12])
def test_longheads_that_reads_everything_is_plain_attention(length: int) -> None:
    weights, x = projections(GQA), random(2, length, 16, seed=9)
    padding = HOLES[:, :length]
    plain = mha(x, weights, GQA, key_padding=padding if length == 11 else None)
    for chunks in (Chunks(size=4, slots=3, begin=12), Chunks(size=2, slots=6, begin=0), Chunks(size=20, slots=3)):
        ours = longheads(x, weights, GQA, chunks, key_padding=padding if length == 11 else None)
        near(ours.out, plain)


def test_longheads_grouped_heads_are_repeated_heads_and_choose_apart() -> None:
    weights, x = projections(GQA), random(1, 40, 16, seed=9)
    wide = dict(weights)
    for name in ("k_proj.weight", "v_proj.weight"):
        wide[name] = weights[name].unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1)
    chunks = Chunks(size=4, slots=4)
    ours = longheads(x, weights, GQA, chunks)
    repeated = longheads(x, wide, replace(GQA, num_kv_heads=4), chunks)
    near(ours.out, repeated.out)
    assert ours.chunks == repeated.chunks
    assert ours.chunks[0][0] != ours.chunks[0][1]
    together = longheads(x, weights, GQA, replace(chunks, group_select=True)).chunks[0]
    assert together[0] == together[1]
    assert together[2] == together[3]
    assert together[0] != together[2]
    q = (x[0] @ weights["q_proj.weight"].T).unflatten(-1, (4, 4))
    for t in range(16, 40):
        scores = (q[t, :2].unsqueeze(1) * ours.chunk_keys[0][:2]).sum((0, 2))
        best = 1 + int(scores[1 : t // 4 - 1].argmax())
        assert together[0][t] == (0, best, t // 4 - 1, t // 4)


def test_longheads_first_query_of_a_block_selects_for_it() -> None:
    weights, x = projections(GQA), random(1, 40, 16, seed=9)
    chunks = Chunks(size=4, slots=4)
    token = longheads(x, weights, GQA, chunks)
    near(longheads(x, weights, GQA, replace(chunks, select="block", block_q=1)).out, token.out)
    block = longheads(x, weights, GQA, replace(chunks, select="block", block_q=2))
    for mine, first in zip(block.chunks[0], token.chunks[0], strict=True):
        assert mine == [first[t // 2 * 2] for t in range(40)]
    rows = [t for t in range(40) if all(h[t] == h[t // 2 * 2] for h in token.chunks[0])]
    near(block.out[0, rows], token.out[0, rows])
    assert len(rows) < 40
    with pytest.raises(ValueError, match="whole blocks"):
        longheads(x, weights, GQA, replace(chunks, select="block", block_q=3))


def test_longheads_does_not_read_the_future_and_can_be_differentiated() -> None:
    weights, x = projections(GQA), random(1, 30, 16, seed=9)
    for chunks in (Chunks(size=4, slots=4), Chunks(size=4, slots=4, select="block", block_q=4, chunk_rep="mean_key")):
        whole = longheads(x, weights, GQA, chunks)
        for end in (17, 23, 24, 29):
            near(longheads(x[:, :end], weights, GQA, chunks).out, whole.out[:, :end])
    y = x.clone().requires_grad_()
    result = longheads(y, weights, GQA, Chunks(size=4, slots=4))
    (grad,) = torch.autograd.grad(result.out[0, 29].sum(), y)
    read = {c for head in result.chunks[0] for c in head[29]}
    assert 4 <= len(read) < 8
    assert {t // 4 for t in range(30) if float(grad[0, t].abs().max()) > 0} == read


def test_longheads_mean_key_is_the_published_key_of_an_empty_query() -> None:
    q, k, v = (random(4, 4, seed=i) for i in range(3))
    recipe = replace(GQA, scale=0.5)
    chunks = Chunks(size=4, slots=4)
    near(chunk_key(q, k, 0 * v, recipe, chunks), chunk_key(q, k, v, recipe, replace(chunks, chunk_rep="mean_key")))
