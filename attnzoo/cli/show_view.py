"""What a variant or a policy is, for a terminal and for machines: what each option does, and where its page is."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from fnmatch import fnmatchcase
from typing import Any

import attnzoo
from attnzoo.base.registry import variants
from attnzoo.cache.policies.protocol import policies
from attnzoo.cli import prose, screen
from attnzoo.evaluation.two_phase.specs import BY, CHOOSING_NOTES, KEEP, PolicyPart, offered
from attnzoo.factory import class_names
from attnzoo.reporting.choices import check_known, hint
from attnzoo.reporting.tables import Grid
from attnzoo.surgery import options
from attnzoo.surgery.hosts.attention_function import ReadPattern
from attnzoo.surgery.kinds.kind import default_of
from attnzoo.surgery.lowrank import factor
from attnzoo_kernels.errors import ConfigError, UnsupportedError


def summaries(pattern: str) -> dict[str, str]:
    """One line about each variant whose name matches a shell pattern."""
    names = _matching(attnzoo.list_variants(), pattern)
    return {name: prose.words((variants[name].__doc__ or "").strip().splitlines()[0]) for name in names}


def policy_summaries(pattern: str) -> dict[str, str]:
    """One line about each policy of KV caches that ``compare --policy`` takes and whose name matches a pattern."""
    names = _matching(sorted(offered()), pattern)
    return {name: prose.words((policies[name].__doc__ or "").strip().splitlines()[0]) for name in names}


def _matching(known: Sequence[str], pattern: str) -> list[str]:
    """The names that match a shell pattern.

    Raises:
        ConfigError: If none does.
    """
    found = [name for name in known if fnmatchcase(name, pattern)]
    if not found:
        near = hint(pattern, known)
        if not near and any(pattern in name for name in known):
            near = f"; did you mean '*{pattern}*'?"
        raise ConfigError(f"pattern: expected one that matches some of {', '.join(known)}, got {pattern!r}{near}")
    return found


def about(name: str) -> dict[str, Any]:
    """Everything that is shown of a variant or a policy, as plain data but for defaults.

    Raises:
        ConfigError: If neither has this name.
    """
    if name in offered():
        return _about_policy(name)
    check_known(name, [*sorted(variants), *sorted(offered())], "variants and policies", class_names())
    return _about_variant(name)


def _about_policy(name: str) -> dict[str, Any]:
    policy = policies[name]
    settings = {one.name: default_of(one) for one in fields(policy) if one.init and one.name != "full"}
    choosing = {"keep": KEEP, "heads": next(iter(BY)), "seed": 0} if PolicyPart(name, {}).takes_heads else {}
    return {
        "policy": name,
        "options": {**settings, **choosing},
        "about": _document(policy),
        "page": f"docs/policies/{name}.md",
    }


def _document(made: type) -> str:
    return "\n\n".join(prose.plain(sys.modules[made.__module__].__doc__ or ""))


def _about_variant(variant: str) -> dict[str, Any]:
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
        "about": _document(layer_class),
        "page": f"docs/variants/{variant}.md",
        "small": {"config": json.loads(layer.config.to_json()), "density": plan.density},
        "picture": str(plan.layout),
    }


def _conversion(variant: str) -> dict[str, Any] | None:
    """The options of a conversion, or ``None`` where there is none."""
    try:
        return options.options_of(variant)
    except UnsupportedError:
        return None


def show(found: dict[str, Any]) -> None:
    """Prints everything."""
    for paragraph in found["about"].split("\n\n"):
        screen.text(f"{paragraph}\n")
    for grid in grids(found):
        screen.table(grid)
        screen.text("")
    if "variant" in found:
        if found["conversion"] is None:
            screen.text("no conversion of a pretrained model")
        screen.text(limit(found))
        screen.text(f"what {found['variant']} reads at small sizes, 96 tokens:")
        screen.picture(found["picture"])
        screen.text("")
    screen.text(f"More about it, in the repository: {found['page']}")


def grids(found: dict[str, Any]) -> Iterator[Grid]:
    """The tables of options."""
    if "policy" in found:
        policy = found["policy"]
        title = f"Of a KV cache: attnzoo compare MODEL --policy {policy}:option=value,..."
        yield _grid(title, found["options"], {**CHOOSING_NOTES, **prose.notes(policies[policy])})
        return
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
