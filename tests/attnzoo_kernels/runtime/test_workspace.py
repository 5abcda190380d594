"""Scratch memory: whose it is, when it is fresh, and what it must never hand out twice."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from attnzoo_kernels.runtime import workspace
from attnzoo_kernels.runtime.workspace import CAP_BYTES, clear_scratch, scratch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def empty_shelf() -> Iterator[None]:
    clear_scratch()
    yield
    clear_scratch()


def place(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> int:
    return scratch(name, shape, dtype, CPU).data_ptr()


def test_one_name_is_one_piece_of_memory_until_more_is_asked_for() -> None:
    large = place("a", 8, 4)
    assert place("a", 8, 4) == large
    assert place("a", 2, 3) == large
    larger = scratch("a", (9, 4), torch.float32, CPU)
    assert larger.shape == (9, 4)
    assert larger.is_contiguous()
    assert place("a", 8, 4) == larger.data_ptr()


def test_names_and_dtypes_never_share_memory() -> None:
    kept = [
        scratch(name, (6,), dtype, CPU) for name in ("a", "b") for dtype in (torch.float32, torch.int32, torch.float64)
    ]
    assert len({x.data_ptr() for x in kept}) == len(kept)
    assert [x.dtype for x in kept] == 2 * [torch.float32, torch.int32, torch.float64]


def test_threads_never_share_memory() -> None:
    mine = scratch("a", (64,), torch.float32, CPU)
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(scratch, "a", (64,), torch.float32, CPU).result()
        assert theirs.data_ptr() != mine.data_ptr()
        pool.submit(clear_scratch).result()
    assert place("a", 64) == mine.data_ptr(), "another thread freed it"


def test_memory_from_inference_mode_serves_training() -> None:
    with torch.inference_mode():
        place("a", 5)
    x = torch.ones(5, requires_grad=True)
    y = scratch("a", (5,), torch.float32, CPU).copy_(x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_too_large_is_fresh_and_forgotten(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "CAP_BYTES", 1024)
    most = 1024 // dtype.itemsize
    kept = scratch("a", (most,), dtype, CPU)
    assert place("a", most, dtype=dtype) == kept.data_ptr()
    large = scratch("a", (2, most), dtype, CPU)
    assert large.shape == (2, most)
    assert scratch("a", (2, most), dtype, CPU).data_ptr() != large.data_ptr()
    assert place("a", most, dtype=dtype) == kept.data_ptr()


def test_the_cap_is_64_mib_a_piece() -> None:
    assert CAP_BYTES == 64 * 1024 * 1024


def test_other_devices_get_their_own_memory() -> None:
    assert scratch("a", (3, 4), torch.float32, torch.device("meta")).device.type == "meta"
    assert scratch("a", (3, 4), torch.float32, CPU).device.type == "cpu"


def test_freed_memory_is_not_handed_out_again() -> None:
    before = scratch("a", (64,), torch.float32, CPU)
    clear_scratch()
    assert place("a", 64) != before.data_ptr()
