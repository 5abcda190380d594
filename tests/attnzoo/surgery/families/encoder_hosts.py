"""Tiny encoders of transformers with random weights, and the calls that are made of them.

Letters: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    DeiTConfig,
    DeiTModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    ViTConfig,
    ViTModel,
)

VOCAB = 61
HEADS = 3
WIDTH = 24

_SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_TEXT = {**_SIZES, "vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": 0}
_PICTURES = {**_SIZES, "image_size": 12, "patch_size": 3, "num_channels": 1}
_DISTIL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "dim": WIDTH,
    "n_layers": 2,
    "n_heads": HEADS,
    "hidden_dim": 32,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
}

_CLASSES: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "bert": (BertForMaskedLM, BertConfig, _TEXT),
    "roberta": (RobertaForMaskedLM, RobertaConfig, _TEXT),
    "albert": (AlbertForMaskedLM, AlbertConfig, {**_TEXT, "embedding_size": 8, "num_hidden_layers": 3}),
    "distilbert": (DistilBertForMaskedLM, DistilBertConfig, _DISTIL),
    "vit": (ViTModel, ViTConfig, _PICTURES),
    "deit": (DeiTModel, DeiTConfig, _PICTURES),
}

TEXTS = ("bert", "roberta", "albert", "distilbert")
PICTURES = ("vit", "deit")
SITES = {"albert": 1}
"""Attention modules of a model, where they are not two."""


def encoder(name: str, *, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """A host by its name, in evaluation mode."""
    model_class, config_class, settings = _CLASSES[name]
    config = config_class(**{**settings, "attn_implementation": "sdpa", **more})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                # Scores far from uniform, and biases that are not zero.
                if parameter.dim() == 2:
                    parameter.normal_(std=2 * parameter.shape[-1] ** -0.5)
                elif parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval()


def inputs(name: str, *, length: int = 20) -> dict[str, Tensor]:
    """Arguments of a call: ids ``[2, T]``, or pictures of 16 patches."""
    generator = torch.Generator().manual_seed(1)
    if name in PICTURES:
        return {"pixel_values": torch.randn(2, 1, 12, 12, generator=generator, dtype=torch.float64)}
    return {"input_ids": torch.randint(1, VOCAB, (2, length), generator=generator)}


def padding(length: int = 20) -> Tensor:
    """A mask ``[2, T]`` as hosts take it, of an item with padding on the left and one on the right."""
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[0, :5] = 0
    mask[1, 13:] = 0
    return mask


def said(model: Any, **arguments: Tensor) -> Tensor:
    """What a model says of each token: logits, or hidden states."""
    out = model(**arguments)
    found: Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return found
