"""A random Llama in shards, written layer by layer: the process that makes it never holds it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

WEIGHT = 0.02
"""Standard deviation of weights, as a Llama begins."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a Llama.

    Attributes:
        width: Width of the model.
        layers: How many.
        heads: Query heads.
        kv_heads: KV heads.
        inner: Width of the feed-forward layers.
        vocabulary: Tokens that there are.
        shard_layers: Layers in a shard.
    """

    width: int = 2048
    layers: int = 28
    heads: int = 16
    kv_heads: int = 8
    inner: int = 6144
    vocabulary: int = 32_000
    shard_layers: int = 7

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.width // self.heads


TINY = Sizes(width=64, layers=4, heads=4, kv_heads=4, inner=96, vocabulary=101, shard_layers=2)


def write_checkpoint(folder: Path, sizes: Sizes) -> int:
    """Writes a checkpoint in bf16, and returns how many parameters it has."""
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        bos_token_id=None,
        eos_token_id=None,
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    parameters = 0
    parts = list(_parts(sizes))
    for number, shapes in enumerate(parts):
        tensors = {name: _random(shape, generator) for name, shape in shapes.items()}
        file = f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        parameters += sum(x.numel() for x in tensors.values())
    index = {"metadata": {"total_size": 2 * parameters}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return parameters


def parameters_of(folder: Path) -> int:
    """How many parameters a checkpoint has that was written before."""
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    return int(index["metadata"]["total_size"]) // 2


def _parts(sizes: Sizes) -> Iterator[dict[str, tuple[int, ...]]]:
    """The shapes in each shard."""
    keys = sizes.kv_heads * sizes.head_dim
    layer = {
        "self_attn.q_proj": (sizes.width, sizes.width),
        "self_attn.k_proj": (keys, sizes.width),
        "self_attn.v_proj": (keys, sizes.width),
        "self_attn.o_proj": (sizes.width, sizes.width),
        "mlp.gate_proj": (sizes.inner, sizes.width),
        "mlp.up_proj": (sizes.inner, sizes.width),
        "mlp.down_proj": (sizes.width, sizes.inner),
        "input_layernorm": (sizes.width,),
        "post_attention_layernorm": (sizes.width,),
    }
    for first in range(0, sizes.layers, sizes.shard_layers):
        numbers = range(first, min(first + sizes.shard_layers, sizes.layers))
        yield {f"model.layers.{n}.{name}.weight": shape for n in numbers for name, shape in layer.items()}
    outer = (sizes.vocabulary, sizes.width)
    yield {"model.embed_tokens.weight": outer, "lm_head.weight": outer, "model.norm.weight": (sizes.width,)}


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=generator).mul_(WEIGHT).to(torch.bfloat16)
