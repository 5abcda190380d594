"""The kinds that are known, and which of them converts to a variant.

To add one: a class here, and its place in ``KINDS``; the first that takes a variant converts to it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from attnzoo.surgery.hosts.families.bidirectional.timm_like import HOST as TIMM
from attnzoo.surgery.hosts.families.own import HOST as OWN
from attnzoo.surgery.hosts.families.torch_mha import HOST as TORCH
from attnzoo.surgery.kinds.folded_heads import FoldedHeads
from attnzoo.surgery.kinds.head_edits import HeadEdits
from attnzoo.surgery.kinds.kind import Kind
from attnzoo.surgery.kinds.own_layers import OWN_KINDS, own_kind
from attnzoo.surgery.kinds.policy import Remembering
from attnzoo.surgery.kinds.reading import READ_VARIANTS, Reading
from attnzoo.surgery.kinds.replacing import Replacing
from attnzoo.surgery.kinds.torch_modules import TorchLayers, TorchReading
from attnzoo.surgery.kinds.weights import Latents, Weights
from attnzoo_kernels.errors import ConfigError

HEAD_KINDS = (FoldedHeads(), HeadEdits())
REPLACING = Replacing()
TORCH_KINDS = (TorchLayers(), TorchReading())
KINDS: tuple[Kind, ...] = (
    Reading(),
    Remembering(),
    Latents(),
    Weights(),
    *OWN_KINDS,
    *TORCH_KINDS,
    *HEAD_KINDS,
    REPLACING,
)


def kind_for(variant: str, options: dict[str, Any], hosts: Collection[str] = ()) -> Kind:
    """The kind that converts to a variant with these options.

    Args:
        variant: Its name.
        options: Of the variant.
        hosts: The families of the sites, as far as they are known.

    Raises:
        ConfigError: If blocks that are converted otherwise than others are to be converted at once with these.
    """
    # Heads are edited alike wherever they are.
    edits = next((kind for kind in HEAD_KINDS if kind.takes(variant, options)), None)
    if edits is not None:
        return edits
    apart = next((host for host in (OWN, TIMM, TORCH) if host in hosts), None)
    if apart is not None and len(hosts) > 1:
        others = ", ".join(sorted(set(hosts) - {apart}))
        raise ConfigError(
            f"where: expected sites of {apart!r} or of others, got both, {apart} and {others}; convert them one "
            f"after the other (where=lambda site: site.host == {apart!r})"
        )
    if apart == OWN:
        return own_kind(variant)
    if apart == TIMM and variant in READ_VARIANTS:
        # There is no interface by which such a module could be told what to read.
        return REPLACING
    if apart == TORCH:
        return TORCH_KINDS[variant not in TORCH_KINDS[0].variants]
    return next(kind for kind in KINDS if kind.takes(variant, options))


def kind_of(entry: dict[str, Any]) -> Kind | None:
    """The kind of an entry of a recipe, or ``None`` where its word is none of theirs."""
    return next((kind for kind in KINDS if kind.word == entry.get("kind")), None)
