"""The laws of being a module that every variant obeys: copies, files, compilers, precisions, records, the registry."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import attnzoo
from attnzoo.base import registry
from tests.attnzoo.cases import CASES, Case, assert_same, build, tokens

every_variant = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Variants entered by a test are gone after it."""
    monkeypatch.setattr(registry, "variants", dict(registry.variants))
    yield


@every_variant
def test_copies_and_pickles_compute_the_same(case: Case) -> None:
    layer = case.layer()
    x = tokens(layer, 2, 40)
    out = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), out)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), out)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), out)


@every_variant
def test_a_copy_is_independent(case: Case) -> None:
    layer = case.layer()
    x = tokens(layer, 2, 40)
    out = layer(x)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.impl = "reference"
    assert torch.equal(layer(x), out)
    assert (twin(x) == 0).all()


@every_variant
def test_a_state_dict_is_all_there_is(case: Case) -> None:
    layer, other = case.layer(seed=0), case.layer(seed=1)
    x = tokens(layer, 2, 40)
    assert not torch.equal(other(x), layer(x))
    assert set(layer.state_dict()) == {name for name, _ in layer.named_parameters()}
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other(x), layer(x))


@every_variant
def test_projections_have_their_names(case: Case) -> None:
    layer = case.layer(bias=True)
    config = layer.config
    assert isinstance(layer.q_proj, nn.Linear)
    assert isinstance(layer.o_proj, nn.Linear)
    assert layer.q_proj.weight.shape == (config.num_heads * config.head_width, config.dim)
    assert layer.o_proj.weight.shape[0] == config.dim
    assert layer.q_proj.bias is not None


@every_variant
@pytest.mark.parametrize("assign", [False, True])
def test_a_layer_built_on_meta_is_filled_later(case: Case, assign: bool) -> None:
    layer = case.layer()
    x = tokens(layer, 2, 40)
    with torch.device("meta"):
        empty = build(case.config())
    assert empty(x.to("meta")).shape == x.shape
    if not assign:
        empty.to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict(), strict=True, assign=assign)
    assert torch.equal(empty(x), layer(x))


@every_variant
def test_configs_survive_json(case: Case) -> None:
    config = case.config(scale=0.3, bias=True, rotary=attnzoo.RotaryConfig(base=500.0, dim=4, interleaved=True))
    again = type(config).from_json(config.to_json())
    assert again == config
    assert type(again) is type(config)
    assert attnzoo.AttentionConfig.from_json(config.to_json()) == config
    assert {f.name for f in fields(config)} >= {f.name for f in fields(attnzoo.AttentionConfig)}
    stretched = attnzoo.RotaryScaling(
        kind="longrope", short_factor=(1.0, 1.5), long_factor=(2.0, 3.0), original_max_position_embeddings=64
    )
    scaled = case.config(rotary=attnzoo.RotaryConfig(dim=4, scaling=stretched))
    assert type(config).from_json(scaled.to_json()) == scaled
    unrotated = case.config(rotary=None)
    assert type(config).from_json(unrotated.to_json()) == unrotated
    with pytest.raises(ValueError, match="nonsense"):
        type(config).from_dict({**config.to_dict(), "nonsense": 1})
    with pytest.raises(ValueError, match="kind: expected"):
        type(config).from_dict({**config.to_dict(), "kind": "of_nobody"})
    with pytest.raises(ValueError, match="config: expected JSON"):
        type(config).from_json("{")
    with pytest.raises(AttributeError):
        config.dim = 3


COMPILERS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="no C++ compiler"),
        ],
    ),
]


COMPILED = ("s2", "moh", "landmark")
"""A pattern, routed heads and chosen blocks: what a program with gradients may have to hold; the rest is slow."""


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case.name in COMPILED and case.size == "small" else pytest.mark.slow)
        for case in CASES
    ],
    ids=str,
)
def test_compiled_is_eager(case: Case, compiler: str) -> None:
    layer = case.layer()
    x = tokens(layer, 2, 70).requires_grad_()
    parameters = [x, *layer.parameters()]
    expected = layer(x)
    torch.compiler.reset()
    out = torch.compile(layer, fullgraph=True, backend=compiler)(x)
    assert_same(out, expected)
    weight = tokens(layer, 2, 70, seed=1)
    grads, expected_grads = (torch.autograd.grad((y * weight).sum(), parameters) for y in (out, expected))
    for grad, same in zip(grads, expected_grads, strict=True):
        assert_same(grad, same)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(
            pytest.param(name, {}, marks=() if name in ("s2", "landmark") else pytest.mark.slow)
            for name in attnzoo.list_variants()
        ),
        ("rcmha", {"rel": "learned"}),
    ],
    ids=str,
)
def test_compiled_decoding_does_not_compile_every_token_anew(name: str, options: dict[str, Any]) -> None:
    layer = build(replace(attnzoo.get_config(name).small(), **options))
    x = tokens(layer, 2, 60)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with torch.no_grad():
        cache = layer.new_cache(2, 60)
        found = torch.cat([compiled(part, cache=cache) for part in x.split([20, *[1] * 40], 1)], 1)
        assert_same(found, layer(x))
    # Prefill, a step, a step of any length, and steps at which a chunk is complete or selection begins.
    assert counter.frame_count <= 6


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn])
def test_a_cache_of_values_that_cannot_be_read_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(attnzoo.ConfigError, match=r"dtype: expected one of torch\.float64"):
        Case("mha", "small").layer().new_cache(2, 8, dtype=dtype)


