"""The operation as registered torch ops: schema, meta functions, autograd, batching.

Forward and backward are two ops. Autograd of the backward raises: left out, a gradient penalty would be silently wrong.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from attnzoo_kernels import blocked
from attnzoo_kernels.call import Call
from attnzoo_kernels.errors import UnsupportedError
from attnzoo_kernels.rule import Rule

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor start, Tensor count, Tensor col, "
    "Tensor? q_pos, Tensor? key_bias, Tensor? window, Tensor? sink, "
    "int block_q, int block_k, bool causal, int? window_size, int sink_size, float scale, str impl"
)
_KEY_BIAS = 7
_LAYOUT = slice(3, 6)

_library = torch.library.Library("attnzoo", "DEF")
_library.define(f"bsa_fwd({_INPUTS}, bool need_lse) -> (Tensor, Tensor)")
_library.define(f"bsa_bwd(Tensor? dout, Tensor? dlse, {_INPUTS}, bool[] need) -> (Tensor, Tensor, Tensor, Tensor)")


def _call_of(inputs: tuple[Any, ...]) -> Call:
    """The inputs of ``_INPUTS`` as a call."""
    q, k, v, start, count, col, q_pos, key_bias, window, sink = inputs[:10]
    block_q, block_k, causal, window_size, sink_size, scale, _ = inputs[10:]
    rule = Rule(causal, q_pos, window_size if window is None else window, sink_size if sink is None else sink)
    return Call(q, k, v, start, count, col, key_bias, rule, block_q, block_k, scale)


def no_autocast(device: str) -> AbstractContextManager[Any]:
    """Switches autocast off: the inputs are cast already, and inside it would round scores and accumulators."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    call = _call_of(args[:-1])
    with no_autocast(call.q.device.type):
        return blocked.forward(call, need_lse=args[-1])


def _backward(dout: Tensor | None, dlse: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call, need = _call_of(args[:-1]), args[-1]
    with no_autocast(call.q.device.type):
        grads = blocked.backward(call, dout, dlse, need)
    dq, dk, dv, dbias = (call.q.new_empty(0) if grad is None else grad for grad in grads)
    return dq, dk, dv, dbias


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    q, _, v = args[:3]
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3] if args[-1] else (0,), dtype=acc)


def _backward_fake(dout: Tensor | None, dlse: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = args[:3]
    dq, dk, dv, dbias = (
        like.new_empty(like.shape) if needed and like is not None else q.new_empty(0)
        for like, needed in zip((q, k, v, args[_KEY_BIAS]), args[-1], strict=True)
    )
    return dq, dk, dv, dbias


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.scalars = inputs[10:-1]
    ctx.need_lse = inputs[-1]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    need = [ctx.needs_input_grad[i] for i in (0, 1, 2, _KEY_BIAS)]
    dlse = dlse if ctx.need_lse else None
    grads = torch.ops.attnzoo.bsa_bwd(dout, dlse, *ctx.saved_tensors, *ctx.scalars, need)
    result: list[Tensor | None] = [None] * (10 + len(ctx.scalars) + 1)
    for place, grad, needed in zip((0, 1, 2, _KEY_BIAS), grads, need, strict=True):
        result[place] = grad if needed else None
    return tuple(result)


def _refuse_second_derivative(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise UnsupportedError(
        "block_sparse_attention: this implementation has no second derivatives; impl='reference' has them"
    )


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    return None


def _batch(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Folds the mapped dimension into the batch."""
    size = info.batch_size
    if any(dim is not None for dim in in_dims[_LAYOUT]):
        raise UnsupportedError("vmap: the layout may not be mapped over; impl='reference' with a loop does it")
    if any(dim is not None for dim in in_dims[8:10]):
        raise UnsupportedError("vmap: window and sink may not be mapped over; impl='reference' with a loop does it")
    moved = list(args)
    for i in (0, 1, 2, 6, _KEY_BIAS):
        if args[i] is None:
            continue
        x = args[i].movedim(in_dims[i], 0) if in_dims[i] is not None else args[i].unsqueeze(0)
        shared = i > 2 and in_dims[i] is None and x.shape[1] == 1
        moved[i] = x[0] if shared else x.expand(size, *x.shape[1:]).flatten(0, 1)
    batch = moved[0].shape[0] // max(size, 1)
    for i in (6, _KEY_BIAS):
        if moved[i] is not None and moved[i].shape[0] not in (1, size * batch):
            moved[i] = moved[i].repeat_interleave(batch, 0)
    for i in (3, 4):
        moved[i] = args[i] if args[i].shape[0] == 1 else args[i].repeat(size, 1, 1)
    out, lse = torch.ops.attnzoo.bsa_fwd(*moved)
    lse = lse.unflatten(0, (size, batch)) if args[-1] else lse.expand(size, 0)
    return (out.unflatten(0, (size, batch)), lse), (0, 0)


for _name, _function in (("bsa_fwd", _forward), ("bsa_bwd", _backward)):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
torch.library.register_fake("attnzoo::bsa_fwd", _forward_fake, lib=_library)
torch.library.register_fake("attnzoo::bsa_bwd", _backward_fake, lib=_library)
torch.library.register_autograd("attnzoo::bsa_fwd", _differentiate, setup_context=_keep_inputs, lib=_library)
torch.library.register_autograd(
    "attnzoo::bsa_bwd", _refuse_second_derivative, setup_context=_keep_nothing, lib=_library
)
torch.library.register_vmap("attnzoo::bsa_fwd", _batch, lib=_library)
