"""What a saved model's files hold, checked against what loading will expect before anything is written.

The model that loading will build is built here first, without memory: from the configuration that will be written, with
the recipe applied. What is to be written must have its names, shapes and kinds.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.base.weights import PROJECTIONS
from attnzoo.reporting.warn import warn_caller
from attnzoo.surgery.hosts import checkpoint
from attnzoo.surgery.hosts.block import ReplacementModule
from attnzoo.surgery.hosts.weights import FLOATING, why_not_plain
from attnzoo.surgery.kinds import REPLACING, kind_of
from attnzoo.surgery.recipes import Recipe, apply_recipe, beside_of
from attnzoo.surgery.sites import find, share_blocks, shared_blocks
from attnzoo_kernels.errors import ConversionError, UnsupportedError


def is_ordinary(model: Any, recipe: Recipe) -> bool:
    """Whether a converted model is a checkpoint of its host still: other weights alone, equal KV heads everywhere."""
    sites = find(model)
    heads = {site.kv_heads for site in sites}
    kinds = [kind_of(entry) for entry in recipe]
    plain = all(kind is not None and kind.keeps_class for kind in kinds)
    # Where a host has no number of KV heads, a block with fewer is no block of its own class.
    plain = plain and not any(isinstance(model.get_submodule(site.path), ReplacementModule) for site in sites)
    said = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    return plain and heads == {said} and not shared_blocks(model)


def settings_of(model: Any) -> Any:
    """A copy of a model's configuration that says what the model is: its class, its dtype, what is tied."""
    settings = copy.deepcopy(model.config)
    settings.architectures = [_class_name(model)]
    settings.dtype = str(_widest(model)).removeprefix("torch.")
    if hasattr(settings, "quantization_config"):
        # Nothing but plain weights is written.
        del settings.quantization_config
    inner = model.get_input_embeddings()
    outer = model.get_output_embeddings()
    if inner is not None and outer is not None:
        settings.tie_word_embeddings = getattr(outer, "weight", None) is getattr(inner, "weight", None)
    return settings


def _class_name(model: Any) -> str:
    # Sharding replaces a module's class by one with this prefix.
    return type(model).__name__.removeprefix("FSDP")


def _widest(model: nn.Module) -> torch.dtype:
    """The dtype that holds every weight: a reader that knows one dtype alone must not round any."""
    found = [p.dtype for p in model.parameters() if p.dtype in FLOATING]
    return reduce(torch.promote_types, found, found[0] if found else torch.float32)


def whole_tensors(model: Any, recipe: Recipe, settings: Any) -> dict[str, Tensor]:
    """The tensors of a self-contained folder, each once, on the CPU.

    Raises:
        ConversionError: If loading would expect others.
    """
    expected = model_to_load(model, recipe, settings)
    own = model.state_dict(keep_vars=True)
    wanted = expected.state_dict()
    _check(own, wanted)
    twice = {name: names[0] for names in checkpoint.shared_names(expected) for name in names[1:]}
    for name, first in twice.items():
        if own[name] is not own[first] and not torch.equal(own[name], own[first]):
            raise ConversionError(f"model: {name}: expected the same tensor as {first}, which loading makes it")
    return apart({name: x for name, x in own.items() if name not in twice})


def model_to_load(model: Any, recipe: Recipe, settings: Any) -> Any:
    """The model that loading will build, without memory.

    Raises:
        ConversionError: If it is another than this one.
    """
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        config = json.loads(settings.to_json_string(use_diff=True))
        expected = checkpoint.model_of(config, dtype=torch.float32)
        try:
            share_blocks(expected, shared_blocks(model))
            apply_recipe(expected, recipe, beside_of(model, recipe))
        except (ConversionError, UnsupportedError) as error:
            made = type(expected).__name__
            raise ConversionError(
                f"model: expected a {made}, which loading makes, got a {_class_name(model)}: {error}"
            ) from error
    if type(expected).__name__ != _class_name(model):
        _refuse_class(model, expected)
    return expected


def _refuse_class(model: Any, expected: Any) -> None:
    odd = sorted(set(model.state_dict()) ^ set(expected.state_dict()))
    if odd:
        raise ConversionError(
            f"model: expected a {type(expected).__name__}, which loading makes, got a {_class_name(model)}, which "
            f"differs in {odd[0]!r}{_advice(odd)}"
        )
    warn_caller(f"model: a {_class_name(model)} is saved; loading will make a {type(expected).__name__} of it")


