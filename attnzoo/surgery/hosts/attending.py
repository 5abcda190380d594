"""What a block's attention gives for a host's call: by a rule of ours, or plainly, within the host's own window.

Letters: B batch, T query tokens, S slots whose keys are here, H query heads, G KV heads, D head width.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.base.editing.operation import check_honoured
from attnzoo.base.editing.reads import ReadEdit, edits_among
from attnzoo.base.layer import DENSE_BLOCK, AttentionInputs, AttentionLayer
from attnzoo.base.padding import Alignment
from attnzoo.base.shared_layouts import dense_layout
from attnzoo.surgery.hosts.geometry import Geometry
from attnzoo.surgery.hosts.one_row import attend_one_row
from attnzoo.variants.mha import MHAAttention, MHAConfig
from attnzoo_kernels import Extras, block_sparse_attention
from attnzoo_kernels.errors import ShapeError, UnsupportedError


def attend_by(
    layer: AttentionLayer | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: Geometry,
    scale: float | None,
    edits: tuple[ReadEdit, ...] = (),
) -> Tensor:
    """Attention ``[B, H, T, D]`` of the last T slots.

    Args:
        layer: Whose rule is followed; ``None`` reads everything that the host's mask shows.
        q: Rotated queries ``[B, H, T, D]``.
        k: Rotated keys ``[B, G, S, D]``, the last ones where a sliding cache has no others.
        v: Their values.
        geometry: Where they lie.
        scale: The factor on scores, where there is no rule that has it.
        edits: What is edited of what heads read.

    Raises:
        ShapeError: If keys are missing.
        UnsupportedError: If there is padding in a program that is compiled, or an export leaves the length open.
    """
    by_slot = layer is None and geometry.window is not None
    if layer is None:
        layer = _dense_layer((q.shape[1], k.shape[1], q.shape[3]), scale, geometry.causal, geometry.window)
    inputs = AttentionInputs(q, k, v)
    if edits:
        inputs = replace(inputs, edits=edits_among(edits, q, _tokens_of_slots(inputs, geometry, by_slot=by_slot)))
    if geometry.real is None:
        return _attend_plain(layer, inputs, geometry)
    return (_attend_padded_by_slot if by_slot else _attend_padded)(layer, inputs, geometry)


def _tokens_of_slots(inputs: AttentionInputs, geometry: Geometry, *, by_slot: bool) -> Tensor | None:
    """Which token lies in each slot that is read, int64 ``[B|1, S]``; ``None`` where slot s holds token s."""
    first = _among(inputs.k, geometry.first, inputs.q.shape[2], geometry)
    if isinstance(first, Tensor) or isinstance(geometry.first, Tensor):
        raise UnsupportedError("edits: expected no compiler where reads are edited, got one")
    held = first + inputs.q.shape[2]
    begin = geometry.first - first
    if geometry.real is None:
        return torch.arange(begin, begin + held, device=inputs.k.device).unsqueeze(0) if begin else None
    real = geometry.real[:, : begin + held].bool()
    if by_slot:
        return (real.cumsum(1) - 1).masked_fill(~real, -1)[:, begin:]
    # Tokens come first, without padding; a sliding cache has lost some before.
    return torch.arange(held, device=real.device) + real[:, :begin].sum(1, keepdim=True) if begin else None


@lru_cache(maxsize=32)
def _dense_layer(shape: tuple[int, int, int], scale: float | None, causal: bool, window: int | None) -> AttentionLayer:
    """Plain attention of so many heads and KV heads of a width, within the host's window where there is one."""
    heads, groups, width = shape
    config = MHAConfig(
        dim=heads * width,
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=width,
        causal=causal,
        rotary=None,
        scale=scale,
        window=window,
    )
    with torch.device("meta"):
        return MHAAttention(config)


def _run(
    layer: AttentionLayer,
    inputs: AttentionInputs,
    geometry: Geometry,
    offset: int | Tensor,
    lengths: int | Tensor | None = None,
) -> Tensor:
    plan = layer.plan_for(inputs, offset=offset, lengths=lengths)
    if geometry.window is not None and plan.extras.window is None:
        # The host's own window stays in force beside what else is read.
        plan = replace(plan, extras=replace(plan.extras, window=geometry.window))
    for recording in layer.recordings:
        recording.add(layer, plan)
    out = layer.operate(inputs, plan)
    check_honoured(inputs.edits, layer.config.kind)
    return out


def attend_densely(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, scale: float | None) -> Tensor:
    """Plain attention in a program that is compiled, where no layer can be made."""
    first = geometry.first
    tokens = q.shape[2]
    first = _among(k, first, tokens, geometry)
    extras = Extras(window=geometry.window)
    if isinstance(first, int):
        k, v = (x[:, :, : first + tokens] for x in (k, v))
    else:
        extras = Extras(
            window=geometry.window, q_pos=(torch.arange(tokens, device=q.device) + first).to(torch.int32).view(1, 1, -1)
        )
    layout = dense_layout(DENSE_BLOCK, tokens, k.shape[2], q)
    return block_sparse_attention(q, k, v, layout, causal=geometry.causal, scale=scale, extras=extras)


