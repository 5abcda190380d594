"""A small decoder to read, and to train attention layers in."""

from __future__ import annotations

from attnzoo.models.block import Block, SwiGLU
from attnzoo.models.decoder import CausalLM

__all__ = ["Block", "CausalLM", "SwiGLU"]
