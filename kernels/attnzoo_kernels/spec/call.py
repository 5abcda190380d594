"""One call of the operation, checked and in plain data: what every implementation receives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo_kernels.spec.token_rule import TokenRule


@dataclass(frozen=True)
class Gate:
    """Gates of whole blocks.

    Attributes:
        key: ``[B, G, N, D]``, or ``None`` where each block's last key is its landmark.
        mix: How much the gate counts against the block's own log-sum-exp; a float or ``[H]``.
    """

    key: Tensor | None
    mix: float | Tensor

    @property
    def is_last(self) -> bool:
        """Whether the last column of each block is a landmark and no ordinary key."""
        return self.key is None


@dataclass(frozen=True)
class Origins:
    """Rotary origins of the layout's entries.

    Attributes:
        of_entry: int32 ``[cap]``, parallel to ``col``.
        cos: ``[P, Dr / 2]``.
        sin: As ``cos``.
    """

    of_entry: Tensor
    cos: Tensor
    sin: Tensor


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
        aux: ``(q_aux [B, H, T, Da], k_aux [B|1, G|1, S, Da])``, more channels of the score, or ``None``.
        gate: Gates of blocks, or ``None``.
        origins: Rotary origins, or ``None``.
        fast: Whether bf16 may round the scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    start: Tensor
    count: Tensor
    col: Tensor
    key_bias: Tensor | None
    rule: TokenRule
    block_q: int
    block_k: int
    scale: float
    aux: tuple[Tensor, Tensor] | None = None
    gate: Gate | None = None
    origins: Origins | None = None
    fast: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """``B, H, G, T, S``."""
        batch, heads, seq_q, _ = self.q.shape
        return batch, heads, self.k.shape[1], seq_q, self.k.shape[2]

    @property
    def grid(self) -> tuple[int, int]:
        """``M, N``: query blocks and key blocks."""
        seq_q = self.q.shape[2]
        seq_k = self.k.shape[2]
        return -(-seq_q // self.block_q), -(-seq_k // self.block_k)

    @property
    def is_plain(self) -> bool:
        """Whether scores are products of queries and keys and nothing else."""
        return self.key_bias is None and self.aux is None and self.gate is None and self.origins is None

    @property
    def acc_dtype(self) -> torch.dtype:
        """The dtype of scores, log-sum-exp and accumulators: fp64 for fp64 inputs, else fp32."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32
