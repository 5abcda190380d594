"""The operation in blocks, for CPUs: gather, one batched product, softmax, one batched product.

Rows that read equally many key blocks are computed together, in chunks that fit the cache. The backward recomputes the
softmax: a chunk holds whole rows, so that it is exact and nothing but the inputs is saved. Memory is O(T D + chunk).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo_kernels.blocks import gates
from attnzoo_kernels.cpu.gather import Source, tile, untile
from attnzoo_kernels.cpu.pack_gqa import pack_gqa, pack_rows, unpack_rows
from attnzoo_kernels.cpu.path import CPUPath, Gradients
from attnzoo_kernels.cpu.schedule import Bucket, Schedule, chunks_of, schedule_for
from attnzoo_kernels.cpu.scores import Chunk, Inputs, rows_of, weigh
from attnzoo_kernels.runtime.processor import multiplies_bf16
from attnzoo_kernels.runtime.products import are_numbers, product, product_where_seen
from attnzoo_kernels.runtime.workspace import scratch
from attnzoo_kernels.spec.call import Call


class BlockedPath(CPUPath):
    """Every call, forward and backward."""

    name = "blocked"

    def reasons(self, call: Call, *, need_lse: bool = False) -> tuple[str, ...]:
        """None."""
        return ()

    def forward(self, call: Call, *, need_lse: bool) -> tuple[Tensor, Tensor]:
        """As :func:`forward`."""
        return forward(call, need_lse=need_lse)

    def backward_reasons(self, call: Call, *, dlse: bool = False) -> tuple[str, ...]:
        """None."""
        return ()

    def backward(
        self,
        call: Call,
        results: tuple[Tensor | None, Tensor | None],
        *,
        dout: Tensor | None,
        dlse: Tensor | None,
        need: list[bool],
    ) -> Gradients:
        """As :func:`backward`, which recomputes what it needs of the forward."""
        return backward(call, dout, dlse, need)


def forward(call: Call, *, need_lse: bool) -> tuple[Tensor, Tensor]:
    """Out ``[B, H, T, Dv]`` in q's dtype and lse ``[B, H, T]`` (empty where not needed)."""
    packed = pack_gqa(call)
    schedule = schedule_for(packed)
    out, lse = _forward(packed, schedule, need_lse=need_lse)
    if not are_numbers(out) and _hides(packed, chunks_of(packed, schedule)):
        out, lse = _forward(packed, schedule, need_lse=need_lse, careful=True)
    out = unpack_rows(out, packed).contiguous()
    lse = unpack_rows(lse.unsqueeze(-1), packed).squeeze(-1).contiguous() if need_lse else lse
    return out, lse


def _forward(call: Call, schedule: Schedule, *, need_lse: bool, careful: bool = False) -> tuple[Tensor, Tensor]:
    batch, heads, _, _, _ = call.shape
    dtype = _value_dtype(call)
    low = call.fast and dtype != call.acc_dtype and call.origins is None
    inputs = Inputs(call, schedule, dtype if low else None, careful=careful)
    weighted = product_where_seen if careful else product
    values = Source(call.v, call.block_k, dtype, often=inputs.often)
    rows = batch * heads * call.grid[0]
    block = call.block_q
    parts = chunks_of(call, inputs.schedule)
    shape = (rows, block, call.v.shape[3])
    out = call.q.new_empty(shape) if _cover(parts, rows) else call.q.new_zeros(shape)
    lse = torch.full((rows, block, 1), -torch.inf, dtype=call.acc_dtype, device=call.q.device) if need_lse else None
    for part in parts:
        chunk = weigh(inputs, part, need_lse=need_lse)
        v = _values(values, chunk)
        # out = p v.
        weights = chunk.probs
        if weights.dtype != v.dtype:
            weights = scratch("probs", tuple(weights.shape), v.dtype, v.device).copy_(weights)
        if part.span is not None and v.dtype == out.dtype:
            weighted("out", weights, v, out=out[part.span])
        else:
            out.index_copy_(0, part.rows, weighted("out", weights, v).to(out.dtype))
        if lse is not None and chunk.lse is not None:
            lse.index_copy_(0, part.rows, chunk.lse)
    result = untile(out, call.q.shape)
    if lse is None:
        return result, call.q.new_empty(0, dtype=call.acc_dtype)
    return result, untile(lse, call.q.shape).squeeze(-1)


