"""Conversions of torch's own multi-head attention: a module round the very same weights, with a variant inside.

There is no interface by which such a module could be told what to read, so that it is replaced in every case. Where the
variant has no weights of its own an adapter stores none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from attnzoo.factory import get_config
from attnzoo.reporting.choices import check_known
from attnzoo.reporting.warn import silent, warn_caller
from attnzoo.surgery.hosts.block import Need
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.hosts.weights import type_name
from attnzoo.surgery.kinds.kind import Kind, Order
from attnzoo.surgery.kinds.reading import READ_DEFAULTS
from attnzoo.surgery.kinds.replacing import options_in_place
from attnzoo.surgery.replacements import REPLACEMENTS, spec
from attnzoo.surgery.report import SiteReport
from attnzoo.surgery.transaction import Change
from attnzoo.torch_mha.inside import why_no_context
from attnzoo.torch_mha.module import MultiheadAttention
from attnzoo_kernels.errors import AttnzooError, ConversionError, UnsupportedError

_WEIGHTLESS = ("mha", "s2", "longheads")
"""Variants without weights of their own."""

_REFUSED = {
    "landmark": "it inserts tokens at the input of a model, and needs a decoder of transformers",
    "lowrank_gqa": (
        "torch's module has one key head for each query head, and no other projections: fewer, or a latent, needs a "
        "layer of attnzoo's own in its place"
    ),
    "policy": "torch's module has no cache, which a policy needs",
}
"""Variants that modules cannot be converted to, and why."""


class TorchModules(Kind):
    """Modules with a variant inside, in the places of torch's; chosen by what stands at the sites.

    Attributes:
        variants: Which it converts to.
    """

    need = Need.REPLACING
    variants: ClassVar[tuple[str, ...]]

    def takes(self, variant: str, options: dict[str, Any]) -> bool:
        """False: of other hosts the same variants are converted to otherwise."""
        return False

    def options(self, variant: str) -> dict[str, Any]:
        """The options of a variant, by name, with their defaults; ``None`` leaves what the module has."""
        return options_in_place(variant, dropout=None, causal=None)

    def reasons(self, module: nn.Module, site: Site, variant: str) -> tuple[str, ...]:
        """As the module says it; some variants are not for torch's modules."""
        refused = (_REFUSED[variant],) if variant in _REFUSED else ()
        return (*refused, *super().reasons(module, site, variant))

    def prepare(self, order: Order) -> list[Change]:
        """Modules for sites."""
        if order.variant not in _REFUSED:
            get_config(order.variant)
        self.refuse(order.model, order.sites, order.variant)
        order.refuse_calibration()
        for name in order.options:
            check_known(name, self.options(order.variant), f"options for {order.variant!r}")
        found = REPLACEMENTS.get(order.variant)
        defaults = READ_DEFAULTS.get(order.variant)
        with spec.own_random_numbers(order.model):
            changes = []
            for site in order.sites:
                given = found.defaults(site) if defaults is None and found is not None else defaults
                changes.append(self._change(order.model, site, order.variant, {**(given or {}), **order.options}))
        self._warn(changes)
        return changes

    def _change(self, model: nn.Module, site: Site, variant: str, options: dict[str, Any]) -> Change:
        old = model.get_submodule(site.path)
        try:
            with silent():
                given = {name: value for name, value in options.items() if name != "causal" or value is not None}
                new = MultiheadAttention.around(old, variant, **given)
        except AttnzooError as error:
            raise type(error)(f"{site.path}: {error}") from error
        _refuse_other_tokens(model, site, old, new)
        if variant in REPLACEMENTS:
            REPLACEMENTS[variant].start(new.layer)
        trainable = any(x.requires_grad for x in old.parameters())
        for parameter in new.layer.parameters():
            parameter.requires_grad_(trainable)
        entry = {"path": site.path, "kind": self.word, "variant": variant, "options": options}
        return Change(SiteReport(site, 0, 0), entry, module=new)

    def _warn(self, changes: Sequence[Change]) -> None:
        """Says of new weights what they lose."""
        modules = [change.module for change in changes if isinstance(change.module, MultiheadAttention)]
        new = [module for module in modules if module.variant not in READ_DEFAULTS]
        for message in dict.fromkeys(REPLACEMENTS[module.variant].warn(module.layer.config) for module in new):
            if message is not None:
                warn_caller(message)

    def rebuild(self, model: nn.Module, site: Site, entry: dict[str, Any], beside: Mapping[str, Tensor]) -> Change:
        """The module that an entry of a recipe describes."""
        self.refuse(model, [site], entry["variant"], weights_come=True)
        with spec.own_random_numbers(model):
            return self._change(model, site, entry["variant"], dict(entry["options"]))

    def current(self, module: nn.Module, entry: dict[str, Any]) -> dict[str, Any]:
        """The entry, once it is sure that its module stands.

        Raises:
            ConversionError: If it does not.
        """
        if not isinstance(module, MultiheadAttention):
            raise ConversionError(
                f"model: {entry['path']}: expected the module by {entry['variant']!r} that was put there, got a "
                f"{type_name(module)}"
            )
        return entry


class TorchReading(TorchModules):
    """Variants that change what is read, and no weight."""

    word = "torch-read"
    changes_weights = False
    variants = _WEIGHTLESS


class TorchLayers(TorchModules):
    """Variants that have weights of their own beside torch's."""

    word = "torch-layer"
    variants = ("moh", "rcmha")


def _refuse_other_tokens(model: nn.Module, site: Site, old: nn.Module, new: MultiheadAttention) -> None:
    """Raises where it is known that a module reads other tokens than its own, and a variant cannot.

    Raises:
        UnsupportedError: If so.
    """
    parent = model.get_submodule(site.path.rpartition(".")[0])
    if not isinstance(parent, nn.TransformerDecoderLayer) or parent.multihead_attn is not old or new.is_plain:
        return
    why = why_no_context(new.layer)
    if why is not None:
        reason = f"it reads the encoder's tokens, and {why}"
        raise UnsupportedError(
            f"{site.path}: cannot be converted: {reason}; where=lambda site: 'multihead_attn' not in site.path leaves "
            "such modules out",
            (reason,),
        )
