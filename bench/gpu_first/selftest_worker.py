"""The doctor's self-test, item by item: ``python -m bench.gpu_first.selftest_worker NAMES.json NEWS.jsonl DEVICE``."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from attnzoo_kernels import selftest
from attnzoo_kernels.selftest import Check, Job
from bench.gpu_first.pool import POISONED, News
from bench.gpu_first.pytest_worker import device_problem


def name_of(job: Job) -> str:
    """An item's name."""
    _, impl, dtype, case = job
    return f"{impl}, {str(dtype).removeprefix('torch.')}, {case}"


def outcome(checks: list[Check]) -> dict[str, str]:
    """What the pool is told."""
    if not checks:
        return {"outcome": "skipped", "reason": "it does not run here"}
    (check,) = checks
    text = json.dumps(asdict(check))
    if check.holds:
        return {"outcome": "passed", "text": text}
    reason = check.problem or f"{check.quantity} is off by {check.error:.1e}, {check.limit:.1e} is right"
    return {"outcome": "failed", "reason": reason[:300], "text": text}


def main(given: list[str]) -> int:
    """Runs the items of a file of names."""
    jobs = {name_of(job): job for job in selftest.jobs([torch.device(given[2])])}
    news = News(Path(given[1]))
    for name in json.loads(Path(given[0]).read_text(encoding="utf-8")):
        news.write("begin", name)
        found = outcome(list(selftest.run_jobs([jobs[name]])))
        problem = device_problem()
        if problem and found["outcome"] != "failed":
            found = {"outcome": "failed", "reason": problem}
        news.write("end", name, **found)
        if problem:
            sys.stdout.flush()
            os._exit(POISONED)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
