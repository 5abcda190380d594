"""The families of hosts that are known, asked through one interface.

To add one: a file ``hosts/families/<family>.py`` with a ``FAMILY``, and its place in ``FAMILIES``.
"""

from __future__ import annotations

from torch import nn

from attnzoo.surgery.hosts.block import AttentionBlock, Family, ReplacementModule
from attnzoo.surgery.hosts.families import fused, glm, gptj, llama, opt, own, torch_mha
from attnzoo.surgery.hosts.families.bidirectional import encoders, timm_like
from attnzoo.surgery.hosts.projections import Projections
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.hosts.weights import type_name
from attnzoo_kernels.errors import ConversionError

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    *fused.FAMILIES,
    glm.FAMILY,
    gptj.FAMILY,
    opt.FAMILY,
    encoders.FAMILY,
    own.FAMILY,
    timm_like.FAMILY,
    torch_mha.FAMILY,
)

_T5 = "it adds a learned bias for each distance to its scores, which needs an operation that does"

REFUSED = {
    "BloomAttention": "it adds a bias for each distance to its scores (alibi), which needs an operation that does",
    "FalconAttention": "it does not attend through the attention interface of transformers, which conversions need",
    "GPTJAttention": "it attends through the attention interface of transformers from 5.24 on",
    "T5Attention": _T5,
    "T5LayerSelfAttention": _T5,
    "T5LayerCrossAttention": _T5,
    "MptAttention": "it adds a bias for each distance to its scores (alibi), which needs an operation that does",
}
"""Attention classes of which it is known why no family is built for them."""

WITHOUT_TRANSFORMERS = frozenset({own.HOST, timm_like.HOST, torch_mha.HOST})
"""Families whose models need not be of transformers."""


def is_block(module: nn.Module) -> bool:
    """Whether a module is an attention block of a known family, or a replacement in its place."""
    return isinstance(module, ReplacementModule) or any(family.matches(module) for family in FAMILIES)


def family_of(module: nn.Module) -> Family:
    """The family of an attention block, or of the block whose place it has taken.

    Raises:
        ConversionError: If none knows it.
    """
    for family in FAMILIES:
        if family.matches(module) or (isinstance(module, ReplacementModule) and module.family == family.name):
            return family
    raise ConversionError(f"block: expected one of {', '.join(known_classes())}, got {type_name(module)}")


def block_of(module: nn.Module) -> AttentionBlock:
    """What is known about an attention block.

    Raises:
        ConversionError: If no family knows it, or a projection does not say its sizes.
    """
    return module.block() if isinstance(module, ReplacementModule) else family_of(module).block(module)


def site_of(path: str, layer: int, module: nn.Module) -> Site:
    """Where an attention block is, and its sizes; to be looked at, its projections need not be plain.

    Raises:
        ConversionError: If a projection does not say its sizes.
    """
    try:
        block = block_of(module)
    except ConversionError as error:
        raise ConversionError(f"{path}.{error}") from error
    name = family_of(module).name
    return Site(
        path=path,
        host=name,
        layer=layer,
        heads=block.heads,
        kv_heads=block.kv_heads,
        head_dim=block.head_dim,
        width=block.width,
        window=block.window,
    )


def weights_of(module: nn.Module) -> Projections:
    """The weights of an attention block by role, by reference.

    Raises:
        ConversionError: If a projection is no plain product.
    """
    return block_of(module).weights()


def with_weights(module: nn.Module, projections: Projections) -> nn.Module:
    """An attention block of the same class with other weights; the original is untouched.

    Raises:
        ConversionError: If the class cannot hold others.
    """
    make = family_of(module).with_weights
    if make is None:
        raise ConversionError(f"block: expected a class that can hold other weights, got {type_name(module)}")
    return make(module, projections)


def known_classes() -> tuple[str, ...]:
    """The names of all classes that are known."""
    return tuple(name for family in FAMILIES for name in family.classes)
