"""Small models of transformers' own classes, with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.trained.texts import VOCABULARY


@dataclass(frozen=True)
class ModelSizes:
    """ModelSizes that all models share.

    Attributes:
        width: Of the model.
        heads: Query heads.
        layers: Attention blocks.
        context: Tokens of a window in training.
    """

    width: int = 128
    heads: int = 8
    layers: int = 4
    context: int = 256


@dataclass(frozen=True)
class HostSpec:
    """One kind of model.

    Attributes:
        config: The name of its configuration, without "Config".
        own: Settings beside the sizes.
        says: What is particular about it.
        any_length: Whether it takes more tokens than it was trained with.
        kv_share: Query heads for each KV head; ``None`` where its configuration has no KV heads.
        windows: Which layer of how many reads everything, where the others have windows of an eighth of the context.
    """

    config: str
    says: str
    own: Mapping[str, Any] = field(default_factory=dict)
    any_length: bool = True
    kv_share: int | None = None
    windows: int | None = None


_TWO_ROTATIONS = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "default", "rope_theta": 100_000.0},
}
_GPT2 = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
HOSTS: dict[str, HostSpec] = {
    "Qwen3-like": HostSpec("Qwen3", "norms of queries and keys, 4 KV heads", kv_share=2),
    "Gemma-3-like": HostSpec(
        "Gemma3Text",
        "norms, windows of 32 tokens in every second layer, two rotations, 4 KV heads",
        {"rope_parameters": _TWO_ROTATIONS},
        kv_share=2,
        windows=2,
    ),
    "GPT-NeoX-like": HostSpec(
        "GPTNeoX",
        "fused projections with biases, a rotation of half of each head",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}},
    ),
    "GPT-2-like": HostSpec("GPT2", "fused and transposed projections, learned positions", _GPT2, any_length=False),
    "OPT-like": HostSpec("OPT", "learned positions", {"dropout": 0.0}, any_length=False),
}
"""By name; "MHA" is a Llama of as many KV heads as query heads, and has a table of its own."""

MHA = HostSpec("Llama", "as many KV heads as query heads", kv_share=1)


def build(spec: HostSpec, sizes: ModelSizes, seed: int) -> Any:
    """A model with random weights.

    Args:
        spec: Which kind.
        sizes: Its sizes.
        seed: Of its weights.
    """
    import transformers

    config = getattr(transformers, f"{spec.config}Config")(**_settings(spec, sizes), **spec.own)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def _settings(spec: HostSpec, sizes: ModelSizes) -> dict[str, Any]:
    """The sizes as a configuration calls them."""
    found: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "max_position_embeddings": sizes.context,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    wide = {"GPT2": "n_inner", "OPT": "ffn_dim"}.get(spec.config, "intermediate_size")
    gated = spec.kv_share is not None
    found[wide] = sizes.width * (3 if gated else 4)
    if spec.config == "OPT":
        found["word_embed_proj_dim"] = sizes.width
    if gated:
        found["num_key_value_heads"] = sizes.heads // (spec.kv_share or 1)
        found["head_dim"] = sizes.width // sizes.heads
    if spec.windows is not None:
        found["layer_types"] = [
            "sliding_attention" if (layer + 1) % spec.windows else "full_attention" for layer in range(sizes.layers)
        ]
        found["sliding_window"] = sizes.context // 8
        found["query_pre_attn_scalar"] = sizes.width // sizes.heads
    return found
