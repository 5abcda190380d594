"""What the machine is: versions, device, the doctor's findings, and whether kernels that were brought along fit.

    python -m bench.gpu_first.machine FACTS.json NAMES.json DEVICE [MANIFEST]

NAMES.json gets the items of the self-test on that device.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from attnzoo_kernels import selftest
from attnzoo_kernels._triton import tile_table
from bench.gpu_first.selftest_worker import name_of

PACKAGES = ("triton", "numpy", "pytest", "hypothesis", "einops", "matplotlib", "transformers", "xformers", "flash-attn")


def versions() -> dict[str, str | None]:
    """What is installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def device() -> dict[str, Any] | None:
    """The first CUDA device, or ``None``."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory GiB": round(total / 2**30, 1),
        "free GiB": round(free / 2**30, 1),
        "tiles": tile_table.architecture_of(0),
        "devices": torch.cuda.device_count(),
        "cuda": torch.version.cuda or torch.version.hip,
    }


def doctor() -> list[str]:
    """The doctor's findings, or that it could not be asked."""
    if find_spec("einops") is None:
        return ["note: einops is not installed: the doctor was not asked"]
    from attnzoo.doctor import environment, findings

    return [f"{finding.level}: {finding.what}" for finding in findings(environment())]


def main(given: list[str]) -> int:
    """Writes the names and the facts down."""
    names = [name_of(job) for job in selftest.jobs([torch.device(given[2])])]
    Path(given[1]).write_text(json.dumps(names), encoding="utf-8")
    facts: dict[str, Any] = {
        "versions": versions(),
        "system": platform.platform(),
        "cores": os.process_cpu_count() if hasattr(os, "process_cpu_count") else len(os.sched_getaffinity(0)),
        "device": device(),
    }
    Path(given[0]).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    # All that can be known without them is written: these import more.
    facts["doctor"] = doctor()
    if len(given) > 3:
        from bench.kernel_cache import fits

        facts["kernels"] = fits.reasons_against(Path(given[3]))
    Path(given[0]).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
