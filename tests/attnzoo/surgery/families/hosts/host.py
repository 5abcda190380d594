"""What the laws of ``test_conformance.py`` know of a class of hosts.

Letters: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

from attnzoo import surgery
from attnzoo.reporting.versions import TRANSFORMERS, release

FIRST = TRANSFORMERS[0]
"""The oldest version of transformers that hosts are built with."""
VOCAB = 61
HEADS = 4
KV_HEADS = 2
WIDTH = 8

CELLS = (
    "mha",
    "window",
    "s2",
    "policy",
    "mean",
    "expand",
    "commuting",
    "latent",
    "moh",
    "longheads",
    "landmark",
    "rcmha",
)
"""What a host is converted to: what it reads, what it remembers, other weights, and layers in the places of blocks."""

WEIGHTS = ("mean", "expand", "commuting", "latent")


def everywhere(site: surgery.Site) -> bool:
    """Takes every site."""
    return True


@dataclass(frozen=True, kw_only=True)
class Host:
    """A class of hosts.

    Attributes:
        name: Of the class, as users know it.
        make: Builds a tiny one in fp64, of which nothing is computed in fp32.
        attention: The name of its attention class.
        refused: Cells that cannot be, and a piece of what the refusal says.
        at_call: Cells that the first call refuses, which alone says what is asked of them; likewise.
        anew: Cells whose layers are another function there, though they begin as the host elsewhere.
        options: Of a cell, where it needs more than elsewhere.
        sides: Of padding.
        generates: Whether it has transformers' ``generate``.
        pictures: Whether it is given 16 patches of pictures; else ids.
        of_transformers: Whether it is saved whole, and called through an attention interface.
        projects: Whether its projections are modules, which adapters may wrap.
        where: Which of its sites are converted.
    """

    name: str
    make: Callable[[], Any]
    attention: str
    refused: Mapping[str, str] = field(default_factory=dict)
    at_call: Mapping[str, str] = field(default_factory=dict)
    anew: tuple[str, ...] = ()
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sides: tuple[str, ...] = ("left", "right")
    generates: bool = True
    pictures: bool = False
    of_transformers: bool = True
    projects: bool = True
    where: Callable[[surgery.Site], bool] = everywhere

    def works(self, cell: str) -> bool:
        """Whether it can be converted so; "replaced" is a layer of plain attention in a block's place."""
        if cell == "replaced":
            return self.of_transformers and "mha" not in self.refused
        return cell not in self.refused and cell not in self.at_call

    def inputs(self, batch: int, tokens: int, seed: int = 0) -> dict[str, Tensor]:
        """Arguments of a call: ids ``[B, T]``, or pictures of 16 patches."""
        generator = torch.Generator().manual_seed(seed)
        if self.pictures:
            return {"pixel_values": torch.randn(batch, 1, 12, 12, generator=generator, dtype=torch.float64)}
        return {"input_ids": torch.randint(1, VOCAB, (batch, tokens), generator=generator)}

    def calibration(self) -> list[dict[str, Tensor]]:
        """Texts, or pictures, of more tokens than a tiny host is wide."""
        return [self.inputs(2, 40, seed=100 + batch) for batch in range(3)]


class Hosts(dict[str, Host]):
    """Classes of hosts by name."""

    def add(
        self, name: str, attention: str, refused: Mapping[str, str] | None = None, *, since: str = FIRST, **more: Any
    ) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
        """Registers a function that builds a tiny host, with versions of transformers from ``since`` on."""

        def register(make: Callable[[], Any]) -> Callable[[], Any]:
            if release(transformers.__version__) >= release(since):
                self[name] = Host(name=name, make=make, refused=refused or {}, attention=attention, **more)
            return make

        return register


def in_single(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Arguments of a call of a model in fp32."""
    return {name: x.float() if x.is_floating_point() else x for name, x in given.items()}


def said(model: Any, given: Mapping[str, Tensor], **more: Any) -> Tensor:
    """What a model says of each token, with its graph: logits, or hidden states."""
    out = model(**given, **more)
    if isinstance(out, Tensor):
        return out
    found: Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return found
