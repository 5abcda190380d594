"""What can be done with a model's attention blocks, site by site, and why not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from attnzoo.reporting.tables import Grid, lines
from attnzoo.reporting.warn import warn_caller
from attnzoo.surgery import sites
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.kinds import kind_for
from attnzoo.surgery.kinds.head_edits import VARIANT as HEADS
from attnzoo.surgery.kinds.policy import VARIANT as POLICY
from attnzoo.surgery.kinds.reading import READ_VARIANTS
from attnzoo.surgery.kinds.weights import VARIANT as LOW_RANK
from attnzoo.surgery.lookalikes import known_near, lookalikes, unknown
from attnzoo.surgery.replacements import REPLACEMENTS
from attnzoo.surgery.report import WIDTH
from attnzoo_kernels.errors import UnsupportedError

VARIANTS = (
    *READ_VARIANTS,
    POLICY,
    LOW_RANK,
    *(name for name in REPLACEMENTS if name not in READ_VARIANTS),
    HEADS,
)
"""All that a block can be converted to."""


@dataclass(frozen=True, eq=False)
class Inspection:
    """What :func:`inspect` found; ``print`` it for a table.

    Attributes:
        sites: The attention blocks that are known.
        reasons: For each of them, by variant, why it cannot be converted to it; nothing where it can.
        unknown: How many modules look like attention and are not known, by class and place.
    """

    sites: tuple[Site, ...]
    reasons: tuple[Mapping[str, tuple[str, ...]], ...]
    unknown: Mapping[tuple[str, str], int]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return {
            "sites": [
                {**asdict(site), "conversions": {variant: list(why) for variant, why in reasons.items()}}
                for site, reasons in zip(self.sites, self.reasons, strict=True)
            ],
            "unknown": [
                {"class": name, "place": place, "count": count} for (name, place), count in self.unknown.items()
            ],
        }

    def grid(self) -> Grid:
        """The sites as a table."""
        rows = []
        for site, reasons in zip(self.sites, self.reasons, strict=True):
            sizes = (site.heads, site.kv_heads, site.head_dim, site.width)
            window = "-" if site.window is None else str(site.window)
            can = [variant for variant, why in reasons.items() if not why]
            rows.append((site.path, site.host, *(str(x) for x in sizes), window, ", ".join(can) or "nothing"))
        head = ("path", "host", "heads", "KV heads", "head width", "width", "own window", "can become")
        return Grid(head, rows, title=f"{len(rows)} attention blocks", numbers=frozenset({2, 3, 4, 5, 6}))

    def notes(self) -> list[str]:
        """Why what cannot be done cannot be, each once, and what is not known."""
        found: dict[tuple[str, str], int] = {}
        for reasons in self.reasons:
            for variant, why in reasons.items():
                for reason in why:
                    found[variant, reason] = found.get((variant, reason), 0) + 1
        said = [
            f"{variant}, {count} of {len(self.sites)} blocks: {reason}" for (variant, reason), count in found.items()
        ]
        return [*said, *unknown(self.unknown)]

    def __str__(self) -> str:
        return "\n".join([*(line for line, _ in lines(self.grid(), WIDTH)), *self.notes()])


def find(model: nn.Module) -> tuple[Site, ...]:
    """The attention blocks of a model that can be converted, in order.

    A block that the model applies several times is one site. What looks like attention and is not known is named in a
    warning; :func:`attnzoo.surgery.inspect` says what can be done with each block that is.

    Args:
        model: The model.
    """
    found = lookalikes(model)
    if found:
        warn_caller(f"model: {'; '.join(unknown(found))}; {known_near(found)}")
    return sites.find(model)


def inspect(model: nn.Module) -> Inspection:
    """Says what each attention block of a model can be converted to, and why not to the rest. Nothing is changed.

    Whether an option fits, such as a number of heads, is for :func:`attnzoo.surgery.convert` to say.

    Args:
        model: The model.
    """
    known = sites.find(model)
    reasons = []
    for site in known:
        module = model.get_submodule(site.path)
        reasons.append({variant: _reasons(module, site, variant) for variant in VARIANTS})
    return Inspection(known, tuple(reasons), lookalikes(model))


def _reasons(module: nn.Module, site: Site, variant: str) -> tuple[str, ...]:
    """Why a block cannot be converted to a variant."""
    try:
        kind = kind_for(variant, {}, {site.host})
    except UnsupportedError as error:
        return error.reasons or (str(error),)
    return kind.reasons_here(module, site, variant)
