"""The law of quick decoding steps: they say what a call's own steps say, are taken where they may be, only there."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import attnzoo
from attnzoo.base.layer import AttentionLayer
from attnzoo.base.recording import record
from attnzoo.reporting.warn import silent
from tests.attnzoo.cases import CASES, Case, assert_same, build, tokens

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "mha, grouped": ("mha", {"num_kv_heads": 2}),
    "mha, window": ("mha", {"window": 9}),
    "mha, window of one": ("mha", {"window": 1}),
    "mha, window and sink": ("mha", {"window": 9, "sink": 3, "num_kv_heads": 1}),
    "mha, no rotation": ("mha", {"rotary": None, "scale": 0.3, "bias": True}),
    "lowrank_gqa, a latent": ("lowrank_gqa", {"latent_dim": 12, "num_kv_heads": 2}),
    "lowrank_gqa, a latent of neighbours": (
        "lowrank_gqa",
        {"latent_dim": 12, "rotary": attnzoo.RotaryConfig(dim=4, interleaved=True)},
    ),
    "s2, grouped": ("s2", {"num_kv_heads": 2, "block_size": 4, "local_blocks": 2, "vert_stride": 3}),
    "s2, a dense head and sinks": (
        "s2",
        {"block_size": 4, "local_blocks": 1, "vert_stride": 5, "num_dense_heads": 1, "sink_blocks": 1},
    ),
    "s2, all heads alike": ("s2", {"block_size": 2, "local_blocks": 1, "vert_stride": 4, "homogeneous": True}),
    "moh, all heads": ("moh", {"active_heads": "all", "num_kv_heads": 2}),
    "moh, window": ("moh", {"window": 9, "sink": 2, "compute": "routed"}),
    "moh, by length": ("moh", {"router": "norm", "shared_heads": 1, "active_heads": 1, "rescale": True}),
    "moh, parts of groups": (
        "moh",
        {"num_kv_heads": 2, "shared_heads": 1, "active_heads": 1, "compute": "routed"},
    ),
    "moh, whole groups": (
        "moh",
        {"num_kv_heads": 2, "route_unit": "kv_group", "shared_heads": 0, "active_heads": 2, "compute": "routed"},
    ),
    "rcmha, learned distances": ("rcmha", {"rel": "learned", "max_distance": 9, "num_kv_heads": 2}),
    "rcmha, rotated": ("rcmha", {"rotary": attnzoo.RotaryConfig(), "conv_on": ("q", "v")}),
    "rcmha, no distances": ("rcmha", {"rel": None, "conv_size": 1}),
    "mha, partly rotated": ("mha", {"rotary": attnzoo.RotaryConfig(dim=4, interleaved=True)}),
    "longheads, heads of a group together": (
        "longheads", {"chunk_size": 8, "attention_length": 32, "begin": 48, "num_kv_heads": 2, "group_select": True}
    ),
    "longheads, blocks of queries": (
        "longheads", {"chunk_size": 8, "attention_length": 32, "select": "block", "query_block": 4, "num_kv_heads": 1}
    ),
    "longheads, mean keys": (
        "longheads",
        {
            "chunk_size": 4, "attention_length": 20, "chunk_rep": "mean_key", "scale": 0.4,
            "rotary": attnzoo.RotaryConfig(dim=6, interleaved=True),
        },
    ),
    "longheads, no rotation": ("longheads", {"chunk_size": 8, "attention_length": 32, "rotary": None, "bias": True}),
    "landmark, mixed gates": ("landmark", {"block_size": 8, "top_k": 2, "gate_mix": 0.4, "num_kv_heads": 2}),
    "landmark, landmarks without a position": (
        "landmark",
        {
            "block_size": 7, "top_k": 3, "landmark_positions": False, "num_kv_heads": 1,
            "rotary": attnzoo.RotaryConfig(dim=4, interleaved=True),
        },
    ),
    "landmark, soft": ("landmark", {"block_size": 6, "mode": "soft", "gate_mix": 0.3, "num_kv_heads": 2}),
    "landmark, soft without gates": (
        "landmark", {"block_size": 5, "mode": "soft", "gate_mix": 0.0, "landmark_positions": False}
    ),
    "landmark, no rotation": ("landmark", {"block_size": 5, "top_k": 1, "rotary": None, "scale": 0.3, "gate_mix": 0.0}),
}  # fmt: skip
"""What the defaults and small sizes of a variant leave out."""


def layer_of(key: str, dtype: torch.dtype = torch.float32) -> Any:
    """The layer of a case or of options."""
    found = next((case for case in CASES if str(case) == key), None)
    if found is not None:
        return found.layer(dtype=dtype)
    name, options = OPTIONS[key]
    with silent():
        return build(attnzoo.get_config(name)(dim=32, num_heads=4, **options), dtype=dtype)


def has_hooks(case: Case) -> bool:
    return type(case.layer())._stands_for is not None


QUICK = [str(case) for case in CASES if has_hooks(case)] + list(OPTIONS)
every_quick_layer = pytest.mark.parametrize("key", QUICK)


def step_both(layer: Any, x: Tensor, caches: tuple[Any, Any]) -> None:
    """One call each way, held against each other, and what they remember too."""
    quick, plain = caches
    assert_same(layer(x, cache=quick), layer.attend(x, cache=plain).out)
    assert quick.length == plain.length
    for name, stream in quick.streams.items():
        same = assert_same if stream.is_floating_point() else torch.testing.assert_close
        same(stream, plain.streams[name])


calls = st.lists(
    st.one_of(
        st.tuples(st.just("steps"), st.integers(1, 12)),
        st.tuples(st.just("chunk"), st.integers(2, 25)),
        st.tuples(st.just("crop"), st.integers(0, 30)),
        st.tuples(st.just("reorder"), st.permutations([0, 1])),
        st.tuples(st.just("fork"), st.just(0)),
    ),
    min_size=1,
    max_size=8,
)


def each_precision() -> list[Any]:
    """Every layer in double precision, whose bound is the narrowest, and the cases of all laws in the others."""
    precisions = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
    return [
        pytest.param(
            key, dtype, marks=pytest.mark.slow if key in OPTIONS and name != "fp64" else (), id=f"{key}-{name}"
        )
        for key in QUICK
        for name, dtype in precisions.items()
    ]


@pytest.mark.parametrize(("key", "dtype"), each_precision())
@settings(max_examples=4, deadline=None)
@given(calls=calls)
def test_a_quick_step_says_what_the_steps_of_a_call_say(key: str, dtype: torch.dtype, calls: list[Any]) -> None:
    layer = layer_of(key, dtype)
    x = tokens(layer, 2, 160)
    at, caches = 0, (layer.new_cache(2, 200), layer.new_cache(2, 200))
    with torch.no_grad():
        for kind, value in calls:
            if kind == "crop":
                for cache in caches:
                    cache.crop(max(0, cache.length - value))
            elif kind == "reorder":
                for cache in caches:
                    cache.reorder(torch.tensor(value))
            elif kind == "fork":
                caches = tuple(cache.fork() for cache in caches)
            else:
                for size in [1] * value if kind == "steps" else [value]:
                    step_both(layer, x[:, at : at + size], caches)
                    at = (at + size) % 130


@every_quick_layer
def test_steps_are_quick_and_read_nothing_that_is_hidden(key: str) -> None:
    layer = layer_of(key)
    x = tokens(layer, 2, 80)
    quick, plain = layer.new_cache(2, 80), layer.new_cache(2, 80)
    with torch.no_grad():
        for cache in (quick, plain):
            layer.attend(x[:, :50], cache=cache)
        for values in quick._buffers.values():
            if values.is_floating_point():
                values[:, :, 50:] = torch.nan
        for t in range(50, 80):
            found = layer.decode_row(x[:, t : t + 1], quick)
            assert found is not None
            assert_same(found, layer.attend(x[:, t : t + 1], cache=plain).out)
        assert layer.decode_row(x[:, :1], quick) is None
        with pytest.raises(ValueError, match="max_length 80"):
            layer(x[:, :1], cache=quick)


class Adapter(nn.Module):
    """A projection with something beside it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = 2 * self.base(x)
        return result