def adapter_tensors(model: Any, recipe: Recipe, changed: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of changed blocks, each once, on the CPU.

    Raises:
        ConversionError: If loading would expect others.
    """
    own = {name: x for name, x in once(model).items() if name.startswith(changed)} if changed else {}
    if getattr(model, "config", None) is None:
        # Nothing says how to build such a model: that its blocks' names fit, loading finds out.
        wrapped = sorted(name for name in own if _advice([name]))
        _check(own, {name: x for name, x in own.items() if name not in wrapped})
        return apart(own)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        try:
            expected: Any = type(model)(copy.deepcopy(model.config))
        except TypeError as error:
            raise ConversionError(f"model: {_class_name(model)} cannot be built to compare names: {error}") from error
        share_blocks(expected, shared_blocks(model))
        apply_recipe(expected, recipe, beside_of(model, recipe))
    wanted = {name: x for name, x in once(expected).items() if name.startswith(changed)} if changed else {}
    _check(own, wanted)
    return apart(own)


def named_now(tensors: dict[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """A folder's tensors by today's names: once replacements had their host's projections inside their layer."""
    paths = [entry.get("path") for entry in recipe if entry.get("kind") == REPLACING.word]
    names = {f"{path}.layer.{role}.": f"{path}.{role}." for path in paths for role in PROJECTIONS}
    found = {}
    for name, x in tensors.items():
        old = next((old for old in names if name.startswith(old)), "")
        found[names.get(old, "") + name.removeprefix(old)] = x
    return found


def once(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors by their first names."""
    seen: set[int] = set()
    tensors = {}
    for name, x in model.state_dict(keep_vars=True).items():
        if id(x) not in seen:
            seen.add(id(x))
            tensors[name] = x
    return tensors


def _check(own: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Raises unless tensors are what loading will expect."""
    odd = sorted(set(own) ^ set(wanted))
    if odd:
        what = "has" if odd[0] in own else "lacks"
        raise ConversionError(f"model: it {what} {odd[0]!r}, otherwise than loading will expect{_advice(odd)}")
    for name, x in own.items():
        reason = why_not_plain(x, floating=wanted[name].is_floating_point())
        if reason is not None:
            raise ConversionError(f"model: {name}: expected a plain tensor to write, got one that is {reason}; {_HERE}")
        if x.shape != wanted[name].shape:
            raise ConversionError(f"model: {name}: expected {list(wanted[name].shape)}, got {list(x.shape)}")


def check_shapes(written: Mapping[str, tuple[int, ...]], expected: nn.Module, *, but: set[str]) -> None:
    """Raises unless tensors of these shapes are what loading will expect.

    Args:
        written: Shapes by name.
        expected: The model that loading will build.
        but: Its names that need not be written.

    Raises:
        ConversionError: If one is missing, too many or of another shape.
    """
    wanted = {name: tuple(x.shape) for name, x in expected.state_dict().items() if name not in but}
    odd = sorted(name for name in written.keys() | wanted.keys() if written.get(name) != wanted.get(name))
    if odd:
        raise ConversionError(
            f"model: {odd[0]!r}: loading will expect {wanted.get(odd[0])}, and what was to be written is "
            f"{written.get(odd[0])}"
        )


_HERE = "load, gather or dequantise it first"


def _advice(names: Iterable[str]) -> str:
    if any(part in name for name in names for part in ("lora_", "base_layer", "adapter", "parametrizations")):
        return "; merge or remove what wraps its modules first (PEFT: merge_and_unload())"
    return ""


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as files take them: on the CPU, contiguous, and no two in the same memory."""
    seen: set[int] = set()
    found = {}
    for name, x in tensors.items():
        own = x.detach().cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        found[name] = own.clone() if place in seen else own
        seen.add(place)
    return found


def write_config(settings: Any, folder: Path, *, ordinary: bool) -> None:
    """Writes a configuration, under a type that transformers does not know unless the model is an ordinary checkpoint.

    Raises:
        ConversionError: If the host refuses to write it.
    """
    try:
        settings.save_pretrained(folder)
    except ValueError as error:
        raise ConversionError(f"model.config: {' '.join(str(error).split())}") from error
    if ordinary:
        return
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["model_type"] = checkpoint.type_of_converted(config["model_type"])
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
