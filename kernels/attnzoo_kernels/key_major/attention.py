"""Attention in tiles of pairs: each block by itself, and then the blocks of a row joined by their log-sum-exps.

The way back makes the weights again from the row's log-sum-exp, as flash attention does; nothing is saved for it but
the result. A gated block's weights are ``exp(s - λ) π`` with the log-sum-exp λ of its ordinary slots and the weight π
of the block, of which its landmark's score is the logit; see :mod:`attnzoo_kernels.blocks.gates`.

Letters: B batch, H query heads, T rows, W rows of a window, E blocks listed for a row, P places of all tiles, w slots
of a block, D head width, Dv value width, n tiles, R places of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from attnzoo_kernels.key_major.inputs import (
    KeyTiles,
    PairInputs,
    edges_of,
    gathered,
    rotated_rows,
    rows_of,
    scores_of,
    tiles_of,
)
from attnzoo_kernels.key_major.pairs import Window, windows_of
from attnzoo_kernels.runtime.products import product
from attnzoo_kernels.runtime.workspace import scratch
from attnzoo_kernels.spec.call import Call

ROWS_AT_ONCE = 4096
"""Rows that are joined together."""


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Out ``[B, H, T, Dv]`` in q's dtype and lse ``[B, H, T]``; NaN where something that nobody sees is no number."""
    batch, heads, _, tokens, _ = call.shape
    inputs = PairInputs(call)
    dtype = call.acc_dtype
    out = torch.zeros(batch, heads, tokens, call.v.shape[3], dtype=dtype, device=call.q.device)
    lse = torch.full((batch, heads, tokens), -torch.inf, dtype=dtype, device=call.q.device)
    for window in windows_of(call):
        _attend(inputs, window, out, lse)
    return out.to(call.q.dtype), lse


def _attend(inputs: PairInputs, window: Window, out: Tensor, lse: Tensor) -> None:
    """Writes the rows of a window."""
    places = window.row.shape[0]
    if not places:
        return
    found = scratch("outs by place", (places, out.shape[3]), out.dtype, out.device)
    logit = torch.empty(places, dtype=out.dtype, device=out.device)
    for tiles in tiles_of(window, inputs.call.block_k):
        q = rotated_rows(inputs, window, tiles).view(len(tiles.block), window.height, -1)
        k = gathered("tile keys", inputs.k, tiles.block)
        v = gathered("tile values", inputs.v, tiles.block)
        begin, edges = edges_of(inputs.call, window, tiles)
        for part, mask in ((slice(0, begin), None), (slice(begin, None), edges)):
            one, lse_one = _within_blocks(inputs.call, (q[part], k[part], v[part]), mask)
            found[tiles.places].view(*q.shape[:2], -1)[part] = one
            logit[tiles.places].view(q.shape[:2])[part] = lse_one
        if inputs.call.gate is not None:
            gate = product("tile gates", q, k[:, -1:].transpose(1, 2), scale=inputs.call.scale).view(-1)
            if edges is not None:
                gate[begin * window.height :] += edges[..., -1].reshape(-1)
            gated = window.gated_in(tiles.places)
            logit[tiles.places] = mixed(inputs.call, gated, gate, logit[tiles.places])
    _join(window, found, logit, (out, lse))