def _cover(parts: list[Bucket], rows: int) -> bool:
    """Whether chunks hold all rows; those that none holds read nothing, and stay zero."""
    return sum(part.rows.shape[0] for part in parts) == rows


def _hides(call: Call, parts: list[Bucket]) -> bool:
    """Whether a call computes pairs that it then hides; where it does not, what is no number is so by right."""
    if call.gate is not None or any(part.partial for part in parts):
        return True
    return call.key_bias is not None and bool((call.key_bias == -torch.inf).any())


def _value_dtype(call: Call) -> torch.dtype:
    """What weights and values are multiplied in: bf16 where the CPU has instructions for it."""
    return torch.bfloat16 if call.q.dtype == torch.bfloat16 and multiplies_bf16() else call.acc_dtype


def _values(values: Source, chunk: Chunk) -> Tensor:
    part = chunk.part
    width = chunk.k.shape[1]
    found = values.view(part.firsts, part.kv.shape[1]) if chunk.in_place else None
    if found is not None:
        return found
    v = values.gather("v", part.kv.reshape(-1))
    return v.view(part.rows.shape[0], -1, v.shape[2])[:, :width]


@dataclass
class TiledGradients:
    """Gradients of the tiled tensors in the accumulator's dtype; ``None`` where not needed."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    bias: Tensor | None = None
    q_aux: Tensor | None = None
    k_aux: Tensor | None = None
    gate: Tensor | None = None

    @property
    def every(self) -> tuple[Tensor | None, ...]:
        """All of them."""
        return self.q, self.k, self.v, self.bias, self.q_aux, self.k_aux, self.gate

    @property
    def of_scores(self) -> bool:
        """Whether the gradient of the scores is needed."""
        return any(x is not None for x in (self.q, self.k, self.bias, self.q_aux, self.k_aux, self.gate))


def backward(call: Call, dout: Tensor | None, dlse: Tensor | None, need: list[bool]) -> Gradients:
    """Gradients of q, k, v, key_bias, q_aux, k_aux and the gate's keys, each ``None`` where ``need`` says so."""
    packed = pack_gqa(call)
    if dout is None:
        dout = call.q.new_zeros(()).expand(*call.q.shape[:3], call.v.shape[3])
    dout = pack_rows(dout, packed)
    dlse = None if dlse is None else pack_rows(dlse.unsqueeze(-1), packed)
    schedule = schedule_for(packed)
    grads = _backward(packed, schedule, dout, dlse, need)
    if not are_numbers(*grads.every) and _hides(packed, chunks_of(packed, schedule)):
        grads = _backward(packed, schedule, dout, dlse, need, careful=True)
    return _as_given(call, packed, grads)


