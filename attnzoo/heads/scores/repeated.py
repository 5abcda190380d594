"""Heads that look back at what was there before, found on random tokens that are repeated: no data is needed.

In the last of several copies of a sequence, every token has been there before. A head *echoes* by attending to the
same token in earlier copies, and is an *induction* head by attending to the token that came next there. It is a
*duplicate-token* head where it attends to the same token though each copy has an order of its own, so that the token
alone can tell, and a *previous-token* head where it attends to the token just before. A head's score is the weight that
it gives to these, all earlier copies together, as a mean over the rows of the last copy.

Source: Tang et al. 2024, *RazorAttention: Efficient KV Cache Compression Through Retrieval Heads*, section 3.2
(arXiv:2407.15891); induction and previous-token heads: Olsson et al. 2022, *In-context Learning and Induction Heads*
(arXiv:2209.11895); duplicate-token heads: Wang et al. 2022, *Interpretability in the Wild*, section 3.3
(arXiv:2211.00593), which shows them on names. Departures: rows of the last copy alone, which have all others behind
them; the tokens of a sequence differ from each other where the vocabulary has enough, and none is special to the model;
several sequences may be scored together.

Letters: B batch, T tokens, n tokens of one copy, R rows, H query heads, G KV heads, D head width, J earlier copies.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from attnzoo.heads.scores.attention_rows import attention_rows

ECHO = "echo"
INDUCTION = "induction"
PREVIOUS = "previous"
DUPLICATE = "duplicate"

OFFSETS = {ECHO: 0, INDUCTION: 1}
"""How far behind the same token of an earlier copy a head looks, in tokens."""


def repeated_tokens(model: Any, *, length: int, repeats: int, batch: int, seed: int) -> Tensor:
    """Random tokens, repeated: int64 ``[B, repeats * length]`` on the CPU. Global random numbers are untouched."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = torch.ones(model.get_input_embeddings().num_embeddings, dtype=torch.bool, device="cpu")
    special = [number for number in _special(model) if 0 <= number < len(vocabulary)]
    vocabulary[special] = False
    allowed = vocabulary.nonzero().flatten()
    if not len(allowed):
        allowed = torch.arange(len(vocabulary), device="cpu")
    rows: list[Tensor] = []
    for _ in range(batch):
        if len(allowed) >= length:
            drawn = torch.randperm(len(allowed), generator=generator, device="cpu")[:length]
        else:
            drawn = torch.randint(len(allowed), (length,), generator=generator, device="cpu")
        rows.append(allowed[drawn].repeat(repeats))
    return torch.stack(rows)


def reordered(ids: Tensor, length: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Copies of random tokens, each in an order of its own. Global random numbers are untouched.

    Args:
        ids: Tokens that repeat themselves, int64 ``[B, repeats * length]`` on the CPU.
        length: n.
        seed: Of the orders; not that of the tokens.

    Returns:
        The tokens in their new order, and the slots in the earlier copies of what the rows of the last copy hold,
        int64 ``[B, n, J]``.
    """
    generator = torch.Generator().manual_seed(seed)
    copies = ids.unflatten(1, (-1, length))  # [B, J + 1, n]
    keys = torch.rand(copies.shape, generator=generator, device="cpu", dtype=torch.float64)
    order = keys.argsort(-1)
    # Where each copy holds what the last one holds, row by row.
    places = order.argsort(-1)[:, :-1].gather(2, order[:, -1:].expand(-1, copies.shape[1] - 1, -1))
    starts = torch.arange(copies.shape[1] - 1, device="cpu") * length
    return copies.gather(2, order).flatten(1), (places + starts[:, None]).transpose(1, 2)


def _special(model: Any) -> Iterable[int]:
    """Tokens that mean something to the model besides text."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found = getattr(model.config, name, None)
        if found is not None:
            yield from (found if isinstance(found, list | tuple) else [found])


def repeated_scores(
    q: Tensor, k: Tensor, length: int, *, scale: float, kinds: Iterable[str], places: Tensor | None = None
) -> dict[str, Tensor]:
    """The scores of one layer's heads.

    Args:
        q: Rotated queries ``[B, H, T, D]`` of copies of ``length`` tokens.
        k: Rotated keys ``[B, G, T, D]``.
        length: n.
        scale: The factor on scores of attention.
        kinds: Which ones.
        places: For DUPLICATE, the slots that hold the same tokens, as :func:`reordered` gives them.

    Returns:
        By kind, ``[H]`` in fp32 or fp64, between 0 and 1.
    """
    batch, heads, tokens, _ = q.shape
    copies = torch.arange(1, tokens // length, device=q.device)
    found: dict[str, Any] = dict.fromkeys(kinds, 0.0)
    for rows, weights in attention_rows(q, k, tokens - length, scale=scale):
        earlier = rows[:, None] - copies * length  # [R, J]: the same place in earlier copies
        for kind in found:
            if kind == PREVIOUS:
                slots = rows[:, None] - 1
            elif kind == DUPLICATE and places is not None:
                slots = places.to(q.device)[:, None, rows - (tokens - length)]  # [B, 1, R, J]
            else:
                slots = earlier + OFFSETS[kind]
            given = weights.gather(3, slots.expand(batch, heads, -1, -1))
            found[kind] = found[kind] + given.sum((0, 2, 3))
    return {kind: total / (batch * length) for kind, total in found.items()}
