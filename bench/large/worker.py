"""The process of one row of :mod:`bench.large`: an order as JSON in a file, a reading as JSON on stdout."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from attnzoo.surgery.hosts.checkpoint import load_checkpoint
from attnzoo.surgery.streaming.convert import Dtypes, convert_folder


def run(order: dict[str, Any]) -> dict[str, Any]:
    """Does what an order says, and tells the time and the most memory that this process has ever had."""
    torch.set_num_threads(order["threads"])
    began = time.perf_counter()
    used = time.process_time()
    kept = []
    if order["options"] is None:
        load_checkpoint(order["source"])
    else:
        ids = torch.Generator().manual_seed(1)
        shape = (1, order["length"])
        text = [torch.randint(0, order["vocabulary"], shape, generator=ids) for _ in range(order["windows"])]
        report = convert_folder(
            order["source"],
            order["out"],
            "lowrank_gqa",
            calibration=text if order["calibrated"] else None,
            dtypes=Dtypes(run=getattr(torch, order["run_in"])),
            progress=_tell,
            **order["options"],
        )
        kept = [site.kept for site in report.sites if site.kept is not None]
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - used,
        # The most that Linux has counted for this process, files that it has mapped among it; in KiB.
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "kept": sum(kept) / len(kept) if kept else None,
    }


def _tell(what: str, done: int, total: int) -> None:
    sys.stderr.write(f"{what} {done}/{total}\n")


if __name__ == "__main__":
    print(json.dumps(run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
