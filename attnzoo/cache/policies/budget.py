"""What policies have in common that keep the rows with the best scores, as many as a budget allows.

Letters: B batch, G KV heads, C rows of the head that holds most, K rows that are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.cache.policies.protocol import Keep, Policy, Seen
from attnzoo.topk import top_blocks
from attnzoo_kernels.errors import ConfigError


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Budgeted(Policy):
    """Keeps the first and the last rows of each KV head, and of the others those with the best scores.

    An item that has seen n tokens keeps ``budget`` rows for each KV head, or ``round(share * n)`` and no fewer than
    those that are forced. Which ones is a pure function of each head's rows: the best scores, ties to the lowest
    position, NaN last; a larger budget keeps what a smaller one does.

    Attributes:
        budget: Rows that a KV head keeps; or else ``share``.
        share: Rows that a KV head keeps for each token seen, above 0 and at most 1.
        sink: The first tokens, which are kept whatever their scores.
        window: The last tokens, which are kept whatever their scores; also the last queries of "window_mass".

    Raises:
        ConfigError: If there is not one of ``budget`` and ``share``, or a setting is out of its range.
    """

    budget: int | None = None
    share: float | None = None
    sink: int = 4
    window: int = 32

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.share is None):
            raise ConfigError(f"budget: expected one of budget and share, got {self.budget!r} and {self.share!r}")
        for name, least in (("sink", 0), ("window", 0), ("page", 1), ("slack", 0), ("every", 1)):
            value = getattr(self, name)
            if value is not None and not _is_whole(value, least):
                raise ConfigError(f"{name}: expected a whole number, {least} or more, got {value!r}")
        if self.group not in ("max", "mean"):
            raise ConfigError(f"group: expected 'max' or 'mean', got {self.group!r}")
        forced = self.sink + self.recent(0)
        if self.budget is not None and not _is_whole(self.budget, max(forced, 1)):
            expected = f"{max(forced, 1)} rows or more, the sink and the window"
            raise ConfigError(f"budget: expected {expected}, got {self.budget!r}")
        if self.share is not None and not 0 < self.share <= 1:
            raise ConfigError(f"share: expected more than 0 and at most 1, got {self.share!r}")

    def rows_of(self, tokens: int) -> int:
        """How many rows a KV head of an item with so many tokens keeps at most."""
        if self.share is None:
            return self.budget or 0
        return max(self.sink + self.recent(0), round(self.share * tokens))

    def recent(self, rows: int) -> int:
        """How many of the last tokens are kept whatever their scores, where ``rows`` are kept in all."""
        return self.window

    def score(self, seen: Seen) -> Tensor:
        """How much each row is worth ``[B, G, C]``; what is said of rows that are not held is not read."""
        raise NotImplementedError

    def keep(self, seen: Seen) -> Keep | None:
        """The rows with the best scores, and the forced ones; ``None`` where all fit."""
        rows = [self.rows_of(tokens) for tokens in seen.tokens.tolist()]
        if seen.position.shape[2] <= min(rows, default=0):
            return None
        forced = first_rows(seen, self.sink) | last_rows(seen, [self.recent(count) for count in rows])
        return Keep(best_rows(self.score(seen), rows, allowed=seen.held, forced=forced))


def first_rows(seen: Seen, tokens: int) -> Tensor:
    """Where rows of the first tokens are held, bool ``[B, G, C]``."""
    return seen.held & (seen.position < tokens)


def last_rows(seen: Seen, tokens: Sequence[int]) -> Tensor:
    """Where rows of the last tokens are held, so many for each item, bool ``[B, G, C]``."""
    start = seen.tokens - seen.tokens.new_tensor(list(tokens))
    return seen.held & (seen.position >= start[:, None, None])


def best_rows(score: Tensor, rows: Sequence[int], *, allowed: Tensor, forced: Tensor) -> Tensor:
    """The places of the rows with the best scores, so many for each item.

    Args:
        score: ``[B, G, C]``.
        rows: How many each item keeps for a KV head.
        allowed: Which rows there are, bool ``[B, G, C]``.
        forced: Which of them come before all others, bool ``[B, G, C]``.

    Returns:
        int64 ``[B, G, K]``, ascending, -1 behind where fewer are kept.
    """
    held = score.shape[2]
    most = min(held, max(rows, default=0))
    if len(set(rows)) <= 1:
        return top_blocks(score, most, allowed=allowed, forced=forced)
    # Items that keep equally many are asked together.
    kept = torch.full((*score.shape[:2], most), -1, dtype=torch.int64, device=score.device)
    for count in sorted(set(rows)):
        items = [item for item, own in enumerate(rows) if own == count]
        found = top_blocks(score[items], min(held, count), allowed=allowed[items], forced=forced[items])
        kept[items, :, : found.shape[2]] = found
    return kept


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
