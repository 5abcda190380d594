"""LongHeads in a pretrained model: no weight is new, and nothing has to be trained."""

from __future__ import annotations

from attnzoo.base.config import AttentionConfig
from attnzoo.surgery.replacements.spec import ReplacementSpec
from attnzoo.variants.longheads.config import LongHeadsConfig
from attnzoo_kernels.errors import ConfigError


def _warn(config: AttentionConfig) -> str:
    if not isinstance(config, LongHeadsConfig):
        raise ConfigError(f"config: expected a LongHeadsConfig, got {type(config).__name__}")
    return (
        f"longheads: the same function up to {config.first} tokens; from there on every token reads "
        f"{config.attention_length} of them, which works best at about half the length that the model was trained at"
    )


SPEC = ReplacementSpec(refused=frozenset({"official_quirks"}), warn=_warn)
