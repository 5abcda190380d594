"""The operation on CPUs: a list of paths, of which the first that takes a call computes it."""

from __future__ import annotations

from attnzoo_kernels.cpu.bf16 import BF16Path
from attnzoo_kernels.cpu.blocked import BlockedPath
from attnzoo_kernels.cpu.few_rows import FewRowsPath
from attnzoo_kernels.cpu.flash import FlashPath
from attnzoo_kernels.cpu.key_major import KeyMajorPath
from attnzoo_kernels.cpu.path import CPUPath

PATHS: tuple[CPUPath, ...] = (FewRowsPath(), FlashPath(), BF16Path(), KeyMajorPath(), BlockedPath())
"""In the order in which they are asked; the last takes every call."""

__all__ = ["PATHS"]
