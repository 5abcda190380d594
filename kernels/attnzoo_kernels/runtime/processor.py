"""Which class of CPU this is, and what it has instructions for: the one place that asks.

A class decides only what is quicker, never what is right: every path computes the same on every CPU. Whoever has to
know asks at each call and keeps no answer, so that a test can answer for another machine at :func:`_detected`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

CLASSES = ("avx2", "avx512", "amx", "other")


@dataclass(frozen=True)
class Processor:
    """A CPU, as far as the choice of a path goes by it.

    Attributes:
        name: One of :data:`CLASSES`; "amx" has AVX-512 too.
        multiplies_bf16: Whether bf16 products run on instructions of their own.
    """

    name: str
    multiplies_bf16: bool


@cache
def _detected() -> Processor:
    """This machine's, asked of torch once."""
    amx = torch.cpu._is_amx_tile_supported()
    bf16 = amx or torch.cpu._is_avx512_bf16_supported()
    if amx:
        return Processor("amx", bf16)
    if torch.cpu._is_avx512_supported():
        return Processor("avx512", bf16)
    return Processor("avx2" if torch.cpu._is_avx2_supported() else "other", bf16)


def cpu_class() -> str:
    """What the choice of a path goes by: "amx", "avx512", "avx2" or "other"."""
    return _detected().name


def multiplies_bf16() -> bool:
    """Whether bf16 products run on instructions of their own; they are many times slower than fp32 elsewhere."""
    return _detected().multiplies_bf16
