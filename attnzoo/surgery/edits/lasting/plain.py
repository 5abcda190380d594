"""Edits of heads as plain data and tensors, and back: what recipes hold, and files beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from attnzoo.surgery.edits.edit import HeadEdit
from attnzoo.surgery.edits.key_bias import KeyBias, SinkScaling
from attnzoo_kernels.errors import ConversionError

_PARTS: dict[str, type] = {"key_bias": KeyBias, "post": SinkScaling}
"""Fields of an edit that have fields themselves."""
_TENSOR = {"tensor": True}
"""Stands for a tensor that lies beside."""
_INFINITE = {"-inf": -math.inf}
"""Numbers that JSON has no word for."""


def to_plain(edit: HeadEdit) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An edit as data for JSON, and its tensors by name; its layer is its place's."""
    tensors: dict[str, Tensor] = {}
    data = _plain(edit, "", tensors)
    del data["layer"]
    head = edit.head
    data["head"] = {"slice": [head.start, head.stop, head.step]} if isinstance(head, slice) else _listed(head)
    return data, tensors


def from_plain(data: Mapping[str, Any], tensors: Mapping[str, Tensor], layer: int) -> HeadEdit:
    """The edit that :func:`to_plain` has written.

    Raises:
        ConversionError: If a tensor is missing, or a field is not known.
        ConfigError: If a field holds something else than an edit can have.
        ShapeError: If a tensor has another number of dimensions.
    """
    head = data.get("head")
    own: Any = slice(*head["slice"]) if isinstance(head, Mapping) else head
    return HeadEdit(**{**_read(HeadEdit, data, "", tensors), "layer": layer, "head": own})


def _listed(head: int | Sequence[int]) -> int | list[int]:
    return head if isinstance(head, int) else list(head)


def _plain(value: Any, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for field in fields(value):
        found = getattr(value, field.name)
        path = f"{name}{field.name}"
        if isinstance(found, Tensor):
            tensors[path] = found.detach()
            data[field.name] = _TENSOR
        elif field.name in _PARTS and found is not None:
            data[field.name] = _plain(found, f"{path}.", tensors)
        elif isinstance(found, float) and found == -math.inf:
            data[field.name] = "-inf"
        else:
            data[field.name] = found
    return data


def _read(kind: type, data: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    known = {field.name for field in fields(kind)}
    given: dict[str, Any] = {}
    for field, value in data.items():
        path = f"{name}{field}"
        if field not in known:
            raise ConversionError(f"recipe: {path}: expected one of {', '.join(sorted(known))}")
        if value == _TENSOR:
            if path not in tensors:
                raise ConversionError(f"recipe: {path}: expected a tensor beside the recipe, found none")
            given[field] = tensors[path]
        elif field in _PARTS and isinstance(value, Mapping):
            part = _PARTS[field]
            given[field] = part(**_read(part, value, f"{path}.", tensors))
        else:
            given[field] = _INFINITE.get(value, value) if isinstance(value, str) else value
    return given
