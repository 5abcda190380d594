"""Microbenchmarks of the operation for pytest-benchmark: ``pytest bench -o python_files='bench_*.py'``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.cpu import cases, gate
from bench.cpu.rows import ours

SMALL = cases.Case("small", tokens=1024, density=0.12)


@pytest.mark.parametrize("name", cases.SWITCHES)
def test_forward(benchmark: Any, name: str) -> None:
    layout, extras = cases.switch(name, SMALL, SMALL.layout())
    run = ours(layout, extras)
    inputs = SMALL.inputs()
    if name == "none":
        gate.check("ours", run(*inputs), gate.truth(*inputs, layout))
    benchmark(run, *inputs)


def test_training_step(benchmark: Any) -> None:
    run = ours(SMALL.layout())
    leaves = [x.requires_grad_() for x in SMALL.inputs()]
    benchmark(lambda: torch.autograd.grad(run(*leaves).sum(), leaves))
