"""The forward in bf16 on CPUs with AMX: gathered blocks by torch's own kernel, which multiplies scores in its units.

Products of fp32 scores out of bf16 inputs do not exist as an operation of their own on CPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo_kernels.cpu.gather import Source, tile, untile
from attnzoo_kernels.cpu.pack_gqa import pack_gqa, packed_rows, unpack_rows
from attnzoo_kernels.cpu.path import CPUPath
from attnzoo_kernels.cpu.schedule import Bucket, Schedule, chunks_of, schedule_for
from attnzoo_kernels.cpu.scores import ceiling, rows_of
from attnzoo_kernels.runtime.processor import cpu_class
from attnzoo_kernels.runtime.workspace import scratch
from attnzoo_kernels.spec.call import Call

LEAST_BLOCK = 16
"""Rows of a query block from which the kernel is quicker."""


class BF16Path(CPUPath):
    """The forward of plain calls in bf16 on CPUs with AMX."""

    name = "bf16"

    def reasons(self, call: Call, *, need_lse: bool = False) -> tuple[str, ...]:
        """As :func:`reasons`."""
        return reasons(call, need_lse=need_lse)

    def forward(self, call: Call, *, need_lse: bool) -> tuple[Tensor, Tensor] | None:
        """Out and an empty lse, or ``None`` where out is not finite."""
        packed = pack_gqa(call)
        schedule = schedule_for(packed)
        found = forward(packed, schedule, chunks_of(packed, schedule, tiled=True))
        if found is None:
            return None
        return unpack_rows(found, packed).contiguous(), call.q.new_empty(0, dtype=call.acc_dtype)


def reasons(call: Call, *, need_lse: bool = False) -> tuple[str, ...]:
    """Why a call is not computed here; reads metadata alone."""
    if call.q.dtype != torch.bfloat16:
        return (f"bf16: the inputs are {call.q.dtype}; it takes torch.bfloat16 alone",)
    if not isinstance(call.q.shape[2], int):
        return ("bf16: the number of queries is a symbol, as while a program is traced",)
    found = []
    if call.q.device.type != "cpu":
        found.append(f"bf16: q is on {call.q.device}; it runs on CPUs alone")
    if cpu_class() != "amx":
        found.append("bf16: the CPU has no AMX, and without it products of fp32 are quicker")
    if need_lse:
        found.append("bf16: the log-sum-exp is wanted, and the kernel's is good for five digits")
    if not call.is_plain:
        found.append("bf16: the call has a bias, auxiliary channels, gates or origins, which the kernel does not know")
    if call.q.shape[3] != call.v.shape[3]:
        found.append(f"bf16: keys and values have widths {call.q.shape[3]} and {call.v.shape[3]}; it takes equal ones")
    if call.q.numel() == 0:
        found.append("bf16: there are no queries")
    elif packed_rows(call) < LEAST_BLOCK:
        found.append(f"bf16: query blocks have fewer than {LEAST_BLOCK} rows, for which it is slower")
    return tuple(found)


def forward(call: Call, schedule: Schedule, parts: list[Bucket]) -> Tensor | None:
    """Out ``[B, H, T, D]`` by chunks of rows; ``None`` where it is not finite: what is hidden may have spoiled it."""
    batch, heads = call.shape[:2]
    often = schedule.reads_often(call)
    q = tile(call.q, call.block_q).contiguous()
    k, v = (Source(x, call.block_k, x.dtype, often=often) for x in (call.k, call.v))
    out = q.new_zeros(batch * heads * call.grid[0], call.block_q, q.shape[2])
    for part in parts:
        index = part.kv.reshape(-1)
        rows = rows_of(q, "q", part).unsqueeze(1)
        keys, values = (x.gather(name, index).view(len(rows), 1, -1, q.shape[2]) for name, x in (("k", k), ("v", v)))
        found, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows, keys, values, 0.0, False, attn_mask=_mask(call, schedule, part), scale=call.scale
        )
        if part.span is not None:
            out[part.span] = found.squeeze(1)
        else:
            out.index_copy_(0, part.rows, found.squeeze(1))
    return untile(out, call.q.shape) if bool(out.sum().isfinite()) else None


def _mask(call: Call, schedule: Schedule, part: Bucket) -> Tensor | None:
    """What is added to a chunk's scores, ``[R|1, 1, block_q, n * block_k]`` in scratch memory, or ``None``."""
    if not part.partial:
        return None
    limits = schedule.limits_in(call, part).common()
    shape = (limits.hi.shape[0], call.block_q, part.cols.shape[1] * call.block_k)
    mask = scratch("mask", shape, call.q.dtype, call.q.device)
    hidden = part.partial * call.block_k
    mask[..., :-hidden] = 0.0
    mask[..., -hidden:] = ceiling(limits, call.block_k, mask.dtype).clamp_(max=0.0).view(*shape[:2], hidden)
    return mask.unsqueeze(1)
