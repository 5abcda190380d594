"""Which implementation runs a call: a failure counts for its own kind of call alone, and is told once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo_kernels import BlockLayout, dispatch
from attnzoo_kernels.cpu import few_rows, flash
from attnzoo_kernels.errors import KernelError
from attnzoo_kernels.spec.call import Call, Gate, Origins
from attnzoo_kernels.spec.token_rule import TokenRule


def call_of(
    *,
    dtype: torch.dtype = torch.float32,
    heads: int = 4,
    widths: tuple[int, int] = (8, 8),
    blocks: tuple[int, int] = (16, 16),
    **more: Any,
) -> Call:
    q, k, v = (torch.zeros(1, h, 16, d, dtype=dtype) for h, d in zip((heads, 2, 2), (widths[0], *widths), strict=True))
    layout = BlockLayout.dense(*blocks, 16, 16)
    return Call(q, k, v, layout.start, layout.count, layout.col, None, TokenRule(True), *blocks, 1.0, **more)


def with_bias(call: Call) -> Call:
    return Call(**{**vars(call), "key_bias": torch.zeros(1, 1, 16)})


ZEROS = torch.zeros(1, 1, 16, 3)
KINDS = {
    "the same": call_of(),
    "bf16": call_of(dtype=torch.bfloat16),
    "fp16": call_of(dtype=torch.float16),
    "two heads": call_of(heads=2),
    "width": call_of(widths=(16, 8)),
    "width of values": call_of(widths=(8, 16)),
    "query blocks": call_of(blocks=(8, 16)),
    "key blocks": call_of(blocks=(16, 8)),
    "gates": call_of(gate=Gate(torch.zeros(1, 2, 1, 8), 1.0)),
    "landmarks": call_of(gate=Gate(None, 1.0)),
    "aux": call_of(aux=(ZEROS, ZEROS)),
    "more aux": call_of(aux=(torch.zeros(1, 1, 16, 5),) * 2),
    "origins": call_of(origins=Origins(torch.zeros(1, dtype=torch.int32), torch.ones(1, 2), torch.zeros(1, 2))),
    "bias": with_bias(call_of()),
}


@pytest.fixture(autouse=True)
def fresh_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No kernel has failed and nothing was said yet."""
    monkeypatch.setattr(dispatch, "_failed", {})
    monkeypatch.setattr(dispatch, "_warned", set())
    yield


