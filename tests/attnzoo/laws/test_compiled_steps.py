"""Compiled decoding steps: no plan, a few programs for all lengths, and what a step without a compiler says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import attnzoo
from attnzoo.base.decoding.compiled import options_of
from attnzoo.variants.s2.layer import S2Attention
from attnzoo_kernels import Slots
from tests.attnzoo.cases import Case, assert_same, build, tokens

STEPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("mha", {}),
    ("mha", {"window": 9, "sink": 2}),
    ("s2", {"num_dense_heads": 1, "sink_blocks": 1}),
    ("lowrank_gqa", {}),
    ("lowrank_gqa", {"latent_dim": None}),
    ("moh", {}),
    ("moh", {"compute": "dense", "window": 9}),
    ("rcmha", {}),
    ("rcmha", {"rel": "learned", "max_distance": 40}),
    ("rcmha", {"conv_pos": "pre_proj", "conv_share": "per_head", "rel": None}),
    ("longheads", {"select": "block", "query_block": 4}),
    ("longheads", {"num_kv_heads": 2, "group_select": True, "chunk_rep": "mean_key"}),
    ("landmark", {}),
    ("landmark", {"landmark_positions": False, "gate_mix": 0.5}),
    ("landmark", {"mode": "soft"}),
)
QUICK = (2,)


def layer_of(name: str, options: dict[str, Any]) -> Any:
    return Case(name, "small").layer(**options)


def targets(counter: CompileCounterWithBackend) -> set[str]:
    """What the programs call."""
    return {str(node.target) for graph in counter.graphs for node in graph.graph.nodes}


@pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(*case, marks=[] if n in QUICK else [pytest.mark.slow]) for n, case in enumerate(STEPS)],
)
@torch.no_grad()
def test_decoding_steps_are_few_programs_and_make_no_plan(name: str, options: dict[str, Any]) -> None:
    layer = layer_of(name, options)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = tokens(layer, 2, 50)
    caches = layer.new_cache(2, 80), layer.new_cache(2, 80)
    for cache in caches:
        layer(x[:, :5], cache=cache)
    for t in range(5, 50):
        found = compiled(x[:, t : t + 1], cache=caches[0])
        assert_same(found, layer.attend(x[:, t : t + 1], cache=caches[1]).out)
    assert caches[0].length == caches[1].length == 50
    for name, values in caches[0].streams.items():
        assert_same(values, caches[1].streams[name])
    # The first program is for its length alone, the second for all. A block's border may be asked for once, and
    # a window for each token that it leaves between itself and its sink at first.
    assert counter.frame_count <= 3 + (options.get("window") is not None) * (1 + options.get("sink", 0))
    assert not any("bsa" in call for call in targets(counter))


@pytest.mark.slow
@torch.no_grad()
def test_every_variant_compiles_its_default_step_without_a_plan() -> None:
    for name in attnzoo.list_variants():
        layer = build(attnzoo.get_config(name)(dim=32, num_heads=4))
        torch.compiler.reset()
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        x = tokens(layer, 1, 76)
        caches = layer.new_cache(1, 80), layer.new_cache(1, 80)
        for cache in caches:
            layer(x[:, :70], cache=cache)
        for t in range(70, 76):
            found = compiled(x[:, t : t + 1], cache=caches[0])
            assert_same(found, layer.attend(x[:, t : t + 1], cache=caches[1]).out)
        assert not any("bsa" in call for call in targets(counter)), name


def test_with_gradients_wanted_the_steps_of_a_call_are_compiled() -> None:
    layer = layer_of("mha", {})
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = tokens(layer, 2, 10)
    caches = layer.new_cache(2, 20), layer.new_cache(2, 20)
    for cache in caches:
        layer(x[:, :9], cache=cache)
    assert_same(compiled(x[:, 9:], cache=caches[0]), layer.attend(x[:, 9:], cache=caches[1]).out)
    assert any("bsa" in call for call in targets(counter))


@torch.no_grad()
def test_latents_behind_positions_that_were_given_are_rotated_by_them() -> None:
    layer = layer_of("lowrank_gqa", {})
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = tokens(layer, 2, 12)
    caches = layer.new_cache(2, 20), layer.new_cache(2, 20)
    for cache in caches:
        layer(x[:, :11], positions=torch.arange(3, 14), cache=cache)
    assert_same(compiled(x[:, 11:], cache=caches[0]), layer.attend(x[:, 11:], cache=caches[1]).out)


# What is asked before a plan is left out, without a compiler.


@pytest.fixture
def _compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def may(layer: Any, cache: Any, dtype: torch.dtype = torch.float32) -> bool:
    with torch.no_grad():
        found: bool = layer.may_compile_row(torch.zeros(1, 1, 32, dtype=dtype), cache)
    return found


@pytest.mark.usefixtures("_compiling")
def test_a_plan_is_made_where_a_hidden_step_would_say_something_else() -> None:
    for name in attnzoo.list_variants():
        layer = layer_of(name, {})
        cache = layer.new_cache(1, 9)
        assert may(layer, cache), name
        layer.impl = "reference"
        assert not may(layer, cache), name
        layer.impl = "auto"
        if name != "mha":
            with torch.autocast("cpu"):
                assert not may(layer, cache), name
    for name in ("longheads", "landmark"):
        layer = layer_of(name, {})
        assert not may(layer, layer.new_cache(1, 9, offload=True))
        assert not may(layer, layer.new_cache(1, 9), torch.bfloat16)
        published = layer_of(name, {"official_quirks": True})
        assert not may(published, published.new_cache(1, 9))
    s2 = layer_of("s2", {})
    assert not may(s2, s2.new_cache(1, 9, evict=True))
    rcmha = layer_of("rcmha", {})
    placed = rcmha.new_cache(1, 9)
    rcmha(torch.zeros(1, 2, 32), positions=torch.tensor([4, 6]), cache=placed)
    assert not may(rcmha, placed)
    latent = layer_of("lowrank_gqa", {"bias": True})
    assert not may(latent, latent.new_cache(1, 9))
    hooked = layer_of("lowrank_gqa", {})
    hooked.kv_up.register_forward_hook(lambda *_: None)
    assert not may(hooked, hooked.new_cache(1, 9))
    many = layer_of("longheads", {"begin": 400, "chunk_size": 8})
    cache = many.new_cache(1, 500)
    assert may(many, cache)
    cache.length = 32 * 8
    assert not may(many, cache)
    cache.length = 400
    assert may(many, cache)


@pytest.mark.usefixtures("_compiling")
def test_hooks_of_ones_own_are_not_compiled_as_those_of_the_class_before() -> None:
    class Own(S2Attention):
        def row_slots(self, held: int, device: torch.device) -> Slots:
            return Slots(((held - 1, held),))

    layer = Own(layer_of("s2", {}).config)
    assert not may(layer, layer.new_cache(1, 9))


@dataclass(frozen=True, kw_only=True)
class OddConfig(attnzoo.get_config("s2")):  # type: ignore[misc]
    """A configuration whose text is that of no registered one."""

    what: Any = field(default_factory=object)


def test_a_configuration_is_handed_on_as_text_that_gives_it_again() -> None:
    for name in attnzoo.list_variants():
        config = attnzoo.get_config(name).small()
        text = options_of(config)
        assert text is not None
        assert type(config).from_json(text) == config
    assert options_of(OddConfig(dim=32, num_heads=4)) is None
    assert options_of(OddConfig(dim=32, num_heads=4, what=3)) is None


@torch.no_grad()
def test_the_operator_is_what_torch_takes_it_for() -> None:
    layer = layer_of("s2", {})
    q, k, v = (torch.randn(2, 4, n, 8) for n in (1, 41, 41))
    arguments = ("s2", [q, k, v], 41, layer.row_options, 8, [0.0, 4.0, 0.5])
    torch.library.opcheck(torch.ops.attnzoo.row.default, arguments, test_utils=("test_schema", "test_faketensor"))
    made: Tensor = torch.ops.attnzoo.row(*arguments)
    assert made.shape == (2, 4, 1, 8)
