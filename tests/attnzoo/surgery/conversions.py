"""Every kind of conversion, by name: what is asked of all goes through here, so that a new one is under it."""

from __future__ import annotations

import warnings
from typing import Any

from attnzoo import surgery
from attnzoo.surgery.replacements import REPLACEMENTS
from tests.attnzoo.surgery.tiny import LATENT_SMALL, READING, calibration, replace_mha

LOWRANK: dict[str, dict[str, Any]] = {
    "commuting": {"num_kv_heads": 1},
    "latent": {"latent_dim": LATENT_SMALL},
    "mean": {"num_kv_heads": 1},
    "expand": {"num_kv_heads": 6},
}

SPARSE: dict[str, dict[str, Any]] = {
    "landmark": {"block_size": 6},
    "longheads": {"chunk_size": 4, "attention_length": 16},
    "moh": {"shared_heads": 2, "active_heads": 2},
}
"""Options at which a variant leaves something out at a few dozen tokens; of one that is not here, the defaults."""

BY_LAYERS = tuple(f"replaced-{variant}" for variant in REPLACEMENTS)
READ = tuple(READING)
ALL = (*READ, *LOWRANK, *BY_LAYERS)
REPLACED = ("latent", *BY_LAYERS)
"""Kinds that put a module of attnzoo's in a block's place."""


def convert_as(model: Any, kind: str, **more: Any) -> surgery.ConversionReport:
    """Converts a tiny host; what a conversion warns of is expected here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind in READING:
            variant, options = READING[kind]
            return surgery.convert(model, variant, **options, **more)
        if kind in LOWRANK:
            text = calibration() if kind in ("commuting", "latent") else None
            return surgery.convert(model, "lowrank_gqa", method=kind, calibration=text, **LOWRANK[kind], **more)
        variant = kind.removeprefix("replaced-")
        if variant == "mha":
            return replace_mha(model, **more)
        return surgery.convert(model, variant, **SPARSE.get(variant, {}), **more)
