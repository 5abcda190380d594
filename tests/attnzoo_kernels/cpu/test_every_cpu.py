"""What one class of CPU alone runs, on every other: the numeric laws in the dtypes that take the fast paths."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnzoo_kernels import block_sparse_attention
from tests.attnzoo_kernels.cpu.cpu_classes import PROCESSORS, answering
from tests.attnzoo_kernels.cpu.test_nonfinite import from_one_row_on
from tests.attnzoo_kernels.op.test_agreement import run, seeds_of
from tests.attnzoo_kernels.op.test_poison import poison_scratch
from tests.attnzoo_kernels.oracle import Answer, Problem, solve, visible
from tests.bounds import assert_near
from tests.strategies import extras_of, layout_of, problems

ROOT = Path(__file__).resolve().parents[3]
LOW = (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def as_here() -> Iterator[None]:
    """The limits from which paths pay, as they are."""
    yield


def without_lse(p: Problem, truth: Answer, seeds: tuple[torch.Tensor, torch.Tensor]) -> Answer:
    """Of calls whose log-sum-exp nobody asks for, which have paths of their own."""
    leaves = [x.detach().requires_grad_() for x in (p.q, p.k, p.v)]
    call = {"causal": p.causal, "scale": p.scale, "extras": extras_of(p), "impl": "blocked"}
    out = block_sparse_attention(*leaves, layout_of(p), **call)  # type: ignore[arg-type]
    return truth._replace(
        **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, seeds[0]), strict=True)), out=out.detach()
    )


@settings(max_examples=6)
@given(problems(dtypes=LOW, longest=24), st.booleans())
def test_every_cpu_computes_the_definition_whatever_memory_holds(p: Problem, square: bool) -> None:
    if square:
        # torch's kernel takes equal widths and no bias.
        p = p.change(v=p.k.clone(), key_bias=None)
    seeds, mask = seeds_of(p), visible(p)
    apart = (seeds[0], torch.zeros_like(seeds[1]))
    truth, plain = solve(p, *seeds, mask), solve(p, *apart, mask)
    for cpu in PROCESSORS:
        for limits in (as_here, from_one_row_on):
            with answering(cpu), limits():
                poison_scratch()
                assert_near(run(p, layout_of(p), seeds, "blocked"), truth, p, seeds, mask)
                poison_scratch()
                assert_near(without_lse(p, plain, apart), plain, p, apart, mask)


MACHINES = {
    "the least of both": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "torch without AVX-512": {"ATEN_CPU_CAPABILITY": "avx2"},
    "oneDNN without AMX": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "oneDNN without AVX-512": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
}


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
def test_the_numbers_hold_with_fewer_instructions(machine: str) -> None:
    """A process of its own: torch and oneDNN look at these once."""
    files = ["cpu/test_every_cpu", "cpu/test_nonfinite", "op/test_scale", "runtime/test_products", "op/test_state"]
    paths = [f"tests/attnzoo_kernels/{name}.py" for name in files]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", *paths],
        cwd=ROOT, env={**os.environ, **MACHINES[machine]}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-4000:]
