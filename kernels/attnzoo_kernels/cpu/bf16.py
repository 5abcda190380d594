"""The forward in bf16 on CPUs with AMX: gathered blocks by torch's own kernel, which multiplies scores in its units.

Products of fp32 scores out of bf16 inputs do not exist as an operation of their own on CPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo_kernels.cpu.gather import Source, tile, untile
from attnzoo_kernels.cpu.schedule import Bucket, Schedule
from attnzoo_kernels.cpu.scores import ceiling, rows_of
from attnzoo_kernels.runtime.processor import cpu_class
from attnzoo_kernels.runtime.workspace import scratch
from attnzoo_kernels.spec.call import Call

LEAST_BLOCK = 16
"""Rows of a query block from which the kernel is quicker."""


def takes(call: Call) -> bool:
    """Whether a call may be computed here, unless its log-sum-exp is wanted: the kernel's is good for five digits."""
    widths = call.q.shape[3] == call.v.shape[3] and call.q.numel() > 0
    half = call.q.dtype == torch.bfloat16 and cpu_class() == "amx"
    return call.is_plain and widths and half and call.block_q >= LEAST_BLOCK


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
