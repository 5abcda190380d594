"""The meaning of the operation: plain differentiable PyTorch at O(T S) memory.

Every other implementation must agree with this one. It is no registered op, so that ``torch.func.grad``,
``vmap(grad)``, forward mode and second derivatives work here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo_kernels.call import Call
from attnzoo_kernels.rule import token_mask


def layout_mask(call: Call) -> Tensor:
    """The slots that the layout alone lists, bool ``[B|1, H|1, T, S]``."""
    _, heads, _, seq_q, seq_k = call.shape
    _, blocks_k = call.grid
    # One extra column takes what lies beyond a row's list.
    width = torch.arange(call.col.shape[0], device=call.col.device)
    inside = (width >= call.start.unsqueeze(-1)) & (width < (call.start + call.count).unsqueeze(-1))
    target = torch.where(inside, call.col.long(), blocks_k)
    keep = torch.zeros(*call.start.shape, blocks_k + 1, dtype=torch.int32, device=call.col.device)
    keep = keep.scatter_add(-1, target, torch.ones_like(target, dtype=torch.int32))[..., :blocks_k] > 0
    keep = keep.repeat_interleave(call.block_q, -2)[..., :seq_q, :]
    keep = keep.repeat_interleave(call.block_k, -1)[..., :seq_k]
    return keep if keep.shape[1] == 1 else keep.repeat_interleave(heads // keep.shape[1], 1)


def visible_mask(call: Call) -> tuple[Tensor, Tensor | None]:
    """The pairs that count, bool ``[B, H, T, S]``, and the finite part of the bias ``[B|1, H|1, 1, S]``."""
    batch, heads, _, seq_q, seq_k = call.shape
    mask = layout_mask(call) & token_mask(call.rule, heads, seq_q, seq_k, call.q.device)
    bias = call.key_bias
    if bias is not None:
        if bias.shape[1] not in (1, heads):
            bias = bias.repeat_interleave(heads // bias.shape[1], 1)
        bias = bias.unsqueeze(-2)
        hidden = bias == -torch.inf
        mask = mask & ~hidden
        bias = bias.masked_fill(hidden, 0.0)
    return mask.expand(batch, heads, seq_q, seq_k), bias


def attend(call: Call) -> tuple[Tensor, Tensor]:
    """Attention by definition: out ``[B, H, T, Dv]`` in q's dtype and lse ``[B, H, T]``."""
    batch, heads, groups, _, seq_k = call.shape
    acc = call.acc_dtype
    mask, bias = visible_mask(call)
    live = mask.any(-1, keepdim=True)
    # Hidden rows and slots may hold NaN, and 0 * NaN would spread: they are replaced before any product.
    read = mask.any(-2).view(batch, groups, heads // groups, seq_k).any(2).unsqueeze(-1)
    q = torch.where(live, call.q.to(acc), 0.0)
    k = torch.where(read, call.k.to(acc), 0.0).repeat_interleave(heads // groups, 1)
    v = torch.where(read, call.v.to(acc), 0.0).repeat_interleave(heads // groups, 1)
    if call.key_bias is not None:
        # A head may have to ignore a slot that another head of its group reads.
        own = mask.any(-2).unsqueeze(-1)
        k, v = torch.where(own, k, 0.0), torch.where(own, v, 0.0)
    scores = torch.matmul(q, k.transpose(-1, -2)) * call.scale
    if bias is not None:
        scores = scores + bias.to(acc)
    scores = torch.where(mask, scores, -torch.inf)
    # detach: the shift cancels, and its gradient through amax would only add noise.
    peak = torch.where(live, scores.detach().amax(-1, keepdim=True), 0.0) if seq_k else scores.new_zeros(live.shape)
    weights = torch.exp(scores - peak)
    total = torch.where(live, weights.sum(-1, keepdim=True), 1.0)
    out = torch.matmul(weights, v) / total
    lse = torch.where(live, peak + torch.log(total), -torch.inf).squeeze(-1)
    return out.to(call.q.dtype), lse
