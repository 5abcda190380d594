"""Which kernels the parts of a first contact launch, for what: the real launcher runs them, with nothing behind it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from attnzoo_kernels import dispatch, selftest
from attnzoo_kernels._triton import launch
from attnzoo_kernels._triton.tile_table import Tiles
from bench.aot import compiling
from bench.gpu import peers
from bench.gpu.cells import Cell, every
from bench.gpu.contact import CELLS, SPECIALISED

PROCESSORS = {"sm_90": 132, "sm_100": 148, "sm_80": 108}
"""Of the largest device of an architecture: by them lists are cut, which another kernel then joins."""
KEPT_OPTIONS = ("num_warps", "num_stages", "debug", "instrumentation_mode")
"""What a launch says; the rest follows from the target where it is compiled."""
LONGEST = 8192
"""Tokens of a recorded cell that does not decode: as in a longer one no list is cut."""
CPU = torch.device("cpu")
Request = tuple[str, dict[str, Any], dict[Any, Any], dict[Any, Any], dict[str, Any]]
"""A kernel's name, its signature, constants, attributes, and options."""


@contextmanager
def recording(architecture: str) -> Iterator[list[Request]]:
    """Inside, calls on the CPU go to the Triton kernels, whose launches are listed, each once; nothing is computed."""
    requests: list[Request] = []
    known: set[str] = set()

    def remember(src: Any, target: Any, options: dict[str, Any], **_: Any) -> object:
        kept = {name: options[name] for name in KEPT_OPTIONS if name in options}
        key = f"{src.hash()} {kept}"
        if key not in known:
            known.add(key)
            requests.append((src.fn.__name__, dict(src.signature), dict(src.constants), dict(src.attrs), kept))
        return object()

    def run(kernel: Any, programs: int, arguments: Sequence[Any], own: Tiles | None, **constants: Any) -> None:
        options = {} if own is None else {"num_warps": own.warps, "num_stages": own.stages}
        kernel.warmup(*arguments, grid=(programs,), **constants, **options)

    real_compile = triton.compiler.compile
    real_against = dispatch._against_triton
    with compiling(architecture):
        # The end of ``compiling`` puts these two back.
        launch.run = run
        launch.processors = lambda device: PROCESSORS.get(architecture, 128)  # type: ignore[assignment]
        try:
            triton.compiler.compile = remember
            dispatch._against_triton = lambda call: ()
            yield requests
        finally:
            triton.compiler.compile = real_compile
            dispatch._against_triton = real_against


def self_test() -> None:
    """The doctor's self-test of the kernels, as on a GPU."""
    for dtype in selftest.dtypes_of("triton", torch.device("cuda")):
        for case in selftest.CASES:
            selftest.solve(selftest.make(case).to(dtype, CPU), "triton", dtype)


def _inputs(cell: Cell) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.empty(1, cell.heads, cell.queries, cell.width, dtype=torch.bfloat16)
    k, v = (torch.empty(1, cell.groups, cell.tokens, cell.width, dtype=torch.bfloat16) for _ in range(2))
    return q, k, v


def _cell(cell: Cell) -> None:
    if cell.what != "decode":
        cell = replace(cell, tokens=min(cell.tokens, LONGEST))
    run = peers.ours(cell.layout(CPU))
    inputs = _inputs(cell)
    with torch.no_grad():
        run(*inputs)
    if cell.what in ("backward", "recompilations"):
        leaves = [x.requires_grad_() for x in inputs]
        torch.autograd.grad(run(*leaves), leaves, torch.empty_like(leaves[0]))


def cells() -> None:
    """The cells in the order of a first contact, the form that may hang included."""
    known = {cell.name: cell for cell in every()}
    for name in dict.fromkeys(item.name for item in (*CELLS, *SPECIALISED)):
        cell = known.get(name)
        if cell is None:
            continue
        if cell.what == "recompilations":
            # A short call cuts its lists.
            for tokens in (cell.tokens // 8, cell.tokens):
                _cell(replace(cell, tokens=tokens))
        elif cell.what == "form":
            for form in ("plain", cell.form):
                with peers.form(form):
                    _cell(cell)
        else:
            _cell(cell)


def tests() -> None:
    """The tests on a GPU but for those of CUDA itself. They fail: nothing is computed."""
    import pytest

    from tests.attnzoo_kernels.gpu import gpu_support

    os.environ |= {"ATTNZOO_TEST_DEVICE": "cpu", "TRITON_INTERPRET": "0"}
    gpu_support.assert_within = lambda *_: None
    root = Path(__file__).resolve().parents[2]
    options = ["-q", "-p", "no:cacheprovider", "--tb=no", "--rootdir", str(root), "-m", "gpu and not slow"]
    pytest.main([*options, str(root / "tests/attnzoo_kernels/gpu/test_gpu.py")])


PARTS: dict[str, Callable[[], None]] = {"self-test": self_test, "cells": cells, "tests": tests}


def record(architecture: str, parts: Sequence[str]) -> list[Request]:
    """The kernels of some parts, the first used first.

    Raises:
        RuntimeError: If the interpreter was asked for when triton was imported: nothing could be compiled.
    """
    if launch.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET: expected it unset, got 1")
    with recording(architecture) as requests:
        for part in parts:
            before = len(requests)
            PARTS[part]()
            print(f"{part}: {len(requests) - before} kernels", flush=True)
    return requests
