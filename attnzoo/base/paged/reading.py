"""One decoding row that reads some pages alone: those that the policy chooses by what it knows of them.

Letters: B batch, H query heads, G KV heads, P pages of the head that has most, K pages that are read, w rows of a page,
D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from attnzoo.base.editing.operation import HeldKeys, OperationCall, attend
from attnzoo.base.paged.inputs import PagedInputs, may_place, precise_of
from attnzoo.base.shared_layouts import dense_layout
from attnzoo.base.steps import Way
from attnzoo.cache.lengths import Lengths
from attnzoo.cache.pages.pool import PagePool
from attnzoo.cache.pages.records import UNCHOSEN, PagesRead, is_any
from attnzoo.cache.policies.protocol import PageBounds
from attnzoo.cache.streams import fetched
from attnzoo_kernels import Extras


def pages_to_read(inputs: PagedInputs) -> Tensor | None:
    """The pages of the pool that a row reads beside its own token, int64 ``[B, G, K]``, 0 for none; ``None`` for all.

    A choice serves ``policy.reuse`` rows of an item, which others have no part in; pages that are begun meanwhile are
    read too.
    """
    cache = inputs.cache
    policy = cache.policy
    if not policy.reads_pages or cache.bound == 0:
        return None
    pool = cache.pool
    table = pool.table_near()
    known = pool.page_counts()
    count = known.to(pool.device)
    # Items without a token choose nothing.
    each = Lengths(inputs.lengths).each
    asks = True if each is None else each.cpu() > 0
    held = None if cache.choice is None else _with_begun(cache.choice, known)
    due = asks if held is None else asks & (held.uses >= policy.reuse)
    if held is None or is_any(due):
        with torch.no_grad():
            pages = policy.read(inputs.q.detach(), _bounds(pool, table, count))
        held = _exchanged(held, PagesRead(pages, known, 0), due)
    uses = held.uses + asks
    cache.choice = PagesRead(held.pages, held.known, uses)
    if held.pages is None:
        return None
    numbers = held.pages.to(pool.device)
    chosen = table.gather(2, numbers.clamp(min=0))
    return torch.where(numbers < 0, 0, chosen)


def _bounds(pool: PagePool, table: Tensor, count: Tensor) -> PageBounds:
    """What is known of the pages of each head, in the order of what they hold."""
    if len(pool.extents) == 1 and pool.extents[0].ring is None:
        # They lie in order.
        extent = pool.extents[0]
        least, most = (pool.view(name, extent).narrow(2, 0, extent.live) for name in ("least", "most"))
        return PageBounds(least, most, count, pool.page)
    there = (table > 0).unsqueeze(-1)
    least, most = (pool.tensors[name][table].masked_fill(~there, 0) for name in ("least", "most"))
    return PageBounds(least, most, count, pool.page)


def _with_begun(choice: PagesRead, known: Tensor) -> PagesRead:
    """The pages of a choice, and those that were begun since, where heads have so many now, ``[B, G]`` on the CPU."""
    pages = choice.pages
    begins = known > choice.known
    if pages is not None and is_any(begins):
        # No row begins more than one.
        begun = torch.where(begins, choice.known, -1).to(pages.device)
        pages = torch.cat((pages, begun.unsqueeze(-1)), 2)
    return PagesRead(pages, known, choice.uses)


def _exchanged(held: PagesRead | None, chosen: PagesRead, due: bool | Tensor) -> PagesRead:
    """A new choice for the items that are due, beside what the others read; those that pause have chosen nothing."""
    if isinstance(due, bool):
        return chosen
    if held is None:
        return PagesRead(chosen.pages, chosen.known, torch.where(due, 0, UNCHOSEN))
    uses = torch.where(due, 0, held.uses)
    if held.pages is None and chosen.pages is None:
        return PagesRead(None, chosen.known, uses)
    page = torch.arange(int(chosen.known.max()), device="cpu")
    every = page.masked_fill(page >= chosen.known.unsqueeze(-1), -1)
    new, old = (every if x.pages is None else x.pages.cpu() for x in (chosen, held))
    wide = max(new.shape[2], old.shape[2])
    new, old = (pad(x, (0, wide - x.shape[2]), value=-1) for x in (new, old))
    pages = torch.where(due.view(-1, 1, 1), new, old)
    return PagesRead(pages, chosen.known, uses)


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
    number = pages.flatten()
    shape = (*pages.shape[:2], pages.shape[2] * pool.page)
    held = {}
    for name in ("k", "v", "bias"):
        x = pool.tensors[name]
        # What is offloaded is gathered where it lies, so that the chosen pages alone are moved.
        held[name] = fetched(x.index_select(0, number.to(x.device)), pool.device)
    k = torch.cat((held["k"].view(*shape, -1).to(q.dtype), inputs.k), 2)
    v = torch.cat((held["v"].view(*shape, -1).to(inputs.v.dtype), inputs.v), 2)
    bias = pad(held["bias"].view(shape).to(precise_of(q)), (0, 1))
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
    if may_place(inputs, way.impl):
        rows = q.reshape(q.shape[0], pool.heads, -1, q.shape[3])
        out = scaled_dot_product_attention(rows, k, v, attn_mask=bias.unsqueeze(2).to(q.dtype), scale=way.scale)
        return out.reshape(*q.shape[:3], -1)
    q_pos = inputs.row_slots(slots - 1) if Lengths(inputs.lengths).differ else None
    layout = dense_layout(64, 1, slots, q)
    extras = Extras(q_pos=q_pos, key_bias=bias)
    operation = OperationCall(q=q, k=k, v=v, layout=layout, extras=extras, scale=way.scale, impl=way.impl)
    if inputs.edits is None:
        return operation.run()
    # Tokens of rows that were chosen, of none before them where a row stands for what is lost, and of the own one.
    position = pool.tensors["position"].index_select(0, number.to(pool.device)).view(shape).long()
    own = Lengths(inputs.cache.offset).column(3)
    token = torch.cat((position, (own + position.new_zeros(1, 1, 1)).expand(*shape[:2], 1)), 2)
    token = pad(token, (slots - token.shape[2], 0), value=-1)
    return attend(operation, inputs.edits, HeldKeys(None, token))
