"""The weights of an attention block by role, whatever the host calls them.

Letters: C model width, H query heads, G KV heads, D head width, Dv value width, r latent width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnzoo.base.rope import RotaryConfig


@dataclass(frozen=True, eq=False, kw_only=True)
class Projections:
    """Weights as in ``nn.Linear``, rows ordered by head.

    Attributes:
        q: ``[H * D, C]``.
        k: ``[G * D, C]``.
        v: ``[G * Dv, C]``.
        o: ``[C, H * Dv]``.
        q_bias: ``[H * D]`` or ``None``.
        k_bias: ``[G * D]`` or ``None``.
        v_bias: ``[G * Dv]`` or ``None``.
        o_bias: ``[C]`` or ``None``.
        num_heads: H.
        num_kv_heads: G.
        head_dim: D.
        rotary: How queries and keys are rotated after projection; ``None`` if they are not.
        scale: The factor on scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: RotaryConfig | None
    scale: float


@dataclass(frozen=True, eq=False, kw_only=True)
class LatentProjections:
    """Weights of the latent form: keys and values of all heads are expanded from r cached values.

    Attributes:
        q: ``[H * D, C]``.
        down: ``[r, C]``.
        up: ``[G * (D + Dv), r]``, keys first.
        o: ``[C, H * Dv]``.
        q_bias: ``[H * D]`` or ``None``.
        down_bias: ``[r]`` or ``None``.
        o_bias: ``[C]`` or ``None``.
        num_heads: H.
        num_kv_heads: G.
        head_dim: D.
        rotary: How queries and keys are rotated.
        scale: The factor on scores.
    """

    q: Tensor
    down: Tensor
    up: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    down_bias: Tensor | None = None
    o_bias: Tensor | None = None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: RotaryConfig | None
    scale: float
