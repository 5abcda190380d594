"""Which models' heads can be scored: scores are of plain causal attention, and one table holds all layers."""

from __future__ import annotations

from typing import Any

from attnzoo.surgery.hosts.attention_function import pattern_of
from attnzoo.surgery.hosts.block import Need
from attnzoo.surgery.hosts.families.known import block_of
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.lookalikes import refuse_unknown
from attnzoo.surgery.sites import find, shared_blocks
from attnzoo_kernels.errors import UnsupportedError


def scored_sites(model: Any) -> list[Site]:
    """The attention blocks of a model, each of which reads all that came before.

    Raises:
        ConfigError: If no block is known.
        UnsupportedError: If a block reads less, is applied several times, or has other heads than the first one.
    """
    sites = find(model)
    if not sites:
        refuse_unknown(model)
    if shared := shared_blocks(model):
        raise UnsupportedError(f"model: expected a block for each layer, got one for {' and '.join(shared[0])}")
    for site in sites:
        module = model.get_submodule(site.path)
        if pattern_of(module) is not None:
            raise UnsupportedError(
                f"model: {site.path}: expected a block that reads everything, got one that was converted to read less; "
                "undo that conversion first"
            )
        if site.window is not None:
            raise UnsupportedError(
                f"model: {site.path}: expected a block that reads everything, but it has a sliding window of its own "
                f"({site.window} tokens)"
            )
        if reasons := block_of(module).reasons[Need.READING]:
            raise UnsupportedError(f"model: {site.path}: expected a block that reads everything, but {reasons[0]}")
        if (site.heads, site.kv_heads) != (sites[0].heads, sites[0].kv_heads):
            raise UnsupportedError(
                f"model: {site.path}: expected {sites[0].heads} query and {sites[0].kv_heads} KV heads as in "
                f"{sites[0].path}, got {site.heads} and {site.kv_heads}"
            )
    return list(sites)
