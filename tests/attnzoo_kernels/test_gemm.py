"""Which library multiplies: chosen by the CPU alone, held under one lock, and put back whatever happens."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo_kernels import BlockLayout, Extras, block_sparse_attention, blocked, gemm

setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The route of a CPU with AVX-512; what oneDNN computes without AMX is true fp32 anywhere."""
    if gemm.cpu_class() == "amx":
        pytest.skip("with AMX the route would round to bf16")
    monkeypatch.setenv("ATTNZOO_CPU_GEMM", "onednn")
    before = setting.fp32_precision
    yield
    assert setting.fp32_precision == before


def call(dtype: torch.dtype = torch.float32, **more: Any) -> Tensor:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 80, 16, generator=g).to(dtype) for _ in range(3))
    layout = BlockLayout.window(16, 16, 80, 80, window=40)
    return block_sparse_attention(q, k, v, layout, extras=Extras(window=40, **more), impl="blocked")


@pytest.mark.parametrize(
    ("cpu", "asked", "found"),
    [
        ("avx512", "auto", "onednn"),
        ("amx", "auto", "mkl"),
        ("avx2", "auto", "mkl"),
        ("other", "auto", "mkl"),
        ("avx512", "mkl", "mkl"),
        ("avx2", "onednn", "onednn"),
    ],
)
def test_the_route_goes_by_the_cpu_unless_asked(
    monkeypatch: pytest.MonkeyPatch, cpu: str, asked: str, found: str
) -> None:
    monkeypatch.setattr(gemm, "cpu_class", lambda: cpu)
    monkeypatch.setenv("ATTNZOO_CPU_GEMM", asked)
    assert gemm.route() == found


def test_an_unknown_route_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNZOO_CPU_GEMM", "blas")
    with pytest.raises(ValueError, match=r"ATTNZOO_CPU_GEMM: expected one of auto, mkl, onednn, got 'blas'"):
        call()


def test_both_routes_compute_true_fp32(onednn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    routed = call()
    monkeypatch.setenv("ATTNZOO_CPU_GEMM", "mkl")
    # Rounding to bf16 would differ by a thousandth.
    torch.testing.assert_close(routed, call(), rtol=1e-5, atol=1e-6)


def test_the_setting_is_put_back_where_a_call_fails(onednn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        assert setting.fp32_precision == "bf16"
        raise MemoryError("no room")

    monkeypatch.setattr(blocked, "weigh", fail)
    with pytest.raises(MemoryError):
        call()
    with gemm.routed(), gemm.routed():
        assert setting.fp32_precision == "bf16"


def test_threads_take_turns_and_leave_the_setting_as_it_was(onednn: None) -> None:
    expected, results, errors = call(), [], []

    def work() -> None:
        try:
            results.extend(torch.equal(call(), expected) for _ in range(20))
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    assert results == [True] * 80


def test_a_fork_inside_a_call_leaves_the_child_a_free_lock_and_the_old_setting(onednn: None) -> None:
    before = setting.fp32_precision
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with gemm.routed():
            held.set()
            done.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(30)
    child = os.fork()
    if child == 0:
        fine = setting.fp32_precision == before and gemm._process.lock.acquire(timeout=5)
        os._exit(0 if fine else 1)
    _, status = os.waitpid(child, 0)
    done.set()
    holder.join()
    assert os.waitstatus_to_exitcode(status) == 0


def test_beyond_the_budget_of_shapes_the_default_library_multiplies(
    onednn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm, "SHAPE_BUDGET", 1)
    monkeypatch.setattr(gemm._process, "shapes", set())
    seen: list[str] = []
    bmm = torch.bmm

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(setting.fp32_precision)
        return bmm(*args, **kwargs)

    monkeypatch.setattr(torch, "bmm", watched)
    call()
    assert seen[0] == "bf16"
    assert set(seen[1:]) >= {"none"}
    assert len(gemm._process.shapes) == 1


@pytest.mark.parametrize("precision", ["precise", "fast"])
def test_bf16_values_are_multiplied_in_bf16_where_the_cpu_can(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr(blocked, "multiplies_bf16", lambda: True)
    found = call(torch.bfloat16, precision=precision)
    monkeypatch.setattr(blocked, "multiplies_bf16", lambda: False)
    wide = call(torch.bfloat16, precision=precision)
    # Weights and values of size 1, rounded once more to 8 bits each.
    assert (found.float() - wide.float()).abs().max() <= 3 * 2**-8 * wide.float().abs().max()
