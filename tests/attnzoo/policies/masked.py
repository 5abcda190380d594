"""Plain models under explicit masks, by the block rule in loops: what a model under a policy must say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests.attnzoo.surgery.hosts.masks import for_host
from tests.attnzoo.surgery.tiny import VOCAB, WIDTH, ExactNorm, make_exact

HEADS = 4
GROUPS = 2
LAYERS = 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HEADS * WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": WIDTH,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    "attn_implementation": "sdpa",
}
FULL = torch.tensor([[True, False], [False, False]])
"""Which KV heads hold everything in the tests."""

CONFIGS: dict[str, Any] = {
    "llama": lambda **more: LlamaConfig(**SIZES | more),
    "qwen2": lambda **more: Qwen2Config(**{name: x for name, x in (SIZES | more).items() if name != "head_dim"}),
    "qwen3": lambda **more: Qwen3Config(**SIZES | more),
    "mistral": lambda **more: MistralConfig(**SIZES | {"sliding_window": None} | more),
}


def host(name: str, seed: int = 0, **sizes: Any) -> Any:
    """A tiny fp64 host with random weights, in which nothing is computed in fp32.

    Args:
        name: Its family.
        seed: Of its weights.
        **sizes: Settings other than ``SIZES``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make: Any = AutoModelForCausalLM
        model = make.from_config(CONFIGS[name](**sizes))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                scale = 2 * parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.3
                parameter.normal_(std=scale).add_("norm" in key)
    make_exact(model)
    for block in blocks_of(model):
        for norm in ("q_norm", "k_norm"):
            if hasattr(block, norm):
                setattr(block, norm, ExactNorm(getattr(block, norm).weight.detach(), model.config.rms_norm_eps))
    return model.double().eval()


def blocks_of(model: Any) -> list[nn.Module]:
    return [layer.self_attn for layer in model.model.layers]


def rule_mask(tokens: int, full: list[bool], *, sink: int, near: int, block: int) -> Tensor:
    """Bool ``[H, T, T]``: what query heads read, KV head by KV head and block by block."""
    seen = torch.zeros(HEADS, tokens, tokens, dtype=torch.bool)
    for head in range(HEADS):
        for t in range(tokens):
            for s in range(t + 1):
                distance = t // block - s // block
                seen[head, t, s] = full[head * len(full) // HEADS] or distance < near or s // block < sink
    return seen


@contextmanager
def masked(model: Any, padding: list[int], longest: int, **rule: int) -> Iterator[None]:
    """Runs a plain model's calls without a cache under the mask of each layer, items padded on the left."""
    masks = [rule_mask(longest, full.tolist(), **rule) for full in FULL]

    def hide(index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            x: Any = kwargs.get("hidden_states", args[0] if args else None)
            # Beams of an item lie together.
            beams = x.shape[0] // len(padding)
            each = [left for left in padding for _ in range(beams)]
            mask = for_host(masks[index][:, : x.shape[1], : x.shape[1]], each, dtype=x.dtype)
            return args, {**kwargs, "attention_mask": mask}

        return hook

    hooks = [block.register_forward_pre_hook(hide(n), with_kwargs=True) for n, block in enumerate(blocks_of(model))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
