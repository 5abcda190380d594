"""The operation in blocks, for CPUs: gather, one batched product, softmax, one batched product.

Rows that read equally many key blocks are computed together, in chunks that fit the cache. The backward recomputes the
softmax: a chunk holds whole rows, so that it is exact and nothing but the inputs is saved. Memory is O(T D + chunk).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_zeros

from attnzoo_kernels.call import Call
from attnzoo_kernels.schedule import Bucket, Schedule, schedule_for
from attnzoo_kernels.workspace import scratch

CHUNK_SCORES = 1 << 18
"""Scores in one chunk and thread: what stays in a core's cache between the two products."""


@dataclass(frozen=True)
class Chunk:
    """Some rows of a bucket, gathered.

    Attributes:
        rows: int64 ``[R]``.
        kv: int64 ``[R * n]``, their key blocks in the tiled keys.
        q: ``[R, block_q, D]``, scaled, in the accumulator's dtype.
        k: ``[R, n * block_k, D]``.
        v: ``[R, n * block_k, Dv]``.
        probs: Softmax weights ``[R, block_q, n * block_k]``.
        dead: Rows that see nothing, bool ``[R, block_q, 1]``, or ``None`` where there surely is none.
        peak: The largest score of each row ``[R, block_q, 1]``, or ``None`` where nobody asked.
        bias: int64 ``[R * n]``, their blocks in the tiled bias, or ``None``.
    """

    rows: Tensor
    kv: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    probs: Tensor
    dead: Tensor | None
    peak: Tensor | None
    bias: Tensor | None


