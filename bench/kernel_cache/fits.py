"""What a cache is made with, and why one that was brought along is of no use here. Needs triton, and no torch."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {"forward_kernel": "forward", "join_kernel": "forward", "query_kernel": "backward", "key_kernel": "backward"}
"""The kernels, and the files that they are in."""


def kernels() -> dict[str, Any]:
    """The kernels by name; where the package is not imported yet, without all of it that needs torch."""
    if "attnzoo_kernels" not in sys.modules:
        package = ModuleType("attnzoo_kernels")
        package.__path__ = [str(ROOT / "kernels" / "attnzoo_kernels")]
        sys.modules["attnzoo_kernels"] = package
    return {name: getattr(import_module(f"attnzoo_kernels._triton.{file}"), name) for name, file in KERNELS.items()}


def made_with(capability: int) -> dict[str, Any]:
    """Everything in a kernel's key that is not the call's."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.cache import triton_key

    return {
        "capability": capability,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "triton": triton.__version__,
        "triton's code": hashlib.sha256(triton_key().encode()).hexdigest(),
        "assembler": make_backend(GPUTarget("cuda", capability, 32)).hash(),
        "variables": dict(sorted(get_cache_invalidating_env_vars().items())),
        "kernels": {name: kernel.cache_key for name, kernel in kernels().items()},
    }


def reasons_against(manifest: Path) -> list[str]:
    """Why no kernel of an unpacked archive will be found on this machine's first device; empty if all can be."""
    import torch

    if not torch.cuda.is_available():
        return ["torch finds no CUDA device"]
    major, minor = torch.cuda.get_device_capability(0)
    there = json.loads(manifest.read_text(encoding="utf-8"))
    here = made_with(major * 10 + minor)
    return [f"{name} differs" for name, value in here.items() if there.get(name) != value]
