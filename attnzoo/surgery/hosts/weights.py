"""The gate before a block is replaced: its projections must be plain products with weights that are here.

A replacement is built from what a weight says about itself: its values, dtype and device. Of a weight that is
offloaded, packed, sharded or computed from others these say something else, and the result would be garbage without a
word. Conversions of what is read do not ask: they leave the modules and their weights alone.

Weights that come from files must fit a model's own: by name, shape and kind.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from attnzoo_kernels.errors import ConversionError, UnsupportedError

T = TypeVar("T")

CONV1D = "transformers.pytorch_utils.Conv1D"
"""A product whose weight is stored ``[in, out]``, as GPT-2 has it."""

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of weights: anything narrower is a code that another library must read."""


def reasons_against(projections: Mapping[str, Any]) -> tuple[str, ...]:
    """Why projections of a block, by their names, cannot be replaced; empty if they can."""
    found: dict[str, list[str]] = {}
    for role, child in projections.items():
        reason = _reason(child)
        if reason is not None:
            found.setdefault(reason, []).append(role)
    wanted = "expected an nn.Linear with a plain floating weight"
    return tuple(f"{', '.join(roles)}: {wanted}, got {reason}" for reason, roles in found.items())


def check_embedding(model: Any) -> None:
    """Raises unless the weight of a model's embedding can be read, for tokens that start as its mean.

    Raises:
        UnsupportedError: If it cannot.
    """
    inner = model.get_input_embeddings()
    reason = why_not_plain(inner.weight)
    if reason is not None:
        raise UnsupportedError(
            f"embedding: expected a plain floating weight, got {type_name(inner)} whose weight is {reason}; "
            f"{_advice(inner, inner.weight)}"
        )


def _reason(child: Any) -> str | None:
    """What is in the way of one projection, and what to do."""
    is_transposed = is_conv1d(child)
    if not isinstance(child, nn.Linear) and not is_transposed:
        advice = "quantise and wrap after converting (PEFT: merge_and_unload() first)"
        return f"{type_name(child)}; {advice}"
    for name in ("weight", "bias"):
        x = getattr(child, name)
        if name == "bias" and x is None:
            continue
        reason = why_not_plain(x)
        if reason is not None:
            return f"{type_name(child)} whose {name} is {reason}; {_advice(child, x)}"
        if child._parameters.get(name) is None:
            return f"{type_name(child)} whose {name} is computed from other tensors; {_PERMANENT}"
    if not is_transposed and type(child).forward is not nn.Linear.forward:
        return f"{type_name(child)}, whose forward is its own; replace it by an nn.Linear that computes the same"
    return None


def is_conv1d(child: object) -> bool:
    """Whether a module is the transposed product of transformers itself, by name, so that nothing is imported."""
    return type_name(child) == CONV1D


_PERMANENT = (
    "make it a parameter first (torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove, "
    "torch.nn.utils.remove_weight_norm)"
)
_OFFLOADED = "offloaded by accelerate"


def why_not_plain(x: Any, *, floating: bool = True) -> str | None:
    """What a tensor is instead of a plain one whose values are here; ``None`` if it is one.

    Args:
        x: The tensor.
        floating: Whether it must be of a dtype that weights have.
    """
    if not isinstance(x, Tensor):
        return f"a {type_name(x)}"
    if x.is_meta:
        return "on the meta device: its values are not here"
    if floating and (x.dtype not in FLOATING or x.is_quantized):
        return f"{x.dtype} ({type_name(x)})" if type(x) not in _PLAIN else f"{x.dtype}"
    if type(x) not in _PLAIN:
        return f"a {type_name(x)}"
    if x.layout is not torch.strided:
        return f"{x.layout}"
    return None


_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def _advice(child: nn.Module, x: Any) -> str:
    if isinstance(x, Tensor) and x.is_meta:
        if hasattr(child, "_hf_hook"):
            return f"it is {_OFFLOADED}: load the model without offloading, convert it, and dispatch it then"
        return "load the weights first"
    return "convert the model before quantising or sharding it"


def type_name(x: Any) -> str:
    """A type's name with its module's, so that two of one name are told apart."""
    return f"{type(x).__module__}.{type(x).__qualname__}"


def check_fit(own: Mapping[str, Tensor], tensors: Mapping[str, Any]) -> None:
    """Raises unless tensors, or what says their shapes and dtypes, can take the places of a model's own.

    Raises:
        ConversionError: If one is of another shape, or no plain floating weight.
    """
    for name, x in tensors.items():
        if tuple(x.shape) != tuple(own[name].shape):
            raise ConversionError(f"weights: {name}: expected {list(own[name].shape)}, got {list(x.shape)}")
        if own[name].is_floating_point() and x.dtype not in FLOATING:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
            raise ConversionError(f"weights: {name}: expected {names}, got {x.dtype}; quantised weights are not read")


def named_as(model: Any, own: Iterable[str], tensors: Mapping[str, T]) -> dict[str, T]:
    """Tensors by the model's own names, without those that its class ignores, as transformers reads them."""
    names = set(own)
    prefix = model.base_model_prefix
    # Buffers that older versions stored, and what the class lists.
    ignored = [
        *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
        r"rotary_emb\.inv_freq",
        r"(^|\.)position_ids$",
    ]
    found = {}
    renamed = _renaming(model) if set(tensors) - names else str
    for name, x in tensors.items():
        if name not in names:
            name = next((own for own in (renamed(name), renamed(f"{prefix}.{name}")) if own in names), name)
        longer = f"{prefix}.{name}"
        if name not in names and longer in names and longer not in tensors:
            found[longer] = x
        elif name in names or not any(re.search(pattern, name) for pattern in ignored):
            found[name] = x
    return found


def _renaming(model: Any) -> Callable[[str], str]:
    """What gives a tensor of a file its name of now, where transformers has changed names."""
    if importlib.util.find_spec("transformers.conversion_mapping") is None:
        return str
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    steps = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]

    def rename(name: str) -> str:
        for step in steps:
            name = str(step.rename_source_key(name)[0])
        return name

    return rename
