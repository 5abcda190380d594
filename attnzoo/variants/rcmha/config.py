"""The options of relative convolutional attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from attnzoo.base.config import AttentionConfig, check_bool, check_int
from attnzoo.base.rope import RotaryConfig as RotaryConfig
from attnzoo.reporting.choices import hint
from attnzoo_kernels.errors import ConfigError

CONVOLVED = ("q", "k", "v")


@dataclass(frozen=True, kw_only=True)
class RCMHAConfig(AttentionConfig):
    """Relative convolutional attention; without convolutions it is RMHA, with ``rel=None`` MDHA.

    Attributes:
        rotary: As everywhere, but off unless asked for.
        conv_size: Tokens n that a convolution sees, the own one included; odd where the layer is not causal.
        conv_on: What is convolved, of "q", "k" and "v".
        conv_share: Whether each head has kernels of its own ("per_head") or all heads share them ("across_heads").
        conv_pos: Whether the convolutions follow the projections ("post_proj") or see the layer's input ("pre_proj").
        conv_bias: Whether the convolutions have biases; that of keys has one only beside ``rotary``.
        conv_init: Kernels at the start: "uniform" as torch's convolutions, "delta" passes what comes.
        rel: Distances in the score: "sinusoidal", "learned" or ``None``.
        rel_dim: Width of a distance's vector, even; ``None`` means a head's. Sinusoidal distances only.
        rel_init: How distances' vectors start: "xavier" (learned ones small), or "zero", as if there were none.
        max_distance: Distance from which on all share one learned vector.
    """

    rotary: RotaryConfig | None = None
    conv_size: int = 3
    conv_on: tuple[str, ...] = CONVOLVED
    conv_share: Literal["per_head", "across_heads"] = "per_head"
    conv_pos: Literal["post_proj", "pre_proj"] = "post_proj"
    conv_bias: bool = True
    conv_init: Literal["uniform", "delta"] = "uniform"
    rel: Literal["sinusoidal", "learned"] | None = "sinusoidal"
    rel_dim: int | None = None
    rel_init: Literal["xavier", "zero"] = "xavier"
    max_distance: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("conv_size", self.conv_size, 1)
        check_bool("conv_bias", self.conv_bias)
        check_int("max_distance", self.max_distance, 1)
        self._check_choices()
        if not self.causal and self.conv_on and self.conv_size % 2 == 0:
            raise ConfigError(f"conv_size: expected an odd int where the layer is not causal, got {self.conv_size}")
        if self.conv_pos == "pre_proj" and self.conv_share == "across_heads":
            raise ConfigError(
                "conv_share: expected 'per_head' before the projections, where there are no heads to share"
            )
        if self.rel_dim is not None:
            check_int("rel_dim", self.rel_dim, 2)
            if self.rel_dim % 2:
                raise ConfigError(f"rel_dim: expected an even int, got {self.rel_dim}")

    def _check_choices(self) -> None:
        if not isinstance(self.conv_on, list | tuple) or not set(self.conv_on) <= set(CONVOLVED):
            raise ConfigError(f"conv_on: expected some of {', '.join(CONVOLVED)}, got {self.conv_on!r}")
        object.__setattr__(self, "conv_on", tuple(name for name in CONVOLVED if name in self.conv_on))
        choices: dict[str, tuple[str | None, ...]] = {
            "conv_share": ("per_head", "across_heads"),
            "conv_pos": ("post_proj", "pre_proj"),
            "conv_init": ("uniform", "delta"),
            "rel": ("sinusoidal", "learned", None),
            "rel_init": ("xavier", "zero"),
        }
        for name, known in choices.items():
            if (got := getattr(self, name)) not in known:
                near = hint(got, [word for word in known if word is not None])
                raise ConfigError(f"{name}: expected one of {', '.join(map(repr, known))}, got {got!r}{near}")

    @property
    def rel_width(self) -> int:
        """Width of a distance's vector of sinusoids; even."""
        return self.head_width + self.head_width % 2 if self.rel_dim is None else self.rel_dim

    @property
    def cautions(self) -> tuple[str, ...]:
        """That nothing is convolved, and no distance scored."""
        if self.conv_on or self.rel is not None:
            return ()
        return (
            "rcmha: with conv_on=() and rel=None nothing is convolved and no distance is scored: this is plain "
            "attention, which 'mha' computes",
        )

    @classmethod
    def small(cls) -> Self:
        """Four heads of 8 on two KV heads, kernels of five tokens for all heads, few channels."""
        return cls(dim=32, num_heads=4, num_kv_heads=2, conv_size=5, conv_share="across_heads", rel_dim=6)
