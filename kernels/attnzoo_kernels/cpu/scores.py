"""The weights of a chunk of rows, with every switch, and the way back from their gradients.

Forward and backward make the weights with the same code: the backward recomputes the softmax, which is exact since a
chunk holds whole rows.

Letters: R rows of the chunk (query blocks), n key blocks of each row, D head width, Dr rotated width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo_kernels.blocks import gates
from attnzoo_kernels.blocks.rotation import Rotation
from attnzoo_kernels.cpu.gather import Source, tile
from attnzoo_kernels.cpu.schedule import Bucket, Limits, Schedule
from attnzoo_kernels.runtime.products import product
from attnzoo_kernels.runtime.store import remembers
from attnzoo_kernels.runtime.workspace import scratch
from attnzoo_kernels.spec.call import Call


@dataclass
class Chunk:
    """Some rows of a bucket, gathered and weighed.

    Attributes:
        part: The rows and what they read.
        q: ``[R, block_q, D]``, in the dtype of the products.
        k: ``[R, n * block_k, D]``, rotated where there are origins; if ``in_place``, a ragged last block is shorter.
        q_aux: As q, with its own width, or ``None``.
        k_aux: As k.
        probs: Softmax weights ``[R, block_q, n * block_k]``.
        dead: Rows that see nothing, bool ``[R, block_q, 1]``, or ``None`` where there surely is none.
        lse: ``[R, block_q, 1]``, or ``None`` where nobody asked.
        gated: What the gate left for the way back, or ``None``.
        in_place: Whether ``k`` is a view of the call's keys.
    """

    part: Bucket
    q: Tensor
    k: Tensor
    q_aux: Tensor | None
    k_aux: Tensor | None
    probs: Tensor
    dead: Tensor | None = None
    lse: Tensor | None = None
    gated: gates.Gated | None = None
    in_place: bool = False


class Inputs:
    """A call's tensors as sources of blocks, and the schedule that says which.

    Args:
        call: The call.
        schedule: Its schedule.
        compute: What queries and keys are multiplied in; the accumulator's dtype by default.
        careful: Whether something hidden may be no number.
    """

    def __init__(
        self, call: Call, schedule: Schedule, compute: torch.dtype | None = None, *, careful: bool = False
    ) -> None:
        self.call = call
        self.schedule = schedule
        self.careful = careful
        acc = self.compute = compute or call.acc_dtype
        q = call.q
        k = call.k
        # A step that gathers few keys of a long memory must not copy all of it.
        self.often = schedule.reads_often(call)
        self.rotation = None
        if call.origins is not None:
            self.rotation = Rotation(call.origins, call.q.shape[3], call.acc_dtype)
            q = self.rotation.in_pairs(q)
            k = self.rotation.in_pairs(k) if self.often else k
        self.q = tile(q, call.block_q).to(acc)
        self.k = Source(k, call.block_k, acc, often=self.often)
        self.q_aux: Tensor | None = None
        self.k_aux = self.bias = self.gate_key = None
        if call.aux is not None:
            self.q_aux = tile(call.aux[0], call.block_q).to(acc)
            self.k_aux = Source(call.aux[1], call.block_k, acc, often=self.often)
        self.bias_hides = False
        if call.key_bias is not None:
            self.bias = Source(call.key_bias.unsqueeze(-1), call.block_k, call.acc_dtype)
            self.bias_hides = bool((call.key_bias == -torch.inf).any())
        if call.gate is not None and call.gate.key is not None:
            key = call.gate.key if self.rotation is None else self.rotation.in_pairs(call.gate.key)
            self.gate_key = Source(key, 1, acc)

    def reads_in_place(self, part: Bucket, *, training: bool) -> bool:
        """Whether a chunk's keys and values may be used where they lie.

        In training that goes for one row at a time, whose gradients are added where they belong.
        """
        call = self.call
        single = part.rows.shape[0] == 1
        plain = call.aux is None and call.gate is None and self.rotation is None and not self.bias_hides
        if not (part.runs and plain):
            return False
        return not training or (single and call.key_bias is None)

    def blocks_in(self, source: Source, part: Bucket) -> Tensor:
        """A chunk's key blocks as flat indices into ``[b, h, N]`` of a tensor that may share batch or heads."""
        if (source.batch, source.heads) == (self.call.k.shape[0], self.call.k.shape[1]):
            return part.kv.reshape(-1)
        heads = self.call.q.shape[1]
        head = part.rows // self.call.grid[0]
        index = (head // heads) * source.heads if source.batch > 1 else torch.zeros_like(head)
        index = index + (head % heads) * source.heads // heads
        return (index.unsqueeze(1) * self.call.grid[1] + part.cols).reshape(-1)


def rows_of(x: Tensor, name: str, part: Bucket) -> Tensor:
    """A chunk's rows of tiles ``[rows, ..]``: where they lie if they follow one another, else in scratch memory."""
    if part.span is not None:
        return x[part.span]
    out = scratch(name, (part.rows.shape[0], *x.shape[1:]), x.dtype, x.device)
    return torch.index_select(x, 0, part.rows, out=out)


def weigh(inputs: Inputs, part: Bucket, *, need_lse: bool, training: bool = False) -> Chunk:
    """Reads a chunk's rows and makes their weights.

    Args:
        inputs: The call.
        part: The chunk.
        need_lse: Whether the log-sum-exp is wanted.
        training: Whether gradients are wanted.
    """
    call = inputs.call
    q = rows_of(inputs.q, "q", part)
    wide = inputs.compute == call.acc_dtype
    scale = call.scale if wide else 1.0
    in_place = inputs.k.view(part.firsts, part.kv.shape[1]) if inputs.reads_in_place(part, training=training) else None
    k = _keys(inputs, part) if in_place is None else in_place
    q_aux, k_aux = _auxiliary(inputs, part)
    # Scores: scale * q k^T, with auxiliary channels and the bias on top.
    scores = product("scores", q, k.transpose(1, 2), scale=scale)
    if q_aux is not None and k_aux is not None:
        product("scores", q_aux, k_aux.transpose(1, 2), out=scores, scale=scale, add=True)
    if not wide:
        scores = _widen(scores, call)
    bias = None
    if inputs.bias is not None:
        bias = inputs.bias.gather("bias", inputs.blocks_in(inputs.bias, part)).view(part.rows.shape[0], 1, -1)
        bias = bias[..., : scores.shape[2]]
        scores += bias
    unseen = None
    if inputs.careful:
        # NaN outlives an addition and a minimum, but no choice.
        unseen = _unseen(inputs, part, bias, scores)
        scores.masked_fill_(unseen, -torch.inf)
    elif part.partial:
        # The causal edge, and those of window and sink: partial blocks come last in a row.
        _hide(inputs, part, scores)
    chunk = Chunk(part, q, k, q_aux, k_aux, scores, in_place=in_place is not None)
    if call.gate is not None:
        _gate(inputs, chunk, scores, unseen, need_lse=need_lse)
    else:
        _normalise(inputs, chunk, scores, need_lse=need_lse)
        if unseen is not None:
            # All weights of a row are NaN where one of its scores is.
            scores.masked_fill_(unseen, 0.0)
    if training and chunk.dead is not None:
        # A dead query may hold NaN; its zero weight would not take it to 0 in the gradients of keys.
        chunk.q = q.masked_fill(chunk.dead, 0.0)
        chunk.q_aux = None if q_aux is None else q_aux.masked_fill(chunk.dead, 0.0)
    return chunk


def _widen(scores: Tensor, call: Call, name: str = "wide scores") -> Tensor:
    """Scores of a low dtype in the accumulator's, scaled: a low dtype would round the scaled queries too."""
    return scratch(name, tuple(scores.shape), call.acc_dtype, scores.device).copy_(scores).mul_(call.scale)


def _keys(inputs: Inputs, part: Bucket) -> Tensor:
    k = inputs.k.gather("k", part.kv.reshape(-1))
    if inputs.rotation is not None and part.origin is not None:
        if not inputs.often:
            shape = (*k.shape[:-1], inputs.rotation.padded)
            k = inputs.rotation.in_pairs(k, scratch("k in pairs", shape, k.dtype, k.device))
        inputs.rotation.rotate(k, part.origin.reshape(-1))
    return k.view(part.rows.shape[0], -1, k.shape[2])


def _auxiliary(inputs: Inputs, part: Bucket) -> tuple[Tensor | None, Tensor | None]:
    if inputs.q_aux is None or inputs.k_aux is None:
        return None, None
    q = rows_of(inputs.q_aux, "q_aux", part)
    k = inputs.k_aux.gather("k_aux", inputs.blocks_in(inputs.k_aux, part))
    return q, k.view(part.rows.shape[0], -1, k.shape[2])


def _normalise(inputs: Inputs, chunk: Chunk, scores: Tensor, *, need_lse: bool) -> None:
    """Scores to weights in place."""
    unsafe = not chunk.part.safe or inputs.bias_hides
    peak = scores.amax(-1, keepdim=True) if need_lse or unsafe else None
    if peak is not None and unsafe:
        chunk.dead = _any_of(peak == -torch.inf)
    dead = None if chunk.dead is None else chunk.dead.flatten().nonzero().squeeze(1)
    rows = scores.flatten(0, 1)
    if dead is not None:
        rows.index_fill_(0, dead, 0.0)
    # A chunk holds whole rows: an ordinary softmax, not an online one.
    torch.softmax(scores, -1, out=scores)
    if dead is not None:
        rows.index_fill_(0, dead, 0.0)
    if need_lse and peak is not None:
        # The largest weight is exp(0) / total: no second pass of exp.
        lse = peak - scores.amax(-1, keepdim=True).log()
        chunk.lse = lse if chunk.dead is None else lse.masked_fill(chunk.dead, -torch.inf)


def _any_of(dead: Tensor) -> Tensor | None:
    return dead if bool(dead.any()) else None


def _gate(inputs: Inputs, chunk: Chunk, scores: Tensor, unseen: Tensor | None, *, need_lse: bool) -> None:
    call = inputs.call
    part = chunk.part
    gate = call.gate
    if gate is None:
        return
    heads = call.q.shape[1]
    block_k = call.block_k
    own = inputs.schedule.positions(part.rows, heads).unsqueeze(-1) // block_k == part.cols.unsqueeze(1)
    mix = gate.mix
    if isinstance(mix, Tensor):
        mix = mix.to(scores.dtype)[(part.rows // call.grid[0]) % heads].view(-1, 1, 1)
    key = logits = None
    if inputs.gate_key is not None:
        key = inputs.gate_key.gather("gate key", part.kv.reshape(-1))
        if inputs.rotation is not None and part.origin is not None:
            inputs.rotation.rotate(key, part.origin.reshape(-1))
        key = key.view(part.rows.shape[0], -1, key.shape[2])
        wide = inputs.compute == call.acc_dtype
        logits = product("gate logits", chunk.q, key.transpose(1, 2), scale=call.scale if wide else 1.0)
        if not wide:
            logits = _widen(logits, call, "wide gate logits")
    chunk.gated, chunk.probs, chunk.dead, lse = gates.weigh(
        scores, block_k, own=own, mix=mix, logits=logits, unseen=unseen
    )
    chunk.gated.key = key
    chunk.lse = lse if need_lse else None


def _hide(inputs: Inputs, part: Bucket, scores: Tensor) -> None:
    """Hides what the rule hides in the partial blocks; a hidden NaN stays, and shows in the results."""
    tail, most = _partial(inputs, part, scores)
    torch.minimum(tail, most, out=tail)


def _partial(inputs: Inputs, part: Bucket, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The scores of the partial blocks, and what they must not exceed."""
    call = inputs.call
    limits = inputs.schedule.limits_in(call, part)
    tail = scores[..., (part.cols.shape[1] - part.partial) * call.block_k :]
    most = ceiling(limits, call.block_k, scores.dtype).view(*scores.shape[:2], -1)
    return tail, most[..., : tail.shape[2]]


def _unseen(inputs: Inputs, part: Bucket, bias: Tensor | None, scores: Tensor) -> Tensor:
    """What rule and bias hide, bool, of the shape of the scores."""
    unseen = torch.zeros_like(scores, dtype=torch.bool)
    if part.partial:
        tail, most = _partial(inputs, part, scores)
        unseen[..., -tail.shape[2] :] = most < 0
    return unseen if bias is None else unseen.logical_or_(bias == -torch.inf)


@remembers(64)
def _until(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Row j is inf at the columns before j and -inf from there on, ``[block + 1, block]``."""
    with torch.inference_mode(False):
        seen = torch.arange(block, device=device) < torch.arange(block + 1, device=device).unsqueeze(1)
        return torch.where(seen, torch.inf, -torch.inf).to(dtype)


@remembers(64)
def _since(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Row j is inf at the columns from j on."""
    with torch.inference_mode(False):
        return -_until(block, dtype, device)


def ceiling(limits: Limits, block: int, dtype: torch.dtype) -> Tensor:
    """What scores must not exceed: inf at slots that are seen, else -inf, ``[R * block_q * partial, block]``."""
    hi = limits.hi.reshape(-1)
    shape = (hi.shape[0], block)
    device = hi.device
    out = scratch("ceiling", shape, dtype, device)
    torch.index_select(_until(block, dtype, device), 0, hi, out=out)
    if limits.lo is not None:
        other = scratch("other ceiling", shape, dtype, device)
        torch.index_select(_since(block, dtype, device), 0, limits.lo.reshape(-1), out=other)
        torch.minimum(out, other, out=out)
        if limits.sink is not None:
            torch.index_select(_until(block, dtype, device), 0, limits.sink.reshape(-1), out=other)
            torch.maximum(out, other, out=out)
    return out
