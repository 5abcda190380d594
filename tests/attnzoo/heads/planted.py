"""A model of bytes in which one head copies, and nothing else reads far.

The width is four blocks of 64: what a byte is, what the byte before it was, what was copied, and constants. Head (0, 0)
looks one token back, by fast planes of the rotation; head (2, 2) looks for the byte that followed this one before, by
slow planes, and copies it. Where there is none it looks at the first token, which has nothing to copy.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

BYTES = 256
WIDTH = 64
FAST = 8
SLOW = slice(17, 32)
SINK = 16
BEGIN = 0
COPYING = (2, 2)


def planted(*, layers: int = 4, theta: float = 1e8) -> Any:
    """4 layers of 4 query and 2 KV heads; BEGIN is the token before all others."""
    config = LlamaConfig(
        vocab_size=BYTES,
        hidden_size=4 * WIDTH,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=WIDTH,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        bos_token_id=BEGIN,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.02)
        _plant(model)
    return model.train(mode=False)


def _plant(model: Any) -> None:
    layers = model.model.layers
    codes = torch.where(torch.rand(BYTES, 30) < 0.5, -1.0, 1.0)
    embedding = model.model.embed_tokens.weight.zero_()
    embedding[:, :30] = codes
    embedding[:, 3 * WIDTH] = 4.0  # a constant
    embedding[BEGIN, :30] = 0
    embedding[BEGIN, 3 * WIDTH + 1] = 4.0
    model.lm_head.weight.zero_()[:, 2 * WIDTH : 2 * WIDTH + 30] = codes
    model.lm_head.weight[BEGIN] = 0
    _clear(layers[0], 0)
    attention = layers[0].self_attn
    angle = 1e8 ** (-torch.arange(FAST) / 32)
    for plane in range(FAST):
        # Queries are turned back by one token, so that scores are largest there.
        attention.k_proj.weight[plane, 3 * WIDTH] = 6.0
        attention.q_proj.weight[plane, 3 * WIDTH] = 6.0 * angle[plane].cos()
        attention.q_proj.weight[plane + 32, 3 * WIDTH] = -6.0 * angle[plane].sin()
    attention.v_proj.weight[:30, :30] = torch.eye(30)
    attention.o_proj.weight[WIDTH : WIDTH + 30, :30] = torch.eye(30)
    _clear(layers[2], 1)
    attention = layers[2].self_attn
    match = [*range(SLOW.start, SLOW.stop), *range(SLOW.start + 32, SLOW.stop + 32)]
    for place, row in enumerate(match):
        attention.q_proj.weight[2 * WIDTH + row, place] = 3.0
        attention.k_proj.weight[WIDTH + row, WIDTH + place] = 3.0
    attention.q_proj.weight[2 * WIDTH + SINK, 3 * WIDTH] = 3.0
    attention.k_proj.weight[WIDTH + SINK, 3 * WIDTH + 1] = 3.0
    attention.v_proj.weight[WIDTH : WIDTH + 30, :30] = torch.eye(30)
    attention.o_proj.weight[2 * WIDTH : 2 * WIDTH + 30, 2 * WIDTH : 2 * WIDTH + 30] = torch.eye(30)


def _clear(layer: Any, kv_head: int) -> None:
    """Nothing random is left in a KV head, nor in the two heads that read it."""
    attention = layer.self_attn
    for projection in (attention.k_proj, attention.v_proj):
        projection.weight[kv_head * WIDTH : (kv_head + 1) * WIDTH] = 0
    attention.q_proj.weight[2 * kv_head * WIDTH : 2 * (kv_head + 1) * WIDTH] = 0
    attention.o_proj.weight[:, 2 * kv_head * WIDTH : 2 * (kv_head + 1) * WIDTH] = 0
