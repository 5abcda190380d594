"""RCMHA in a pretrained model: it begins as the host, and learns convolutions and distances when it is trained."""

from __future__ import annotations

from attnzoo.base.config import AttentionConfig
from attnzoo.surgery.replacements.spec import ReplacementSpec
from attnzoo.variants.rcmha.config import RCMHAConfig
from attnzoo_kernels.errors import ConfigError


def _warn(config: AttentionConfig) -> str | None:
    if not isinstance(config, RCMHAConfig):
        raise ConfigError(f"config: expected an RCMHAConfig, got {type(config).__name__}")
    if (config.conv_on and config.conv_init != "delta") or (config.rel is not None and config.rel_init != "zero"):
        return "rcmha: not the host's function at first, and to be trained; conv_init='delta', rel_init='zero' is"
    return None


SPEC = ReplacementSpec(
    defaults=lambda site: {"conv_init": "delta", "rel_init": "zero"},
    warn=_warn,
    # Then a token's position is its slot, and one table of distances serves all items and steps.
    by_slot=True,
)
