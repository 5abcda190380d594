"""Memory: peaks measured in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def peak_growth(program: str, *arguments: str) -> float:
    """MiB by which memory peaks above what is held when a program calls ``ready()``; a process of its own.

    Args:
        program: Python source; ``ready()`` marks the point from which growth counts.
        *arguments: For ``sys.argv``.
    """
    prelude = (
        "import sys\n"
        "def memory(name):\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024\n"
        "held = None\n"
        "def ready():\n"
        "    global held\n"
        "    open('/proc/self/clear_refs', 'w').write('5')\n"  # the peak starts anew from what is held
        "    held = memory('VmRSS')\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    source = f"{prelude}{program}\nprint(memory('VmHWM') - held)\n"
    done = subprocess.run(
        [sys.executable, "-c", source, *arguments], env=env, check=True, capture_output=True, text=True, cwd=ROOT
    )
    return float(done.stdout.strip().splitlines()[-1])