def _among(k: Tensor, first: int | Tensor, tokens: int, geometry: Geometry) -> int | Tensor:
    """Where a call's first token lies among the keys ``k [B, G, S, D]``, of which a sliding cache has the last."""
    gone = first + tokens - k.shape[2]
    if isinstance(gone, Tensor):
        return first if geometry.window is None else first - gone.clamp(min=0)
    if gone > 0 and geometry.window is None:
        raise ShapeError(f"attention_mask: expected at most {k.shape[2]} slots, got queries up to slot {gone}")
    return first - max(gone, 0)


def _attend_plain(layer: AttentionLayer, inputs: AttentionInputs, geometry: Geometry) -> Tensor:
    q = inputs.q
    k = inputs.k
    v = inputs.v
    tokens = q.shape[2]
    first = _among(k, geometry.first, tokens, geometry)
    if isinstance(first, int):
        held = first + tokens
        is_row = tokens == 1 and layer.config.causal
        # Where a rule knows nothing of the host's window, the plan has to say it.
        is_row = is_row and (geometry.window is None or getattr(layer.config, "window", None) is not None)
        out = attend_one_row(layer, q, k, v, held) if is_row and inputs.edits is None else None
        if out is not None:
            return out
        # A static cache is longer than what it holds.
        return _run(layer, replace(inputs, k=k[:, :, :held], v=v[:, :, :held]), geometry, first)
    if isinstance(first, torch.SymInt):
        raise UnsupportedError(
            "input_ids: expected a length that is known, since what a converted block reads is laid out for it, got "
            "one that the export leaves open; export one program for each length"
        )
    return _run(layer, inputs, geometry, first.view(1).expand(q.shape[0]))


def _attend_padded_by_slot(layer: AttentionLayer, inputs: AttentionInputs, geometry: Geometry) -> Tensor:
    """Hides padding where it lies: the host's window counts slots, and padding has some."""
    q = inputs.q
    k = inputs.k
    v = inputs.v
    real, first = _real_among(q, k, geometry)
    held = first + q.shape[2]
    acc = torch.promote_types(q.dtype, torch.float32)
    hidden = torch.zeros(real.shape, dtype=acc, device=q.device).masked_fill(~real, -torch.inf).unsqueeze(1)
    inputs = replace(inputs, k=k[:, :, :held], v=v[:, :, :held], key_bias=hidden)
    return _run(layer, inputs, geometry, first).masked_fill(~real[:, None, first:, None], 0.0)


def _real_among(q: Tensor, k: Tensor, geometry: Geometry) -> tuple[Tensor, int]:
    """Which of the keys that are here hold tokens ``[B, S]``, and where the call begins among them.

    Raises:
        UnsupportedError: If that is not known under compilation.
        ShapeError: If the mask is too short.
    """
    real = geometry.real
    first = _among(k, geometry.first, q.shape[2], geometry)
    if real is None or not isinstance(geometry.first, int) or not isinstance(first, int):
        raise UnsupportedError("attention_mask: padding under compilation is not supported; compile without padding")
    begin = geometry.first - first
    held = geometry.first + q.shape[2]
    if real.shape[1] < held:
        raise ShapeError(f"attention_mask: expected {held} slots, got {real.shape[1]}")
    return real[:, begin:held].bool(), first


def _attend_padded(layer: AttentionLayer, inputs: AttentionInputs, geometry: Geometry) -> Tensor:
    """Moves each item's real tokens to slots 0, 1, ... first: rules go by position, and padding has none."""
    q = inputs.q
    k = inputs.k
    v = inputs.v
    real, first = _real_among(q, k, geometry)
    held = first + q.shape[2]
    slots = Alignment.of(~real)
    longest = int(slots.lengths.max())
    k, v = (slots.aligned(x[:, :, :held], longest) for x in (k, v))
    rows = Alignment.of(~real[:, first:])
    before = real[:, :first].sum(1) if geometry.causal else 0
    out = _run(layer, replace(inputs, q=rows.aligned(q), k=k, v=v), geometry, before, rows.lengths)
    return rows.put_back(out).masked_fill(~real[:, None, first:, None], 0.0)


def attend_as_host(config: Any) -> Any:
    """The attention function that a host is set to; written out where it is set to "eager"."""
    # Importing the host's library is for callers who have one of its models.
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, attend_eagerly)


def attend_eagerly(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, as a host's function: ``[B, T, H, D]``, and weights ``[B, H, T, S]``.

    Scores and softmax are in fp32 at least. The module says how many query heads share a KV head
    (``num_key_value_groups``), and whether it trains.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (k, v))
    scores = (q.to(wide) @ k.to(wide).mT) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.dropout(scores.softmax(-1).to(v.dtype), dropout, module.training)
    return (weights @ v).transpose(1, 2), weights
