"""What the laws run on: every registered variant, at its defaults and where it is sparse at short lengths."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import attnzoo
from attnzoo.oracles.mha import Recipe
from attnzoo.reporting.warn import silent

LIMIT = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 2.0**-6}
"""What one token may differ by, of the largest value, between two ways to compute it: the promise made to users."""

LENGTHS = (1, 2, 7, 61, 64, 65, 129)


@dataclass(frozen=True)
class Case:
    """A variant at one size."""

    name: str
    size: str

    def __str__(self) -> str:
        return f"{self.name}-{self.size}"

    def config(self, **changes: Any) -> attnzoo.AttentionConfig:
        config_class = attnzoo.get_config(self.name)
        if self.size == "small":
            return replace(config_class.small(), **changes)
        return config_class(**{"dim": 32, "num_heads": 4, **changes})

    def layer(self, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
        return build(self.config(**changes), dtype=dtype, seed=seed)


CASES = tuple(Case(name, size) for name in attnzoo.list_variants() for size in ("defaults", "small"))


def build(config: attnzoo.AttentionConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A layer whose weights are twice the usual, so that the softmax is far from uniform, in evaluation mode."""
    # Patterns that leave blocks unread, and options that leave nothing out, are wanted here.
    with torch.random.fork_rng(devices=[]), silent():
        torch.manual_seed(seed)
        layer = attnzoo.create(config)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2)
    return layer.to(dtype).eval()


def tokens(layer: Any, batch: int, length: int, *, seed: int = 0) -> Tensor:
    """Random input ``[B, T, C]`` in the layer's dtype."""
    parameter = next(layer.parameters())
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, layer.config.dim, generator=generator, dtype=torch.float64).to(parameter.dtype)


def assert_same(actual: Tensor, expected: Tensor, *, scale: float = 1.0) -> None:
    """Equal up to the promise for the dtype, relative to the largest expected value (or 1)."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isfinite(), expected.isfinite())
    if expected.numel() == 0:
        return
    largest = max(1.0, float(expected.detach().abs().max()))
    error = float((actual.detach().double() - expected.detach().double()).abs().max())
    assert error <= scale * LIMIT[expected.dtype] * largest, f"off by {error:.3g}, values up to {largest:.3g}"


def recipe_of(config: attnzoo.AttentionConfig) -> Recipe:
    """The shared numbers of a config, as the oracles take them."""
    rotary = config.rotary
    return Recipe(
        num_heads=config.num_heads,
        num_kv_heads=config.kv_heads,
        head_dim=config.head_width,
        scale=config.scale,
        causal=config.causal,
        rotary_base=None if rotary is None else rotary.base,
        rotary_dim=None if rotary is None else rotary.dim,
        interleaved=rotary is not None and rotary.interleaved,
    )


def gradients(layer: Any, x: Tensor, out: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    """Of the sum of out times cotangent, for the input and every parameter, by name."""
    named = {"x": x, **dict(layer.named_parameters())}
    return dict(zip(named, torch.autograd.grad((out * cotangent).sum(), list(named.values())), strict=True))
