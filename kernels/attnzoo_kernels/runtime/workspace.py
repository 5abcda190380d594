"""Scratch memory that outlives a call, one set a thread.

Fresh megabyte-sized tensors fault their pages in at every call, which costs more than the arithmetic on them.
"""

from __future__ import annotations

import math
import threading
import weakref

import torch
from torch import Tensor

from attnzoo_kernels.runtime import store

CAP_BYTES = 64 << 20
"""A request above this size is served by a fresh tensor and forgotten."""

MOST_BYTES = 256 << 20
"""What a thread keeps; beyond it everything is forgotten and begun anew."""


class _Kept(dict[tuple[str, torch.dtype], Tensor]):
    """What a thread keeps, by name."""

    # Found by identity: dictionaries have no hash.
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other


_every: weakref.WeakSet[_Kept] = weakref.WeakSet()


class _Shelf(threading.local):
    def __init__(self) -> None:
        self.kept = _Kept()
        _every.add(self.kept)


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
        if sum(x.nbytes for x in _shelf.kept.values()) + kept.nbytes > MOST_BYTES:
            # Whoever still reads one of these holds it himself.
            _shelf.kept.clear()
        _shelf.kept[(name, dtype)] = kept
    return kept[:size].view(shape)


def clear_scratch() -> None:
    """Frees what the calling thread keeps."""
    _shelf.kept.clear()


def clear_memory() -> None:
    """Frees all that is remembered between calls, in every thread of this process.

    Schedules of layouts, layouts and tables that layers share, scratch memory. Results do not change; the next call
    makes what it needs anew. Calls may be running.
    """
    store.forget()
    for kept in list(_every):
        kept.clear()