class Tiles:
    """The call's tensors cut into blocks, with what chunks need to index them."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.blocks_q, self.blocks_k = call.grid
        self.q = self.tile(call.q, call.block_q, self.blocks_q)
        self.k = self.tile(call.k, call.block_k, self.blocks_k)
        self.v = self.tile(call.v, call.block_k, self.blocks_k)
        self.bias = None
        self.bias_hides = False
        if call.key_bias is not None:
            self.bias = self.tile(call.key_bias.unsqueeze(-1), call.block_k, self.blocks_k).squeeze(-1)
            self.bias_hides = bool((call.key_bias == -torch.inf).any())

    @staticmethod
    def tile(x: Tensor, block: int, blocks: int) -> Tensor:
        """``[B, h, L, D]`` as ``[B * h * blocks, block, D]``; a ragged tail is filled with zeros."""
        pad = blocks * block - x.shape[2]
        x = pad_zeros(x, (0, 0, 0, pad)) if pad else x
        return x.reshape(x.shape[0] * x.shape[1] * blocks, block, x.shape[3])

    @staticmethod
    def untile(x: Tensor, like: Tensor) -> Tensor:
        """The inverse of :meth:`tile`, in the shape and dtype of ``like``, contiguous."""
        batch, heads, length, _ = like.shape
        x = x.view(batch, heads, x.shape[0] * x.shape[1] // max(batch * heads, 1), x.shape[-1])[:, :, :length]
        return x.to(like.dtype).contiguous()

    def kv_rows(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Indices of blocks in the tiled keys, int64 ``[R * n]``."""
        _, heads, groups, _, _ = self.call.shape
        head = rows // self.blocks_q
        group = (head // heads) * groups + (head % heads) // (heads // groups)
        return (group.unsqueeze(1) * self.blocks_k + cols).reshape(-1)

    def bias_rows(self, rows: Tensor, cols: Tensor) -> Tensor | None:
        """Indices of blocks in the tiled bias, int64 ``[R * n]``."""
        if self.call.key_bias is None:
            return None
        _, heads, _, _, _ = self.call.shape
        bias_batch, bias_heads, _ = self.call.key_bias.shape
        head = rows // self.blocks_q
        index = (head // heads) * bias_heads if bias_batch > 1 else torch.zeros_like(head)
        index = index + (head % heads) * bias_heads // heads
        return (index.unsqueeze(1) * self.blocks_k + cols).reshape(-1)


def chunks(call: Call, tiles: Tiles, *, need_peak: bool) -> Iterator[Chunk]:
    """The call's rows, gathered, scored and normalised, a chunk at a time."""
    schedule = schedule_for(call)
    budget = CHUNK_SCORES * min(torch.get_num_threads(), 4)
    for bucket in schedule.buckets:
        # Small query blocks gather as many keys as large ones: their chunks are bounded by the keys.
        scores = max(call.block_q, 64) * bucket.cols.shape[1] * call.block_k
        size = max(1, budget // scores)
        for rows, cols in zip(bucket.rows.split(size), bucket.cols.split(size), strict=True):
            yield _score(call, tiles, schedule, Bucket(rows, cols, bucket.partial, bucket.safe), need_peak=need_peak)


def _score(call: Call, tiles: Tiles, schedule: Schedule, part: Bucket, *, need_peak: bool) -> Chunk:
    acc = call.acc_dtype
    size, length = part.cols.shape
    kv = tiles.kv_rows(part.rows, part.cols)
    q = _gather("q", tiles.q, part.rows, acc).mul_(call.scale)
    k = _gather("k", tiles.k, kv, acc).view(size, length * call.block_k, -1)
    v = _gather("v", tiles.v, kv, acc).view(size, length * call.block_k, -1)
    bias_at = tiles.bias_rows(part.rows, part.cols)
    bias = None
    if bias_at is not None and tiles.bias is not None:
        bias = tiles.bias.index_select(0, bias_at).view(size, 1, length * call.block_k).to(acc)
        if tiles.bias_hides:
            hidden = (bias == -torch.inf).view(size, -1, 1)
            k.masked_fill_(hidden, 0.0)
            v.masked_fill_(hidden, 0.0)
    scores = _product("scores", q, k.transpose(1, 2))
    if bias is not None:
        scores += bias
    if part.partial:
        tail = scores[..., (length - part.partial) * call.block_k :]
        tail.masked_fill_(_hidden(call, schedule, part), -torch.inf)
    peak = dead = None
    if need_peak or not part.safe or tiles.bias_hides:
        peak = scores.amax(-1, keepdim=True)
    if peak is not None and (not part.safe or tiles.bias_hides):
        dead = peak == -torch.inf
        scores.masked_fill_(dead, 0.0)
        # A dead query may hold NaN; its zero weight would not silence it in dK.
        q.masked_fill_(dead, 0.0)
    probs = torch.softmax(scores, -1, out=scores)
    if dead is not None:
        probs.masked_fill_(dead, 0.0)
    return Chunk(part.rows, kv, q, k, v, probs, dead, peak, bias_at)


def _gather(name: str, tiles: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of ``tiles`` in scratch memory, converted to ``dtype``."""
    shape = (index.shape[0], *tiles.shape[1:])
    raw = scratch(name, shape, tiles.dtype, tiles.device)
    torch.index_select(tiles, 0, index, out=raw)
    if tiles.dtype == dtype:
        return raw
    return scratch(name, shape, dtype, tiles.device).copy_(raw)


def _product(name: str, a: Tensor, b: Tensor) -> Tensor:
    """A batched product in scratch memory."""
    return torch.bmm(a, b, out=scratch(name, (*a.shape[:2], b.shape[2]), a.dtype, a.device))


def _hidden(call: Call, schedule: Schedule, part: Bucket) -> Tensor:
    """Which pairs of the partial blocks are hidden, bool ``[R, block_q, partial * block_k]``."""
    _, heads, _, _, seq_k = call.shape
    rule, blocks_q = call.rule, schedule.pos.shape[2]
    head, block = part.rows // blocks_q, part.rows % blocks_q
    pos_batch, pos_heads = schedule.pos.shape[:2]
    at_batch = head // heads if pos_batch > 1 else torch.zeros_like(head)
    at_head = head % heads if pos_heads > 1 else torch.zeros_like(head)
    pos = schedule.pos[at_batch, at_head, block]

    def of_row(value: int | Tensor) -> int | Tensor:
        return value.long()[head % heads].unsqueeze(1) if isinstance(value, Tensor) else value

    window = None if rule.window is None else of_row(rule.window)
    lo, hi = rule.span(pos, window, seq_k)
    cols = part.cols[:, part.cols.shape[1] - part.partial :]
    slot = cols.unsqueeze(-1) * call.block_k + torch.arange(call.block_k, device=cols.device)
    slot = slot.view(cols.shape[0], 1, -1)
    hidden = (slot >= hi.unsqueeze(-1)) | (slot < lo.unsqueeze(-1))
    if window is not None:
        hidden &= slot >= rule.sink_end(pos, of_row(rule.sink), seq_k).unsqueeze(-1)
    return hidden


def fold_groups(call: Call) -> Call:
    """The same call with its tiles as small as its rows, where there is one query block.

    The query heads of a group are laid along the rows where they read the same blocks: a decode step then gathers each
    key block once a group instead of once a head.
    """
    batch, heads, groups, seq_q, _ = call.shape
    rule, bias = call.rule, call.key_bias
    if not 0 < seq_q <= call.block_q:
        return call
    fold = heads // groups
    shared = (
        call.start.shape[1] in (1, groups) and not rule.is_per_head and (bias is None or bias.shape[1] in (1, groups))
    )
    if fold == 1 or not shared or fold * seq_q > 64:
        return call if seq_q == call.block_q else replace(call, block_q=seq_q)
    q_pos = None if rule.q_pos is None else rule.q_pos.repeat(1, 1, fold)
    # [B, H, T, D] -> [B, G, H / G * T, D]
    q = call.q.reshape(batch, groups, fold * seq_q, call.q.shape[3])
    return replace(call, q=q, block_q=fold * seq_q, rule=replace(rule, q_pos=q_pos, folded=fold))


def forward(call: Call, *, need_lse: bool) -> tuple[Tensor, Tensor]:
    """Out ``[B, H, T, Dv]`` in q's dtype and lse ``[B, H, T]`` (empty where not needed)."""
    shape = call.q.shape[:3]
    out, lse = _forward(fold_groups(call), need_lse=need_lse)
    return out.view(*shape, out.shape[-1]), lse.view(shape) if need_lse else lse


def _forward(call: Call, *, need_lse: bool) -> tuple[Tensor, Tensor]:
    tiles = Tiles(call)
    rows, block = tiles.q.shape[:2]
    out = tiles.q.new_zeros(rows, block, call.v.shape[3])
    lse = torch.full((rows, block, 1), -torch.inf, dtype=call.acc_dtype, device=call.q.device) if need_lse else None
    for chunk in chunks(call, tiles, need_peak=need_lse):
        out.index_copy_(0, chunk.rows, _product("out", chunk.probs, chunk.v).to(out.dtype))
        if lse is not None and chunk.peak is not None:
            # The largest weight is exp(0) / total: no second pass of exp.
            value = chunk.peak - chunk.probs.amax(-1, keepdim=True).log()
            value = value if chunk.dead is None else value.masked_fill(chunk.dead, -torch.inf)
            lse.index_copy_(0, chunk.rows, value)
    out_like = call.q.new_empty(*call.q.shape[:3], 0)
    result = Tiles.untile(out, out_like)
    if lse is None:
        return result, call.q.new_empty(0, dtype=call.acc_dtype)
    return result, Tiles.untile(lse, out_like.to(call.acc_dtype)).squeeze(-1)


@dataclass
class Gradients:
    """Gradients of the tiled tensors in the accumulator's dtype; ``None`` where not needed."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    bias: Tensor | None


def backward(
    call: Call, dout: Tensor | None, dlse: Tensor | None, need: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, v and key_bias, each ``None`` where ``need`` says so."""
    folded = fold_groups(call)
    if folded is not call:
        dout = None if dout is None else dout.reshape(*folded.q.shape[:3], dout.shape[3])
        dlse = None if dlse is None else dlse.reshape(folded.q.shape[:3])
        dq, dk, dv, dbias = backward(folded, dout, dlse, need)
        return None if dq is None else dq.view(call.q.shape), dk, dv, dbias
    tiles = Tiles(call)
    acc = call.acc_dtype

    def zeros(like: Tensor | None, needed: bool) -> Tensor | None:
        return torch.zeros_like(like, dtype=acc) if needed and like is not None else None

    grads = Gradients(*(zeros(x, n) for x, n in zip((tiles.q, tiles.k, tiles.v, tiles.bias), need, strict=True)))
    if dout is None:
        dout = call.q.new_zeros(()).expand(*call.q.shape[:3], call.v.shape[3])
    dout_tiles = Tiles.tile(dout, call.block_q, tiles.blocks_q)
    dlse_tiles = None if dlse is None else Tiles.tile(dlse.unsqueeze(-1), call.block_q, tiles.blocks_q)
    for chunk in chunks(call, tiles, need_peak=False):
        _accumulate(call, chunk, dout_tiles, dlse_tiles, grads)
    dbias = None if grads.bias is None else grads.bias.unsqueeze(-1)
    bias_like = None if call.key_bias is None else call.key_bias.unsqueeze(-1)
    dq, dk, dv = (
        None if grad is None else Tiles.untile(grad, like)
        for grad, like in ((grads.q, call.q), (grads.k, call.k), (grads.v, call.v))
    )
    if dbias is None or bias_like is None:
        return dq, dk, dv, None
    return dq, dk, dv, Tiles.untile(dbias, bias_like).squeeze(-1)


def _accumulate(call: Call, chunk: Chunk, dout: Tensor, dlse: Tensor | None, grads: Gradients) -> None:
    acc = call.acc_dtype
    dout_rows = _gather("dout", dout, chunk.rows, acc)
    if chunk.dead is not None:
        dout_rows.masked_fill_(chunk.dead, 0.0)
    if grads.v is not None:
        dv = _product("dkv", chunk.probs.transpose(1, 2), dout_rows)
        grads.v.index_add_(0, chunk.kv, dv.view(-1, call.block_k, dv.shape[-1]))
    if grads.q is None and grads.k is None and grads.bias is None:
        return
    dscores = _product("dscores", dout_rows, chunk.v.transpose(1, 2))
    torch.ops.aten._softmax_backward_data.out(dscores, chunk.probs, -1, acc, grad_input=dscores)
    if dlse is not None:
        dlse_rows = dlse.index_select(0, chunk.rows).to(acc)
        if chunk.dead is not None:
            dlse_rows = dlse_rows.masked_fill(chunk.dead, 0.0)
        dscores.addcmul_(chunk.probs, dlse_rows)
    if grads.q is not None:
        grads.q.index_copy_(0, chunk.rows, _product("dq", dscores, chunk.k).mul_(call.scale))
    if grads.k is not None:
        dk = _product("dkv", dscores.transpose(1, 2), chunk.q)
        grads.k.index_add_(0, chunk.kv, dk.view(-1, call.block_k, dk.shape[-1]))
    if grads.bias is not None and chunk.bias is not None:
        grads.bias.index_add_(0, chunk.bias, dscores.sum(1).view(-1, call.block_k))
