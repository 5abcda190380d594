"""When the Triton kernels run, why they do not, and what becomes of a call whose kernel fails."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from attnzoo_kernels import BlockLayout, Extras, UnsupportedError, block_sparse_attention_with_lse, dispatch, why_not
from attnzoo_kernels._triton import launch
from tests import child
from tests.attnzoo_kernels.triton.interpreted import only_interpreted
from tests.strategies import Numbers

pytestmark = only_interpreted

CALL = """
import torch
from attnzoo_kernels import *
x = torch.ones(1, 1, 4, 4)
layout = BlockLayout.dense(2, 2, 4, 4)
try:
    out = block_sparse_attention(x, x, x, layout, impl="triton")
except UnsupportedError as error:
    print("refused", error)
else:
    print("computed", tuple(out.shape))
assert torch.equal(block_sparse_attention(x, x, x, layout), block_sparse_attention(x, x, x, layout, impl="blocked"))
"""


def arguments(*, heads: int = 2, width: int = 4, requires_grad: bool = False) -> tuple[list[torch.Tensor], BlockLayout]:
    n = Numbers.of(1)
    leaves = [n.normal(1, count, 5, width).float().requires_grad_(requires_grad) for count in (heads, 1, 1)]
    return leaves, BlockLayout.dense(8, 8, 5, 5)


def test_without_the_variable_a_cpu_call_is_refused_and_told_how_to_run() -> None:
    said = child.run(CALL)
    assert said.startswith("refused")
    assert "TRITON_INTERPRET=1 set before triton is imported" in said


def test_with_the_variable_it_runs() -> None:
    assert child.run(CALL, TRITON_INTERPRET="1") == "computed (1, 1, 4, 4)\n"


def test_a_variable_set_too_late_is_named() -> None:
    late = "import os, triton, attnzoo_kernels._triton.launch\nos.environ['TRITON_INTERPRET'] = '1'\n"
    assert "after triton was imported, which comes too late" in child.run(late + CALL)


def test_where_triton_is_not_installed_the_extra_is_named() -> None:
    assert "the extra 'triton' brings it" in child.run(
        "import sys, importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n" + CALL
    )


def test_gated_blocks_too_tall_for_a_tile_are_refused_by_name() -> None:
    q, k, v = (torch.zeros(1, 1, 600, 4) for _ in range(3))
    gated = Extras(gate="last")
    assert why_not("triton", q, k, v, BlockLayout.dense(16, 256, 600, 600), extras=gated) == ()
    (reason,) = why_not("triton", q, k, v, BlockLayout.dense(16, 257, 600, 600), extras=gated)
    assert "257" in reason and "256" in reason
    assert why_not("triton", q, k, v, BlockLayout.dense(16, 257, 600, 600)) == ()


@pytest.fixture
def fresh_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No kernel has failed and nothing was said yet."""
    monkeypatch.setattr(dispatch, "_failed", {})
    monkeypatch.setattr(dispatch, "_warned", set())
    yield


FAILURES = {
    "too large": OutOfResources(999, 99, "shared memory"),
    "not compiled": CompilationError("source", None, "nonsense"),  # type: ignore[arg-type]
}


class Failing:
    """A kernel that does not start."""

    def __init__(self, error: BaseException, name: str) -> None:
        self.error, self.starts = error, 0
        self.fn = SimpleNamespace(__name__=name)

    def __getitem__(self, grid: Any) -> Any:
        def start(*args: Any, **kwargs: Any) -> None:
            self.starts += 1
            raise self.error

        return start


def automatic(patch: pytest.MonkeyPatch) -> None:
    """Has "auto" stand for the kernels, as on a GPU, as long as nothing speaks against them."""

    def choose(impl: str, call: Any) -> str:
        return "blocked" if impl == "blocked" or dispatch.reasons_against("triton", call) else "triton"

    patch.setattr(dispatch, "choose", choose)


@pytest.mark.usefixtures("fresh_memory")
@pytest.mark.parametrize("kernel", ["forward_kernel", "query_kernel", "key_kernel"])
@pytest.mark.parametrize("error", FAILURES.values(), ids=FAILURES.keys())
def test_auto_warns_once_computes_otherwise_and_does_not_try_again(
    error: Exception, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, layout = arguments(requires_grad=True)
    expected = block_sparse_attention_with_lse(*leaves, layout, impl="blocked")
    true = torch.autograd.grad(expected[0].sum() + expected[1].sum(), leaves)
    failing = Failing(error, kernel)
    monkeypatch.setattr(launch, kernel, failing)
    automatic(monkeypatch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            found = block_sparse_attention_with_lse(*leaves, layout)
            grads = torch.autograd.grad(found[0].sum() + found[1].sum(), leaves)
            for mine, other in zip((*found, *grads), (*expected, *true), strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    told = [str(x.message) for x in caught if x.category is RuntimeWarning]
    assert len(told) == 1
    assert kernel in told[0] and type(error).__name__ in told[0]
    assert failing.starts == 1


@pytest.mark.usefixtures("fresh_memory")
@pytest.mark.parametrize("error", FAILURES.values(), ids=FAILURES.keys())
def test_asked_for_by_name_a_kernel_that_fails_raises(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, layout = arguments()
    failing = Failing(error, "forward_kernel")
    monkeypatch.setattr(launch, "forward_kernel", failing)
    for _ in range(2):
        with pytest.raises(UnsupportedError, match=f"forward_kernel.*{type(error).__name__}") as caught:
            block_sparse_attention_with_lse(*leaves, layout, impl="triton")
        assert caught.value.reasons
    assert failing.starts == 1
    other, layout = arguments(width=7)
    with pytest.raises(UnsupportedError):
        block_sparse_attention_with_lse(*other, layout, impl="triton")
    assert failing.starts == 2


@pytest.mark.usefixtures("fresh_memory")
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_memory_that_runs_out_is_never_taken_for_a_kernel_that_fails(
    impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, layout = arguments()
    monkeypatch.setattr(launch, "forward_kernel", Failing(torch.OutOfMemoryError("full"), "forward_kernel"))
    automatic(monkeypatch)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            block_sparse_attention_with_lse(*leaves, layout, impl=impl)


def test_fake_tensors_are_answered_without_a_kernel() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(2, 4, 40, 8)
        layout = BlockLayout.window(8, 16, 40, 40, window=20)
        assert why_not("triton", q, q, q, layout) == ()
        out, lse = block_sparse_attention_with_lse(q, q, q, layout, impl="triton")
    assert out.shape == (2, 4, 40, 8)
    assert lse.shape == (2, 4, 40)


def test_meta_tensors_are_refused_by_name() -> None:
    q = torch.empty(2, 4, 40, 8, device="meta")
    layout = BlockLayout.window(8, 16, 40, 40, window=20).to("meta")
    (reason,) = why_not("triton", q, q, q, layout)
    assert "meta" in reason
