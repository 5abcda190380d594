"""Floating-point operations of the ops, for torch's counter; registered once that counter is in use."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from attnzoo_kernels.runtime.plain import is_readable

COUNTER = "torch.utils.flop_counter"
_registered = False


def register_when_counting() -> None:
    """Registers the formulas if somebody has imported the counter, whose import is slow."""
    global _registered
    if _registered or COUNTER not in sys.modules:
        return
    _registered = True
    counter: Any = sys.modules[COUNTER]
    counter.register_flop_formula(torch.ops.attnzoo.bsa_fwd, get_raw=True)(_forward)
    counter.register_flop_formula(torch.ops.attnzoo.bsa_bwd, get_raw=True)(_backward)
    for mode in _get_current_dispatch_mode_stack():
        # A counter that is running has copied the formulas that there were when it was made.
        if isinstance(mode, counter._FlopCounterMode):
            mode.counter.flop_registry.update(counter.flop_registry)


def _pairs(q: Tensor, k: Tensor, start: Tensor, count: Tensor, blocks: tuple[int, int]) -> int:
    """Listed (query, key) pairs; all that there may be where the lists cannot be read."""
    entries = int(count.sum()) if is_readable(count) else start.numel() * -(-k.shape[2] // blocks[1])
    shared = q.shape[0] * q.shape[1] // max(start.shape[0] * start.shape[1], 1)
    return entries * shared * math.prod(blocks)


def _forward(q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor, col: Tensor, *rest: Any, **_: Any) -> int:
    """Two products: scores and outputs."""
    blocks = [x for x in rest if isinstance(x, int) and not isinstance(x, bool)][:2]
    return 2 * (q.shape[3] + v.shape[3]) * _pairs(q, k, start, count, (blocks[0], blocks[1]))


def _backward(dout: Any, dlse: Any, out: Any, lse: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **_: Any) -> int:
    """Five products: the scores again, and the gradients of weights, queries, keys and values."""
    start, count, _, *others = rest
    blocks = [x for x in others if isinstance(x, int) and not isinstance(x, bool)][:2]
    return 2 * (3 * q.shape[3] + 2 * v.shape[3]) * _pairs(q, k, start, count, (blocks[0], blocks[1]))
