"""Tiny hosts of every family whose heads can be scored."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.attnzoo.surgery.tiny import tiny

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def host(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model of 2 layers, 6 query and 2 KV heads with random weights, whose heads differ."""
    if family == "llama":
        return tiny(dtype=dtype, seed=seed)
    more: dict[str, Any] = {"sliding_window": None} if family == "mistral" else {}
    config = AutoConfig.for_model(
        family,
        vocab_size=61,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **more,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make: Any = AutoModelForCausalLM
        model = make.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=2 * parameter.shape[-1] ** -0.5)
    return model.to(dtype).eval()
