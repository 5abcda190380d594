"""The public functions of the operation: check, choose, run."""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnzoo_kernels import reference
from attnzoo_kernels.checks import check_arguments, check_counting
from attnzoo_kernels.dispatch import PATH_NAMES, reasons_against
from attnzoo_kernels.errors import UnsupportedError
from attnzoo_kernels.flops import register_when_counting
from attnzoo_kernels.layouts.density import count_pairs
from attnzoo_kernels.layouts.layout import BlockLayout
from attnzoo_kernels.registration import attend
from attnzoo_kernels.runtime.autocast import as_autocast, no_autocast
from attnzoo_kernels.runtime.plain import is_watched
from attnzoo_kernels.runtime.products import rounds_to_zero
from attnzoo_kernels.runtime.tracing import traceable
from attnzoo_kernels.spec.call import Call, Gate, Origins
from attnzoo_kernels.spec.extras import Extras
from attnzoo_kernels.spec.token_rule import TokenRule, bounded

_NO_EXTRAS = Extras()


@traceable("block_sparse_attention")
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    causal: bool = True,
    scale: float | None = None,
    extras: Extras | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Softmax attention restricted to the key blocks that a layout lists.

    .. math:: o_t = \sum_{s \in S(t)} \mathrm{softmax}_s(\sigma\, q_t \cdot k_s + b_s)\, v_s

    S(t) are the slots of the listed blocks that the token rule leaves to row t. Causality is aligned at the last key,
    ``s <= t + S - T``, unless ``extras.q_pos`` says otherwise.

    Args:
        q: Queries ``[B, H, T, D]``, any strides; fp64, fp32, fp16 or bf16.
        k: Keys ``[B, G, S, D]``; H must be a multiple of G.
        v: Values ``[B, G, S, Dv]``.
        layout: Which key blocks each query block reads.
        causal: Whether a row may read only slots up to its position.
        scale: The factor on scores. ``None`` means ``D ** -0.5``.
        extras: Positions, bias, window and sink, and what later variants add.
        impl: ``"auto"``, ``"reference"``, ``"blocked"`` or ``"triton"``. A named one runs or raises.

    Returns:
        ``[B, H, T, Dv]`` in q's dtype. A row with nothing to read gives zeros and has zero gradients.

    Raises:
        TypeError: If an argument has the wrong type.
        ShapeError: If shapes, dtypes or devices disagree.
        UnsupportedError: If ``impl`` names an implementation that cannot run these inputs.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 1, 4, 100, 16).unbind(0)
        >>> layout = BlockLayout.window(32, 32, 100, 100, window=32)
        >>> block_sparse_attention(q, k, v, layout).shape
        torch.Size([1, 4, 100, 16])
    """
    return _attend((q, k, v), layout, causal, scale, extras, impl, need_lse=False)[0]


@traceable("block_sparse_attention_with_lse")
def block_sparse_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    causal: bool = True,
    scale: float | None = None,
    extras: Extras | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """As :func:`block_sparse_attention`, with the log-sum-exp of the scores beside the output.

    Returns:
        ``(out, lse)``: out as there; lse ``[B, H, T]``, natural log, differentiable, fp64 when the inputs are fp64,
        else fp32. A row with nothing to read gives 0 and -inf.

    Raises:
        TypeError: As there.
        ShapeError: As there.
        UnsupportedError: As there.
    """
    return _attend((q, k, v), layout, causal, scale, extras, impl, need_lse=True)


def why_not(
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    causal: bool = True,
    scale: float | None = None,
    extras: Extras | None = None,
) -> tuple[str, ...]:
    """The reasons why an implementation cannot run these inputs; empty if it runs them.

    Reads metadata only, so that it also answers on fake and meta tensors. ``"blocked"`` runs everything, on the first
    of its paths that takes a call; ``"blocked/few_rows"``, ``"blocked/flash"``, ``"blocked/bf16"`` and
    ``"blocked/blocked"`` ask for the reasons of one path. A path without a reason may still leave a call to the next at
    what it finds in the values.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the inputs are wrong for every implementation.
    """
    known = "blocked" if impl in PATH_NAMES else impl
    check_arguments((q, k, v), layout, causal=causal, scale=scale, extras=extras, impl=known)
    factor = _scale_of(q, scale)
    tensors = as_autocast((q, k, v))
    return reasons_against(impl, make_call(tensors, layout, causal=causal, scale=factor, extras=extras or Extras()))


def attend_on_path(
    path: str,
    tensors: tuple[Tensor, Tensor, Tensor],
    layout: BlockLayout,
    *,
    causal: bool = True,
    scale: float | None = None,
    extras: Extras | None = None,
    need_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Runs a call on one path of the CPU: for tests and benches, which want to know each by itself.

    What the path leaves to the next at its values, the next computes; a backward goes to the first from this path on
    that takes it.

    Args:
        path: A name in :data:`attnzoo_kernels.cpu.PATHS`.
        tensors: q, k and v, as in :func:`block_sparse_attention`.
        layout: As there.
        causal: As there.
        scale: As there.
        extras: As there.
        need_lse: Whether lse is wanted; else it is empty.

    Raises:
        TypeError: As there.
        ValueError: As there, or if no path has this name.
        UnsupportedError: If the path has reasons against the call.
    """
    if f"blocked/{path}" not in PATH_NAMES:
        raise ValueError(f"path: expected one of {', '.join(PATH_NAMES)} without 'blocked/', got {path!r}")
    return _attend(tensors, layout, causal, scale, extras, "blocked", need_lse=need_lse, path=path)