def _backward(
    call: Call, schedule: Schedule, dout: Tensor, dlse: Tensor | None, need: list[bool], *, careful: bool = False
) -> TiledGradients:
    inputs = Inputs(call, schedule, careful=careful)
    acc = call.acc_dtype
    device = call.q.device
    batch, heads, groups, _, _ = call.shape
    rows = batch * heads * call.grid[0]
    keys = batch * groups * call.grid[1]

    def zeros(needed: bool, *shape: int) -> Tensor | None:
        return torch.zeros(shape, dtype=acc, device=device) if needed else None

    width = call.q.shape[3] if inputs.rotation is None else inputs.rotation.padded
    parts = chunks_of(call, inputs.schedule)
    q_shape = (rows, call.block_q, width)
    grads = TiledGradients(
        q=call.q.new_empty(q_shape, dtype=acc) if need[0] and _cover(parts, rows) else zeros(need[0], *q_shape),
        k=zeros(need[1], keys, call.block_k, width),
        v=zeros(need[2], keys, call.block_k, call.v.shape[3]),
    )
    if inputs.bias is not None:
        grads.bias = zeros(need[3], inputs.bias.batch * inputs.bias.heads * call.grid[1], call.block_k)
    if call.aux is not None and inputs.k_aux is not None:
        aux_width = call.aux[0].shape[3]
        grads.q_aux = zeros(need[4], rows, call.block_q, aux_width)
        grads.k_aux = zeros(need[5], inputs.k_aux.batch * inputs.k_aux.heads * call.grid[1], call.block_k, aux_width)
    if inputs.gate_key is not None:
        grads.gate = zeros(need[6], keys, width)
    values = Source(call.v, call.block_k, acc, often=inputs.often)
    # The rows behind a ragged end have no gradient; tiles give them zeros.
    dout_tiles = tile(dout, call.block_q).to(acc)
    dlse_tiles = None if dlse is None else tile(dlse, call.block_q).to(acc)
    for part in parts:
        # Recomputed probabilities, as the forward made them.
        chunk = weigh(inputs, part, need_lse=False, training=True)
        dout_rows = rows_of(dout_tiles, "dout", part)
        dlse_rows = None if dlse_tiles is None else rows_of(dlse_tiles, "dlse", part)
        if chunk.dead is not None:
            dout_rows = dout_rows.masked_fill(chunk.dead, 0.0)
            dlse_rows = None if dlse_rows is None else dlse_rows.masked_fill(chunk.dead, 0.0)
        _accumulate(inputs, chunk, dout_rows, dlse_rows, values, grads)
    if inputs.rotation is not None:
        for name in ("q", "k", "gate"):
            paired = getattr(grads, name)
            setattr(grads, name, None if paired is None else inputs.rotation.in_halves(paired))
    return grads


def _accumulate(
    inputs: Inputs, chunk: Chunk, dout: Tensor, dlse: Tensor | None, values: Source, grads: TiledGradients
) -> None:
    """Adds what one chunk contributes."""
    call = inputs.call
    part = chunk.part
    kv = part.kv.reshape(-1)
    # dv = p^T do.
    if grads.v is not None:
        _add_product(inputs, grads.v, chunk, chunk.probs, dout)
    if not grads.of_scores:
        return
    # dp = do v^T, then through the softmax to ds.
    dscores = product("dscores", dout, _values(values, chunk).transpose(1, 2))
    dgates = None
    if chunk.gated is not None:
        dscores, dgates = gates.unweigh(chunk.gated, dscores, dlse)
    else:
        _through_softmax(inputs, chunk, dscores, dlse)
    multiply = product_where_seen if inputs.careful else product
    # dq = ds k, dk = ds^T q.
    if grads.q is not None:
        here = None if part.span is None else grads.q[part.span]
        dq = multiply("dq", dscores, chunk.k, out=here, scale=call.scale)
        if dgates is not None and chunk.gated is not None and chunk.gated.key is not None:
            multiply("dq", dgates, chunk.gated.key, out=dq, scale=call.scale, add=True)
        if here is None:
            grads.q.index_copy_(0, part.rows, dq)
    if grads.k is not None and part.origin is None:
        _add_product(inputs, grads.k, chunk, dscores, chunk.q, scale=call.scale)
    elif grads.k is not None:
        dk = multiply("dkv", dscores.transpose(1, 2), chunk.q, scale=call.scale).view(kv.shape[0], call.block_k, -1)
        _rotate_back(inputs, part, dk)
        _add(grads.k, kv, dk)
    if grads.gate is not None and dgates is not None:
        dkey = multiply("dgate", dgates.transpose(1, 2), chunk.q, scale=call.scale).view(kv.shape[0], 1, -1)
        _rotate_back(inputs, part, dkey)
        grads.gate.index_add_(0, kv, dkey.squeeze(1))
    _accumulate_rest(inputs, chunk, dscores, grads)


