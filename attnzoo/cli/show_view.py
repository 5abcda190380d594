"""What a variant is, for a terminal and for machines: its options as a layer, and those of a conversion to it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import attnzoo
from attnzoo.base.registry import variants
from attnzoo.cli import prose
from attnzoo.reporting.tables import Grid
from attnzoo.surgery import options
from attnzoo.surgery.hosts.attention_function import ReadPattern
from attnzoo.surgery.lowrank import factor
from attnzoo_kernels.errors import UnsupportedError


def summaries(pattern: str) -> dict[str, str]:
    """One line about each variant whose name matches a shell pattern."""
    names = attnzoo.list_variants(pattern)
    return {name: prose.words((variants[name].__doc__ or "").strip().splitlines()[0]) for name in names}


def about(variant: str) -> dict[str, Any]:
    """Everything that is shown, as plain data but for defaults."""
    config = attnzoo.get_config(variant)
    layer_class = variants[variant]
    layer = attnzoo.create(config.small())
    plan = layer.attend(layer.q_proj.weight.new_zeros(1, 96, layer.config.dim)).plan
    return {
        "variant": variant,
        "options": options.layer_options(config),
        "conversion": _conversion(variant),
        "dense_limit": layer_class.dense_limit,
        "causal": layer_class.causal_promise,
        "about": "\n\n".join(prose.plain(sys.modules[layer_class.__module__].__doc__ or "")),
        "small": {"config": json.loads(layer.config.to_json()), "density": plan.density},
        "picture": str(plan.layout),
    }


def _conversion(variant: str) -> dict[str, Any] | None:
    """The options of a conversion, or ``None`` where there is none."""
    try:
        return options.options_of(variant)
    except UnsupportedError:
        return None


def grids(found: dict[str, Any]) -> Iterator[Grid]:
    """The tables of options."""
    variant = found["variant"]
    config = attnzoo.get_config(variant)
    title = f"As a layer: attnzoo.create({variant!r}, dim=..., num_heads=..., option=value)"
    yield _grid(title, found["options"], prose.notes(config))
    if found["conversion"] is not None:
        title = f"In a pretrained model: attnzoo convert MODEL --to {variant}:option=value,... --out FOLDER"
        record = factor.Request if variant == "lowrank_gqa" else config
        # A pattern is no option of the layer: whether its caches evict.
        yield _grid(title, found["conversion"], {**prose.notes(ReadPattern), **prose.notes(record)})


def _grid(title: str, defaults: dict[str, Any], notes: dict[str, str]) -> Grid:
    rows = [(name, str(default), notes.get(name, "")) for name, default in defaults.items()]
    return Grid(("option", "default", "what it is"), rows or [("none", "", "")], title)


def limit(found: dict[str, Any]) -> str:
    """Where a variant is plain attention."""
    given = ", ".join(f"{name}={value}" for name, value in found["dense_limit"].items())
    return f"plain attention at: {given or 'its defaults'}"