def failed(call: Call, reason: str = "kernel: out of resources") -> None:
    dispatch._give_up("auto", call, KernelError(reason, (reason,)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_counts_for_its_own_kind_of_call_alone(kind: str) -> None:
    before = {name: dispatch.reasons_against("triton", call) for name, call in KINDS.items()}
    with pytest.warns(RuntimeWarning, match="out of resources"):
        failed(KINDS[kind])
    for name, call in KINDS.items():
        more = ("kernel: out of resources",) if name == kind else ()
        assert dispatch.reasons_against("triton", call) == (*before[name], *more), name
        for impl in ("auto", "blocked", "reference"):
            assert dispatch.reasons_against(impl, call) == ()


def test_a_reason_is_told_once_and_another_one_too() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in ("the same", "bf16", "bias"):
            failed(KINDS[name])
        failed(KINDS["gates"], "kernel: another reason")
    told = [str(x.message) for x in caught]
    assert [text.partition(";")[0] for text in told] == ["kernel: out of resources", "kernel: another reason"]
    assert all("the blocked implementation runs instead" in text for text in told)


def test_a_gpu_that_is_not_used_is_told_of_once_and_every_reason_is(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float16, torch.float64):
            assert dispatch.choose("auto", on_gpu(dtype)) == "blocked"
    told = [str(x.message) for x in caught]
    assert len(told) == 2
    assert "below 8.0" in told[0] and "fp64" in told[1]
    assert all(x.filename == __file__ for x in caught)


def test_asked_for_by_name_a_failure_raises_and_is_remembered() -> None:
    error = KernelError("too large", ("too large",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KernelError):
            dispatch._give_up("triton", KINDS["bf16"], error)
    assert "too large" in dispatch.reasons_against("triton", KINDS["bf16"])


def on_gpu(dtype: torch.dtype = torch.float32) -> Any:
    """Enough of a call on a GPU for what reads metadata alone."""
    shape = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=(1, 4, 16, 8))
    return SimpleNamespace(
        q=shape, k=shape, v=shape, gate=None, aux=None, origins=None, key_bias=None, block_q=16, block_k=16
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    return monkeypatch


@pytest.mark.parametrize(
    ("capability", "hip", "dtype", "told"),
    [
        ((9, 0), None, torch.float32, None),
        ((8, 0), None, torch.bfloat16, None),
        ((7, 5), None, torch.float16, "below 8.0"),
        ((7, 5), "6.2", torch.float16, None),
        ((9, 0), None, torch.float64, "fp64"),
    ],
)
def test_on_a_gpu_auto_is_the_kernels_unless_something_speaks_against_them(
    capability: tuple[int, int], hip: str | None, dtype: torch.dtype, told: str | None, gpu: pytest.MonkeyPatch
) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu.setattr(torch.version, "hip", hip)
    call = on_gpu(dtype)
    if told is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert dispatch.choose("auto", call) == "triton"
        return
    with pytest.warns(RuntimeWarning, match=told):
        assert dispatch.choose("auto", call) == "blocked"
    assert dispatch.choose("triton", call) == "triton"
    (reason,) = dispatch.reasons_against("triton", call)
    assert told in reason


def test_without_a_driver_that_alone_is_told(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    (reason,) = dispatch.reasons_against("triton", on_gpu(torch.float64))
    assert "no CUDA device" in reason


def test_on_a_cpu_auto_is_blocked_without_a_word_and_names_stay() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in KINDS.values():
            assert dispatch.choose("auto", call) == "blocked"
            assert [dispatch.choose(name, call) for name in ("triton", "blocked")] == ["triton", "blocked"]


class Kernels:
    """Kernels that answer with what they were asked, or fail."""

    INTERPRETED = True

    def __init__(self, *, fail: bool = False) -> None:
        self.fail, self.asked = fail, []

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        self.asked.append("forward")
        if self.fail:
            raise KernelError("no", ("no",))
        return call.q + 7, call.q[..., 0] + 7

    def backward(self, call: Call, results: Any, dout: Any, dlse: Any, need: Any) -> tuple[Tensor | None, ...]:
        self.asked.append("backward")
        if self.fail:
            raise KernelError("no", ("no",))
        return call.q + 7, None, None, None, None, None, None


def test_the_kernels_results_are_the_calls_unless_they_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    call = KINDS["the same"]
    kernels = Kernels()
    monkeypatch.setattr(dispatch, "_kernels", lambda: kernels)
    out, lse = dispatch.forward("triton", call, need_lse=True)
    assert bool((out == 7).all()) and lse.shape == (1, 4, 16)
    assert dispatch.forward("triton", call, need_lse=False)[1].numel() == 0
    need = [True] + [False] * 6
    grads = dispatch.backward("triton", call, (out, lse), out, None, need)
    assert grads[0] is not None and bool((grads[0] == 7).all())
    assert kernels.asked == ["forward", "forward", "backward"]
    # Without the forward's results the kernels have nothing to go back from.
    dispatch.backward("triton", call, (None, None), out, None, need)
    assert kernels.asked == ["forward", "forward", "backward"]
    assert dispatch.keeps_results("triton", call)


def test_kernels_that_fail_by_name_do_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    call = KINDS["the same"]
    monkeypatch.setattr(dispatch, "_kernels", lambda: Kernels(fail=True))
    with pytest.raises(KernelError):
        dispatch.forward("triton", call, need_lse=False)
    with pytest.raises(KernelError):
        dispatch.backward("triton", call, (call.q, call.q[..., 0]), call.q, None, [True] * 7)


def test_gradients_come_back_where_they_are_wanted_alone() -> None:
    call = call_of(heads=2, blocks=(64, 64))
    out, lse = dispatch.forward("blocked", call, need_lse=True)
    for at in range(3):
        need = [place == at for place in range(7)]
        for results in ((out, lse), (None, None)):
            grads = dispatch.backward("blocked", call, results, torch.ones_like(out), None, need)
            assert len(grads) == 7
            assert [grad is not None for grad in grads] == need


def test_what_the_fused_backward_gives_beside_what_is_wanted_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    call = KINDS["the same"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(few_rows, "MOST_ROWS", 0)
    monkeypatch.setattr(flash, "LEAST_ROWS", 1)
    monkeypatch.setattr(flash, "backward", lambda call, results, dout: (call.q + 1, call.k + 2, call.v + 3))
    for at in range(3):
        need = [place == at for place in range(7)]
        grads = dispatch.backward("blocked", call, (call.q, call.q[..., 0]), call.q, None, need)
        assert [grad is not None for grad in grads] == need
        assert float(grads[at].unique()) == at + 1
    # The gradient of the log-sum-exp is made in blocks alone.
    grads = dispatch.backward(
        "blocked", call, (call.q, call.q[..., 0]), call.q, call.q[..., 0], [True] * 3 + [False] * 4
    )
    assert not bool((grads[0] == 1).all())
