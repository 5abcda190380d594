"""The tests on a GPU where there is none: they skip and say why, and need no hypothesis."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import sys
import pytest


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hypothesis":
            raise ModuleNotFoundError(f"No module named {name!r}")


sys.meta_path.insert(0, Missing())
files = ["tests/attnzoo_kernels/gpu/test_gpu.py", "tests/attnzoo_kernels/gpu/test_gpu_runtime.py"]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *files, *sys.argv[1:]]))
"""


def select(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_INTERPRET", "PYTEST_"))}
    env |= {"CUDA_VISIBLE_DEVICES": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def test_they_skip_with_the_reason() -> None:
    done = select("-m", "gpu and not slow", "-rs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no CUDA device" in done.stdout
    assert "passed" not in done.stdout.splitlines()[-1]
    assert "failed" not in done.stdout


def test_the_suite_leaves_them_out() -> None:
    done = select("-m", "not slow and not gpu")
    # Exit code 5: nothing was selected.
    assert done.returncode == 5, done.stdout
    assert "deselected" in done.stdout
