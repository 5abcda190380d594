"""What users do to any layer: they start it anew, replace its steps, hook its modules, and give it odd arguments."""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import pkgutil
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnzoo
import attnzoo.surgery
import attnzoo_kernels
from attnzoo.base import registry
from tests.attnzoo.cases import CASES, Case, assert_same, build, tokens

every_variant = pytest.mark.parametrize("case", CASES, ids=str)
every_name = pytest.mark.parametrize("name", attnzoo.list_variants())

STEPS = ("begin", "project", "remember", "plan", "operate", "combine")

# Options that give a variant weights of another kind.
MORE = [
    ("lowrank_gqa", {"latent_dim": 12, "bias": True}),
    ("moh", {"shared_heads": 2, "active_heads": 1}),
    ("moh", {"router": "norm", "shared_heads": 0, "active_heads": 2}),
    ("rcmha", {"rel": "learned", "conv_pos": "pre_proj", "bias": True}),
    ("rcmha", {"conv_init": "delta", "rel_init": "zero", "rotary": attnzoo.RotaryConfig()}),
]
CONFIGS = [
    *(pytest.param(case.config(), id=str(case)) for case in CASES),
    *(pytest.param(attnzoo.get_config(name, dim=32, num_heads=4, **options), id=f"{name}-{i}")
      for i, (name, options) in enumerate(MORE)),
]  # fmt: skip


def state(layer: nn.Module) -> dict[str, Tensor]:
    return dict([*layer.named_parameters(), *layer.named_buffers()])


# Weights


@pytest.mark.parametrize("config", CONFIGS)
def test_a_layer_given_memory_starts_as_one_that_is_built(config: attnzoo.AttentionConfig) -> None:
    layer_class = registry.variants[config.kind]
    with torch.device("meta"):
        empty = layer_class(config)
    empty.to_empty(device="cpu")
    with torch.no_grad():
        for value in state(empty).values():
            value.fill_(torch.nan)
    torch.manual_seed(3)
    empty.reset_parameters()
    after = torch.get_rng_state()
    torch.manual_seed(3)
    fresh = layer_class(config)
    assert torch.equal(after, torch.get_rng_state())
    assert state(empty).keys() == state(fresh).keys()
    for name, value in state(fresh).items():
        assert value.isfinite().all()
        assert torch.equal(state(empty)[name], value), name


def test_what_cannot_start_anew_is_refused_by_name_before_anything_changes() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

    layer = Case("moh", "small").layer()
    layer.v_proj = Packed()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(attnzoo.UnsupportedError, match=r"^v_proj: expected a module with reset_parameters, got Packed"):
        layer.reset_parameters()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


# Steps


