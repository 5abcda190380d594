"""Scratch memory that outlives a call, one set a thread.

Fresh megabyte-sized tensors fault their pages in at every call, which costs more than the arithmetic on them.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

CAP_BYTES = 64 << 20
"""A request above this size is served by a fresh tensor and forgotten."""


class _Shelf(threading.local):
    def __init__(self) -> None:
        self.kept: dict[tuple[str, torch.dtype], Tensor] = {}


_shelf = _Shelf()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor, valid until the same thread asks for the same name again; never to be returned to users.

    Args:
        name: What it is for; two tensors alive at once need two names.
        shape: Its shape.
        dtype: Its dtype.
        device: Its device; only CPU memory is kept.
    """
    size = math.prod(shape)
    if device.type != "cpu" or size * dtype.itemsize > CAP_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    kept = _shelf.kept.get((name, dtype))
    if kept is None or kept.numel() < size:
        # An inference tensor kept here could not serve a later training step.
        with torch.inference_mode(False):
            kept = torch.empty(size, dtype=dtype, device=device)
        _shelf.kept[(name, dtype)] = kept
    return kept[:size].view(shape)


def clear_scratch() -> None:
    """Frees what the calling thread keeps."""
    _shelf.kept.clear()
