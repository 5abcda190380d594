"""Many rows that choose key blocks for themselves, on CPUs: key block by key block instead of row by row.

Gathering what each row reads costs as many times the keys as there are rows. Rows that read a block can share it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo_kernels.cpu.path import CPUPath, Gradients, wanted
from attnzoo_kernels.key_major import attention
from attnzoo_kernels.spec.call import Call

LEAST_ROWS = 8
"""Rows that read a key block on average, from which sharing it is quicker than gathering it for each."""


class KeyMajorPath(CPUPath):
    """Rows with lists of their own, forward and backward."""

    name = "key_major"

    def reasons(self, call: Call, *, need_lse: bool = False) -> tuple[str, ...]:
        """As :func:`reasons`."""
        return reasons(call)

    def forward(self, call: Call, *, need_lse: bool) -> tuple[Tensor, Tensor] | None:
        """Out and lse, or ``None`` where they are not finite: what nobody may see may have spoiled them."""
        found = attention.forward(call)
        return found if bool(found[0].sum(dtype=call.acc_dtype).isfinite()) else None

    def keeps_results(self, call: Call) -> bool:
        """Whenever the backward is computed here, but in bf16, where another path may compute the forward alone."""
        return call.q.dtype != torch.bfloat16 and not reasons(call)

    def backward_reasons(self, call: Call, *, dlse: bool = False) -> tuple[str, ...]:
        """As :func:`reasons`."""
        return reasons(call)

    def backward(
        self,
        call: Call,
        results: tuple[Tensor | None, Tensor | None],
        *,
        dout: Tensor | None,
        dlse: Tensor | None,
        need: list[bool],
    ) -> Gradients | None:
        """Gradients, or ``None`` as in the forward, or where only lse has a gradient."""
        if dout is None:
            return None
        out, lse = results
        if out is None or lse is None:
            out, lse = attention.forward(call)
        grads = attention.backward(call, (out, lse), dout, dlse)
        if not all(bool(grad.sum(dtype=call.acc_dtype).isfinite()) for grad in grads):
            return None
        return wanted(grads, need)


def reasons(call: Call) -> tuple[str, ...]:
    """Why a call is not of this kind; reads metadata alone."""
    q = call.q
    k = call.k
    if not isinstance(q.shape[2], int) or not isinstance(k.shape[2], int):
        return ("key_major: a length is a symbol, as while a program is traced",)
    found = []
    if q.device.type != "cpu":
        found.append(f"key_major: q is on {q.device}; it runs on CPUs alone")
    if 0 in (q.numel(), k.numel(), call.v.numel()):
        found.append("key_major: there are no queries, keys or values")
    if call.block_q != 1:
        found.append(f"key_major: query blocks have {call.block_q} rows; it takes lists of single ones")
    if call.rule.packed is not None or call.rule.window is not None or call.aux is not None:
        found.append("key_major: the call has a window, auxiliary channels or packed heads")
    if call.key_bias is not None:
        found.append("key_major: the call has a bias")
    gate = call.gate
    if gate is not None and (not gate.is_last or isinstance(gate.mix, Tensor) or call.block_k == 1):
        found.append("key_major: gates have keys or a mix for each head, or blocks are nothing but a landmark")
    if not found and _rows_of_a_block(call) < LEAST_ROWS:
        found.append(f"key_major: a key block is read by fewer than {LEAST_ROWS} rows on average")
    return tuple(found)


def _rows_of_a_block(call: Call) -> float:
    """Rows that read a key block on average, if all room of the lists is used."""
    batch, heads, groups, _, _ = call.shape
    shared = batch * heads / (call.start.shape[0] * call.start.shape[1])
    return float(call.col.shape[0] * shared / (batch * groups * call.grid[1]))
