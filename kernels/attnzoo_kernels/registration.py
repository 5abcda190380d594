"""The operation as registered torch ops: schema, meta functions, autograd, batching.

Forward and backward are two ops. Autograd of the backward raises: left out, a gradient penalty would be silently wrong.
Autograd is a kernel of our own under torch's key: the registration helper costs a tenth of a millisecond a call at this
number of arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo_kernels import dispatch
from attnzoo_kernels.errors import UnsupportedError
from attnzoo_kernels.runtime.autocast import no_autocast
from attnzoo_kernels.runtime.plain import PLAIN, is_watched
from attnzoo_kernels.spec.call import Call, Gate, Origins
from attnzoo_kernels.spec.token_rule import TokenRule

_TENSORS = (
    "Tensor q", "Tensor k", "Tensor v", "Tensor start", "Tensor count", "Tensor col", "Tensor? q_pos",
    "Tensor? key_bias", "Tensor? window", "Tensor? sink", "Tensor? q_aux", "Tensor? k_aux", "Tensor? gate",
    "Tensor? gate_mix", "Tensor? origin", "Tensor? cos", "Tensor? sin",
)  # fmt: skip
_SCALARS = (
    "int block_q", "int block_k", "bool causal", "int? window_size", "int sink_size", "float scale", "bool gate_last",
    "float gate_mix_size", "bool fast", "str impl",
)  # fmt: skip
_INDEX_OF = {text.rpartition(" ")[2]: index for index, text in enumerate(_TENSORS)}
_COUNT = len(_TENSORS)
WITH_GRADIENT = tuple(_INDEX_OF[name] for name in ("q", "k", "v", "key_bias", "q_aux", "k_aux", "gate"))
"""Indices of the inputs that have gradients, in the order of the backward's results."""
_LISTS = tuple(_INDEX_OF[name] for name in ("start", "count", "col", "origin"))
_SHARED = tuple(_INDEX_OF[name] for name in ("window", "sink", "gate_mix", "cos", "sin"))
_INPUTS = ", ".join((*_TENSORS, *_SCALARS))
_GRADIENTS = ", ".join(["Tensor"] * len(WITH_GRADIENT))

_library = torch.library.Library("attnzoo", "DEF")
_library.define(f"bsa_fwd({_INPUTS}, bool need_lse) -> (Tensor, Tensor)")
_library.define(
    f"bsa_bwd(Tensor? dout, Tensor? dlse, Tensor? out, Tensor? lse, {_INPUTS}, bool[] need) -> ({_GRADIENTS})"
)


def flatten(call: Call) -> tuple[Any, ...]:
    """A call as the ops' arguments, without ``impl``."""
    rule = call.rule
    gate = call.gate
    origins = call.origins
    window, sink = (x if isinstance(x, Tensor) else None for x in (rule.window, rule.sink))
    mix = 1.0 if gate is None else gate.mix
    return (
        call.q, call.k, call.v, call.start, call.count, call.col, rule.q_pos, call.key_bias, window, sink,
        *(call.aux or (None, None)), None if gate is None else gate.key, mix if isinstance(mix, Tensor) else None,
        *((None, None, None) if origins is None else (origins.of_entry, origins.cos, origins.sin)),
        call.block_q, call.block_k, rule.causal, None if window is not None else rule.window,
        0 if sink is not None else rule.sink, call.scale, gate is not None and gate.is_last,
        1.0 if isinstance(mix, Tensor) else float(mix), call.fast,
    )  # fmt: skip


def _call_of(inputs: tuple[Any, ...]) -> Call:
    """The inverse of :func:`flatten`."""
    q, k, v, start, count, col, q_pos, key_bias, window, sink = inputs[:10]
    q_aux, k_aux, gate_key, gate_mix, origin, cos, sin = inputs[10:_COUNT]
    block_q, block_k, causal, window_size, sink_size, scale, gate_last, mix, fast, _ = inputs[_COUNT:]
    rule = TokenRule(causal, q_pos, window_size if window is None else window, sink_size if sink is None else sink)
    aux = None if q_aux is None else (q_aux, k_aux)
    gated = gate_last or gate_key is not None
    gate = Gate(gate_key, mix if gate_mix is None else gate_mix) if gated else None
    origins = None if origin is None else Origins(origin, cos, sin)
    return Call(
        q, k, v, start, count, col, key_bias, rule, block_q, block_k, scale, aux, gate, origins, fast
    )  # fmt: skip


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    call = _call_of(args[:-1])
    with no_autocast(call.q.device.type):
        return dispatch.forward(args[-2], call, need_lse=args[-1])


