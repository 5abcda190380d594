"""How fp32 is multiplied follows what the user chose for torch, by its older and its newer name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("fp32_precision = 'tf32'", "tf32"), ("allow_tf32 = True", "tf32"), ("fp32_precision = 'ieee'", "tf32x3")],
)
def test_either_name_is_understood(choice: str, expected: str) -> None:
    pytest.importorskip("triton")
    program = (
        "import torch\n"
        f"torch.backends.cuda.matmul.{choice}\n"
        "from attnzoo_kernels._triton import specialize\n"
        "print(specialize._precision('sm_90'))\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout.strip() == expected, done.stderr
