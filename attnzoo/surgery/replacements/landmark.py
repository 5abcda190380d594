"""Landmark attention in a pretrained model: every block becomes landmark attention, and its input gets landmarks.

It starts as the same function: in mode "soft" with ``gate_mix`` 0 blocks weigh what plain attention gives them, and
landmarks, which take no position, weigh nothing. Healing raises the mix to 1; "topk" is for healed models.
"""

from __future__ import annotations

from torch import nn

from attnzoo.base.config import AttentionConfig
from attnzoo.surgery.replacements.landmark_tokens import NAME, LandmarkInput
from attnzoo.surgery.replacements.spec import ModelChange, ReplacementSpec
from attnzoo.variants.landmark.config import LandmarkConfig
from attnzoo_kernels.errors import ConfigError


def _warning(config: AttentionConfig) -> str | None:
    landmark = _checked(config)
    if landmark.gate_mix == 0 and landmark.mode == "soft":
        return None
    return (
        "landmark with gate_mix > 0 or another mode than 'soft': the model has never seen landmarks; start at "
        "gate_mix=0, mode='soft', and raise the mix while healing"
    )


def _change(model: nn.Module, config: AttentionConfig) -> ModelChange:
    return LandmarkInput(model, _checked(config))


def _checked(config: AttentionConfig) -> LandmarkConfig:
    if not isinstance(config, LandmarkConfig):
        raise ConfigError(f"config: expected a LandmarkConfig, got {type(config).__name__}")
    return config


DECODERS = ("", "model.", "model.decoder.", "transformer.", "gpt_neox.")
"""Where hosts have the decoder that the tokens are put in."""

SPEC = ReplacementSpec(
    defaults=lambda site: {"mode": "soft", "gate_mix": 0.0, "landmark_positions": False},
    refused=frozenset({"landmark_positions", "official_quirks"}),
    warn=_warning,
    slots_per_token=lambda config: _checked(config).block_size / (_checked(config).block_size - 1),
    model_change=_change,
    model_state=tuple(f"{path}{NAME}." for path in DECODERS),
    whole_model=True,
)
