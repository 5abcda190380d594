"""Attention of a call over rows that are kept in pages and over the call's own tokens.

One decoding row is written first and read with the others where they lie, or with the pages that it chooses. For other
calls an extent's rows are joined with the call's own, each with its bias.

Letters: B batch, T tokens of a call, H query heads, G KV heads, h heads of an extent, D head width, Dv value width, n
rows of an extent.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnzoo.base.editing.operation import HeldKeys, OperationCall, attend, edited
from attnzoo.base.paged.blocks import attend_blocks
from attnzoo.base.paged.inputs import PagedInputs, check_edits, in_order, may_place, precise_of
from attnzoo.base.paged.one_row import attend_row
from attnzoo.base.paged.reading import attend_pages, pages_to_read
from attnzoo.base.paged.signals import received
from attnzoo.base.shared_layouts import dense_layout
from attnzoo.base.steps import AttentionInputs, Way
from attnzoo.cache.evicting.regions import of_heads
from attnzoo.cache.kv_cache import KVCache
from attnzoo.cache.lengths import Lengths
from attnzoo.cache.pages.cache import PagedCache
from attnzoo.cache.pages.extents import Extent
from attnzoo_kernels import Extras

LAYOUT_BLOCK = 64
"""Tokens in a block of layouts where everything that is held is read."""


def paged_inputs(inputs: AttentionInputs, cache: KVCache, lengths: int | Tensor) -> PagedInputs:
    """A call's own tokens, which a cache of pages has taken note of.

    Raises:
        TypeError: If the cache is none.
    """
    if not isinstance(cache, PagedCache):
        raise TypeError(f"cache: expected a PagedCache, got {type(cache).__name__}")
    return PagedInputs(**vars(inputs), cache=cache, lengths=lengths)


def attend_paged(inputs: AttentionInputs, scale: float | None, impl: str) -> Tensor:
    """Attention over what a cache of pages holds and over the call's own tokens, which are staged there.

    Args:
        inputs: The call, and its cache.
        scale: The factor on scores; ``None`` means ``D ** -0.5``.
        impl: Which implementation of the operation runs.

    Returns:
        ``[B, H, T, Dv]``, zeros for rows without a token.

    Raises:
        TypeError: If what is remembered does not lie in pages.
    """
    if not isinstance(inputs, PagedInputs):
        raise TypeError(f"inputs: expected PagedInputs, got {type(inputs).__name__}")
    q = inputs.q
    cache = inputs.cache
    if 0 in q.shape:
        return q.new_zeros(*q.shape[:3], inputs.v.shape[3])
    way = Way(q.shape[3] ** -0.5 if scale is None else scale, impl)
    check_edits(inputs)
    # What rows are kept by is attention as it would be without edits.
    cache.note(q, way.scale)
    pages = pages_to_read(inputs) if q.shape[2] == 1 else None
    if pages is not None:
        return attend_pages(inputs, pages, way)
    if may_place(inputs, impl):
        return attend_row(cache, q, way.scale)
    parts = []
    mass = []
    for extent in cache.pool.extents:
        if extent.ring is not None:
            parts.append(attend_blocks(inputs, extent, way))
            continue
        out, given = _attend_rows(inputs, extent, way)
        parts.append(out)
        if given is not None:
            mass.append(given)
    if mass:
        cache.note_mass(mass)
    return in_order(cache.pool, parts, inputs.k.shape[1])


def _attend_rows(inputs: PagedInputs, extent: Extent, way: Way) -> tuple[Tensor, Tensor | None]:
    """Heads that read all rows that they hold; with it what rows receive, where that is counted."""
    cache = inputs.cache
    pool = cache.pool
    q, k, v = inputs.own_of(extent.heads)
    tokens = q.shape[2]
    held = extent.most
    keys = [k]
    values = [v]
    bias = None
    if held:
        keys.insert(0, pool.view("k", extent).narrow(2, 0, held).to(k))
        values.insert(0, pool.view("v", extent).narrow(2, 0, held).to(v))
        if pool.is_masked(extent):
            bias = pool.view("bias", extent).narrow(2, 0, held).to(precise_of(q))
    beside = cache.beside()
    front = 0
    if beside is not None:
        # The row that stands for what is lost comes before all others.
        lost_k, lost_v, lost_bias = (of_heads(x, extent.heads).unsqueeze(2) for x in beside)
        keys.insert(0, lost_k.to(k.dtype))
        values.insert(0, lost_v.to(v.dtype))
        if bias is None:
            bias = lost_bias.new_zeros(*k.shape[:2], held, dtype=precise_of(q))
        bias = torch.cat((lost_bias.to(bias.dtype), bias), 2)
        front = 1
    k = torch.cat(keys, 2)
    v = torch.cat(values, 2)
    if bias is not None:
        bias = pad(bias, (0, tokens))
    q_pos = inputs.row_slots(front + held) if Lengths(inputs.lengths).differ else None
    layout = dense_layout(LAYOUT_BLOCK, tokens, k.shape[2], q)
    extras = Extras(q_pos=q_pos, key_bias=bias)
    operation = OperationCall(q=q, k=k, v=v, layout=layout, extras=extras, scale=way.scale, impl=way.impl)
    tokens_held = HeldKeys(extent.heads, None if inputs.edits is None else _tokens(inputs, extent, front))
    if not cache.counts_mass:
        return attend(operation, inputs.edits, tokens_held), None
    out, lse = operation.run_with_lse()
    with torch.no_grad():
        mass = received(q, k, lse, bias, scale=way.scale)
        if cache.policy.group == "mean":
            mass = mass.mean(-1, keepdim=True)
    if inputs.edits is not None:
        out = edited(out, operation, inputs.edits, tokens_held)
    return out, mass[:, :, front:]


def _tokens(inputs: PagedInputs, extent: Extent, front: int) -> Tensor:
    """The tokens of an extent's rows and of the call's own, int64 ``[B, h, n]``; -1 for what is none."""
    pool = inputs.cache.pool
    position = pool.view("position", extent).narrow(2, 0, extent.most).long()
    own = torch.arange(inputs.k.shape[2], device=position.device) + Lengths(inputs.cache.offset).column(3)
    return torch.cat((pad(position, (front, 0), value=-1), own.expand(*position.shape[:2], -1)), 2)
