"""The meaning of the operation: plain differentiable PyTorch at O(T S) memory.

Every other implementation must agree with this one. It is no registered op, so that ``torch.func.grad``,
``vmap(grad)``, forward mode and second derivatives work here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnzoo_kernels.spec.call import Call, Gate, Origins
from attnzoo_kernels.spec.token_rule import token_mask


def _listed_blocks(call: Call) -> Tensor:
    """The key block at each index of ``col`` for each row, int64 ``[B|1, h, M, cap]``; N beyond a row's own list."""
    index = torch.arange(call.col.shape[0], device=call.col.device)
    inside = (index >= call.start.unsqueeze(-1)) & (index < (call.start + call.count).unsqueeze(-1))
    return torch.where(inside, call.col.long(), call.grid[1])


def layout_mask(call: Call) -> Tensor:
    """The slots that the layout alone lists, bool ``[B|1, H|1, T, S]``."""
    _, heads, _, seq_q, seq_k = call.shape
    _, blocks_k = call.grid
    target = _listed_blocks(call)
    keep = torch.zeros(*call.start.shape, blocks_k + 1, dtype=torch.int32, device=call.col.device)
    keep = keep.scatter_add(-1, target, torch.ones_like(target, dtype=torch.int32))[..., :blocks_k] > 0
    keep = _repeated(keep, call.block_q, seq_q, -2)
    keep = _repeated(keep, call.block_k, seq_k, -1)
    return keep if keep.shape[1] == 1 else _repeated(keep, heads // keep.shape[1], heads, 1)


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
    acc = call.acc_dtype
    heads = call.shape[1]
    mask, bias = visible_mask(call)
    # contiguous: products of other strides differ in their last bits.
    q = call.q.to(acc).contiguous()
    k = _for_heads(call.k.to(acc).contiguous(), call)
    scores = _where_seen(q, k, lambda q, k: _products(call, q, k, call.block_k))
    if call.aux is not None:
        q_aux, k_aux = call.aux
        k_aux = _for_heads(k_aux.to(acc).expand(call.k.shape[0], call.k.shape[1], -1, -1), call)
        scores = scores + _where_seen(q_aux.to(acc), k_aux, lambda q, k: torch.matmul(q, k.transpose(-1, -2)))
    scores = scores * call.scale
    if bias is not None:
        scores = scores + bias.to(acc)
    if call.gate is not None:
        scores, mask = _gated(call, call.gate, scores, mask, q)
    v = _for_heads(call.v.to(acc).contiguous(), call)
    live = mask.any(-1, keepdim=True)
    scores = torch.where(mask, scores, -torch.inf)
    # detach: the shift cancels, and its gradient through amax would only add noise.
    peak = torch.where(live, scores.detach().amax(-1, keepdim=True), 0.0) if mask.shape[-1] else scores.sum(-1, True)
    weights = torch.exp(scores - peak)
    total = torch.where(live, weights.sum(-1, keepdim=True), 1.0)
    # In a row with a NaN every difference is one, of hidden slots too.
    weights = torch.where(mask, weights / total, 0.0)
    # Rows that see nothing are 0 already; chosen here, their gradients are dropped whatever they hold.
    out = torch.where(live, _weighted(weights, mask, v), 0.0)
    lse = torch.where(live, peak + torch.log(total), -torch.inf).squeeze(-1)
    return out.to(call.q.dtype).view(call.q.shape[0], heads, call.q.shape[2], v.shape[-1]), lse


def _where_seen(q: Tensor, k: Tensor, products: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Scores in which a query or key that is not finite reaches no gradient of a row or slot that it has no part in.

    The gradient of a pair that is hidden is 0, and 0 * NaN is NaN.
    """
    finite_q, finite_k = (x.isfinite().all(-1, keepdim=True) for x in (q, k))
    clean = products(torch.where(finite_q, q, 0.0), torch.where(finite_k, k, 0.0))
    return torch.where(finite_q & finite_k.transpose(-1, -2), clean, products(q, k).detach())


def _weighted(weights: Tensor, mask: Tensor, v: Tensor) -> Tensor:
    """``weights @ v``, in which a value that is not finite reaches only the rows that read it."""
    finite = v.isfinite().all(-1).unsqueeze(-2)  # [B, H, 1, S]
    clean = torch.matmul(weights, torch.where(finite.transpose(-1, -2), v, 0.0))
    touched = (mask & ~finite).any(-1, keepdim=True)
    spoilt = torch.matmul(weights.detach(), v.detach())
    return torch.where(touched, clean + (spoilt - clean).detach(), clean)


def _for_heads(x: Tensor, call: Call) -> Tensor:
    """Keys, values or gates ``[B, G, S, D]`` for each query head."""
    heads, groups = call.shape[1:3]
    return _repeated(x, heads // groups, heads, 1)


def _repeated(x: Tensor, times: int, length: int, dim: int) -> Tensor:
    """Each index of a dimension so many times, cut to a length; ``repeat_interleave`` asks an export about strides."""
    return x.index_select(dim, torch.arange(length, device=x.device) // times)


def _products(call: Call, q: Tensor, k: Tensor, block: int) -> Tensor:
    """``q . k``, ``[B, H, T, S]``, where a query block is rotated by minus the origin of each key block it meets.

    Args:
        call: The call.
        q: ``[B, H, T, D]``.
        k: ``[B, H, S, D]``.
        block: Keys that share an origin.
    """
    if call.origins is None or q.shape[2] == 0:
        return torch.matmul(q, k.transpose(-1, -2))
    table = _dense_origins(call, call.origins)
    tiles = []
    for m, rows in enumerate(q.split(call.block_q, 2)):
        at = table[:, :, m].repeat_interleave(block, -1)[..., : k.shape[2]]
        # R(-o) q . k = q . R(o) k
        rotated = _rotate(k, call.origins.cos[at].to(k.dtype), call.origins.sin[at].to(k.dtype))
        tiles.append(torch.matmul(rows, rotated.transpose(-1, -2)))
    return torch.cat(tiles, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first = x[..., :half]
    second = x[..., half : 2 * half]
    rest = x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def _dense_origins(call: Call, origins: Origins) -> Tensor:
    """The origin of each listed block, int64 ``[B|1, H|1, M, N]``; 0 where it is not listed."""
    _, blocks_k = call.grid
    target = _listed_blocks(call)
    table = torch.zeros(*call.start.shape, blocks_k + 1, dtype=torch.int64, device=call.col.device)
    table = table.scatter(-1, target, origins.of_entry.long().expand(target.shape))[..., :blocks_k]
    return table if table.shape[1] == 1 else table.repeat_interleave(call.shape[1] // table.shape[1], 1)


def _gated(call: Call, gate: Gate, scores: Tensor, mask: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Scores whose softmax over all keys is the gated one, and which keys count."""
    _, _, _, seq_q, seq_k = call.shape
    _, blocks_k = call.grid
    beyond = blocks_k * call.block_k - seq_k
    s = pad(scores, (0, beyond)).unflatten(-1, (blocks_k, call.block_k))
    seen = pad(mask, (0, beyond)).unflatten(-1, (blocks_k, call.block_k))
    if gate.key is None:
        ordinary = torch.arange(call.block_k, device=s.device) < call.block_k - 1
        logits = s[..., -1]
        open_ = seen[..., -1]
        seen = seen & ordinary
    else:
        key = _for_heads(gate.key.to(s.dtype), call)
        logits = _where_seen(q, key, lambda q, k: _products(call, q, k, 1)) * call.scale
        open_ = torch.ones_like(seen[..., 0])
    alive = seen.any(-1)
    inner = torch.where(seen, s, -torch.inf)
    peak = torch.where(alive, inner.detach().amax(-1), 0.0).unsqueeze(-1)
    total = torch.where(seen, torch.exp(torch.where(seen, s, peak) - peak), 0.0).sum(-1)
    total = peak.squeeze(-1) + torch.log(torch.where(alive, total, 1.0))
    own = call.rule.positions(seq_q, seq_k, s.device).unsqueeze(-1) // call.block_k
    own = own == torch.arange(blocks_k, device=s.device)
    mix = gate.mix.detach().to(s.dtype).view(-1, 1, 1) if isinstance(gate.mix, Tensor) else gate.mix
    outer = torch.where(own, total, mix * logits + (1 - mix) * total)
    keep = seen & (alive & (own | open_)).unsqueeze(-1)
    s = s + (outer - total).unsqueeze(-1)
    return s.flatten(-2)[..., :seq_k], keep.flatten(-2)[..., :seq_k]
