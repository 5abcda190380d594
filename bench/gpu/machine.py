"""The machine: what it is, and how fast it could be at best."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PEAKS = {
    "H200": (989e12, 4.8e12),
    "H100": (989e12, 3.35e12),
    "H100 PCIe": (756e12, 2.0e12),
    "A100-SXM4-40GB": (312e12, 1.555e12),
    "A100-SXM4-80GB": (312e12, 2.039e12),
    "A100-PCIE-40GB": (312e12, 1.555e12),
    "A100 80GB PCIe": (312e12, 1.935e12),
}
"""Dense bf16 operations and bytes a second, as the makers say, by what the name holds; the longest match counts."""


def peak_of(name: str) -> tuple[float, float] | None:
    """The makers' figures for a device, or ``None`` where it is not in the table."""
    known = [key for key in PEAKS if key in name]
    return PEAKS[max(known, key=len)] if known else None


LONG = 50.0
"""Milliseconds from which three runs must do."""


def _timed(run: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def milliseconds(run: Callable[[], Any], device: torch.device) -> float | None:
    """The median of a run on a GPU, caches cold; elsewhere ``None``: a CPU's time would say nothing here."""
    if device.type != "cuda":
        run()
        return None
    from triton.testing import do_bench

    times = [_timed(run)]
    if times[0] > LONG:
        # do_bench would run it ten times before it measures.
        return sorted([*times, _timed(run), _timed(run)])[1]
    return float(do_bench(run, warmup=15, rep=60, return_mode="median"))


@cache
def measured(device: torch.device) -> dict[str, float]:
    """Operations a second of a large bf16 product, and bytes a second of a copy, measured now."""
    if device.type != "cuda":
        return {}
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = milliseconds(lambda: a @ b, device)
    source = torch.empty(1 << 30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), device)
    assert product and copy
    return {"product": 2 * size**3 / product * 1e3, "copy": 2 * source.numel() / copy * 1e3}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def settings(device: torch.device, *, tuned: bool) -> dict[str, Any]:
    """What results must share to lie in one folder."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__, "triton": _version("triton"), "tuned": tuned}


def about(device: torch.device, *, tuned: bool) -> dict[str, Any]:
    """Where the figures come from."""
    data = settings(device, tuned=tuned) | {"date": time.strftime("%F"), "measured": measured(device)}
    peak = peak_of(data["device"])
    data["peak"] = {"product": peak[0], "copy": peak[1]} if peak else data["measured"]
    data["peak is"] = "the maker's" if peak else "measured"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        data |= {
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "driver": _driver(),
        }
    return data


def _driver() -> str | None:
    import subprocess

    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        # A description may lack a line; a measurement must not fail for it.
        return None
    return done.stdout.strip().splitlines()[0]
