"""Correctness first: no time is printed of a contestant that is wrong."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnzoo_kernels import BlockLayout
from bench.contestants import Wrong
from bench.cpu.peers import token_mask

BOUND = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Largest difference to fp32 attention with a mask, for normal inputs: a few roundings of values of size 1."""


def truth(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> Tensor:
    """Attention on the seen pairs in fp32, head by head to save memory."""
    mask = token_mask(layout)
    group = q.shape[1] // k.shape[1]
    heads = []
    for head in range(q.shape[1]):
        one = slice(head, head + 1)
        kv = slice(head // group, head // group + 1)
        shared = mask[:, head * mask.shape[1] // q.shape[1]].unsqueeze(1)
        heads.append(
            scaled_dot_product_attention(q[:, one].float(), k[:, kv].float(), v[:, kv].float(), attn_mask=shared)
        )
    return torch.cat(heads, 1)


def check(name: str, out: Tensor, expected: Tensor) -> None:
    """Raises unless an output is right.

    Raises:
        Wrong: With the largest difference.
    """
    difference = float((out.float() - expected).abs().max())
    if not difference <= BOUND[out.dtype]:
        raise Wrong(f"{name}: differs by {difference:.1e}, at most {BOUND[out.dtype]:.0e} is right")
