"""Which library multiplies matrices on a CPU, for the duration of a call.

On a CPU with AVX-512 and without AMX, oneDNN multiplies fp32 faster than the default, and exactly: the setting that
routes products to it lets it round to bf16 only where AMX exists. The setting is one for the process, so that a
process-wide lock is held while it is changed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from attnzoo_kernels.workspace import scratch

_settings: Any = cast("Any", torch.backends.mkldnn).matmul

ROUTES = ("auto", "mkl", "onednn")
SHAPE_BUDGET = 150
"""Product shapes that oneDNN may learn; each costs a quarter of a millisecond and half a MiB that is never returned."""


@cache
def cpu_class() -> str:
    """What the choice goes by: "amx", "avx512", "avx2" or "other"."""
    if torch.cpu._is_amx_tile_supported():
        return "amx"
    if torch.cpu._is_avx512_supported():
        return "avx512"
    return "avx2" if torch.cpu._is_avx2_supported() else "other"


@cache
def multiplies_bf16() -> bool:
    """Whether bf16 products run on instructions of their own; they are many times slower than fp32 elsewhere."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def route() -> str:
    """Either "onednn" or "mkl": by the environment variable ATTNZOO_CPU_GEMM, else by the CPU's features.

    Raises:
        ValueError: If the variable holds something else.
    """
    asked = os.environ.get("ATTNZOO_CPU_GEMM", "auto")
    if asked not in ROUTES:
        raise ValueError(f"ATTNZOO_CPU_GEMM: expected one of {', '.join(ROUTES)}, got {asked!r}")
    if cpu_class() == "amx":
        # There the setting would round to bf16.
        return "mkl"
    if asked != "auto":
        return asked
    return "onednn" if cpu_class() == "avx512" else "mkl"


class _Process:
    """The process's lock, how deep it is held, and the shapes that oneDNN has seen."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.depth = 0
        self.before = ""
        self.routed = False
        self.shapes: set[tuple[object, ...]] = set()


_process = _Process()


def _renew() -> None:
    # A lock that another thread held at the fork would never be released in the child.
    global _process
    left = _process
    _process = _Process()
    if left.routed:
        _settings.fp32_precision = left.before


os.register_at_fork(after_in_child=_renew)


def _own_setting() -> str:
    """What restores the setting: a value that is only inherited must not become one of its own."""
    found: str = _settings.fp32_precision
    return "none" if found == cast("Any", torch.backends.mkldnn).fp32_precision else found


@contextmanager
def routed() -> Iterator[None]:
    """Holds the lock and the route; the first in sets it, the last out restores what was there."""
    with _process.lock:
        _process.depth += 1
        try:
            if _process.depth == 1 and route() == "onednn":
                _process.before = _own_setting()
                _settings.fp32_precision = "bf16"
                _process.routed = True
            yield
        finally:
            _process.depth -= 1
            if _process.depth == 0 and _process.routed:
                _settings.fp32_precision = _process.before
                _process.routed = False


def views_freely() -> bool:
    """Whether matrices of a batch may lie anywhere: oneDNN copies them unless they are one block of memory."""
    return not _process.routed


def product(
    name: str, a: Tensor, b: Tensor, out: Tensor | None = None, *, scale: float = 1.0, add: bool = False
) -> Tensor:
    """A batched product times ``scale``, by default in scratch memory; ``add`` adds it to what ``out`` holds."""
    if out is None:
        out = scratch(name, (*a.shape[:2], b.shape[2]), a.dtype, a.device)
    if a.dtype == torch.bfloat16:
        return _half_product(a, b, out, scale=scale, add=add)
    beta = 1 if add else 0
    if not _process.routed or _may_learn((str(a.dtype), *a.shape, b.shape[2], a.stride(1) == 1, b.stride(1) == 1)):
        return torch.baddbmm(out, a, b, beta=beta, alpha=scale, out=out)
    _settings.fp32_precision = "none"
    try:
        return torch.baddbmm(out, a, b, beta=beta, alpha=scale, out=out)
    finally:
        _settings.fp32_precision = "bf16"


def _half_product(a: Tensor, b: Tensor, out: Tensor, *, scale: float, add: bool) -> Tensor:
    """A product in bf16. With AMX torch's reads beyond the rows of ``a``, times 0: a NaN would reach the row before."""
    few = add or a.numel() <= out.numel()
    clean = bool(a.sum().isfinite()) if few else True
    if clean:
        torch.baddbmm(out, a, b, beta=1 if add else 0, alpha=scale, out=out)
        clean = few or bool(out.sum().isfinite())
    if not clean:
        found = torch.bmm(a.float(), b.float()).mul_(scale)
        out.copy_(out + found if add else found)
    return out


def _may_learn(shape: tuple[object, ...]) -> bool:
    if shape in _process.shapes:
        return True
    if len(_process.shapes) >= SHAPE_BUDGET:
        return False
    _process.shapes.add(shape)
    return True
