"""Texts that repeat themselves word for word: what calibrates which heads must remember, without data sets.

Letters: B batch, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.base.config import check_int
from attnzoo_kernels.errors import ConfigError


def verbatim_batches(
    tokens: Tensor,
    *,
    count: int = 32,
    batch: int = 1,
    length: int = 1024,
    spans: int = 2,
    span: int = 64,
    begin: int | None = None,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Windows of a text, each followed by spans of it once more, as batches for :func:`calibrate_duo`.

    Args:
        tokens: The text, int64 ``[any]``.
        count: Batches.
        batch: B.
        length: T, spans that are repeated included.
        spans: How many are repeated, each from somewhere in the window.
        span: Tokens of each, 8 at least. Nothing could foretell which one it is: its first eighth is no answer.
        begin: A token before all others, for models that expect one.
        seed: Of the places; global random numbers are untouched.

    Returns:
        Mappings with "input_ids", int64 ``[B, T]``, and "answers", bool ``[B, T]``: the rows that foretell a token of
        a repeated span.

    Raises:
        ConfigError: If the text is too short, or a number does not fit.
    """
    for name, value in (("count", count), ("batch", batch), ("spans", spans)):
        check_int(name, value, 1)
    check_int("span", span, 8)
    cue = span // 8
    head = [] if begin is None else [begin]
    window = length - len(head) - spans * span
    check_int("length", length, len(head) + (spans + 1) * span)
    if len(tokens) < window:
        raise ConfigError(f"tokens: expected at least {window}, got {len(tokens)}")
    generator = torch.Generator().manual_seed(seed)

    def place(end: int) -> int:
        return int(torch.randint(end + 1, (), generator=generator, device="cpu"))

    def row() -> Tensor:
        start = place(len(tokens) - window)
        text = tokens[start : start + window]
        starts = [place(window - span) for _ in range(spans)]
        first = torch.tensor(head, dtype=tokens.dtype, device=tokens.device)
        return torch.cat([first, text, *(text[at : at + span] for at in starts)])

    answers = torch.zeros(length, dtype=torch.bool, device=tokens.device)
    for number in range(spans):
        begins = length - (spans - number) * span
        # A token is foretold by the row before it.
        answers[begins + cue - 1 : begins + span - 1] = True
    return [
        {"input_ids": torch.stack([row() for _ in range(batch)]), "answers": answers.expand(batch, -1).clone()}
        for _ in range(count)
    ]
