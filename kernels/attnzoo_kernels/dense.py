"""Dense calls on CPUs by torch's own fused kernel, where it multiplies with the same library and so is quicker.

It walks through tiles that stay in the cache; a chunk of whole rows does not where rows are long.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo_kernels.call import Call
from attnzoo_kernels.gemm import route

LEAST_ROWS = 512
"""Rows from which a call is handed over."""


def may_take(call: Call) -> bool:
    """Whether a call may be of the kind that :func:`takes`; reads metadata alone."""
    q, k, v, rule = call.q, call.k, call.v, call.rule
    seq_q, seq_k = q.shape[2], k.shape[2]
    if not isinstance(seq_q, int) or not isinstance(seq_k, int) or q.device.type != "cpu":
        return False
    plain = call.key_bias is None and call.aux is None and call.gate is None and call.origins is None
    aligned = not rule.causal or seq_q == seq_k
    return (
        plain
        and aligned
        and rule.q_pos is None
        and rule.window is None
        and q.dtype == torch.float32
        and seq_q >= LEAST_ROWS
        and 0 not in (q.numel(), k.numel(), v.numel())
        and q.shape[3] == v.shape[3]
        and call.col.shape[0] == call.grid[1]
        and route() == "mkl"
    )


def takes(call: Call) -> bool:
    """Whether every row of a call reads every block, under no rule but causality."""
    return may_take(call) and bool((call.count == call.grid[1]).all())


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Out ``[B, H, T, D]`` and lse ``[B, H, T]``."""
    k, v = _packed(call.k), _packed(call.v)
    found = [
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, call.rule.causal, scale=call.scale)
        for q in _by_head(_packed(call.q), call)
    ]
    return _joined([out for out, _ in found]), _joined([lse for _, lse in found])


def backward(call: Call, results: tuple[Tensor, Tensor], dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from those of out.

    Args:
        call: The call.
        results: Out and lse of the forward.
        dout: ``[B, H, T, D]``.
    """
    k, v = _packed(call.k), _packed(call.v)
    rows = (_by_head(x, call) for x in (_packed(dout), _packed(call.q), *results))
    found = [
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            of_dout, q, k, v, out, lse, 0.0, call.rule.causal, scale=call.scale
        )
        for of_dout, q, out, lse in zip(*rows, strict=True)
    ]
    dq, dk, dv = zip(*found, strict=True)
    return _joined(list(dq)), sum(dk[1:], dk[0]).contiguous(), sum(dv[1:], dv[0]).contiguous()


def _packed(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _by_head(x: Tensor, call: Call) -> tuple[Tensor, ...]:
    """Views ``[B, G, T, ..]`` of ``[B, H, T, ..]``: the first query head of every group, the second, and so on."""
    heads: tuple[Tensor, ...] = x.unflatten(1, (call.k.shape[1], -1)).unbind(2)
    return heads


def _joined(parts: list[Tensor]) -> Tensor:
    """The inverse, a contiguous tensor."""
    return torch.stack(parts, 2).flatten(1, 2)
