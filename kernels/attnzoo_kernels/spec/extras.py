"""The switches of the operation beside its layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Extras:
    """Everything that changes which keys a query sees, or how they are scored, beside the layout.

    A field that is off costs nothing. Shapes use B batch, H query heads, G KV heads, T queries, S keys, N key blocks.

    Attributes:
        q_pos: int32 ``[B|1, H|1, T]``, the last key slot a row may read. ``None`` means ``t + S - T``; -1 is an absent
            row: it gives 0 and log-sum-exp -inf, receives no gradient and disturbs nobody, even where it holds NaN.
        key_bias: ``[B|1, G|H|1, S]``, added to the scaled scores (fp64 when the inputs are fp64, else fp32). A key
            with -inf is never read: its K and V may be NaN.
        window: How many keys a row sees, its own included: ``0 <= q_pos - s < window``; an int32 tensor ``[H]`` gives
            each head its own. Without causality the rule is ``|q_pos - s| < window``.
        sink: Slots ``s < sink`` stay visible beside the window; causality still holds. An int, or int32 ``[H]``.
        aux: ``(q_aux [B, H, T, Da], k_aux [B|1, G|1, S, Da])``: the score becomes ``scale * (q.k + q_aux.k_aux)``.
        gate: Landmark gates: ``k_gate [B, G, N, D]``, or ``"last"`` for the last key of each block.
        gate_mix: A block's outer logit is ``mix * gate + (1 - mix) * its own log-sum-exp``; a float or ``[H]``.
        rope: ``(cos, sin)``, each ``[P, Dr/2]`` in half layout; used together with ``layout.origin``.
        precision: For bf16 on CPUs with bf16 instructions: ``"fast"`` multiplies queries and keys in bf16 too, which
            rounds large scores; the backward is always precise.
    """

    q_pos: Tensor | None = None
    key_bias: Tensor | None = None
    window: int | Tensor | None = None
    sink: int | Tensor = 0
    aux: tuple[Tensor, Tensor] | None = None
    gate: Tensor | Literal["last"] | None = None
    gate_mix: float | Tensor = 1.0
    rope: tuple[Tensor, Tensor] | None = None
    precision: Literal["precise", "fast"] = "precise"
