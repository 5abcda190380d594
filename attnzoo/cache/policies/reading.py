r"""Quest: a decoding row reads the pages alone that can hold keys with large scores; nothing is freed.

With kmin and kmax the smallest and the largest of a page's keys, channel by channel, and :math:`q^+ = \max(q, 0)`,
:math:`q^- = \min(q, 0)`, no key of the page has a larger product with q than

.. math:: u_p = \sum_d \max(q_d\, \mathrm{kmin}_{p,d},\ q_d\, \mathrm{kmax}_{p,d})
    = q^+ \cdot \mathrm{kmax}_p + q^- \cdot \mathrm{kmin}_p .

A KV head reads the pages with the largest :math:`\max_{h} u_p` over the query heads h of its group.

Source: Tang et al. 2024, *Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference*, section 3.3 and
algorithm 1 (arXiv:2406.10774); Yang et al. 2025, *LServe: Efficient Long-sequence LLM Serving with Unified Sparse
Attention*, sections 3.5 and 3.6 (arXiv:2502.14866), which reads pages so in heads that keep everything, and a sink and
a window in the others: ``Compose(static=Duo(full, block=16), read=Pages())``.

Departures:
    - Pages are chosen for each KV head, by the largest bound of its group; the published code chooses for each query
      head, so that a group reads up to as many times more.
    - The first page and the last two are always read. The published LServe makes sure of the last one alone; Quest's
      code also reads the first two layers whole.
    - How many pages are read is counted in each item's own pages.
    - A page of the pool is the page that is scored; LServe's hold several of these.
    - Bounds do not know the mass of merged rows.

Letters: L layers, B batch, H query heads, G KV heads, P pages of the head that has most, K pages that are read, D
width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnzoo.cache.policies.full_heads import check_heads, full_heads, heads_of_layer
from attnzoo.cache.policies.protocol import PageBounds, Policy
from attnzoo.topk import top_blocks
from attnzoo_kernels.errors import ConfigError


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Pages(Policy, name="pages"):
    """Reads ``budget // page`` pages, the first and the last two among them.

    Attributes:
        budget: Rows that a decoding row reads for each KV head; three pages at least.
        full: Which KV heads read everything, bool ``[L, G]``; ``[G]`` is one layer's. ``None``: none.

    Raises:
        ConfigError: If there are fewer than three pages, or a setting is out of its range.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"page_bounds"})

    page: int = 16
    budget: int = 1024
    full: Tensor | None = None

    def __post_init__(self) -> None:
        if self.page < 1:
            raise ConfigError(f"page: expected 1 row or more, got {self.page!r}")
        if self.budget < 3 * self.page:
            least = f"{3 * self.page} rows or more, three pages of {self.page}"
            raise ConfigError(f"budget: expected {least}, got {self.budget!r}")
        if self.reuse < 1:
            raise ConfigError(f"reuse: expected 1 step or more, got {self.reuse!r}")
        if self.full is not None:
            object.__setattr__(self, "full", full_heads(self.full))

    def of_layer(self, layer: int) -> Pages:
        """The policy of one layer."""
        return self if self.full is None else replace(self, full=heads_of_layer(self.full, layer))

    def check(self, layers: int, kv_heads: int) -> None:
        """Raises unless ``full`` fits so many layers and KV heads."""
        if self.full is not None:
            check_heads(self.full, layers, kv_heads)

    def read(self, q: Tensor, pages: PageBounds) -> Tensor | None:
        """The pages with the largest bounds, and the forced ones; ``None`` where there are no more."""
        number = pages.least.shape[2]
        count = self.budget // self.page
        if number <= count:
            return None
        page = torch.arange(number, device=pages.count.device)
        there = page < pages.count[..., None]
        forced = there & ((page == 0) | (page >= pages.count[..., None] - 2))
        bound = page_bounds(q, pages).amax(2)
        rows = top_blocks(bound, count, allowed=there, forced=forced)
        return rows if self.full is None else with_every_page(rows, pages, self.full[0])


def with_every_page(rows: Tensor, pages: PageBounds, heads: Tensor) -> Tensor:
    """Pages that are read, and all there are for some heads.

    Args:
        rows: Numbers of pages, int64 ``[B, G, K]``, -1 behind.
        pages: What is known of the pages.
        heads: Which KV heads read every page, bool ``[G]``.

    Returns:
        int64 ``[B, G, P]``.
    """
    number = pages.least.shape[2]
    page = torch.arange(number, device=rows.device)
    every = page.masked_fill(page >= pages.count[..., None], -1)
    return torch.where(heads.to(rows.device)[:, None], every, pad(rows, (0, number - rows.shape[2]), value=-1))


def page_bounds(q: Tensor, pages: PageBounds) -> Tensor:
    """What no product of a query with a key of a page exceeds.

    Args:
        q: Rotated queries ``[B, H, 1, D]``.
        pages: What is known of the pages.

    Returns:
        ``[B, G, H / G, P]``, in float32 or more; what is said of places behind the pages is nothing.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    query = q.detach()[:, :, 0].unflatten(1, (pages.least.shape[1], -1)).to(dtype)
    upper: Tensor = query.clamp(min=0) @ pages.most.to(dtype).mT
    lower: Tensor = query.clamp(max=0) @ pages.least.to(dtype).mT
    return upper + lower
