"""What layers are measured against: attention as one would write it in ten lines of torch, and nothing of ours.

Letters: B batch, T tokens, S slots of a cache, C model width, H query heads, G KV heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

BASE = 10000.0
"""Of the wavelengths of rotary positions, as layers have it."""


class TenLines(nn.Module):
    """Causal attention: three linear maps, a rotation, ``scaled_dot_product_attention``, a fourth linear map.

    It computes what ``mha`` computes and takes its weights; it checks nothing.

    Args:
        dim: C.
        num_heads: H.
        num_kv_heads: G; ``None`` means H.
        most: Positions that there are cosines and sines for.
        device: Of the weights.
        dtype: Of the weights.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        most: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.width = dim // num_heads
        self.kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        groups = self.kv_heads * self.width
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(dim, rows, bias=False, device=device, dtype=dtype) for rows in (dim, groups, groups, dim)
        )
        plane = torch.arange(0, self.width, 2, dtype=torch.float64, device=device) / self.width
        angle = torch.arange(most, dtype=torch.float64, device=device).unsqueeze(1) * BASE**-plane  # [most, D / 2]
        self.register_buffer("cos", angle.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angle.sin().to(dtype), persistent=False)

    def new_cache(self, batch: int, slots: int) -> Tensor:
        """Room for keys and values, ``[2, B, G, S, D]``."""
        weight = self.k_proj.weight
        return torch.zeros(2, batch, self.kv_heads, slots, self.width, device=weight.device, dtype=weight.dtype)

    def forward(self, x: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        """Attends to tokens ``[B, T, C]`` and those before them.

        Args:
            x: A whole sequence, or the one token behind those in the cache.
            cache: Room for keys and values, written from slot ``start`` on.
            start: Tokens in the cache: 0, or T is 1.
        """
        q, k, v = (rows(x).unflatten(2, (-1, self.width)).transpose(1, 2) for rows in self._inner)  # [B, h, T, D]
        end = start + x.shape[1]
        q = rotated(q, self.cos[start:end], self.sin[start:end])
        k = rotated(k, self.cos[start:end], self.sin[start:end])
        if cache is not None:
            cache[0, :, :, start:end] = k
            cache[1, :, :, start:end] = v
            k, v = cache[:, :, :, :end]
        causal = x.shape[1] > 1
        out = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        found: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return found

    @property
    def _inner(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.q_proj, self.k_proj, self.v_proj


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads ``[B, h, T, D]`` rotated by angles ``[T, D / 2]``; the first half pairs with the second."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
