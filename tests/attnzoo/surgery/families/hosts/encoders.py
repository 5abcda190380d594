"""Tiny encoders of transformers: of texts, and of pictures of 16 patches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
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

from tests.attnzoo.surgery.families.hosts.host import VOCAB, Host, Hosts
from tests.attnzoo.surgery.families.hosts.modules import AHEAD

HOSTS = Hosts()
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


_TITLES = {
    "bert": ("BERT", "BertSelfAttention"),
    "roberta": ("RoBERTa", "RobertaSelfAttention"),
    "albert": ("ALBERT", "AlbertAttention"),
    "distilbert": ("DistilBERT", "DistilBertSelfAttention"),
    "vit": ("ViT", "ViT(Self)?Attention"),
    "deit": ("DeiT", "DeiT(Self)?Attention"),
}
"""By name, what users call a class, and its attention class."""


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


CLASSES: dict[str, Host] = {}
for _name, (_title, _attention) in _TITLES.items():
    _more = {"generates": False, "pictures": _name in PICTURES, "sides": () if _name in PICTURES else ("left", "right")}
    HOSTS.add(_title, _attention, AHEAD, **_more)(partial(encoder, _name))
    CLASSES[_name] = HOSTS[_title]
