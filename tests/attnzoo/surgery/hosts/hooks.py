"""What attention blocks see of a text, by hooks of our own and plain autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax


def seen_by_hooks(model: Any, batches: list[dict[str, Tensor]], path: str) -> dict[str, Tensor]:
    """Inputs of keys and gradients of the summed loss at keys and values, real tokens alone, first tokens beside."""
    attention, found = model.get_submodule(path), {"x": [], "g": [], "first": []}
    for batch in batches:
        tokens = batch["input_ids"]
        real = batch.get("attention_mask", torch.ones_like(tokens)).bool()
        caught: list[Tensor] = []
        handles = [attention.k_proj.register_forward_hook(lambda m, a, y, caught=caught: caught.extend([a[0], y]))]
        handles += [attention.v_proj.register_forward_hook(lambda m, a, y, caught=caught: caught.append(y))]
        chances = log_softmax(model(**batch, use_cache=False).logits, -1)
        for handle in handles:
            handle.remove()
        picked = chances[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2)
        loss = -(picked * (real[:, 1:] & real[:, :-1])).sum()
        grads = torch.autograd.grad(loss, caught[1:])
        found["x"].append(caught[0].detach()[real])
        found["g"].append(torch.cat(grads, -1)[real])
        at = real.long().argmax(1)
        found["first"].append(caught[0].detach()[torch.arange(len(tokens)), at])
    return {name: torch.cat(parts).double() for name, parts in found.items()}


def with_one(x: Tensor, bias: bool) -> Tensor:
    """Inputs with a constant 1 behind them, which a bias is the weight of."""
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1) if bias else x
