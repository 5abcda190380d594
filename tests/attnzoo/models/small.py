"""Small models of every variant, and batches for them."""

from __future__ import annotations

import torch
from torch import Tensor

import attnzoo
from attnzoo.models import CausalLM

VARIANTS = attnzoo.list_variants()
WORDS = 23
LENGTHS = (29, 12, 1)


def small(variant: str, seed: int = 0) -> CausalLM:
    """Two layers at the sizes of the variant's small configuration, in fp64."""
    options = vars(attnzoo.get_config(variant).small())
    options = {name: value for name, value in options.items() if name != "causal"}
    torch.manual_seed(seed)
    model = CausalLM(vocab_size=WORDS, num_layers=2, variant=variant, **options).double().eval()
    # So large that logits are apart, and so small that what the layers add decides them.
    torch.nn.init.normal_(model.embedding.weight, std=0.05)
    return model


def texts(seed: int = 0) -> list[Tensor]:
    """One text of each length, int64 ``[1, t]``."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(WORDS, (1, length), generator=generator) for length in LENGTHS]


def padded(items: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """The texts in one batch and its padding, which holds no words: left, right, or in between."""
    length = max(item.shape[1] for item in items) + 3
    ids = torch.full((len(items), length), -7)
    generator = torch.Generator().manual_seed(1)
    for row, item in enumerate(items):
        count = item.shape[1]
        place = {
            "left": torch.arange(length - count, length),
            "right": torch.arange(count),
            "between": torch.randperm(length, generator=generator)[:count].sort().values,
        }[side]
        ids[row, place] = item[0]
    return ids, ids == -7
