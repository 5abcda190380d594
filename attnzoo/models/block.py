"""A layer of a decoder: RMSNorm and attention, RMSNorm and SwiGLU. Letters: B batch, T tokens, C model width."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import silu

from attnzoo.base.config import check_int
from attnzoo.base.layer import AttentionConfig, AttentionLayer
from attnzoo.cache.kv_cache import KVCache
from attnzoo.factory import create


class SwiGLU(nn.Module):
    """``[..., C]`` to ``[..., C]``: down(silu(gate(x)) * up(x)); Shazeer 2020, *GLU Variants Improve Transformer*."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden_dim, bias=False)
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        out: Tensor = self.down(silu(self.gate(x)) * self.up(x))
        return out


class Block(nn.Module):
    """A layer of a decoder, ``[B, T, C]`` to ``[B, T, C]``; each half adds to what comes in.

    Args:
        config: The configuration of its attention, of any variant.
        hidden_dim: The width inside SwiGLU; ``None`` means 8/3 of C: as many weights as 4 C have without a gate.
    """

    def __init__(self, config: AttentionConfig, hidden_dim: int | None = None) -> None:
        super().__init__()
        width = 8 * config.dim // 3 if hidden_dim is None else hidden_dim
        check_int("hidden_dim", width, 1)
        self.attention_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.attention: AttentionLayer = create(config)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.mlp = SwiGLU(config.dim, width)

    def forward(self, x: Tensor, key_padding: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Runs the layer; the arguments are those of its attention."""
        x = x + self.attention(self.attention_norm(x), key_padding=key_padding, cache=cache)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out
