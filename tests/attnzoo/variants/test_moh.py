"""Mixture-of-head attention: the layer against its oracle, both ways of computing it, routing, and what it refuses."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attnzoo
from attnzoo.oracles import moh as oracle
from attnzoo.variants.moh import forms, routed_rows
from attnzoo.variants.moh import layer as moh
from attnzoo.variants.moh import router as routing
from attnzoo.variants.moh.routed_rows import Rows
from tests.attnzoo.cases import assert_same, build, recipe_of, tokens

CONFIGS: dict[str, dict[str, Any]] = {
    "shared and routed": {"num_heads": 8, "shared_heads": 3, "active_heads": 2},
    "one shared": {"num_heads": 8, "shared_heads": 1, "active_heads": 3},
    "routed alone": {"shared_heads": 0, "active_heads": 1},
    "shared alone": {"shared_heads": 4, "active_heads": 0},
    "all active": {"shared_heads": 1, "active_heads": "all"},
    "as the paper": {"num_heads": 8, "shared_heads": 2, "active_heads": 2, "gate_norm": "paper", "aux_scale": "paper"},
    "grouped heads": {"num_heads": 8, "num_kv_heads": 2, "shared_heads": 3, "active_heads": 2, "bias": True},
    "groups routed": {
        "num_heads": 8, "num_kv_heads": 4, "shared_heads": 2, "active_heads": 2, "route_unit": "kv_group",
    },
    "longest queries": {"num_heads": 8, "num_kv_heads": 2, "shared_heads": 4, "active_heads": 2, "router": "norm"},
    "longest queries, all learn": {
        "num_heads": 8, "shared_heads": 2, "active_heads": 3, "router": "norm", "ste_scope": "all",
        "ste_coefficient": 0.5,
    },
    "longest queries of groups": {
        "num_heads": 8, "num_kv_heads": 4, "shared_heads": 0, "active_heads": 4, "router": "norm",
        "route_unit": "kv_group",
    },
    "one candidate": {"num_heads": 2, "shared_heads": 1, "active_heads": 1, "router": "norm"},
    "rescaled": {"num_heads": 8, "shared_heads": 2, "active_heads": 2, "rescale": True},
    "window and sink": {"num_heads": 8, "shared_heads": 2, "active_heads": 2, "window": 9, "sink": 3, "block_size": 4},
    "window alone": {"shared_heads": 1, "active_heads": 1, "window": 5, "block_size": 4},
    "both directions": {"shared_heads": 1, "active_heads": 2, "causal": False, "rotary": None},
}  # fmt: skip


def config_of(**options: Any) -> Any:
    return attnzoo.get_config("moh")(**{"dim": 32, "num_heads": 4, **options})


def routing_of(config: Any) -> oracle.MoHRouting:
    counts = config.counts
    return oracle.MoHRouting(
        shared_heads=counts.shared,
        active_heads=counts.active,
        router=config.router,
        gate_norm=config.gate_norm,
        unit=config.route_unit,
        aux_scale=config.aux_scale,
        ste_scope=config.ste_scope,
        ste_coefficient=config.ste_coefficient,
        eps=config.eps,
        rescale=config.rescale,
    )


def layer_of(config: Any, dtype: torch.dtype = torch.float64) -> Any:
    """A layer whose router is sure of itself: gates far from equal."""
    layer = build(config, dtype=dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for router in (layer.router, layer.shared_router, layer.type_router):
            if router is not None:
                router.weight.copy_(torch.randn(router.weight.shape, generator=generator, dtype=torch.float64) / 3)
    return layer


def joined(layer: Any) -> Any:
    """A copy whose heads come together before they are projected: what has hooks is called as a whole."""
    layer = copy.deepcopy(layer)
    layer.o_proj.register_forward_hook(lambda *_: None)
    return layer


def some_padding(length: int) -> Tensor:
    key_padding = torch.zeros(3, length, dtype=torch.bool)
    key_padding[1, :9] = True
    key_padding[2, [0, 4, 5, 21, length - 1]] = True
    return key_padding


DENSE = ("shared and routed", "as the paper", "groups routed", "longest queries, all learn", "window and sink")
"""Where all heads are computed too in the quick run."""


@pytest.mark.parametrize(
    ("name", "compute"),
    [
        *((name, "routed") for name in CONFIGS),
        *(pytest.param(name, "dense", marks=() if name in DENSE else pytest.mark.slow) for name in CONFIGS),
    ],
)
def test_layer_is_its_oracle(name: str, compute: str) -> None:
    config = config_of(**CONFIGS[name], compute=compute)
    layer, length = layer_of(config), 29
    key_padding = some_padding(length)
    x = tokens(layer, 3, length).requires_grad_()
    weight = tokens(layer, 3, length, seed=1)
    expected = oracle.moh(
        x, dict(layer.named_parameters()), recipe_of(config), routing_of(config),
        window=config.window, sink=config.sink, key_padding=key_padding,
    )  # fmt: skip
    found = layer.attend(x, key_padding=key_padding)
    assert_same(found.out, expected.out)
    assert_same(found.plan.aux_loss, expected.loss)
    order = [[t for t in range(length) if not padded[t]] for padded in key_padding]
    for item, real in enumerate(order):
        # The layer's rows are the real tokens, moved to the left.
        assert_same(found.plan.info["gates"][item, : len(real)], expected.gates[item, real].detach())
        assert torch.equal(found.plan.info["active"][item, : len(real)], expected.selected[item, real])
    losses = [
        (y.out * weight).sum() + 0.3 * loss for y, loss in ((found, found.plan.aux_loss), (expected, expected.loss))
    ]
    named = {"x": x, **dict(layer.named_parameters())}
    grads = [
        torch.autograd.grad(loss, list(named.values()), materialize_grads=True, allow_unused=True) for loss in losses
    ]
    for grad, same in zip(*grads, strict=True):
        assert_same(grad, same, scale=10)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    heads=st.sampled_from([(4, 4), (8, 2), (6, 3), (3, 1), (1, 1)]),
    seed=st.integers(0, 9),
    length=st.integers(1, 90),
    router=st.sampled_from(["learned", "norm"]),
    window=st.sampled_from([None, 7, 40]),
    padded=st.booleans(),
    block=st.sampled_from([3, 16, 64]),
)
def test_both_ways_of_computing_give_the_same_output_and_gradients(
    heads: tuple[int, int], seed: int, length: int, router: str, window: int | None, padded: bool, block: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shared = int(torch.randint(0, heads[0], (), generator=generator))
    active = int(torch.randint(1, heads[0] - shared + 1, (), generator=generator))
    options = {
        "dim": 24 if heads[0] != 8 else 32, "num_heads": heads[0], "num_kv_heads": heads[1], "shared_heads": shared,
        "active_heads": active, "router": router, "window": window, "block_size": block, "head_dim": 8,
    }  # fmt: skip
    results = []
    key_padding = torch.rand(2, length, generator=generator) < 0.4 if padded else None
    for compute in ("routed", "dense"):
        layer = layer_of(config_of(**options, compute=compute))
        x = tokens(layer, 2, length, seed=seed).requires_grad_()
        found = layer.attend(x, key_padding=key_padding)
        leaves = [x, *layer.parameters()]
        grads = torch.autograd.grad(found.out.square().sum(), leaves, materialize_grads=True, allow_unused=True)
        results.append((found, grads))
    (routed, routed_grads), (dense, dense_grads) = results
    assert_same(routed.out, dense.out)
    for grad, same in zip(routed_grads, dense_grads, strict=True):
        assert_same(grad, same, scale=10)


def test_what_is_not_routed_is_not_computed() -> None:
    # Queries that are NaN wherever a head does not run disturb nobody: they never reach the operation.
    config = config_of(num_heads=8, shared_heads=2, active_heads=2, compute="routed")
    layer = layer_of(config)
    x = tokens(layer, 2, 50)
    expected, seen = layer(x), []
    project, plan = layer.project, layer.plan

    def spoiled(step: Any) -> Any:
        heads = project(step)
        idle = ~heads.routing.active.transpose(1, 2).unsqueeze(-1)
        return moh.MoHHeads(heads.q.masked_fill(idle, torch.nan), heads.k, heads.v, heads.routing)

    def listening(step: Any, heads: Any, inputs: Any) -> Any:
        seen.append(inputs)
        return plan(step, heads, inputs)

    layer.project, layer.plan = spoiled, listening
    assert torch.equal(layer(x), expected)
    rows = int((seen[0].q_pos >= 0).sum())
    assert rows == 2 * 50 * 4
    assert seen[0].q.shape == (2, 8, 50, 4)


@pytest.mark.parametrize("length", [129, 300])
def test_density_is_the_share_of_pairs_that_run(length: int) -> None:
    layer = layer_of(config_of(num_heads=8, shared_heads=2, active_heads=2, compute="routed"))
    plan = layer.attend(tokens(layer, 1, length)).plan
    counts = plan.info["active"][0].double() * torch.arange(1, length + 1).unsqueeze(1)
    assert plan.density == pytest.approx(float(counts.sum()) / (8 * length * (length + 1) / 2))
    assert attnzoo.create(attnzoo.MoHConfig.small()).attend(torch.randn(1, length, 32)).plan.density < 1
    dense = layer_of(config_of(num_heads=8, shared_heads=2, active_heads=2, compute="dense"))
    assert dense.attend(tokens(dense, 1, length)).plan.density == 1


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("unit", ["head", "kv_group"])
def test_decoding_reads_the_kv_heads_that_are_needed_and_equals_prefill(kv_heads: int, unit: str) -> None:
    options = {"shared_heads": 4, "active_heads": 4} if unit == "kv_group" and kv_heads == 2 else {}
    options = options or {"shared_heads": 0, "active_heads": 2}
    config = config_of(num_heads=8, num_kv_heads=kv_heads, route_unit=unit, compute="routed", **options)
    layer, length = layer_of(config), 40
    x = tokens(layer, 3, length)
    padding = some_padding(30)
    rows = [x[i : i + 1][:, torch.cat([~padding[i], torch.ones(10, dtype=torch.bool)])] for i in range(3)]
    cache = layer.new_cache(3, length)
    with torch.no_grad():
        layer.attend(x[:, :30], key_padding=padding, cache=cache)
        for t in range(30, length):
            found = layer.attend(x[:, t : t + 1], cache=cache)
            for item, row in enumerate(rows):
                assert_same(found.out[item], layer(row[:, : row.shape[1] - length + t + 1])[0, -1:])
    groups = found.plan.info["active"].view(3, kv_heads, -1).any(2)
    lengths = torch.tensor([row.shape[1] for row in rows])
    share = (groups.sum(1) / kv_heads * lengths).sum() / lengths.sum()
    assert found.plan.density == pytest.approx(float(share))
    assert found.plan.density < 1 or kv_heads == 2


def test_a_decoding_step_does_not_touch_kv_heads_that_nobody_needs() -> None:
    layer = layer_of(config_of(num_heads=8, shared_heads=0, active_heads=2, compute="routed"))
    x = tokens(layer, 1, 40)
    cache = layer.new_cache(1, 40)
    with torch.no_grad():
        layer.attend(x[:, :39], cache=cache)
        expected = layer.attend(x[:, 39:], cache=cache.fork())
        idle = ~expected.plan.info["active"][0, 0]
        for stream in cache.streams.values():
            stream[0, idle] = torch.nan
        assert torch.equal(layer.attend(x[:, 39:], cache=cache).out, expected.out)


def test_the_choice_between_gathering_and_all_rows_is_one_rule() -> None:
    assert [least for least, _, _ in forms.CROSSINGS] == sorted(
        (least for least, _, _ in forms.CROSSINGS), reverse=True
    )
    for least, most, most_training in forms.CROSSINGS:
        for training, limit in ((False, most), (True, most_training)):
            assert forms.gathering_pays(least, limit, training=training)
            assert not forms.gathering_pays(least, limit + 0.01, training=training)
    assert not forms.gathering_pays(forms.CROSSINGS[-1][0] - 1, 0.1, training=True)


def test_auto_follows_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(config_of(num_heads=8, shared_heads=2, active_heads=2))
    x = tokens(layer, 1, 40)
    assert layer.attend(x).plan.form.kind == "every_row"
    monkeypatch.setattr(forms, "CROSSINGS", ((40, 0.4, 0.6),))
    assert layer.attend(x).plan.form.leaves_out
    with torch.no_grad():
        assert layer.attend(x).plan.form.kind == "every_row"
    assert layer.attend(x[:, :39]).plan.form.kind == "every_row"
    cache = layer.new_cache(1, 60)
    layer.attend(x, cache=cache)
    assert layer.attend(x[:, :1], cache=cache).plan.form.kind == "every_row"
    monkeypatch.setattr(forms, "LEAST_SLOTS", 42)
    assert layer.attend(x[:, :1], cache=cache).plan.form.leaves_out


def test_gates_add_up_and_name_the_heads_that_run() -> None:
    for norm in ("code", "paper"):
        config = config_of(num_heads=8, shared_heads=3, active_heads=2, gate_norm=norm)
        layer = layer_of(config)
        info = layer.attend(tokens(layer, 2, 33)).plan.info
        gates, active = info["gates"], info["active"]
        assert ((gates > 0) == active).all()
        assert (active.sum(-1) == 5).all()
        assert active[..., :3].all()
        shared, routed = gates[..., :3].sum(-1), gates[..., 3:].sum(-1)
        if norm == "code":
            # Each kind adds up to its number of heads times the weight of its kind, and these two to 2.
            assert torch.allclose(shared / 3 + routed / 2, torch.full_like(shared, 2.0))
        else:
            assert (shared + routed < 1).all()


def test_ties_go_to_the_lowest_head_and_selections_are_nested() -> None:
    scores = torch.tensor([[0.2, 0.5, 0.5, 0.1, 0.5]])
    counts = routing.Counts(shared=0, routed=5, active=2)
    assert routing.best(scores, counts).tolist() == [[False, True, True, False, False]]
    equal = torch.zeros(3, 64)
    for active in (1, 7, 63):
        chosen = routing.best(equal, routing.Counts(shared=0, routed=64, active=active))
        assert chosen.sum(-1).tolist() == [active] * 3
        assert chosen[:, :active].all()
    random = torch.rand(50, 8, generator=torch.Generator().manual_seed(0))
    few, more = (routing.best(random, routing.Counts(shared=0, routed=8, active=n)) for n in (2, 5))
    assert (more | ~few).all()


@pytest.mark.parametrize("heads", [1, 3, 7, 49, 64])
def test_equal_shares_are_exactly_one(heads: int) -> None:
    for dtype in (torch.float32, torch.float64):
        assert (routing.shares(torch.zeros(2, 3, heads, dtype=dtype), heads) == 1).all()


@pytest.mark.parametrize("shared", [0, 1, 3])
@pytest.mark.parametrize("compute", ["routed", "dense"])
def test_all_heads_active_is_plain_attention_to_the_bit(shared: int, compute: str) -> None:
    options = {"num_heads": 6, "num_kv_heads": 3, "dim": 48}
    layer = build(config_of(**options, shared_heads=shared, active_heads="all", compute=compute))
    plain = attnzoo.create("mha", **options)
    plain.load_state_dict({name: x for name, x in layer.state_dict().items() if "router" not in name})
    x = tokens(layer, 2, 70)
    with torch.no_grad():
        if compute == "dense":
            assert torch.equal(layer(x), plain(x))
        else:
            assert_same(layer(x), plain(x))


def test_a_router_starts_small_and_random_but_at_zero_where_all_heads_are_active() -> None:
    torch.manual_seed(0)
    some = attnzoo.create("moh", dim=256, num_heads=16, shared_heads=4, active_heads=4)
    for router, heads in ((some.router, 12), (some.shared_router, 4), (some.type_router, 2)):
        assert router.weight.shape == (heads, 256)
        assert router.bias is None
        assert float(router.weight.detach().std()) == pytest.approx(0.02, rel=0.15)
    every = attnzoo.create("moh", dim=256, num_heads=16, shared_heads=4, active_heads="all")
    assert all((r.weight == 0).all() for r in (every.router, every.shared_router, every.type_router))
    alone = attnzoo.create("moh", dim=32, num_heads=4, shared_heads=4, active_heads=0)
    assert alone.router is None
    assert alone.type_router is None
    norm = attnzoo.create("moh", dim=32, num_heads=4, router="norm")
    assert not [name for name, _ in norm.named_parameters() if "router" in name]


def test_the_balance_loss_is_least_where_heads_are_used_alike_and_reaches_the_router() -> None:
    layer = layer_of(config_of(num_heads=8, shared_heads=2, active_heads=2))
    x = tokens(layer, 2, 60)
    with attnzoo.record(nn.Sequential(layer)) as rec:
        layer(x)
        layer(x)
    one = layer.attend(x).plan.aux_loss
    assert_same(rec.aux_loss, 2 * one)
    # With a uniform router it is K; where choices follow opinions it is more.
    assert float(one.detach()) > 2
    (grad,) = torch.autograd.grad(rec.aux_loss, layer.router.weight)
    assert grad.abs().max() > 0
    weight = layer.router.weight.detach().clone()
    with torch.no_grad():
        layer.router.weight.zero_()
        assert float(layer.attend(x).plan.aux_loss.detach()) == pytest.approx(2)
        layer.router.weight.copy_(weight)
    cloned = attnzoo.create("moh", dim=32, num_heads=4, shared_heads=4, active_heads=0)
    assert float(cloned.attend(torch.randn(1, 5, 32)).plan.aux_loss) == 0


@pytest.mark.parametrize("scope", ["selected", "all"])
def test_the_straight_through_gate_is_hard_forward_and_soft_backward(scope: str) -> None:
    lengths = torch.rand(2, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    counts = routing.Counts(shared=1, routed=5, active=2)
    found = routing.by_norm(lengths, counts, eps=1e-6, coefficient=3.0, every=scope == "all")
    assert torch.equal(found.gates.detach(), found.active.double())
    cotangent = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (grad,) = torch.autograd.grad((found.gates * cotangent).sum(), lengths)
    z = lengths.detach().clone().requires_grad_()
    soft = 3.0 * torch.softmax(z / (z.std(-1, keepdim=True) + 1e-6), -1)
    soft = soft if scope == "all" else soft * found.active[..., 1:]
    (expected,) = torch.autograd.grad((soft * cotangent[..., 1:]).sum(), z)
    assert_same(grad, expected)


def test_equal_queries_give_no_nan() -> None:
    layer = build(config_of(router="norm", shared_heads=0, active_heads=2), dtype=torch.float64)
    with torch.no_grad():
        layer.q_proj.weight.zero_()
    x = tokens(layer, 1, 9).requires_grad_()
    out = layer(x)
    grads = torch.autograd.grad(out.sum(), [x, *layer.parameters()])
    assert all(g.isfinite().all() for g in (out, *grads))
    assert layer.attend(x).plan.info["active"][0, 0].tolist() == [True, True, False, False]


def test_the_longest_queries_are_chosen_whatever_their_common_scale() -> None:
    layer = layer_of(config_of(num_heads=8, shared_heads=2, active_heads=2, router="norm"))
    x = tokens(layer, 2, 30)
    chosen = layer.attend(x).plan.info["active"]
    with torch.no_grad():
        layer.q_proj.weight.mul_(5)
    assert torch.equal(layer.attend(x).plan.info["active"], chosen)


def test_another_sequence_is_read_by_the_heads_that_run() -> None:
    outs = []
    for compute in ("routed", "dense"):
        layer = layer_of(config_of(num_heads=8, shared_heads=1, active_heads=2, compute=compute))
        x, context = tokens(layer, 2, 33), tokens(layer, 2, 21, seed=1)
        hidden = torch.arange(21) < torch.tensor([[0], [8]])
        outs.append(layer.attend(x, context=context, key_padding=hidden).out)
    assert_same(outs[0], outs[1])
    windowed = layer_of(config_of(window=4))
    with pytest.raises(attnzoo.UnsupportedError, match=r"^context: "):
        windowed.attend(x, context=context)


def test_half_precision_routes_as_full_precision_does() -> None:
    layer = layer_of(config_of(num_heads=8, shared_heads=2, active_heads=2), dtype=torch.float32)
    x = tokens(layer, 2, 60)
    expected = layer.attend(x).plan.info["active"]
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.attend(x)
    assert torch.equal(found.plan.info["active"], expected)
    assert found.plan.info["gates"].dtype == torch.float32


BAD: tuple[tuple[dict[str, Any], str], ...] = (
    ({"shared_heads": 5}, "shared_heads"),
    ({"shared_heads": -1}, "shared_heads"),
    ({"shared_heads": 1.0}, "shared_heads"),
    ({"shared_heads": 2, "active_heads": 3}, "active_heads"),
    ({"shared_heads": 2, "active_heads": 0}, "active_heads"),
    ({"active_heads": True}, "active_heads"),
    ({"active_heads": "most"}, "active_heads"),
    ({"num_kv_heads": 2, "route_unit": "kv_group", "shared_heads": 1}, "shared_heads"),
    ({"num_kv_heads": 2, "route_unit": "kv_group", "shared_heads": 0, "active_heads": 3}, "active_heads"),
    ({"router": "random"}, "router"),
    ({"gate_norm": "none"}, "gate_norm"),
    ({"route_unit": "token"}, "route_unit"),
    ({"rescale": 1}, "rescale"),
    ({"aux_scale": 2}, "aux_scale"),
    ({"ste_scope": "none"}, "ste_scope"),
    ({"ste_coefficient": 0.0}, "ste_coefficient"),
    ({"eps": math.nan}, "eps"),
    ({"window": 0}, "window"),
    ({"sink": 3}, "sink"),
    ({"block_size": 0}, "block_size"),
    ({"compute": "fast"}, "compute"),
)


@pytest.mark.parametrize(("options", "field"), BAD, ids=[f"{i}-{name}" for i, (_, name) in enumerate(BAD)])
def test_a_bad_option_is_refused_by_name(options: dict[str, Any], field: str) -> None:
    with pytest.raises(attnzoo.ConfigError, match=rf"^{field}: expected .*got ") as caught:
        config_of(**options)
    assert "\n" not in str(caught.value)


def test_defaults_are_the_papers_three_quarters() -> None:
    for heads, shared, active in ((32, 16, 8), (16, 8, 4), (8, 4, 2), (4, 2, 2), (2, 1, 1), (1, 0, 1)):
        counts = config_of(dim=heads * 4, num_heads=heads).counts
        assert (counts.shared, counts.active) == (shared, active)


def test_rows_are_gathered_and_scattered_in_the_tokens_order() -> None:
    wanted = torch.rand(2, 3, 11, generator=torch.Generator().manual_seed(0)) < 0.4
    rows = Rows.of(wanted)
    assert rows.token.shape[2] == int(wanted.sum(-1).max())
    for item in range(2):
        for head in range(3):
            expected = wanted[item, head].nonzero().flatten().tolist()
            assert rows.token[item, head].tolist()[: len(expected)] == expected
            assert (rows.token[item, head, len(expected) :] == -1).all()
    x = torch.randn(2, 3, 11, 5, generator=torch.Generator().manual_seed(1))
    back = rows.scatter(rows.gather(x) * rows.present.unsqueeze(-1))
    assert torch.equal(back, x * wanted.unsqueeze(-1))
    traced = routed_rows.Rows.of(wanted.to("meta"))
    assert traced.token.shape == (2, 3, 11)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"window": 20, "sink": 3}], ids=["everything", "window"])
def test_compiled_with_lengths_as_variables_it_gathers_without_reading_and_says_the_same(
    options: dict[str, Any],
) -> None:
    layer = layer_of(config_of(num_heads=8, shared_heads=2, active_heads=2, compute="routed", **options))
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    x, key_padding = tokens(layer, 2, 70), torch.arange(70) < torch.tensor([[0], [17]])
    assert_same(compiled(x, key_padding=key_padding), layer(x, key_padding=key_padding))
    caches = [layer.new_cache(2, 80) for _ in range(2)]
    with torch.no_grad():
        for part in x.split([40, 29, 1], 1):
            assert_same(compiled(part, cache=caches[0]), layer(part, cache=caches[1]))
