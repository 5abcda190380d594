"""Records, compiles and packs: ``python -m bench.kernel_cache --out kernels.tar.gz``; needs no GPU.

This Python needs torch and triton. ``--python`` may name another one, without torch, whose version and triton are those
of the GPU machine; triton's version here must be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.kernel_cache import record, unpack

ROOT = Path(__file__).resolve().parents[2]
CAPABILITIES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}


def compile_all(requests: list[record.Request], cache: Path, capability: int, python: str, jobs: int) -> dict[str, int]:
    """Compiles in several processes; what the cache is made with.

    Raises:
        RuntimeError: If a process fails, or a kernel does not compile.
    """
    listed = cache.with_suffix(".pickle")
    listed.write_bytes(pickle.dumps(requests))
    program = str(Path(__file__).with_name("compile.py"))
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    running = [
        subprocess.Popen(
            [python, program, str(listed), str(cache), str(capability), str(share), str(jobs)],
            env=env, stdout=subprocess.PIPE, text=True,
        )
        for share in range(jobs)
    ]  # fmt: skip
    said = [process.communicate()[0] for process in running]
    listed.unlink()
    if any(process.returncode for process in running):
        raise RuntimeError(f"kernels were not compiled: {said}")
    made: dict[str, int] = json.loads(said[0].splitlines()[-1])["made with"]
    return made


def main(given: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernel_cache", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu-first-kernels.tar.gz"), help="the archive")
    parser.add_argument("--architecture", choices=CAPABILITIES, default="sm_90")
    parser.add_argument("--python", default=sys.executable, help="whose triton compiles")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes at a time")
    parser.add_argument("--parts", choices=record.PARTS, nargs="+", default=["self-test", "cells"])
    options = parser.parse_args(given)
    requests = record.record(options.architecture, options.parts)
    with tempfile.TemporaryDirectory(prefix="kernels-") as folder:
        cache = Path(folder, "cache")
        cache.mkdir()
        made = compile_all(requests, cache, CAPABILITIES[options.architecture], options.python, options.jobs)
        unpack.pack(cache, dict(made), options.out)
    print(f"{len(requests)} kernels, {options.out.stat().st_size >> 10} KiB: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