def _within_blocks(call: Call, tensors: tuple[Tensor, ...], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention of tiles to the ordinary slots of their own blocks, by torch's fused kernel.

    Args:
        call: The call.
        tensors: Rows ``[n, R, D]``, keys ``[n, w, D]`` and values ``[n, w, Dv]``.
        mask: Added to scores, ``[n, R, w]``, or ``None``.

    Returns:
        Out ``[n, R, Dv]`` and lse ``[n, R]``.
    """
    q, k, v = tensors
    if q.shape[0] == 0:
        return q.new_empty(0, q.shape[1], v.shape[2]), q.new_empty(q.shape[:2])
    if call.gate is not None:
        # The last slot is a landmark, and no ordinary one.
        k = k[:, :-1]
        v = v[:, :-1]
        mask = None if mask is None else mask[..., :-1]
    width = v.shape[2]
    # The kernel takes equal widths.
    most = max(q.shape[2], width)
    q, k, v = (x if x.shape[2] == most else pad(x, (0, most - x.shape[2])) for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), attn_mask=None if mask is None else mask.unsqueeze(1),
        scale=call.scale,
    )  # fmt: skip
    return out.squeeze(1)[..., :width], lse.squeeze(1)


def mixed(call: Call, gated: Tensor, gate: Tensor, lse: Tensor) -> Tensor:
    """The logits of blocks: their log-sum-exps, or where they are gated these mixed with their landmarks' scores."""
    mix = 1.0 if call.gate is None else call.gate.mix
    if mix != 1:
        # A hidden gate times a mix of 0 would be NaN.
        gate = torch.where(gate == -torch.inf, gate, mix * gate + (1 - mix) * lse)
    return torch.where(gated, gate, lse)


def _join(window: Window, found: Tensor, logit: Tensor, results: tuple[Tensor, Tensor]) -> None:
    """Online softmax over the blocks of each row: results of blocks are joined by their logits."""
    logit = logit[window.tile_row].masked_fill_(~window.listed, -torch.inf)  # [B * H * W, E]
    lse = torch.logsumexp(logit, -1)
    # Rows that read nothing have no weights.
    share = logit.sub_(lse.unsqueeze(-1)).exp_().masked_fill_(~window.listed, 0.0)
    out, lse_out = results
    first, last = window.rows
    shape = (*out.shape[:2], last - first)
    out[:, :, first:last] = _sums(found, window.tile_row, share).view(*shape, -1)
    lse_out[:, :, first:last] = lse.view(shape)


def _sums(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of rows ``index [n, E]`` of ``x [P, D]``, ``[n, D]``."""
    if x.dtype == torch.float32:
        return embedding_bag(index, x, mode="sum", per_sample_weights=weight)
    return torch.cat(
        [
            torch.bmm(w.unsqueeze(1), x[i]).squeeze(1)
            for i, w in zip(index.split(ROWS_AT_ONCE), weight.split(ROWS_AT_ONCE), strict=True)
        ]
    )


@dataclass(frozen=True, eq=False)
class _Given:
    """What a backward is given for each row, with a row without anything at the end.

    Attributes:
        dout: ``[B * H * T + 1, Dv]``.
        lse: ``[B * H * T + 1]``, inf where the row reads nothing.
        change: The gradient of lse less the product of out and its gradient, ``[B * H * T + 1]``.
    """

    dout: Tensor
    lse: Tensor
    change: Tensor


@dataclass(frozen=True, eq=False)
class _Gradients:
    """Gradients of the inputs as tiles see them: of rows, and of blocks of keys and values."""

    q: Tensor
    k: Tensor
    v: Tensor


def backward(
    call: Call, results: tuple[Tensor, Tensor], dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from those of out ``[B, H, T, Dv]`` and lse ``[B, H, T]``.

    Args:
        call: The call.
        results: Out and lse of the forward, by whatever implementation.
        dout: Gradient of out.
        dlse: Gradient of lse, or ``None`` for zeros.
    """
    inputs = PairInputs(call)
    given = _given(call, results, dout, dlse)
    grads = _Gradients(torch.zeros_like(inputs.q), torch.zeros_like(inputs.k), torch.zeros_like(inputs.v))
    for window in windows_of(call):
        for tiles in tiles_of(window, call.block_k):
            _accumulate(inputs, window, tiles, given, grads)
    dq = grads.q[:-1].view(*call.q.shape[:3], -1)
    dk = _slots_of(grads.k, call.k)
    if inputs.rotation is not None:
        dq, dk = (inputs.rotation.in_halves(x) for x in (dq, dk))
    dv = _slots_of(grads.v, call.v)
    given_dtype = call.q.dtype
    return dq.to(given_dtype).contiguous(), dk.to(given_dtype).contiguous(), dv.to(given_dtype).contiguous()


def _given(call: Call, results: tuple[Tensor, Tensor], dout: Tensor, dlse: Tensor | None) -> _Given:
    dtype = call.acc_dtype
    out, lse = (x.to(dtype) for x in results)
    dout = dout.to(dtype)
    change = (dout * out).sum(-1).neg_()
    if dlse is not None:
        change += dlse
    # The weights of a row that reads nothing are exp(-inf).
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    lse = torch.cat((lse.reshape(-1), lse.new_full((1,), torch.inf)))
    return _Given(rows_of(dout, dtype), lse, torch.cat((change.reshape(-1), change.new_zeros(1))))


def _slots_of(blocks: Tensor, like: Tensor) -> Tensor:
    """Blocks ``[B * G * N, w, D]`` as ``[B, G, S, D]``."""
    batch, groups, slots, _ = like.shape
    return blocks.reshape(batch, groups, -1, blocks.shape[2])[:, :, :slots]


def _accumulate(inputs: PairInputs, window: Window, tiles: KeyTiles, given: _Given, grads: _Gradients) -> None:
    """Adds what some tiles contribute."""
    call = inputs.call
    height = window.height
    q = rotated_rows(inputs, window, tiles)
    k = gathered("tile keys", inputs.k, tiles.block)
    v = gathered("tile values", inputs.v, tiles.block)
    scores = scores_of(call, window, tiles, q, k)
    dout = gathered("row gradients", given.dout, tiles.row).view(len(tiles.block), height, -1)
    lse = given.lse[tiles.row].view(len(tiles.block), height, 1)
    change = given.change[tiles.row].view_as(lse)
    dweights = product("dweights", dout, v.transpose(1, 2))
    if call.gate is None:
        # Recomputed weights, and through the softmax.
        weights = scores.sub_(lse).exp_()
        dscores = dweights.add_(change).mul_(weights)
    else:
        weights, dscores = _through_gate(call, window.gated_in(tiles.places), scores, (dweights, lse, change))
    # dv = p^T do.
    grads.v.index_add_(0, tiles.block, product("tile dv", weights.transpose(1, 2), dout))
    # dq = ds k, rotated back; dk = ds^T q.
    rows = q.view(len(tiles.block), height, -1)
    grads.k.index_add_(0, tiles.block, product("tile dk", dscores.transpose(1, 2), rows, scale=call.scale))
    dq = product("row dq", dscores, k, scale=call.scale).view(q.shape)
    if inputs.rotation is not None and window.origin is not None:
        inputs.rotation.rotate(dq.unsqueeze(1), window.origin[tiles.places])
    grads.q.index_add_(0, tiles.row, dq)


def _through_gate(
    call: Call, gated: Tensor, scores: Tensor, of_rows: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Weights and gradients of scores where blocks are gated, both in place.

    Args:
        call: The call.
        gated: Whether a place's block is not the row's own, bool ``[n * R]``.
        scores: ``[n, R, w]``.
        of_rows: Gradients of weights ``[n, R, w]``, lse and what is added to these gradients, ``[n, R, 1]``.
    """
    dweights, lse, change = of_rows
    gated = gated.view(lse.shape)
    gate = scores[..., -1:].clone()
    scores[..., -1] = -torch.inf
    within = torch.logsumexp(scores, -1, keepdim=True)
    # The weights within a block, and those of blocks.
    inner = scores.sub_(within).exp_()
    outer = (mixed(call, gated, gate, within) - lse).exp_()
    by_block = torch.linalg.vecdot(inner, dweights).unsqueeze(-1)
    change = (change + by_block).mul_(outer)
    # A gated block's logit goes to its landmark's score, as far as it is mixed in; the rest to its log-sum-exp.
    mix = 1.0 if call.gate is None else call.gate.mix
    through_gate = torch.where(gated, change * mix, 0.0)
    dscores = dweights.sub_(by_block).mul_(outer).add_(change - through_gate).mul_(inner)
    dscores[..., -1:] = through_gate
    return inner.mul_(outer), dscores