def _backward(
    dout: Tensor | None, dlse: Tensor | None, out: Tensor | None, lse: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    call = _call_of(args[:-1])
    need = args[-1]
    with no_autocast(call.q.device.type):
        grads = dispatch.backward(args[-2], call, (out, lse), dout, dlse, need)
    return tuple(call.q.new_empty(0) if grad is None else grad for grad in grads)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    q, _, v = args[:3]
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3] if args[-1] else (0,), dtype=acc)


def _backward_fake(
    dout: Tensor | None, dlse: Tensor | None, out: Tensor | None, lse: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    likes = [args[index] for index in WITH_GRADIENT]
    return tuple(
        like.new_empty(like.shape) if needed and like is not None else args[0].new_empty(0)
        for like, needed in zip(likes, args[-1], strict=True)
    )


def _save(
    ctx: Any, tensors: tuple[Tensor | None, ...], results: tuple[Tensor, Tensor], *, keeps: bool, need_lse: bool
) -> tuple[Tensor, Tensor]:
    """Keeps what the backward reads; the results as they are given out."""
    out, lse = results
    # A layout may have been made in inference mode, whose tensors autograd does not keep.
    inputs = (x.clone() if x is not None and x.is_inference() else x for x in tensors)
    ctx.save_for_backward(*inputs, out if keeps else None, lse if keeps else None)
    ctx.need_lse = need_lse
    ctx.set_materialize_grads(False)
    if not need_lse:
        lse = lse.new_empty(0)
        ctx.mark_non_differentiable(lse)
    return out, lse


def _gradients(ctx: Any, given: tuple[Tensor | None, ...], *, before: int) -> tuple[Tensor | None, ...]:
    """Gradients of a forward's arguments; ``before``: how many precede its tensors where it went straight to a path."""
    dout, dlse = given
    need = [ctx.needs_input_grad[before + index] for index in WITH_GRADIENT]
    dlse = dlse if ctx.need_lse else None
    *inputs, out, lse = ctx.saved_tensors
    if not before or torch.is_grad_enabled() or is_watched() or not _are_plain((dout, dlse)):
        grads = torch.ops.attnzoo.bsa_bwd(dout, dlse, out, lse, *inputs, *ctx.scalars, need)
    else:
        call = _call_of((*inputs, *ctx.scalars))
        with no_autocast(call.q.device.type):
            grads = dispatch.backward(ctx.scalars[-1], call, (out, lse), dout, dlse, need)
    result: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for index, grad, needed in zip(WITH_GRADIENT, grads, need, strict=True):
        result[before + index] = grad if needed else None
    return tuple(result)


class _Attend(torch.autograd.Function):
    """The forward with the backward op as its derivative."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        keeps = dispatch.keeps_results(args[-2], _call_of(args[:-1]))
        need_lse = args[-1]
        with torch._C._AutoDispatchBelowAutograd():
            results = torch.ops.attnzoo.bsa_fwd(*args[:-1], need_lse or keeps)
        ctx.scalars = args[_COUNT:-1]
        return _save(ctx, args[:_COUNT], results, keeps=keeps, need_lse=need_lse)

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, given, before=0)


class _AttendDirectly(torch.autograd.Function):
    """The same without a way through the dispatcher; the call comes beside its tensors."""

    @staticmethod
    def forward(ctx: Any, call: Call, impl: str, need_lse: bool, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        keeps = dispatch.keeps_results(impl, call)
        results = dispatch.forward(impl, call, need_lse=need_lse or keeps)
        ctx.scalars = (*flatten(call)[_COUNT:], impl)
        return _save(ctx, tensors, results, keeps=keeps, need_lse=need_lse)

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, given, before=3)


class _Refuse(torch.autograd.Function):
    """The backward op, whose own derivative raises."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            grads: tuple[Tensor, ...] = torch.ops.attnzoo.bsa_bwd(*args)
        return grads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise UnsupportedError(
            "block_sparse_attention: this implementation has no second derivatives; impl='reference' has them"
        )


_attend: Any = _Attend.apply
_attend_directly: Any = _AttendDirectly.apply
_refuse: Any = _Refuse.apply


def _differentiable(tensors: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors)


REAL = ("cpu", "cuda")
"""Devices whose tensors have values."""


def _are_plain(tensors: tuple[Any, ...]) -> bool:
    """Whether tensors are of torch's own class, or none at all."""
    return all(x is None or type(x) in PLAIN for x in tensors)


def attend(call: Call, impl: str, *, need_lse: bool) -> tuple[Tensor, Tensor]:
    """A forward with its derivative: by the ops where somebody looks at what is dispatched, else straight to its path.

    The way through the dispatcher and back, of some thirty arguments, takes several times as long as a small call.
    """
    simple = call.is_plain and call.rule.is_static
    tensors = (call.q, call.k, call.v, call.col) if simple else flatten(call)[:_COUNT]
    if is_watched() or call.q.device.type not in REAL or not _are_plain(tensors):
        out, lse = torch.ops.attnzoo.bsa_fwd(*flatten(call), impl, need_lse)
        return out, lse
    with no_autocast(call.q.device.type):
        if _differentiable(tensors):
            out, lse = _attend_directly(call, impl, need_lse, *flatten(call)[:_COUNT])
            return out, lse
        return dispatch.forward(impl, call, need_lse=need_lse)


def _forward_autograd(*args: Any) -> Any:
    if _differentiable(args[:_COUNT]):
        return _attend(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.attnzoo.bsa_fwd(*args)


def _backward_autograd(*args: Any) -> Any:
    if _differentiable(args[: _COUNT + 4]):
        return _refuse(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.attnzoo.bsa_bwd(*args)


def _batch(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Moves the mapped dimension into the batch."""
    size = info.batch_size
    for index in _SHARED:
        if in_dims[index] is not None:
            name = _TENSORS[index].rpartition(" ")[2]
            raise UnsupportedError(f"vmap: {name} may not be mapped over; impl='reference' with a loop does it")
    moved = list(args)
    apart = {*_SHARED, *_LISTS}
    batched = [index for index in range(_COUNT) if index not in apart and args[index] is not None]
    for i in batched:
        x = args[i].movedim(in_dims[i], 0) if in_dims[i] is not None else args[i].unsqueeze(0)
        shared = i > 2 and in_dims[i] is None and x.shape[1] == 1
        moved[i] = x[0] if shared else x.expand(size, *x.shape[1:]).flatten(0, 1)
    batch = moved[0].shape[0] // max(size, 1)
    for i in batched:
        if moved[i].shape[0] not in (1, size * batch):
            moved[i] = moved[i].repeat_interleave(batch, 0)
    for i, x in zip(_LISTS, _batch_lists(size, batch, [(args[i], in_dims[i]) for i in _LISTS]), strict=True):
        moved[i] = x
    out, lse = torch.ops.attnzoo.bsa_fwd(*moved)
    lse = lse.unflatten(0, (size, batch)) if args[-1] else lse.expand(size, 0)
    return (out.unflatten(0, (size, batch)), lse), (0, 0)


def _batch_lists(size: int, batch: int, lists: list[tuple[Tensor | None, int | None]]) -> list[Tensor | None]:
    """A layout's start, count, col and origin for ``size * batch`` items, from those of each call."""
    if all(dim is None for _, dim in lists):
        (start, _), (count, _), (col, _), (origin, _) = lists
        repeated = [x if x is None or x.shape[0] == 1 else x.repeat(size, 1, 1) for x in (start, count)]
        return [*repeated, col, origin]
    each = [
        None if x is None else x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in lists
    ]
    start, count, col, origin = each
    if start is None or count is None or col is None:
        raise TypeError("layout: expected start, count and col, got None")
    # The calls' entries lie one after the other.
    first = torch.arange(size, dtype=start.dtype, device=start.device).view(-1, 1, 1, 1) * col.shape[1]
    wide = [x.expand(-1, batch, -1, -1).flatten(0, 1) for x in (start + first, count)]
    return [*wide, col.flatten(), None if origin is None else origin.flatten()]


for _name, _function, _autograd in (
    ("bsa_fwd", _forward, _forward_autograd),
    ("bsa_bwd", _backward, _backward_autograd),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    _library.impl(_name, _autograd, "Autograd")
torch.library.register_fake("attnzoo::bsa_fwd", _forward_fake, lib=_library)
torch.library.register_fake("attnzoo::bsa_bwd", _backward_fake, lib=_library)
torch.library.register_vmap("attnzoo::bsa_fwd", _batch, lib=_library)