def _through_softmax(inputs: Inputs, chunk: Chunk, dscores: Tensor, dlse: Tensor | None) -> None:
    """Gradients of weights to those of scores, in place."""
    unseen = chunk.probs == 0 if inputs.careful else None
    if unseen is not None:
        # The sum over a row's slots must not meet what the row does not see.
        dscores.masked_fill_(unseen, 0.0)
    torch.ops.aten._softmax_backward_data.out(dscores, chunk.probs, -1, inputs.call.acc_dtype, grad_input=dscores)
    if dlse is not None:
        dscores.addcmul_(chunk.probs, dlse)
    if unseen is not None:
        dscores.masked_fill_(unseen, 0.0)


def _accumulate_rest(inputs: Inputs, chunk: Chunk, dscores: Tensor, grads: TiledGradients) -> None:
    """Gradients of the bias and of the auxiliary channels."""
    call = inputs.call
    part = chunk.part
    multiply = product_where_seen if inputs.careful else product
    if grads.bias is not None and inputs.bias is not None:
        _add(grads.bias, inputs.blocks_in(inputs.bias, part), dscores.sum(1))
    if grads.q_aux is not None and chunk.k_aux is not None:
        dq_aux = multiply("dq_aux", dscores, chunk.k_aux, scale=call.scale)
        grads.q_aux.index_copy_(0, part.rows, dq_aux)
    if grads.k_aux is not None and chunk.q_aux is not None and inputs.k_aux is not None:
        dk_aux = multiply("dk_aux", dscores.transpose(1, 2), chunk.q_aux, scale=call.scale)
        _add(grads.k_aux, inputs.blocks_in(inputs.k_aux, part), dk_aux)


def _add_product(
    inputs: Inputs, total: Tensor, chunk: Chunk, weights: Tensor, rows: Tensor, *, scale: float = 1.0
) -> None:
    """Adds ``weights^T rows``, gradients of a chunk's keys or values, to those of all."""
    weights = weights.transpose(1, 2)
    blocks = chunk.part.kv
    multiply = product_where_seen if inputs.careful else product
    if chunk.in_place:
        first = chunk.part.firsts[0] * total.shape[1]
        here = total.view(1, -1, total.shape[2])[:, first : first + weights.shape[1]]
        multiply("dkv", weights, rows, out=here, scale=scale, add=True)
    else:
        _add(total, blocks.reshape(-1), multiply("dkv", weights, rows, scale=scale))


def _add(total: Tensor, blocks: Tensor, x: Tensor) -> None:
    """Adds rows to blocks, in the order in which they come."""
    total.index_add_(0, blocks, x.view(blocks.shape[0], *total.shape[1:]))


def _rotate_back(inputs: Inputs, part: Bucket, dk: Tensor) -> None:
    if inputs.rotation is not None and part.origin is not None:
        inputs.rotation.rotate(dk, part.origin.reshape(-1), back=True)


def _as_given(call: Call, packed: Call, grads: TiledGradients) -> Gradients:
    """The gradients in the shapes, orders and dtypes of the inputs."""

    def rows(grad: Tensor | None, like: Tensor | None, given: Tensor | None) -> Tensor | None:
        if grad is None or like is None or given is None:
            return None
        return unpack_rows(untile(grad, like.shape), packed).to(given.dtype).contiguous()

    def keys(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
        return None if grad is None or like is None else untile(grad, like.shape).to(like.dtype).contiguous()

    q_aux, k_aux = call.aux or (None, None)
    packed_aux = packed.aux[0] if packed.aux is not None else None
    bias = None if call.key_bias is None else call.key_bias.unsqueeze(-1)
    dbias = keys(None if grads.bias is None else grads.bias.unsqueeze(-1), bias)
    gate_key = None if call.gate is None else call.gate.key
    return (
        rows(grads.q, packed.q, call.q),
        keys(grads.k, call.k),
        keys(grads.v, call.v),
        None if dbias is None else dbias.squeeze(-1),
        rows(grads.q_aux, packed_aux, q_aux),
        keys(grads.k_aux, k_aux),
        None if grads.gate is None or gate_key is None else grads.gate.view_as(gate_key).to(gate_key.dtype),
    )
