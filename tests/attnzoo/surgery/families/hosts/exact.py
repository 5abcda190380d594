"""Hosts of which nothing is computed in fp32, with weights at which mistakes show."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ExactNorm(nn.Module):
    """A host's norm without its detour through fp32."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach())
        self.eps = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))
        # Gemma's weights are what is added to 1.
        self.shift = float("Gemma" in type(norm).__name__)

    def forward(self, x: Tensor) -> Tensor:
        return (self.shift + self.weight) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


class ExactRotary(nn.Module):
    """A host's rotary tables from fp64 angles, those of one kind of layers or of several."""

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        parameters = rotary.config.rope_parameters
        self.frequencies: dict[str | None, Tensor] = {}
        for name, x in rotary.named_buffers():
            if name.endswith("inv_freq") and "original" not in name:
                kind = name.removesuffix("inv_freq").rstrip("_") or None
                base = (parameters if kind is None else parameters[kind])["rope_theta"]
                self.frequencies[kind] = base ** -(torch.arange(len(x), dtype=torch.float64) / len(x))

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].double() * self.frequencies[layer_type]
        both = torch.cat([angles, angles], -1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)


class ExactSines(nn.Module):
    """GPT-J's tables from fp64 angles: sines and cosines of each plane."""

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.frequencies = 1e4 ** -(torch.arange(0, rotary.pos_embd_dim, 2).double() / rotary.pos_embd_dim)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].double() * self.frequencies
        return angles.sin().to(x.dtype), angles.cos().to(x.dtype)


def make_exact(model: Any) -> Any:
    """Replaces what computes in fp32 whatever a model's dtype is."""
    for path, module in list(model.named_modules()):
        name = type(module).__name__
        rotary = ExactSines if name == "GPTJRotaryEmbedding" else ExactRotary
        new = ExactNorm(module) if name.endswith("RMSNorm") else rotary(module) if "RotaryEmb" in name else None
        if new is not None:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
    return model.double().eval()


def randomise(model: Any, seed: int = 0) -> Any:
    """Gives all weights values at which scores are far from uniform, and biases that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            std = 0.3 if p.dim() < 2 else 2 * p.shape[-1] ** -0.5
            p.copy_(std * torch.randn(p.shape, generator=generator))
            if p.dim() < 2 and "norm" in name.lower() and "bias" not in name:
                p.add_(1)
    return model