def settings(layer: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls of every kind, each of one call of the layer."""
    x = tokens(layer, 2, 40)
    key_padding = torch.arange(40) < torch.tensor([[0], [9]])
    yield "eval", lambda: layer.eval()(x)
    yield "no grad", lambda: torch.no_grad()(layer)(x)
    yield "train", lambda: layer.train()(x)
    yield "padding", lambda: layer.eval()(x, key_padding=key_padding)
    if getattr(layer.config, "rel", None) != "learned":
        yield "positions", lambda: layer.eval()(x, torch.arange(40))
    yield "cache", lambda: layer.eval()(x, cache=layer.new_cache(2, 40))
    held = layer.new_cache(2, 41)
    layer.eval()(x, cache=held)
    yield "one more", lambda: layer.eval()(x[:, :1], cache=held)
    if layer.config.kind == "s2":
        yield "evict", lambda: layer.eval()(x, cache=layer.new_cache(2, 40, evict=True))
    if layer.config.kind in ("landmark", "longheads"):
        yield "offload", lambda: torch.no_grad()(layer.eval())(x, cache=layer.new_cache(2, 40, offload=True))
    if layer.config.kind == "landmark":
        marks = torch.arange(40) % 7 == 6
        yield "is_landmark", lambda: layer.train()(x, is_landmark=marks.expand(2, 40))


def counted(layer: Any, how: str) -> Counter[str]:
    """Counts the runs of each step from now on, of a subclass that overrides it or of the one layer."""
    runs: Counter[str] = Counter()

    def counting(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            runs[name] += 1
            return step(*arguments, **named)

        return run

    if how == "subclass":
        own = {name: counting(name, getattr(type(layer), name)) for name in STEPS}
        layer.__class__ = type("Overriding", (type(layer),), own)
    else:
        for name in STEPS:
            setattr(layer, name, counting(name, getattr(layer, name)))
    return runs


@pytest.mark.parametrize("how", ["subclass", "layer"])
@pytest.mark.parametrize(
    "config", [*CONFIGS, pytest.param(attnzoo.MoHConfig(dim=32, num_heads=4, shared_heads=2, active_heads=1,
                                                       compute="routed"), id="moh-apart")]
)  # fmt: skip
def test_every_announced_step_is_run_once_whoever_overrides_it(config: attnzoo.AttentionConfig, how: str) -> None:
    layer = build(config)
    wanted = dict.fromkeys(STEPS, 1)
    runs = counted(layer, how)
    for name, call in settings(layer):
        runs.clear()
        call()
        assert dict(runs) == wanted, name


@pytest.mark.parametrize("how", ["subclass", "instance"])
def test_an_overridden_step_has_whole_heads_and_what_it_gives_comes_out(how: str) -> None:
    """Where shared heads are computed apart, the layer's own steps hand each other packed rows."""
    shapes = []

    def halved(self: Any, inputs: Any, plan: Any) -> Tensor:
        out = attnzoo.MoHAttention.operate(self, inputs, plan)
        shapes.append(tuple(out.shape))
        return out / 2

    config = attnzoo.MoHConfig(dim=32, num_heads=4, shared_heads=2, active_heads=1, compute="routed")
    layer: Any = build(config)
    x = tokens(layer, 2, 40)
    plain = layer.attend(x)
    assert plain.plan.form.kind == "two_calls"
    assert plain.plan.form.packed
    if how == "subclass":
        layer.__class__ = type("Halved", (attnzoo.MoHAttention,), {"operate": halved})
    else:
        layer.operate = partial(halved, layer)
    assert_same(layer(x), plain.out / 2)
    assert shapes == [(2, 4, 40, 8)]


@every_variant
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_every_module_are_run_once_a_call(case: Case, register: str) -> None:
    layer = case.layer()
    runs: Counter[str] = Counter()
    for path, module in layer.named_modules():
        # A container is not called.
        if not isinstance(module, nn.ModuleDict):
            getattr(module, register)(lambda module, *_, path=path: runs.update([path]))
    layer(tokens(layer, 2, 40))
    called = [path for path, module in layer.named_modules() if not isinstance(module, nn.ModuleDict)]
    assert dict(runs) == dict.fromkeys(called, 1)


@every_name
def test_a_layer_takes_what_attend_takes(name: str) -> None:
    layer_class = registry.variants[name]
    forward, attend = (inspect.signature(f).parameters for f in (layer_class.forward, layer_class.attend))
    assert forward == attend


def test_landmarks_may_be_given_to_the_layer_itself() -> None:
    layer = Case("landmark", "small").layer().train()
    x, marks = tokens(layer, 2, 20), (torch.arange(20) % 7 == 6).expand(2, 20)
    assert torch.equal(layer(x, is_landmark=marks), layer.attend(x, is_landmark=marks).out)


# Arguments

ODD = {
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "jagged": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
    "sparse": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.to_mkldnn(),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ODD)
@every_name
def test_tensors_of_other_layouts_are_refused_by_name(name: str, kind: str) -> None:
    layer = Case(name, "small").layer()
    x = tokens(layer, 2, 8)
    plain = {
        "x": x,
        "context": x,
        "positions": torch.arange(8).expand(2, 8),
        "key_padding": torch.zeros(2, 8, dtype=torch.bool),
        "is_landmark": torch.zeros(2, 8, dtype=torch.bool),
    }
    for argument in set(plain) & set(inspect.signature(layer.attend).parameters):
        if kind == "mkldnn" and plain[argument].dtype != torch.float32:
            continue
        given = {"x": x, argument: ODD[kind](plain[argument])}
        with pytest.raises(TypeError, match=rf"^{argument}: expected a plain.*got ") as refusal:
            layer.train().attend(**given)
        assert ("key_padding" if "nested" in str(refusal.value) else "to_dense") in str(refusal.value)


WRONG = {bool: ("yes", 1, None), int: ("3", 2.0, True)}


@every_name
def test_an_argument_of_the_wrong_type_is_a_type_error_that_names_it(name: str) -> None:
    layer = Case(name, "small").layer()
    cache = layer.new_cache(2, 8)
    right: dict[str, Any] = {"batch": 2, "max_length": 8}
    hints = typing.get_type_hints(type(layer).new_cache)
    taken = inspect.signature(layer.new_cache).parameters
    checked = {argument: hints[argument] for argument in taken if hints[argument] in WRONG}
    assert {"batch", "max_length"} <= set(checked)
    for argument, kind in checked.items():
        for value in WRONG[kind]:
            with pytest.raises(TypeError, match=f"^{argument}: expected an? {kind.__name__}.*, got "):
                layer.new_cache(**{**right, argument: value})
    for value in ("float32", 32):
        with pytest.raises(TypeError, match=r"^dtype: expected a torch\.dtype.*, got "):
            layer.new_cache(2, 8, dtype=value)
    for method, argument in ((cache.crop, "length"), (cache.grow, "max_length")):
        for value in WRONG[int]:
            with pytest.raises(TypeError, match=f"^{argument}: expected an int.*, got "):
                method(value)
    for value in (1, [0, 1], None):
        with pytest.raises(TypeError, match=r"^index: expected "):
            cache.reorder(value)


# Configurations


@every_name
def test_a_configuration_is_had_by_name(name: str) -> None:
    config_class = attnzoo.get_config(name)
    assert isinstance(config_class, type)
    assert attnzoo.get_config(name, dim=32, num_heads=4) == config_class(dim=32, num_heads=4)
    with pytest.raises(attnzoo.ConfigError, match=r"num_haeds.*num_heads"):
        attnzoo.get_config(name, dim=32, num_haeds=4)
    with pytest.raises(attnzoo.ConfigError, match=r"^num_heads: expected a value"):
        attnzoo.get_config(name, dim=32)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_configuration_travels_in_a_checkpoint_that_is_read_safely(config: attnzoo.AttentionConfig) -> None:
    file = io.BytesIO()
    config = replace(config, rotary=attnzoo.RotaryConfig(dim=4))
    torch.save({"config": config.to_dict()}, file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    assert attnzoo.AttentionConfig.from_dict(read["config"]) == config


def public() -> Iterator[Any]:
    """Functions, classes and methods that are no module's own affair."""
    names = [info.name for info in pkgutil.walk_packages(attnzoo.__path__, "attnzoo.")]
    modules = [attnzoo_kernels, *map(importlib.import_module, (name for name in names if "__main__" not in name))]
    for module in modules:
        for name, found in vars(module).items():
            own = (getattr(found, "__module__", "") or "").split(".")[0] == module.__name__.split(".")[0]
            if name.startswith("_") or not own or not (inspect.isclass(found) or inspect.isfunction(found)):
                continue
            yield found
            for member, value in vars(found).items() if inspect.isclass(found) else ():
                plain = getattr(value, "fget", None) or getattr(value, "__func__", None) or value
                plain = getattr(plain, "func", plain)
                if inspect.isfunction(plain) and (not member.startswith("_") or member in ("__init__", "__call__")):
                    yield plain


def test_annotations_can_be_evaluated() -> None:
    """What checks types at run time, such as beartype, reads them."""
    found = list(public())
    assert len(found) > 300
    for one in found:
        typing.get_type_hints(one)


def test_protocols_can_be_checked() -> None:
    """What checks types at run time asks ``isinstance`` of everything that an annotation names."""
    protocols = [one for one in public() if inspect.isclass(one) and getattr(one, "_is_protocol", False)]
    assert protocols
    for protocol in protocols:
        assert not isinstance(None, protocol)
