"""What models are converted to, what each conversion guarantees, and what stands beside it as a control.

A control is the model as it was where each token reads itself, the first one, and as many others at random as the
conversion reads; or the conversion with the choice taken away: heads at random, or averaged ones.

Letters: T tokens, H query heads, G KV heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnzoo.surgery import Site

KINDS = ("window", "s2", "latent", "moh", "longheads")
BLOCK = 16

Visible = Callable[[int], Tensor]
"""How many tokens each of T rows reads, int64 ``[T]``."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """One row.

    Attributes:
        kind: One of ``KINDS``.
        name: Of the row.
        variant: Of the conversion.
        options: Of the conversion.
        guarantees: Why the model must stay the same function: a certificate. Empty where it need not.
        reads: Tokens that each row reads, where a control reads as many at random.
        random_heads: Whether the control chooses heads at random.
        averaged: KV heads of a control with averaged heads that remembers as much.
    """

    kind: str
    name: str
    variant: str
    options: dict[str, Any] = field(default_factory=dict)
    guarantees: str = ""
    reads: Visible | None = None
    random_heads: bool = False
    averaged: int | None = None

    @property
    def calibrated(self) -> bool:
        """Whether it reads a calibration text."""
        return self.options.get("method") == "latent"


def conversions(site: Site, context: int) -> list[Conversion]:
    """All rows for a model, a certificate before the rows of its kind.

    Args:
        site: Its sizes, any block's.
        context: Tokens of a window in training.
    """
    return [
        *_windows(context),
        *_shards(context),
        *_latents(site),
        *_heads(site),
        *_chunks(context),
    ]


def _windows(context: int) -> list[Conversion]:
    found = [
        Conversion(
            kind="window",
            name=f"window {context}",
            variant="mha",
            options={"window": context, "block_size": BLOCK},
            guarantees="a window as long as the text",
        )
    ]
    for width in (32, 8):
        found.append(
            Conversion(
                kind="window",
                name=f"window {width}, sink 1",
                variant="mha",
                options={"window": width, "sink": 1, "block_size": BLOCK},
                reads=lambda tokens, width=width: _up_to(tokens, width + 1),
            )
        )
    return found


def _shards(context: int) -> list[Conversion]:
    every = {"block_size": BLOCK, "local_blocks": context // BLOCK, "vert_stride": 2, "sink_blocks": 1}
    few = {"block_size": BLOCK, "local_blocks": 2, "vert_stride": 4, "sink_blocks": 1}
    return [
        Conversion(
            kind="s2",
            name=f"s2, {context // BLOCK} near blocks",
            variant="s2",
            options=every,
            guarantees="near blocks as long as the text",
        ),
        Conversion(kind="s2", name="s2, 2 near blocks, stride 4", variant="s2", options=few, reads=_in_shards),
    ]


def _latents(site: Site) -> list[Conversion]:
    full = 2 * site.kv_heads * site.head_dim
    found = [
        Conversion(
            kind="latent",
            name=f"latent {full}",
            variant="lowrank_gqa",
            options={"method": "latent", "latent_dim": full},
            guarantees="as wide as keys and values",
        )
    ]
    # Where heads are as many as KV heads, half of the values are as many as the model is wide, and nothing is lost.
    for share in (2, 4):
        found.append(
            Conversion(
                kind="latent",
                name=f"latent {full // share}",
                variant="lowrank_gqa",
                options={"method": "latent", "latent_dim": full // share},
                averaged=site.kv_heads // share,
            )
        )
    return found


def _heads(site: Site) -> list[Conversion]:
    shared = site.heads // 2
    found = [
        Conversion(
            kind="moh", name=f"moh, {site.heads} of {site.heads} heads", variant="moh", guarantees="all heads active"
        )
    ]
    for left_out in (1, 2):
        active = site.heads - shared - left_out
        found.append(
            Conversion(
                kind="moh",
                name=f"moh, {site.heads - left_out} of {site.heads} heads",
                variant="moh",
                options={"router": "norm", "shared_heads": shared, "active_heads": active},
                random_heads=True,
            )
        )
    return found


def _chunks(context: int) -> list[Conversion]:
    def options(length: int) -> dict[str, Any]:
        return {"chunk_size": BLOCK, "attention_length": length}

    found = [
        Conversion(
            kind="longheads",
            name=f"longheads {context}",
            variant="longheads",
            options=options(context),
            guarantees="all chunks of the text are read",
        )
    ]
    for length in (context // 2, context // 4):
        found.append(
            Conversion(
                kind="longheads",
                name=f"longheads {length}",
                variant="longheads",
                options=options(length),
                reads=lambda tokens, length=length: _up_to(tokens, length),
            )
        )
    return found


def _up_to(tokens: int, most: int) -> Tensor:
    return (torch.arange(tokens, device="cpu") + 1).clamp(max=most)


def _in_shards(tokens: int) -> Tensor:
    """The first block, two near ones, and every fourth of the others, a head's mean."""
    place = torch.arange(tokens, device="cpu")
    own = place // BLOCK
    within = place % BLOCK + 1
    far = (own - 2).clamp(min=0).double() * BLOCK / 4
    sink = torch.where(own > 1, float(BLOCK), 0.0)
    near = own.clamp(max=1) * BLOCK + within
    return (near + far + sink).round().long().minimum(place + 1)


def at_random(reads: Visible, heads: int, tokens: int, seed: int) -> Tensor:
    """Which keys each head's rows read: itself, the first, and others at random, bool ``[1, H, T, T]``.

    Args:
        reads: How many each row reads.
        heads: H.
        tokens: T.
        seed: Of the draw.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    chance = torch.rand(heads, tokens, tokens, generator=generator, device="cpu")
    place = torch.arange(tokens, device="cpu")
    chance[:, :, 0] = 2.0
    chance[:, place, place] = 3.0
    chance.masked_fill_(place > place[:, None], -1.0)
    rank = chance.argsort(-1, descending=True).argsort(-1)
    return (rank < reads(tokens)[:, None]).unsqueeze(0) & (place <= place[:, None])
