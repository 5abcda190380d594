"""How much memory a training step at 8k tokens takes: growth of the peak after a warm-up, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

STEP = """
import resource, sys, torch
from attnzoo_kernels import BlockLayout, Extras, block_sparse_attention
torch.set_num_threads(1)
tokens, blocks = 8192, 128
keep = torch.rand(1, 1, blocks, blocks, generator=torch.Generator().manual_seed(0)) < 0.12
index = torch.where(keep, torch.arange(blocks).expand_as(keep), -1)
turned = sys.argv[1] == "origins"
origin = torch.randint(0, 50, index.shape) if turned else None
layout = BlockLayout.from_indices(index, 64, 64, tokens, tokens, origin=origin)
extras = Extras(rope=(torch.rand(50, 32), torch.rand(50, 32))) if turned else None
small = [torch.randn(1, 8, 512, 64).requires_grad_() for _ in range(3)]
block_sparse_attention(*small, BlockLayout.dense(64, 64, 512, 512), impl="blocked").sum().backward()
leaves = [torch.randn(1, 8, tokens, 64).requires_grad_() for _ in range(3)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
block_sparse_attention(*leaves, layout, extras=extras, impl="blocked").sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("switch", "most"), [("plain", 100), ("origins", 165)])
def test_a_training_step_grows_by_so_many_mib(switch: str, most: float) -> None:
    source = Path(__file__).resolve().parents[3]
    there = {**os.environ, "PYTHONPATH": f"{source}:{source / 'kernels'}", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", STEP, switch], env=there, capture_output=True, text=True, check=True
    )  # fmt: skip
    assert 32 < float(ran.stdout) <= most