def visible_pairs(
    layout: BlockLayout, *, causal: bool, extras: Extras | None = None, batch: int, heads: int
) -> tuple[int, int]:
    """Counts the (query, key) pairs that a call sees, without materialising ``T x S``.

    Args:
        layout: Which key blocks each query block reads.
        causal: As in the call.
        extras: As in the call.
        batch: B of the call.
        heads: H of the call.

    Returns:
        ``(visible, dense)``: pairs visible by the call's whole rule, and pairs that a dense call under the same
        causality, absent rows and bias would see without layout, window and sink.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a size or value does not fit.
    """
    check_counting(layout, causal=causal, extras=extras, batch=batch, heads=heads)
    extras = extras or Extras()
    groups = layout.start.shape[1]
    device = layout.col.device
    q = torch.empty(batch, heads, layout.seq_q, 0, device=device)
    k = torch.empty(batch, groups, layout.seq_k, 0, device=device)
    return count_pairs(make_call((q, k, k), layout, causal=causal, scale=1.0, extras=extras))


def _attend(
    tensors: tuple[Tensor, Tensor, Tensor],
    layout: BlockLayout,
    causal: bool,
    scale: float | None,
    extras: Extras | None,
    impl: str,
    *,
    need_lse: bool,
    path: str | None = None,
) -> tuple[Tensor, Tensor]:
    if "DTensor" in (type(tensors[0]).__name__, type(tensors[1]).__name__, type(tensors[2]).__name__):
        from attnzoo_kernels.sharding import attend_locally

        def locally(
            part: tuple[Tensor, Tensor, Tensor], own: BlockLayout, more: Extras | None
        ) -> tuple[Tensor, Tensor]:
            return _attend(part, own, causal, scale, more, impl, need_lse=need_lse, path=path)

        return attend_locally(locally, tensors, layout, extras, need_lse=need_lse)
    check_arguments(tensors, layout, causal=causal, scale=scale, extras=extras, impl=impl)
    extras = extras or _NO_EXTRAS
    device = tensors[0].device.type
    q, k, v = as_autocast(tensors)
    call = make_call((q, k, v), layout, causal=causal, scale=_scale_of(q, scale), extras=extras)
    if impl == "reference":
        with no_autocast(device):
            return reference.attend(call)
    _refuse_onnx()
    impl = impl if path is None else f"blocked/{path}"
    reasons = reasons_against(impl, call, need_lse=need_lse)
    if reasons:
        raise UnsupportedError(f"impl: {impl!r} cannot run this call: {'; '.join(reasons)}", reasons)
    if is_watched() and not torch.compiler.is_compiling():
        _refuse_transforms((q, k, v, extras.key_bias, *(extras.aux or ()), extras.gate))
        register_when_counting()
    return attend(call, impl, need_lse=need_lse)


def _scale_of(q: Tensor, scale: float | None) -> float:
    """The factor on scores."""
    return q.shape[3] ** -0.5 if scale is None else float(scale)


def make_call(
    tensors: tuple[Tensor, Tensor, Tensor], layout: BlockLayout, *, causal: bool, scale: float, extras: Extras
) -> Call:
    """Checked arguments as every implementation receives them."""
    rule = TokenRule(causal, extras.q_pos, bounded(extras.window), bounded(extras.sink))
    gate = origins = None
    if extras.gate is not None:
        gate = Gate(extras.gate if isinstance(extras.gate, Tensor) else None, extras.gate_mix)
    if extras.rope is not None and layout.origin is not None:
        origins = Origins(layout.origin, *extras.rope)
    q, k, v = tensors
    # What rounds to 0 is 0 for everybody, and not too small a number here and -inf * 0 there.
    scale = 0.0 if rounds_to_zero(scale, q.dtype) else scale
    aux = extras.aux
    if aux is not None and aux[0].dtype != q.dtype:
        aux = (aux[0].to(q.dtype), aux[1].to(q.dtype))
    if gate is not None and gate.key is not None and gate.key.dtype != q.dtype:
        gate = Gate(gate.key.to(q.dtype), gate.mix)
    return Call(
        q, k, v, layout.start, layout.count, layout.col, extras.key_bias, rule, layout.block_q, layout.block_k, scale,
        aux, gate, origins, extras.precision == "fast",
    )  # fmt: skip


def _refuse_onnx() -> None:
    """Raises where the call is being exported to ONNX, which has no such operation."""
    if torch.compiler.is_exporting() and "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export():
        raise UnsupportedError(
            "impl: expected 'reference' in an export to ONNX, which has no block-sparse operation; set layer.impl = "
            "'reference', which is plain PyTorch"
        )


def _refuse_transforms(tensors: tuple[object, ...]) -> None:
    """Raises where torch would drop a tangent without a word, or fail without naming the way out."""
    given = [x for x in tensors if isinstance(x, Tensor)]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in given):
        raise UnsupportedError("block_sparse_attention: no forward-mode derivatives here; impl='reference' has them")
    if any(torch._C._functorch.is_gradtrackingtensor(x) for x in given):
        raise UnsupportedError("block_sparse_attention: torch.func.grad does not work here; impl='reference' does")
