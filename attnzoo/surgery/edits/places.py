"""Where the outputs of a layer's heads go: the module that is called with all of them, joined.

Letters: B batch, T query tokens, C model width, H query heads, G KV heads, D width of a head's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from attnzoo.base.config import check_int
from attnzoo.surgery.hosts.families.known import block_of
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.hosts.weights import type_name
from attnzoo.surgery.lookalikes import refuse_unknown
from attnzoo.surgery.sites import find
from attnzoo_kernels.errors import ConfigError, ConversionError, UnsupportedError


@dataclass(frozen=True)
class HeadSite:
    """An attention block of a model, and where the outputs of its heads go.

    Attributes:
        layer: Its index among the model's attention blocks.
        path: The block's name in ``model.named_modules()``; of a family that is not known, that of ``o_proj``.
        o_proj: The name of the module that is called with ``[B, T, H * D]`` and gives ``[B, T, C]``.
        heads: Query heads H.
        kv_heads: KV heads G.
        head_dim: Width D of a head's output.
        site: The block, where its family is known.
    """

    layer: int
    path: str
    o_proj: str
    heads: int
    kv_heads: int
    head_dim: int
    site: Site | None = None


def sites(
    model: nn.Module, o_proj: str | None = None, *, heads: int | None = None, kv_heads: int | None = None
) -> tuple[HeadSite, ...]:
    """The attention blocks of a model, and where the outputs of their heads go.

    Args:
        model: The model.
        o_proj: A pattern with ``*`` for the names of the outputs' projections, for a model of no known family, such as
            ``"blocks.*.attn.out"``; each is an ``nn.Linear``, and a layer. Only outputs of heads can be edited then.
        heads: H, with a pattern; what the model's configuration calls ``num_attention_heads`` by default.
        kv_heads: G, with a pattern; ``num_key_value_heads`` by default, or H.

    Raises:
        ConfigError: If no block is known, or no module matches, or heads do not divide the projection's width.
        UnsupportedError: If a block hands the outputs of its heads to no module.
    """
    if o_proj is None:
        found = find(model)
        if not found:
            refuse_unknown(model)
        return tuple(place_of(model, site) for site in found)
    config: Any = getattr(model, "config", None)
    count = _count("heads", heads, getattr(config, "num_attention_heads", None))
    groups = _count("kv_heads", kv_heads, getattr(config, "num_key_value_heads", None) or count)
    if count % groups:
        raise ConfigError(f"kv_heads: expected a divisor of {count} heads, got {groups}")
    paths = [path for path, _ in model.named_modules() if fnmatchcase(path, o_proj)]
    if not paths:
        raise ConfigError(f"o_proj: expected a pattern for modules of the model, got {o_proj!r}, which matches none")
    return tuple(_named(model, layer, path, (count, groups)) for layer, path in enumerate(paths))


def place_of(model: nn.Module, site: Site) -> HeadSite:
    """Where the outputs of a known block's heads go.

    Raises:
        UnsupportedError: If to no module.
    """
    module = model.get_submodule(site.path)
    block = block_of(module)
    reason = why_no_place(module)
    if block.output_path is None or reason is not None:
        raise UnsupportedError(f"{site.path}: heads cannot be edited: {reason}", (str(reason),))
    outer = site.path.rpartition(".")[0] if block.output_outside else site.path
    path = f"{outer}.{block.output_path}" if outer else block.output_path
    try:
        model.get_submodule(path)
    except AttributeError as error:
        raise ConversionError(f"{site.path}: expected its output's projection at {path}, found nothing") from error
    return HeadSite(
        layer=site.layer,
        path=site.path,
        o_proj=path,
        heads=block.heads,
        kv_heads=block.kv_heads,
        head_dim=block.value_dim,
        site=site,
    )


def why_no_place(module: nn.Module) -> str | None:
    """Why the outputs of a block's heads cannot be reached; ``None`` if they can."""
    if block_of(module).output_path is not None:
        return None
    return (
        "it hands the outputs of its heads to a function, and calls no module with them; convert it first: "
        "surgery.convert(model, 'mha')"
    )


def check_sites(model: nn.Module, given: Sequence[HeadSite] | None) -> tuple[HeadSite, ...]:
    """The places that a caller has named, or all.

    Raises:
        ConfigError: If they are none, or not of this model.
        UnsupportedError: If two layers have one projection, whose calls would be taken for each other's.
    """
    names = {path for path, _ in model.named_modules(remove_duplicate=False)}
    for site in given or ():
        if not isinstance(site, HeadSite) or site.o_proj not in names:
            raise ConfigError(f"sites: expected what heads.sites(model) gives for this model, got {site!r}")
    found = sites(model) if given is None else tuple(given)
    first: dict[int, HeadSite] = {}
    for site in found:
        other = first.setdefault(id(model.get_submodule(site.o_proj)), site)
        if other is not site:
            raise UnsupportedError(
                f"model: expected an output's projection for each layer, got one for {other.o_proj} and {site.o_proj}"
            )
    return found


def _count(name: str, given: int | None, said: Any) -> int:
    count = said if given is None else given
    if count is None:
        raise ConfigError(f"{name}: expected a number, since the model's configuration says none, got None")
    check_int(name, count, 1)
    return int(count)


def _named(model: nn.Module, layer: int, path: str, counts: tuple[int, int]) -> HeadSite:
    """A projection that a pattern has found."""
    heads, kv_heads = counts
    module = model.get_submodule(path)
    width = getattr(module, "in_features", None)
    if not isinstance(width, int):
        raise ConfigError(f"o_proj: expected an nn.Linear at {path}, got {type_name(module)}")
    if width % heads:
        raise ConfigError(f"heads: expected a divisor of the width {width} of {path}, got {heads}")
    return HeadSite(layer=layer, path=path, o_proj=path, heads=heads, kv_heads=kv_heads, head_dim=width // heads)
