"""Sizes of tiles by architecture, pass, width and dtype: a table that an offline tuner writes, no search while running.

Nothing here depends on lengths, batch or heads, so that a new length never compiles anything.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Literal, NamedTuple

Pass = Literal["forward", "decode", "query", "key"]
PASSES: tuple[Pass, ...] = ("forward", "decode", "query", "key")
WIDTHS = (32, 64, 128, 256)
"""Padded widths of the tables."""


class Tiles(NamedTuple):
    """The most rows and keys of a tile, warps and stages of a program, and the form of the forward loop."""

    rows: int
    keys: int
    warps: int
    stages: int
    form: str = "plain"


def padded(width: int) -> int:
    """The width of a tile that holds ``width`` channels: a power of two from 16; 0 for none."""
    return 0 if width == 0 else max(16, 1 << (width - 1).bit_length())


@cache
def table(architecture: str) -> dict[str, Tiles]:
    """The table of an architecture, such as "sm_90" or "gfx942"; that of "default" where it has none."""
    every = json.loads(files("attnzoo_kernels._triton").joinpath("tiles.json").read_text("utf-8"))
    return {key: Tiles(*value) for key, value in every.get(architecture, every["default"]).items()}


def tiles_for(architecture: str, of: Pass, width: int, size: int) -> Tiles:
    """The tiles of a pass for padded widths up to 256 and values of ``size`` bytes."""
    return table(architecture)[f"{of}/{max(width, 32)}/{min(max(size, 2), 4)}"]


@cache
def architecture_of(device_index: int) -> str:
    """The table's name for a CUDA or ROCm device."""
    import torch

    properties = torch.cuda.get_device_properties(device_index)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).partition(":")[0]
    return _nvidia(properties.major, properties.minor)


def _nvidia(major: int, minor: int) -> str:
    # Consumer chips of any generation have 99 KiB of shared memory and no wgmma.
    if major in (9, 10):
        return f"sm_{major}0"
    return "sm_80" if (major, minor) == (8, 0) else "sm_89"
