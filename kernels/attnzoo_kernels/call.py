"""One call of the operation, checked and in plain data: what every implementation receives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo_kernels.rule import Rule


@dataclass(frozen=True)
class Call:
    """The inputs of one call after checking.

    Attributes:
        q: ``[B, H, T, D]``.
        k: ``[B, G, S, D]``.
        v: ``[B, G, S, Dv]``.
        start: int32 ``[B|1, h, M]``, where each row's list begins in ``col``; h is 1, G or H.
        count: int32, as ``start``: the length of each list.
        col: int32 ``[cap]``, the key blocks.
        key_bias: ``[B|1, G|H|1, S]``, added to the scaled scores, or ``None``.
        rule: Which slots a row may see.
        block_q: Rows per query block.
        block_k: Slots per key block.
        scale: The factor on scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    start: Tensor
    count: Tensor
    col: Tensor
    key_bias: Tensor | None
    rule: Rule
    block_q: int
    block_k: int
    scale: float

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """``B, H, G, T, S``."""
        batch, heads, seq_q, _ = self.q.shape
        return batch, heads, self.k.shape[1], seq_q, self.k.shape[2]

    @property
    def grid(self) -> tuple[int, int]:
        """``M, N``: query blocks and key blocks."""
        seq_q, seq_k = self.q.shape[2], self.k.shape[2]
        return -(-seq_q // self.block_q), -(-seq_k // self.block_k)

    @property
    def acc_dtype(self) -> torch.dtype:
        """The dtype of scores, log-sum-exp and accumulators: fp64 for fp64 inputs, else fp32."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32
