"""What others offer for the same call, each with a reason where it cannot run."""

from __future__ import annotations

import importlib.util
import shutil

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnzoo_kernels import BlockLayout
from bench.contestants import Missing, Run


def flex(layout: BlockLayout) -> Run:
    """Compiled FlexAttention on the same blocks; forward only, there is no backward on CPUs."""
    if shutil.which("g++") is None and shutil.which("c++") is None:
        raise Missing("no C++ compiler")
    from torch.nn.attention.flex_attention import flex_attention

    mask = layout.to_block_mask(causal=True)
    # The number of threads is compiled in.
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = compiled(q, k, v, block_mask=mask)
        return out

    return run


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense causal attention of torch."""
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def naive(layout: BlockLayout) -> Run:
    """The definition in three lines of torch, at T x S memory."""
    mask = token_mask(layout)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        out: Tensor = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
        return out

    return run


def x_transformers() -> Run:
    """Dense causal attention of x-transformers."""
    if importlib.util.find_spec("x_transformers") is None:
        raise Missing("x-transformers is not installed")
    from x_transformers.attend import Attend

    attend = Attend(causal=True)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attend(q, k, v)[0]
        return out

    return run


def token_mask(layout: BlockLayout) -> Tensor:
    """Which pairs are seen, bool ``[1, H, T, S]``."""
    keep = layout.to_mask().repeat_interleave(layout.block_q, 2).repeat_interleave(layout.block_k, 3)
    keep = keep[:, :, : layout.seq_q, : layout.seq_k]
    return keep & torch.ones(layout.seq_q, layout.seq_k, dtype=torch.bool).tril(layout.seq_k - layout.seq_q)
