"""One decoding row that reads some pages alone: those that the policy chooses by what it knows of them.

Letters: B batch, H query heads, G KV heads, P pages of the head that has most, K pages that are read, w rows of a page,
D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnzoo.base.paged.inputs import PagedInputs, Way, precise_of, row_slots
from attnzoo.base.shared_layouts import dense_layout
from attnzoo.cache.lengths import Lengths
from attnzoo.cache.pages.records import PagesRead
from attnzoo.cache.policies.protocol import PageBounds
from attnzoo_kernels import Extras, block_sparse_attention


def pages_to_read(inputs: PagedInputs) -> Tensor | None:
    """The pages of the pool that a row reads beside its own token, int64 ``[B, G, K]``, 0 for none; ``None`` for all.

    A choice serves ``policy.reuse`` rows; pages that are begun meanwhile are read too.
    """
    cache = inputs.cache
    policy = cache.policy
    if not policy.reads_pages or cache.bound == 0:
        return None
    pool = cache.pool
    table = pool.table_near()
    count = pool.page_counts().to(pool.device)
    choice = cache.choice
    if choice is None or choice.uses >= policy.reuse:
        there = (table > 0).unsqueeze(-1)
        least = pool.tensors["least"][table].masked_fill(~there, 0)
        most = pool.tensors["most"][table].masked_fill(~there, 0)
        with torch.no_grad():
            pages = policy.read(inputs.q.detach(), PageBounds(least, most, count, pool.page))
        choice = PagesRead(pages, count, 0)
    elif choice.pages is not None:
        choice = PagesRead(_with_begun(choice, count), count, choice.uses)
    cache.choice = PagesRead(choice.pages, choice.known, choice.uses + 1)
    if choice.pages is None:
        return None
    chosen = table.gather(2, choice.pages.clamp(min=0))
    return torch.where(choice.pages < 0, 0, chosen)


def _with_begun(choice: PagesRead, count: Tensor) -> Tensor | None:
    """The pages of a choice, and those that were begun since."""
    pages = choice.pages
    if pages is None:
        return None
    # No row begins more than one.
    begun = torch.where(count > choice.known, choice.known, -1)
    return torch.cat((pages, begun.unsqueeze(-1)), 2)


def attend_pages(inputs: PagedInputs, pages: Tensor, way: Way) -> Tensor:
    """Attention over some pages and over the own token.

    Args:
        inputs: The call, of one row.
        pages: Pages of the pool that each head reads, int64 ``[B, G, K]``, 0 for none.
        way: How the operation is run.

    Returns:
        ``[B, H, 1, Dv]``.
    """
    pool = inputs.cache.pool
    q = inputs.q
    k = torch.cat((pool.tensors["k"][pages].flatten(2, 3).to(q.dtype), inputs.k), 2)
    v = torch.cat((pool.tensors["v"][pages].flatten(2, 3).to(inputs.v.dtype), inputs.v), 2)
    bias = pad(pool.tensors["bias"][pages].flatten(2, 3).to(precise_of(q)), (0, 1))
    for extent in pool.extents:
        if extent.ring is not None:
            heads = list(extent.heads)
            own = Lengths(inputs.cache.offset // pool.page).column(4)
            block = pool.tensors["position"][pages[:, heads]] // pool.page
            away = ~extent.ring.is_read(block, own)
            bias[:, heads, :-1] = bias[:, heads, :-1].masked_fill(away.flatten(2, 3), -torch.inf)
    beside = inputs.cache.beside()
    if beside is not None:
        lost_k, lost_v, lost_bias = (x.unsqueeze(2) for x in beside)
        k = torch.cat((lost_k.to(k.dtype), k), 2)
        v = torch.cat((lost_v.to(v.dtype), v), 2)
        bias = torch.cat((lost_bias.to(bias.dtype), bias), 2)
    slots = k.shape[2]
    q_pos = row_slots(inputs, slots - 1) if Lengths(inputs.lengths).differ else None
    layout = dense_layout(64, 1, slots, q)
    extras = Extras(q_pos=q_pos, key_bias=bias)
    return block_sparse_attention(q, k, v, layout, scale=way.scale, extras=extras, impl=way.impl)
