"""A decoding step of a converted block: what its one row reads is known beforehand, and no layout or plan is made.

Letters: B batch, H query heads, G KV heads, S slots held, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.base.layer import AttentionLayer
from attnzoo_kernels import attend_slots
from attnzoo_kernels.runtime.plain import is_plain


def attend_one_row(layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, held: int) -> Tensor | None:
    """Attention of the last of ``held`` slots as a layer's plan would have it; ``None`` where a plan must be made.

    Args:
        layer: What is read.
        q: Rotated queries ``[B, H, 1, D]``.
        k: Rotated keys ``[B, G, S, D]``, S at least ``held``.
        v: Values ``[B, G, S, D]``.
        held: The row's own slot, and all before it.
    """
    if not _takes(layer, q, k, v):
        return None
    slots = layer.known_slots(held, q.device)
    if slots is None:
        return None
    scale = layer.config.scale
    return attend_slots(q, k, v, slots, scale=q.shape[3] ** -0.5 if scale is None else scale)


def _takes(layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a call is one row of plain tensors on a CPU, of which nobody wants gradients."""
    if q.shape[2] != 1 or q.device.type != "cpu" or 0 in (q.numel(), v.numel()):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return False
    return all(is_plain(x) for x in (q, k, v))
