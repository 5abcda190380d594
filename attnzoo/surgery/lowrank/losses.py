"""What calibration runs, and what it runs backward from: the loss whose curvature weighs errors in keys and values.

Of a causal language model that is the likelihood of each next token. An encoder has none: gradients of what it says are
taken in random directions instead, whose squares are on average those of its Fisher matrix where it gives logits, and
of the Gauss-Newton matrix of its outputs where it gives hidden states.

Letters: B batch, T tokens, V classes, C width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attnzoo_kernels.errors import ConfigError


def run(model: nn.Module, batch: dict[str, Tensor], *, causal: bool) -> Any:
    """What a model says of a batch; one that is not of transformers is given ids by their place."""
    if hasattr(getattr(model, "config", None), "model_type"):
        return model(**batch, use_cache=False) if causal else model(**batch)
    return model(batch["input_ids"]) if set(batch) == {"input_ids"} else model(**batch)


def in_random_directions(out: Any, real: Tensor) -> Tensor:
    """A scalar whose gradient at anything is a random sample of what it means to a model's output.

    Args:
        out: What the model has given.
        real: Which tokens are no padding, bool ``[B, T]``.

    Raises:
        ConfigError: If it gives neither logits nor hidden states.
    """
    generator = torch.Generator().manual_seed(0)
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if logits is not None:
        rows = _real_rows(logits, real)
        # Labels that the model itself would give.
        chances = rows.detach().double().softmax(-1).cpu()
        labels = torch.multinomial(chances, 1, generator=generator).squeeze(1)
        return cross_entropy(rows, labels.to(rows.device), reduction="sum")
    hidden = getattr(out, "last_hidden_state", None)
    if hidden is None:
        raise ConfigError(f"calibration: expected a model that gives logits or hidden states, got {type(out).__name__}")
    rows = _real_rows(hidden, real)
    signs = torch.randint(0, 2, rows.shape, generator=generator, device="cpu").to(rows) * 2 - 1
    return (rows * signs).sum()


def _real_rows(y: Tensor, real: Tensor) -> Tensor:
    """Outputs of real tokens ``[n, V]``; all of them where there is one for each item."""
    if y.shape[:2] == real.shape:
        y = y[real.to(y.device)]
    flat = y.flatten(0, -2)
    return flat.to(torch.promote_types(flat.dtype, torch.float32))
