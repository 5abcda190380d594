"""Scores of heads in plain loops over whole attention matrices, written from the definitions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def eager_attention(model: Any, ids: Tensor) -> list[Tensor]:
    """Every layer's attention weights ``[B, H, T, T]``, as transformers itself gives them out."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return list(model(ids, output_attentions=True, use_cache=False).attentions)
    finally:
        model.set_attn_implementation(before)


def plain_echo_and_induction(weights: Tensor, length: int) -> dict[str, Tensor]:
    """Scores ``[H]`` of one layer's weights ``[B, H, T, T]`` on copies of ``length`` tokens."""
    batch, heads, tokens, _ = weights.shape
    found = {"echo": torch.zeros(heads, dtype=torch.float64), "induction": torch.zeros(heads, dtype=torch.float64)}
    for b in range(batch):
        for h in range(heads):
            for t in range(tokens - length, tokens):
                same = t % length
                while same < t:
                    found["echo"][h] += float(weights[b, h, t, same])
                    found["induction"][h] += float(weights[b, h, t, same + 1])
                    same += length
    return {kind: total / (batch * length) for kind, total in found.items()}


def plain_previous_and_duplicate(weights: Tensor, ids: Tensor, length: int) -> dict[str, Tensor]:
    """Scores ``[H]`` of one layer's weights ``[B, H, T, T]`` on copies of ``length`` tokens ``ids [B, T]``."""
    batch, heads, tokens, _ = weights.shape
    found = {"previous": torch.zeros(heads, dtype=torch.float64), "duplicate": torch.zeros(heads, dtype=torch.float64)}
    for b in range(batch):
        for t in range(tokens - length, tokens):
            found["previous"] += weights[b, :, t, t - 1].double()
            for s in range(tokens - length):
                if ids[b, s] == ids[b, t]:
                    found["duplicate"] += weights[b, :, t, s].double()
    return {kind: total / (batch * length) for kind, total in found.items()}


def plain_retrieval(model: Any, prompt: Tensor, needle: tuple[int, int], count: int) -> tuple[list[int], Tensor]:
    """What a model says greedily behind a prompt ``[T]``, and the share of the needle that heads copy ``[L, H]``."""
    start, end = needle
    ids = prompt.clone()
    said: list[int] = []
    copied: set[tuple[int, int, int]] = set()
    shape = (0, 0)
    for _ in range(count):
        weights = eager_attention(model, ids[None])
        shape = (len(weights), weights[0].shape[1])
        with torch.no_grad():
            token = int(model(ids[None], use_cache=False).logits[0, -1].argmax())
        for layer, matrix in enumerate(weights):
            for head in range(shape[1]):
                slot = int(matrix[0, head, -1].argmax())
                if start <= slot < end and int(prompt[slot]) == token:
                    copied.add((layer, head, slot))
        said.append(token)
        ids = torch.cat([ids, torch.tensor([token])])
    scores = torch.zeros(shape)
    for layer, head, _ in copied:
        scores[layer, head] += 1 / (end - start)
    return said, scores
