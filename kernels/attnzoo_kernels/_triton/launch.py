"""Runs a call on the Triton kernels: grids, launches, and what becomes of partial results."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from attnzoo_kernels._triton.backward import key_kernel, query_kernel
from attnzoo_kernels._triton.block_lists import lists_of
from attnzoo_kernels._triton.forward import forward_kernel, join_kernel
from attnzoo_kernels._triton.specialize import INTERPRETED as INTERPRETED
from attnzoo_kernels._triton.specialize import Job, job, prepare, unit_last, view_of
from attnzoo_kernels._triton.tile_table import Tiles, padded
from attnzoo_kernels.errors import KernelError
from attnzoo_kernels.spec.call import Call

LOG2E = math.log2(math.e)
MOST_SPLITS = 64
FEW_ROWS = 16
"""Tiles of at most so many rows read a layout's lists as they are: sorting them first would cost more than masks."""

_interpreter = threading.RLock()
"""Interpreted programs share one grid index: two at once compute wrong numbers without a word."""


@cache
def processors(device: torch.device) -> int:
    """Programs that run side by side on a device; 1 in the interpreter."""
    return 1 if device.type != "cuda" else int(torch.cuda.get_device_properties(device).multi_processor_count)


def run(kernel: Any, programs: int, arguments: Sequence[Any], tiles: Tiles | None, **constants: Any) -> None:
    """Starts a kernel.

    Raises:
        KernelError: If it does not compile, or does not fit the device.
    """
    options = {} if tiles is None else {"num_warps": tiles.warps, "num_stages": tiles.stages}
    try:
        kernel[(programs,)](*arguments, **constants, **options)
    except (OutOfResources, CompilationError, PTXASError) as error:
        first = str(error).strip().splitlines()[:1]
        reason = f"triton: {kernel.fn.__name__} does not run on this device: {type(error).__name__}: {' '.join(first)}"
        raise KernelError(f"block_sparse_attention: {reason}", (reason,)) from error


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """The device made current, or the interpreter's lock."""
    if device.type != "cuda":
        return _interpreter
    # The allocator of descriptors is a context variable, which autograd's threads do not inherit.
    triton.set_allocator(_scratch)
    return torch.cuda.device(device)


