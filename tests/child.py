"""Processes of their own, for what one process cannot show twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment(**more: str) -> dict[str, str]:
    """This process's environment, one thread, without the interpreter of Triton unless ``more`` asks for it."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", **more}


def run(program: str, *arguments: str, **more: str) -> str:
    """What a program prints; raises where it fails."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=environment(**more), check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"exit {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout
