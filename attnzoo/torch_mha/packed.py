"""torch's packed weights of multi-head attention: their names, shapes, order and first values, and what they make.

Letters: B batch, T query tokens, S key tokens, C model width, H heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v")
"""The parameters that torch's module has itself, by their names there."""


class PackedModule(nn.Module):
    """A module with the weights of ``torch.nn.MultiheadAttention``, by their names and shapes there.

    Attributes:
        embed_dim: Model width C.
        num_heads: Heads H.
        kdim: Width of keys.
        vdim: Width of values.
        add_zero_attn: Whether a key and a value of zeros stand behind the others.
    """

    embed_dim: int
    num_heads: int
    kdim: int
    vdim: int
    add_zero_attn: bool
    out_proj: nn.Linear
    in_proj_weight: nn.Parameter | None
    q_proj_weight: nn.Parameter | None
    k_proj_weight: nn.Parameter | None
    v_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def make_weights(self, bias: bool, add_bias_kv: bool, where: dict[str, Any]) -> None:
        """Torch's parameters in torch's order, which random numbers follow."""
        width = self.embed_dim
        shapes: dict[str, tuple[int, ...]] = {}
        if self.kdim == self.vdim == width:
            shapes["in_proj_weight"] = (3 * width, width)
        else:
            shapes["q_proj_weight"] = (width, width)
            shapes["k_proj_weight"] = (width, self.kdim)
            shapes["v_proj_weight"] = (width, self.vdim)
        if bias:
            shapes["in_proj_bias"] = (3 * width,)
        if add_bias_kv:
            shapes["bias_k"] = (1, 1, width)
            shapes["bias_v"] = (1, 1, width)
        for name in WEIGHTS:
            made = nn.Parameter(torch.empty(shapes[name], **where)) if name in shapes else None
            self.register_parameter(name, made)
        self.out_proj = NonDynamicallyQuantizableLinear(width, width, bias=bias, **where)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts torch's weights anew, as torch does; those of a variant inside are left."""
        for name in WEIGHTS[:4]:
            weight = getattr(self, name)
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.constant_(self.in_proj_bias, 0.0)
            nn.init.constant_(self.out_proj.bias, 0.0)
        for weight in (self.bias_k, self.bias_v):
            if weight is not None:
                nn.init.xavier_normal_(weight)

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens ``[B, T, C]``, ``[B, S, Ck]``, ``[B, S, Cv]`` to q ``[B, H, T, D]``, k and v ``[B, H, S, D]``."""
        packed = self.in_proj_weight
        bias = self.in_proj_bias
        if packed is not None and query is key and key is value:
            heads = linear(query, packed, bias).chunk(3, -1)
        else:
            weights: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            weights = weights if packed is None else packed.chunk(3)
            biases: Any = (None, None, None) if bias is None else bias.chunk(3)
            parts = zip((query, key, value), weights, biases, strict=True)
            heads = tuple(linear(x, weight, shift) for x, weight, shift in parts)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in heads)
        return q, k, v

    def with_more_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H, S, D]``, and behind them a learned one, and one of zeros."""
        found = []
        for x, learned in ((k, self.bias_k), (v, self.bias_v)):
            one = (x.shape[0], self.num_heads, 1, k.shape[3])
            rows = [x]
            if learned is not None:
                rows.append(learned.view(1, self.num_heads, 1, k.shape[3]).to(x.dtype).expand(one))
            if self.add_zero_attn:
                rows.append(x.new_zeros(one))
            found.append(torch.cat(rows, 2) if len(rows) > 1 else x)
        return found[0], found[1]
