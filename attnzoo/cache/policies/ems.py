r"""EMS: rows with little attention are merged into the most similar of the rows that stay.

With g the mean attention of all queries that saw a row, l that of the last w queries, pooled as SnapKV's, and K the
rows that stay, those with the largest

.. math::
    s_j = \max\Bigl( \frac{g_j}{\max_r g_r}, \frac{l_j}{\max_r l_r} \Bigr) ,

a row j that does not stay goes to the row :math:`c = \arg\max_{c \in K} \cos(k_j, k_c)` if that cosine is at least
:math:`\tau`, ties to the first; else nothing is left of it. With m the mass of a row, 1 for a token, and J(c) a row
that stays and what is merged into it,

.. math::
    k_c' = \frac{\sum_{j \in J(c)} m_j k_j}{\sum_j m_j}, \quad
    v_c' = \frac{\sum_{j \in J(c)} m_j v_j}{\sum_j m_j}, \quad
    m_c' = \sum_{j \in J(c)} m_j

and attention to it is :math:`m_c' \exp(\sigma q \cdot k_c')`: rows that are the same are merged without any loss.

Source: Li et al. 2024, *EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression Based on
Global-Local Importance*, sections 3.2 and 3.3 (arXiv:2412.08521).

Departures:
    - The paper brings both scores to one scale by a rule that it does not write out; here each is divided by its
      largest over the rows of the head, those of the window left out of l.
    - The paper, like others that merge, lets a merged row count once: ``weighs=False``. By default it counts as many
      times as the tokens that it stands for.
    - The paper's classes are found among the rows that were evicted as well; here the centres are the rows that stay,
      the sink and the window among them.

Letters: B batch, G KV heads, C rows of the head that holds most, K rows that are kept, D key width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from attnzoo.cache.policies.budget import Budgeted
from attnzoo.cache.policies.protocol import DROPPED, Keep, Seen
from attnzoo.cache.policies.scored import check_pool, check_window, pooled_window_mass

CHUNK = 1024
"""Rows that are compared with all centres at a time."""


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class EMS(Budgeted, name="ems"):
    """Keeps what all queries or the last ones attend to, and merges the rest into what is kept.

    Attributes:
        pool: Over how many rows that are held side by side the last queries' attention is pooled, an odd number.
        similarity: The least cosine of two keys that are merged; above 1 merges nothing, -1 everything.
        weighs: Whether a merged row stands for the mass of all; else it counts as much as the row that it was.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"mass", "window_mass"})

    pool: int = 7
    similarity: float = 0.8
    weighs: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pool(self.pool)
        check_window(self.window)

    @property
    def joins_rows(self) -> bool:
        """Whether keys may be so similar."""
        return self.similarity <= 1

    def score(self, seen: Seen) -> Tensor:
        """The larger of the attention of all queries and of the last ones, each over its largest."""
        of_all = seen.signals["mass"].masked_fill(~seen.held, 0)
        of_last = pooled_window_mass(seen, self.window, self.pool)
        return torch.maximum(_over_largest(of_all), _over_largest(of_last))

    def keep(self, seen: Seen) -> Keep | None:
        """The rows that stay, and where the others go."""
        kept = super().keep(seen)
        if kept is None:
            return None
        into = most_similar(seen.k, kept.rows, self.similarity)
        return Keep(kept.rows, into, self.weighs)


def most_similar(k: Tensor, rows: Tensor, least: float) -> Tensor:
    """Which of some rows each row is most similar to, by the cosine of their keys.

    Args:
        k: Keys ``[B, G, C, D]``.
        rows: Places of the centres, int64 ``[B, G, K]``, -1 for none.
        least: The least cosine.

    Returns:
        Numbers of centres, int64 ``[B, G, C]``, ties to the first; ``DROPPED`` where none is so similar.
    """
    unit = normalize(k.detach().to(torch.promote_types(k.dtype, torch.float32)), dim=-1)
    centres = unit.gather(2, rows.clamp(min=0)[..., None].expand(*rows.shape, k.shape[3]))
    into = []
    for part in unit.split(CHUNK, 2):
        cosine = (part @ centres.mT).clamp(-1, 1)
        cosine = cosine.masked_fill((rows < 0)[:, :, None] | cosine.isnan(), -torch.inf)
        # Of equal cosines, argmax takes the first.
        best = cosine.argmax(-1)
        found = cosine.gather(-1, best[..., None])[..., 0]
        into.append(best.masked_fill(found < least, DROPPED))
    return torch.cat(into, 2)


def _over_largest(mass: Tensor) -> Tensor:
    """Mass over the largest of its head ``[B, G, C]``; what is no number counts nothing."""
    known = torch.nan_to_num(mass, nan=0, posinf=0, neginf=0)
    return known / known.amax(-1, keepdim=True).clamp(min=torch.finfo(known.dtype).tiny)