def adapt(layer: Any) -> None:
    layer.o_proj = Adapter(layer.o_proj)


def hook(layer: Any) -> None:
    layer.q_proj.register_forward_hook(lambda module, args, out: 2 * out)


def hook_before(layer: Any) -> None:
    layer.q_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def name_implementation(layer: Any) -> None:
    layer.impl = "reference"


def replace_a_step(layer: Any) -> None:
    plain = layer.combine
    layer.combine = lambda *args: 2 * plain(*args)


def replace_forward(layer: Any) -> None:
    plain = layer.o_proj.forward
    layer.o_proj.forward = lambda x: 2 * plain(x)


CHANGES = [adapt, hook, hook_before, name_implementation, replace_a_step, replace_forward]


@every_quick_layer
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_somebody_has_changed_in_a_layer_is_honoured(key: str, change: Callable[[Any], None]) -> None:
    layer = layer_of(key)
    x = tokens(layer, 1, 9)
    caches = layer.new_cache(1, 9), layer.new_cache(1, 9)
    with torch.no_grad():
        for cache in caches:
            layer(x[:, :8], cache=cache)
        change(layer)
        fork = caches[0].fork()
        assert layer.decode_row(x[:, 8:], fork) is None
        assert fork.length == 8
        step_both(layer, x[:, 8:], caches)


