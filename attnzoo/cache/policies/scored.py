r"""Rows are kept by the attention that they have had, or by the length of their keys: SnapKV, H2O, TOVA, KNorm.

With :math:`p_{ij}` the share of attention that query i gives to row j of its KV head, joined over the query heads of
the group, and n tokens seen, the scores of row j are

.. math::
    \text{SnapKV:}\quad & \max_{|r - j| \le 3} \frac{1}{w} \sum_{i = n - w}^{n - 1} p_{ir} \\
    \text{H2O:}\quad & \frac{1}{|\{i : i \text{ sees } j\}|} \sum_i p_{ij} \\
    \text{TOVA:}\quad & p_{n - 1, j} \\
    \text{KNorm:}\quad & - \lVert k_j \rVert_2

Source: Li et al. 2024, *SnapKV: LLM Knows What You are Looking for Before Generation*, section 4 and listing 1
(arXiv:2404.14469); Zhang et al. 2023, *H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language
Models*, algorithm 1 (arXiv:2306.14048); Oren et al. 2024, *Transformers are Multi-State RNNs*, section 3.2
(arXiv:2401.06104); Devoto et al. 2024, *A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression*,
section 4 (arXiv:2406.11430).

Departures:
    - Positions stay those of the sequence; the published TOVA and H2O can renumber them.
    - Each KV head chooses for itself; query heads of a group are joined by ``group``. TOVA's paper averages over all
      heads of a layer, which then keep the same tokens.
    - SnapKV: the paper forces no sink. Its sum over the window is a mean here, which orders rows the same.
    - H2O: the paper adds up attention, which favours rows that have been there for longer; here it is divided by the
      number of queries that saw the row. Both the paper's and TOVA's evict at every token; here every ``every`` tokens
      while decoding, so that between two evictions up to as many rows more are held.
    - KNorm: the paper spares the first layers and forces no rows.

Letters: B batch, G KV heads, C rows of the head that holds most, D key width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from attnzoo.cache.policies.budget import Budgeted, last_rows
from attnzoo.cache.policies.protocol import Seen
from attnzoo_kernels.errors import ConfigError


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class SnapKV(Budgeted, name="snapkv"):
    """Keeps what the last queries of the prompt attend to, and its neighbours.

    Attributes:
        pool: Over how many rows that are held side by side scores are pooled, an odd number; 1 pools nothing.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"window_mass"})

    pool: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pool(self.pool)
        check_window(self.window)

    def score(self, seen: Seen) -> Tensor:
        """The window's attention, pooled over rows before the window."""
        return pooled_window_mass(seen, self.window, self.pool)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class H2O(Budgeted, name="h2o"):
    """Keeps the last rows, and of the others those with most attention from all queries that saw them.

    Attributes:
        local: The share of the budget that the last rows take; at least ``window`` of them are kept.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"mass"})

    sink: int = 0
    window: int = 0
    every: int | None = 64
    local: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.local <= 1:
            raise ConfigError(f"local: expected 0 to 1, got {self.local!r}")

    def recent(self, rows: int) -> int:
        """The last ``local`` of the rows that are kept, rounded down, beside the sink."""
        return max(self.window, int(self.local * max(rows - self.sink, 0)))

    def score(self, seen: Seen) -> Tensor:
        """The mean attention of all queries that saw a row."""
        return seen.signals["mass"]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class TOVA(Budgeted, name="tova"):
    """Keeps what the last query attends to."""

    needs: ClassVar[frozenset[str]] = frozenset({"window_mass"})

    sink: int = 0
    window: int = 1
    group: str = "mean"
    every: int | None = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.window)

    def score(self, seen: Seen) -> Tensor:
        """The attention of the last ``window`` queries, of which there is one."""
        return seen.signals["window_mass"]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class KNorm(Budgeted, name="knorm"):
    """Keeps the rows whose keys are shortest: these are the ones that are attended to, without looking at attention."""

    def score(self, seen: Seen) -> Tensor:
        """The length of a key, the shortest first."""
        dtype = torch.promote_types(seen.k.dtype, torch.float32)
        length: Tensor = torch.linalg.vector_norm(seen.k, dim=-1, dtype=dtype)
        return -length


def pooled_window_mass(seen: Seen, window: int, pool: int) -> Tensor:
    """The attention of the last queries, each row with the largest of the rows around it ``[B, G, C]``.

    Rows of the window itself lend theirs to no other; neither does NaN.
    """
    mass = seen.signals["window_mass"]
    hidden = ~seen.held | last_rows(seen, [window] * mass.shape[0]) | mass.isnan()
    score = mass.masked_fill(hidden, -torch.inf)
    if pool == 1:
        return score
    return max_pool1d(score, pool, stride=1, padding=pool // 2)


def check_pool(pool: int) -> None:
    """Raises unless scores can be pooled over so many rows.

    Raises:
        ConfigError: Naming it.
    """
    if isinstance(pool, bool) or not isinstance(pool, int) or pool < 1 or pool % 2 == 0:
        raise ConfigError(f"pool: expected an odd number, 1 or more, got {pool!r}")


def check_window(window: int) -> None:
    """Raises unless there are last queries to ask.

    Raises:
        ConfigError: Naming it.
    """
    if window < 1:
        raise ConfigError(f"window: expected 1 or more, whose attention is the score, got {window!r}")