def _splits(programs: int, most: int, device: torch.device) -> int:
    """Into how many equal parts each program's list is cut, so that the device is busy: a power of two."""
    splits = 1
    while splits < min(most, MOST_SPLITS) and programs * splits < processors(device):
        splits *= 2
    return splits


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Out ``[B, H, T, Dv]`` in q's dtype and lse ``[B, H, T]``."""
    batch, heads, _, seq_q, seq_k = call.shape
    dtype = call.q.dtype
    call = prepare(call)
    out = call.q.new_empty(batch, heads, seq_q, call.v.shape[3])
    lse = call.q.new_empty(batch, heads, seq_q, dtype=call.acc_dtype)
    if 0 in (batch, seq_q, seq_k):
        return out.zero_().to(dtype), lse.fill_(-torch.inf)
    with _on(call.q.device):
        work = job(call, "decode", None)
        splits = _splits(work.row_tiles, -(-call.grid[1] // 2), call.q.device)
        if splits == 1 and call.grid[0] > 1 and work.shape.PACK_GQA * call.block_q > FEW_ROWS:
            work = job(call, "forward", lists_of(call).queries)
        c = work.shape
        total = batch * heads * seq_q
        parts = out
        lses = lse
        if splits > 1:
            parts = call.q.new_empty(splits, *out.shape, dtype=call.acc_dtype)
            lses = lse.new_empty(splits, *lse.shape)
        views = (view_of(call.q), view_of(call.k), view_of(call.v))
        arguments = (*views, parts, lses, work.lists, work.switches, call.scale * LOG2E, *work.sizes, splits,
                     total, c)  # fmt: skip
        run(forward_kernel, work.row_tiles * splits, arguments, work.tiles)
        if splits > 1:
            width = call.v.shape[3]
            run(join_kernel, total, (parts, lses, out, lse, total, splits), None,
                SPLITS=padded(splits), DV=width, DVP=padded(width))  # fmt: skip
    return out.to(dtype), lse


def backward(
    call: Call, results: tuple[Tensor, Tensor], dout: Tensor | None, dlse: Tensor | None, need: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, key_bias, q_aux, k_aux and the gate's keys, each ``None`` where ``need`` says so."""
    given = call
    out, lse = results
    call = prepare(call)
    batch, _, _, seq_q, seq_k = call.shape
    if dout is None:
        dout = out.new_zeros(()).expand(out.shape)
    likes = _gradient_like(given)
    if 0 in (batch, seq_q, seq_k):
        return tuple(
            torch.zeros_like(x) if needed and x is not None else None for x, needed in zip(likes, need, strict=True)
        )
    need = [needed and like is not None for needed, like in zip(need, likes, strict=True)]
    dout = unit_last(dout.to(call.q.dtype))
    out = out.to(call.q.dtype).contiguous()
    dlse = None if dlse is None else dlse.to(lse.dtype).contiguous()
    with _on(call.q.device):
        lists = lists_of(call)
        delta = torch.empty_like(lse)
        queries = query_gradients(job(call, "query", lists.queries), (out, dout, lse, dlse, delta), need)
        keys = key_gradients(job(call, "key", lists.keys), (dout, lse, delta), need)
    dq, dq_aux = queries
    dk, dv, dbias, dk_aux, dgate = keys
    found = (dq, dk, dv, dbias, dq_aux, dk_aux, dgate)
    return tuple(None if x is None or like is None else _reduced(x, like) for x, like in zip(found, likes, strict=True))


def _gradient_like(call: Call) -> tuple[Tensor | None, ...]:
    q_aux, k_aux = call.aux or (None, None)
    return call.q, call.k, call.v, call.key_bias, q_aux, k_aux, None if call.gate is None else call.gate.key


def query_gradients(work: Job, given: tuple[Any, ...], need: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of q and q_aux; ``given`` are out, dout, lse, dlse and delta, which is written."""
    call = work.call
    out, dout, lse, dlse, delta = given
    dq = call.q.new_empty(call.q.shape) if need[0] else None
    dq_aux = call.aux[0].new_empty(call.aux[0].shape) if need[4] and call.aux is not None else None
    views = (view_of(call.q), view_of(call.k), view_of(call.v))
    arguments = (*views, out, view_of(dout), lse, dlse, delta, dq, dq_aux, work.lists, work.switches, call.scale,
                 call.scale * LOG2E, *work.sizes, work.shape)  # fmt: skip
    run(query_kernel, work.row_tiles, arguments, work.tiles)
    return dq, dq_aux


def key_gradients(work: Job, given: tuple[Tensor, ...], need: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Gradients ``[B, G|H, .., D]`` of keys and what belongs to them, in the accumulator's dtype."""
    call = work.call
    c = work.shape
    dout, lse, delta = given
    batch, heads, groups, _, seq_k = call.shape
    splits = _splits(work.key_tiles, 8, call.q.device)

    def made(needed: bool, *shape: int) -> Tensor | None:
        return call.q.new_empty(splits, batch, *shape, dtype=call.acc_dtype) if needed else None

    dk = made(need[1], groups, seq_k, call.q.shape[3])
    dv = made(need[2], groups, seq_k, call.v.shape[3])
    dbias = made(need[3], heads if c.BIAS_HEADS == 2 else groups, seq_k)
    dk_aux = made(need[5], groups, seq_k, c.DA)
    dgate = made(need[6], groups, call.grid[1], call.q.shape[3])
    views = (view_of(call.q), view_of(call.k), view_of(call.v), view_of(dout))
    results = (dk, dv, dbias, dk_aux, dgate)
    if any(x is not None for x in results):
        arguments = (*views, lse, delta, *results, work.lists, work.switches, call.scale, call.scale * LOG2E,
                     *work.sizes, splits, batch * groups * seq_k, c)  # fmt: skip
        run(key_kernel, work.key_tiles * splits, arguments, work.tiles)
    return tuple(None if x is None else x.sum(0) if splits > 1 else x[0] for x in results)


def _reduced(x: Tensor, like: Tensor) -> Tensor:
    """A gradient summed where the input was one for all, in the input's dtype."""
    if x.shape != like.shape:
        x = x.sum_to_size(like.shape)
    return x.to(like.dtype)