@pytest.mark.parametrize("step", ["project", "rotate", "remember", "plan", "operate", "combine", "attend"])
@pytest.mark.parametrize("how", ["subclass", "mixin", "class"])
def test_a_step_of_ones_own_is_run(step: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer_class: Any = type(attnzoo.create("mha", dim=16, num_heads=2))
    called: list[str] = []

    def mine(self: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(step)
        return plain(self, *args, **kwargs)

    plain = getattr(layer_class, step)
    if how == "subclass":
        later = type("Later", (layer_class,), {step: mine})
    elif how == "mixin":
        later = type("Later", (type("Mixin", (), {step: mine}), layer_class), {})
    else:
        later = layer_class
        monkeypatch.setattr(layer_class, step, mine)
    layer = later(attnzoo.get_config("mha")(dim=16, num_heads=2))
    with torch.no_grad():
        layer(torch.randn(1, 1, 16), cache=layer.new_cache(1, 4))
    assert called == [step]


def test_a_subclass_that_says_what_its_rows_read_is_quick_again() -> None:
    layer_class: Any = type(attnzoo.create("mha", dim=16, num_heads=2))

    class Named(layer_class):  # type: ignore[misc]
        def plan(self, step: Any, heads: Any, inputs: Any) -> Any:
            return super().plan(step, heads, inputs)

        def row_slots(self, held: int, device: torch.device) -> Any:
            return super().row_slots(held, device)

    class Plain(layer_class):  # type: ignore[misc]
        """Nothing of its own."""

    for made, is_quick in ((Named, True), (Plain, True), (AttentionLayer, False)):
        layer = made(attnzoo.get_config("mha")(dim=16, num_heads=2))
        with torch.no_grad():
            found = layer.decode_row(torch.randn(1, 1, 16), layer.new_cache(1, 4))
        assert (found is not None) is is_quick


def test_steps_that_something_else_wants_are_not_quick() -> None:
    layer = attnzoo.create("mha", dim=16, num_heads=2)
    x = torch.randn(1, 1, 16)

    def is_quick(x: Any = x, cache: Any = None, of: Any = layer) -> bool:
        return of.decode_row(x, of.new_cache(x.shape[0], 8) if cache is None else cache) is not None

    assert not is_quick()
    with torch.no_grad():
        assert is_quick()
        assert not is_quick(torch.randn(1, 2, 16))
        assert not is_quick(x.double())
        assert not is_quick(torch.randn(1, 1, 15))
        assert not is_quick(cache={})
        assert not is_quick(cache=layer.new_cache(2, 8))
        assert not is_quick(cache=attnzoo.create("mha", dim=16, num_heads=2).new_cache(1, 8))
        assert not is_quick(cache=layer.new_cache(1, 8, dtype=torch.float64))
        with record(layer):
            assert not is_quick()
        with torch.autocast("cpu", torch.bfloat16):
            assert not is_quick()
        with FlopCounterMode(display=False):
            assert not is_quick()
        with torch.autograd.forward_ad.dual_level():
            assert not is_quick()
        ragged = layer.new_cache(2, 8)
        layer(torch.randn(2, 3, 16), key_padding=torch.arange(3) < torch.tensor([[0], [1]]), cache=ragged)
        assert not is_quick(torch.randn(2, 1, 16), cache=ragged)
        full = layer.new_cache(1, 3)
        layer(torch.randn(1, 3, 16), cache=full)
        assert not is_quick(cache=full)
        seen: list[bool] = []
        torch.func.vmap(lambda y: seen.append(is_quick(y)) or y)(torch.randn(2, 1, 1, 16))
        assert seen == [False]
    assert not is_quick(x.requires_grad_())
    with torch.inference_mode():
        assert is_quick(torch.randn(1, 1, 16))
    frozen = attnzoo.create("mha", dim=16, num_heads=2).requires_grad_(False)
    assert is_quick(torch.randn(1, 1, 16), of=frozen)
    assert not is_quick(torch.randn(1, 1, 16, requires_grad=True), of=frozen)
    half = attnzoo.create("mha", dim=16, num_heads=2).half().requires_grad_(False)
    assert not is_quick(torch.randn(1, 1, 16).half(), of=half)


def test_a_step_within_a_traced_program_is_not_quick() -> None:
    layer = attnzoo.create("mha", dim=16, num_heads=2).requires_grad_(False)
    x = torch.randn(1, 1, 16)
    seen: list[bool] = []

    def run(x: Tensor) -> Tensor:
        seen.append(layer.decode_row(x, layer.new_cache(1, 8)) is not None)
        return x

    make_fx(run)(x)
    torch.jit.trace(run, x, check_trace=False)
    run(x)
    assert seen == [False, False, True]


def test_a_step_that_fails_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of("mha-small", torch.float64)
    x = tokens(layer, 1, 12)
    cache = layer.new_cache(1, 12)
    with torch.no_grad():
        layer(x[:, :9], cache=cache)
        fork = cache.fork()
        with monkeypatch.context() as patch:
            patch.setattr("attnzoo.base.decoding.step.attend_slots", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                layer(x[:, 9:10], cache=cache)
        assert cache.length == cache.bound == 9
        assert all(bool((stream[:, :, 9:] == 0).all()) for stream in cache.streams.values())
        assert torch.equal(layer(x[:, 9:], cache=cache), layer(x[:, 9:], cache=fork))


def test_layers_and_caches_that_were_copied_together_stay_quick() -> None:
    layer = attnzoo.create("mha", dim=16, num_heads=2).requires_grad_(False)
    cache = layer.new_cache(1, 8)
    layer(torch.randn(1, 3, 16), cache=cache)
    twin, twin_cache = deepcopy((layer, cache))
    x = torch.randn(1, 1, 16)
    assert twin.decode_row(x, cache) is None
    found = twin.decode_row(x, twin_cache)
    assert found is not None
    assert torch.equal(found, layer(x, cache=cache))


def test_rings_that_have_come_round_are_read_in_order() -> None:
    layer = layer_of("rcmha-small", torch.float64)
    x = tokens(layer, 1, 300)
    cache = layer.new_cache(1, 300)
    with torch.no_grad():
        expected = layer(x)
        for t in range(300):
            found = layer.decode_row(x[:, t : t + 1], cache)
            assert found is not None
            assert_same(found, expected[:, t : t + 1])


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_latent_at_positions_of_its_own_is_expanded(size: int) -> None:
    layer = layer_of("lowrank_gqa, a latent", torch.float64)
    x = tokens(layer, 2, 9)
    caches = layer.new_cache(2, 9), layer.new_cache(2, 9)
    with torch.no_grad():
        for cache in caches:
            layer(x[:, :size], positions=torch.arange(size) + 1, cache=cache)
        assert layer.decode_row(x[:, 5:6], caches[0]) is None
        step_both(layer, x[:, 5:6], caches)
