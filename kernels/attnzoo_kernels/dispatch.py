"""Which implementation runs a call, and why not the Triton kernels. Imports triton only where they run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from attnzoo_kernels.cpu import PATHS
from attnzoo_kernels.cpu.path import CPUPath
from attnzoo_kernels.errors import KernelError, UnsupportedError
from attnzoo_kernels.runtime.warn import warn_caller
from attnzoo_kernels.spec.call import Call

TALLEST_GATED = 256
"""Slots of a gated block: the kernels hold it in one tile."""

OLDEST = (8, 0)
"""The least compute capability."""

_failed: dict[tuple[object, ...], str] = {}
_warned: set[str] = set()


PATH_NAMES = tuple(f"blocked/{path.name}" for path in PATHS)
"""A path of the CPU as an ``impl`` of its own, inside dispatch and for ``why_not``: "blocked" is all of them."""


def reasons_against(impl: str, call: Call, *, need_lse: bool = False) -> tuple[str, ...]:
    """Why an implementation cannot run a call; empty if it can. Reads metadata alone."""
    if impl in PATH_NAMES:
        return _paths_from(impl)[0].reasons(call, need_lse=need_lse)
    return _against_triton(call) if impl == "triton" else ()


def _paths_from(impl: str) -> tuple[CPUPath, ...]:
    """The paths that are asked, in order: all of them, or a forced one and those behind it."""
    return PATHS[PATH_NAMES.index(impl) :] if impl in PATH_NAMES else PATHS


def path_of(call: Call, *, need_lse: bool = False) -> str:
    """The path that a forward takes, unless its result is not finite. Reads values: for reports, not for calls."""
    return next(path.name for path in PATHS if not path.reasons(call, need_lse=need_lse) and not path.declines(call))


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def _against_triton(call: Call) -> tuple[str, ...]:
    device = call.q.device
    found = []
    if not _installed():
        found.append("triton: it is not installed; the extra 'triton' brings it")
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            found.append(
                "triton: q is on the CPU; it needs a CUDA device, or TRITON_INTERPRET=1 set before triton is imported"
            )
        elif not found and not _kernels().INTERPRETED:
            found.append("triton: TRITON_INTERPRET was set after triton was imported, which comes too late")
    elif device.type != "cuda":
        found.append(f"triton: expected q on a CUDA device, got {device.type}")
    else:
        found += _against_device(call)
    if call.gate is not None and call.block_k > TALLEST_GATED:
        found.append(f"triton: block_k {call.block_k} with gates; a gated block may have {TALLEST_GATED} slots")
    known = _failed.get(_kind(call))
    return (*found, known) if known is not None else tuple(found)


def _against_device(call: Call) -> list[str]:
    found = []
    if not torch.cuda.is_available():
        return ["triton: torch finds no CUDA device or driver"]
    if torch.version.hip is None and torch.cuda.get_device_capability(call.q.device) < OLDEST:
        found.append(f"triton: the device's compute capability is below {OLDEST[0]}.{OLDEST[1]}")
    if call.q.dtype == torch.float64:
        found.append("triton: fp64 inputs; the kernels compute in fp32 on a GPU")
    return found


def _kind(call: Call) -> tuple[object, ...]:
    """What a kernel is compiled for, roughly: one that failed is not tried again."""
    gate = None if call.gate is None else call.gate.is_last
    aux = None if call.aux is None else call.aux[0].shape[3]
    sizes = (call.q.shape[3], call.v.shape[3], call.block_q, call.block_k, call.q.shape[1] // call.k.shape[1])
    return (call.q.device, call.q.dtype, *sizes, gate, aux, call.origins is None, call.key_bias is None)


def _kernels() -> ModuleType:
    from attnzoo_kernels._triton import launch

    return launch


def choose(impl: str, call: Call) -> str:
    """The implementation that "auto" stands for; another name stays. Warns once a reason where a GPU is not used."""
    if impl != "auto" or call.q.device.type != "cuda":
        return "blocked" if impl == "auto" else impl
    reasons = reasons_against("triton", call)
    for reason in reasons:
        _warn_once(f"{reason}; the blocked implementation runs instead")
    return "blocked" if reasons else "triton"


def keeps_results(impl: str, call: Call) -> bool:
    """Whether the backward reads what the forward found; where it does not, it is computed again."""
    chosen = choose(impl, call)
    return chosen == "triton" or any(path.keeps_results(call) for path in _paths_from(chosen))


def forward(impl: str, call: Call, *, need_lse: bool) -> tuple[Tensor, Tensor]:
    """Out ``[B, H, T, Dv]`` and lse ``[B, H, T]`` (empty where not needed) by an implementation or "auto".

    Raises:
        KernelError: If the Triton kernels were asked for by name and fail.
        UnsupportedError: If a path of the CPU was asked for that has reasons against the call.
    """
    found = None
    if choose(impl, call) == "triton":
        try:
            found = _kernels().forward(call)
        except KernelError as error:
            _give_up(impl, call, error)
    if found is None:
        found = _forward_on_cpu(impl, call, need_lse=need_lse)
    out, lse = found
    return out, lse if need_lse or lse.numel() == 0 else lse.new_empty(0)


def _forward_on_cpu(impl: str, call: Call, *, need_lse: bool) -> tuple[Tensor, Tensor]:
    """The first path that has no reason against a call, and does not give up at its values, computes it."""
    paths = _paths_from(impl)
    for path in paths:
        reasons = path.reasons(call, need_lse=need_lse)
        if not reasons:
            found = path.forward(call, need_lse=need_lse)
            if found is not None:
                return found
        elif impl in PATH_NAMES and path is paths[0]:
            raise UnsupportedError(f"impl: {impl!r} cannot run this call: {'; '.join(reasons)}", reasons)
    raise UnsupportedError(f"impl: no path of the CPU takes this call, of {', '.join(PATH_NAMES)}")


def backward(
    impl: str,
    call: Call,
    results: tuple[Tensor | None, Tensor | None],
    dout: Tensor | None,
    dlse: Tensor | None,
    need: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, key_bias, q_aux, k_aux and the gate's keys; ``None`` where ``need`` says so.

    Args:
        impl: As in the forward.
        call: As in the forward.
        results: Out and lse of the forward; ``None`` where they were not kept.
        dout: Gradient of out, or ``None`` for zeros.
        dlse: Gradient of lse, or ``None`` for zeros.
        need: Which gradients are wanted.
    """
    out, lse = results
    if out is not None and lse is not None and choose(impl, call) == "triton":
        try:
            found: tuple[Tensor | None, ...] = _kernels().backward(call, (out, lse), dout, dlse, need)
        except KernelError as error:
            _give_up(impl, call, error)
        else:
            return found
    for path in _paths_from(impl):
        if not path.backward_reasons(call, dlse=dlse is not None):
            grads = path.backward(call, results, dout=dout, dlse=dlse, need=list(need))
            if grads is not None:
                return grads
    raise UnsupportedError(f"impl: no path of the CPU takes this backward, of {', '.join(PATH_NAMES)}")


def _give_up(impl: str, call: Call, error: KernelError) -> None:
    """Remembers a kernel that failed; raises where it was asked for by name."""
    _failed[_kind(call)] = error.reasons[0]
    if impl == "triton":
        raise error
    _warn_once(f"{error.reasons[0]}; the blocked implementation runs instead")


def _warn_once(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warn_caller(reason, RuntimeWarning)
