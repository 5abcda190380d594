"""The options of landmark attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from attnzoo.base.config import AttentionConfig, check_bool, check_int
from attnzoo.base.rope import RotaryConfig as RotaryConfig
from attnzoo.reporting.choices import hint
from attnzoo_kernels.errors import ConfigError

Mode = Literal["soft", "topk"]
_MODES = ("soft", "topk")


@dataclass(frozen=True, kw_only=True)
class LandmarkConfig(AttentionConfig):
    """Landmark attention.

    Attributes:
        block_size: Tokens in a block, the landmark included.
        top_k: Earlier blocks that a query reads in mode "topk".
        mode: "soft" or "topk"; ``None`` means "soft" in training and "topk" in evaluation. The layer's own attribute
            starts as this.
        gate_mix: The share of its landmark's score in a block's logit, beside its own log-sum-exp: at 0 blocks weigh
            what plain attention over the ordinary tokens gives them. The layer's own attribute starts as this.
        landmark_positions: Whether landmarks count as positions; else one shares the position of the token before it.
        official_quirks: Whether "topk" chooses once a call as the published code does, see Departures.
    """

    block_size: int = 51
    top_k: int = 5
    mode: Mode | None = None
    gate_mix: float = 1.0
    landmark_positions: bool = True
    official_quirks: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.causal:
            raise ConfigError("causal: expected True, a block is reached once its landmark has been seen, got False")
        check_int("block_size", self.block_size, 2)
        check_int("top_k", self.top_k, 1)
        check_mode(self.mode)
        check_mix(self.gate_mix)
        check_bool("landmark_positions", self.landmark_positions)
        check_bool("official_quirks", self.official_quirks)

    @property
    def stride(self) -> int:
        """Positions that a block takes."""
        return self.block_size if self.landmark_positions else self.block_size - 1

    @classmethod
    def small(cls) -> Self:
        """Four heads of 8 in two groups, blocks of 8, two of which are retrieved."""
        return cls(dim=32, num_heads=4, num_kv_heads=2, block_size=8, top_k=2)


def check_mode(mode: object) -> None:
    """Raises unless a mode is one.

    Raises:
        ConfigError: If it is none.
    """
    if mode is not None and mode not in _MODES:
        raise ConfigError(f"mode: expected one of {', '.join(_MODES)} or None, got {mode!r}{hint(mode, _MODES)}")


def check_mix(mix: object) -> None:
    """Raises unless a mix of gates lies between 0 and 1.

    Raises:
        ConfigError: If it does not.
    """
    if isinstance(mix, bool) or not isinstance(mix, int | float) or not 0 <= mix <= 1:
        raise ConfigError(f"gate_mix: expected a number from 0 to 1, got {mix!r}")