# What is compiled anew is decided before a backend sees it.
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [
        # Of these, one compilation for all lengths is in test_compiled_replay.py and test_compiled_lengths.py.
        pytest.param(name, marks=pytest.mark.slow if name in ("mha", "lowrank_gqa") else ())
        for name in attnzoo.list_variants()
    ],
)
def test_one_compilation_serves_padding_of_every_length(name: str, backend: str) -> None:
    layer = Case(name, "small").layer()
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    # One block or several is a difference to a compiler, as one of anything is.
    for length in (70, 129, 97):
        x = tokens(layer, 2, length)
        key_padding = torch.arange(length) < torch.tensor([[0], [length // 2]])
        with torch.no_grad():
            assert_same(compiled(x, key_padding=key_padding), layer(x, key_padding=key_padding))
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]


@every_variant
def test_checkpointing_recomputes_the_same_and_is_recorded_once(case: Case) -> None:
    # Recomputation stops at the last tensor that is needed: the last module must save one.
    model = nn.Sequential(case.layer(), nn.GELU())
    x = tokens(model[0], 2, 70).requires_grad_()
    expected = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    with attnzoo.record(model) as rec:
        out = checkpoint(model, x, use_reentrant=False)
        grads = torch.autograd.grad(out.square().sum(), [x, *model.parameters()])
    for grad, same in zip(grads, expected, strict=True):
        assert torch.equal(grad, same)
    assert [len(plans) for plans in rec.plans.values()] == [1]


@every_variant
def test_training_follows_inference(case: Case) -> None:
    layer = case.layer()
    x = tokens(layer, 2, 70)
    with torch.inference_mode():
        first = layer(x).clone()
    assert_same(layer(x), first)
    layer.train()
    with torch.inference_mode():
        second = layer(x).clone()
    out = layer(x)
    assert_same(out, second)
    # Landmark attention reads everything in training, and what it retrieves in evaluation.
    if case.name != "landmark":
        assert_same(out, first)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@every_variant
def test_autocast_computes_in_half_and_trains_in_full(case: Case) -> None:
    layer = case.layer()
    x = tokens(layer, 2, 70)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert_same(out, expected.bfloat16(), scale=4)
    out.float().square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@every_variant
def test_a_layer_in_half_is_near_the_one_in_full(case: Case) -> None:
    layer = case.layer()
    x = tokens(layer, 2, 70).bfloat16()
    half = copy.deepcopy(layer).bfloat16()
    # The full layer computes with the rounded weights, so that only the arithmetic differs.
    full = copy.deepcopy(half).double()
    assert_same(half(x), full(x.double()).bfloat16(), scale=4)
    cache = half.new_cache(2, 70)
    with torch.no_grad():
        parts = [half.attend(part, cache=cache).out for part in x.split(9, 1)]
    assert_same(torch.cat(parts, 1), full(x.double()).bfloat16(), scale=4)


@every_variant
def test_a_layer_drops_into_sequential(case: Case) -> None:
    layer = case.layer()
    x = tokens(layer, 2, 20)
    assert torch.equal(nn.Sequential(layer, nn.Identity())(x), layer(x))
    assert torch.equal(layer.attend(x).out, layer(x))


@every_variant
def test_a_record_holds_the_plans_of_its_model_alone(case: Case) -> None:
    model, other = nn.Sequential(case.layer(), case.layer(seed=1)), case.layer()
    x = tokens(model[0], 1, 40)
    with attnzoo.record(model) as rec:
        model(x)
        other(x)
    model(x)
    assert set(rec.plans) == {"0", "1"}
    for (plan,) in rec.plans.values():
        assert 0 < plan.density <= 1


@every_variant
def test_a_record_ends_with_an_exception_and_does_not_travel_with_copies(case: Case) -> None:
    model = nn.Sequential(case.layer())
    x = tokens(model[0], 1, 40)
    with pytest.raises(RuntimeError, match="stop"), attnzoo.record(model) as rec:
        raise RuntimeError("stop")
    model(x)
    assert not any(rec.plans.values())
    with attnzoo.record(model) as rec:
        copy.deepcopy(model)(x)
        pickle.loads(pickle.dumps(model))(x)
    assert not any(rec.plans.values())


@every_variant
def test_records_nest(case: Case) -> None:
    model = nn.Sequential(case.layer(), case.layer(seed=1))
    x = tokens(model[0], 1, 40)
    with attnzoo.record(model) as outer:
        with attnzoo.record(model[1]) as inner:
            model(x)
        model(x)
    assert {path: len(plans) for path, plans in outer.plans.items()} == {"0": 2, "1": 2}
    assert [len(plans) for plans in inner.plans.values()] == [1]
    assert outer.aux_loss.shape == ()


def test_a_class_statement_enters_the_zoo_and_the_fixture_restores_it(own_registry: None) -> None:
    @dataclass(frozen=True, kw_only=True)
    class ToyConfig(attnzoo.MHAConfig):
        """A variant of its own."""

    class ToyAttention(attnzoo.MHAAttention, name="toy_for_this_test"):
        """Plain attention by another name."""

        config_class = ToyConfig

    assert "toy_for_this_test" in attnzoo.list_variants()
    assert attnzoo.get_config("toy_for_this_test") is ToyConfig
    layer = attnzoo.create("toy_for_this_test", dim=16, num_heads=2)
    assert isinstance(layer, ToyAttention)
    assert layer(torch.randn(1, 5, 16)).shape == (1, 5, 16)
    with pytest.raises(ValueError, match="mha"):

        class Clash(attnzoo.MHAAttention, name="mha"):
            config_class = ToyConfig


def test_the_zoo_has_no_toys_of_other_tests() -> None:
    assert not [name for name in attnzoo.list_variants() if "toy" in name]


def test_unknown_names_and_options_are_refused_with_a_hint() -> None:
    with pytest.raises(ValueError, match="mha"):
        attnzoo.create("mah", dim=16, num_heads=2)
    with pytest.raises(ValueError, match="num_heads"):
        attnzoo.create("mha", dim=16, num_haeds=2)
    with pytest.raises(ValueError, match="dim"):
        attnzoo.create("mha", num_heads=2)
    with pytest.raises((TypeError, ValueError), match="variant"):
        attnzoo.create(3)
    assert attnzoo.list_variants("lo*") == [n for n in attnzoo.list_variants() if n.startswith("lo")]


def base_errors(name: str, value: Any, **changes: Any) -> Any:
    return pytest.param({"dim": 16, "num_heads": 4, **changes, name: value}, name, id=f"{name}={value}")


@pytest.mark.parametrize("name", attnzoo.list_variants())
@pytest.mark.parametrize(
    ("options", "field"),
    [
        base_errors("dim", 0),
        base_errors("dim", 16.0),
        base_errors("dim", True),
        base_errors("num_heads", -1),
        base_errors("num_heads", 5),
        base_errors("num_kv_heads", 3),
        base_errors("num_kv_heads", 8),
        base_errors("num_kv_heads", 0),
        base_errors("head_dim", 0),
        base_errors("head_dim", 257),
        base_errors("bias", 1),
        base_errors("causal", None),
        base_errors("rotary", 10000.0),
        base_errors("rotary", attnzoo.RotaryConfig(dim=6)),
        base_errors("scale", float("nan")),
        base_errors("scale", "big"),
    ],
)
def test_a_bad_option_is_refused_by_name(name: str, options: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}[.:a-z]*.* expected .*got "):
        attnzoo.create(name, **options)


@every_variant
def test_a_description_shows_the_config(case: Case) -> None:
    text = repr(case.layer())
    assert "num_heads=4" in text or "num_heads: 4" in text


def test_no_global_state_is_touched() -> None:
    before = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state(), torch.get_num_threads())
    for case in CASES:
        layer = case.layer()
        layer(tokens(layer, 1, 20))
    after: tuple[Any, bool, Tensor, int] = (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_rng_state(),
        torch.get_num_threads(),
    )
    assert torch.equal(before[2], after[2])
    assert before[:2] == after[:2]
    assert before[3] == after[3]
