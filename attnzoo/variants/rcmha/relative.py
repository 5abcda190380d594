r"""Relative positions in the score: sinusoids as auxiliary channels, and learned vectors of clipped distances.

Source: Dai et al. 2019, *Transformer-XL*, section 3.3 (arXiv:1901.02860).

With :math:`r_\delta = [\sin \delta\omega \| \cos \delta\omega]` and a row's :math:`\gamma_i = [a \| c]`, the addition
theorem takes the distance apart, for any i and j:

.. math:: \gamma_i \cdot r_{i-j} =
          [a \sin i\omega + c \cos i\omega \| c \sin i\omega - a \cos i\omega] \cdot [\cos j\omega \| \sin j\omega]

so that a score over distances is one over channels, and no ``T x S`` matrix of distances exists. Only differences
matter: positions are counted from the last key, so that angles stay small where rows and keys are near it, whatever the
length. Angles are fp64.

Letters: B batch, H query heads, T query tokens, S key tokens, D head width, Da channels, R the largest distance told
apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnzoo.base.decoding.compiled import HiddenRow, compute_hidden, hidden_from_compilers
from attnzoo.base.shared_layouts import Cover, dense_layout, may_share, sink_window_layout
from attnzoo_kernels import Extras, block_sparse_attention_with_lse, merge_states, remembers
from attnzoo_kernels.runtime.plain import is_open

BASE = 10000.0
"""The longest wavelength over 2 pi, as in the paper."""


def waves(positions: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """``[cos | sin]`` of positions times frequencies, ``[..., Da]``; the angles are fp64.

    Args:
        positions: Integers ``[...]``.
        width: Da, even.
        dtype: Of the result.
    """
    exponent = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
    angles = positions.to(torch.float64).unsqueeze(-1) * torch.pow(BASE, -exponent)
    return torch.cat((angles.cos().to(dtype), angles.sin().to(dtype)), -1)


def waves_behind(slots: int, width: int, like: Tensor) -> Tensor:
    """Waves of positions ``-(slots - 1)`` to 0, ``[slots, Da]``, in fp32 at least; a view of a table that is kept."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    if not may_share(like):
        return waves(torch.arange(slots, device=like.device) - (slots - 1), width, dtype)
    size = 1 << max(slots - 1, 0).bit_length()
    return _shared_waves(size, width, dtype, like.device)[size - slots :]


@remembers(8)
def _shared_waves(size: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A power of two of positions serves all lengths up to it: a decoding step makes no table."""
    with torch.inference_mode(False), torch.no_grad():
        return waves(torch.arange(1 - size, 1, device=device), width, dtype)


def query_channels(gamma: Tensor, rows: Tensor) -> Tensor:
    """What a row brings to the score, ``[B, H, T, Da]`` in gamma's dtype.

    Args:
        gamma: ``[B, H, T, Da]``, the factors of ``[sin | cos]`` of a distance.
        rows: Waves of the rows' positions, ``[B|1, 1, T, Da]``.
    """
    a, c = gamma.chunk(2, -1)
    cos, sin = rows.chunk(2, -1)
    return torch.cat((a * sin + c * cos, c * sin - a * cos), -1).to(gamma.dtype)


def channels_by_slot(gamma: Tensor, q_pos: Tensor | None, slots: int) -> tuple[Tensor, Tensor]:
    """The auxiliary pair where a token's position is its slot: ``[B, H, T, Da]`` and ``[1, 1, S, Da]``.

    Args:
        gamma: ``[B, H, T, Da]``.
        q_pos: The rows' slots, ``[B|1, 1, T]``; ``None`` means the last T.
        slots: S.
    """
    table = waves_behind(slots, gamma.shape[-1], gamma)  # [S, Da]
    rows = table[slots - gamma.shape[2] :] if q_pos is None else table[q_pos.long().clamp(min=0)]  # [B|1, 1, T, Da]
    return query_channels(gamma, rows), table.to(gamma.dtype)[None, None]


def channels_by_position(gamma: Tensor, rows: Tensor, keys: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
    """The auxiliary pair where positions are given: ``[B, H, T, Da]`` and ``[B|1, 1, S, Da]``.

    Args:
        gamma: ``[B, H, T, Da]``.
        rows: The rows' positions, integers ``[B|1, T]``.
        keys: The keys' positions, integers ``[B|1, S]``.
        present: Which rows are tokens, bool ``[B, T]``; the others' positions have no meaning. ``None`` means all.
    """
    dtype = torch.promote_types(gamma.dtype, torch.float32)
    width = gamma.shape[-1]
    if rows.shape[1]:
        least = torch.iinfo(rows.dtype).min
        last = (rows if present is None else torch.where(present, rows, least)).amax(1, keepdim=True)
        # An item without a token has no last one.
        last = torch.where(last == least, 0, last)
        rows = rows - last
        keys = keys - last
    q_aux = query_channels(gamma, waves(rows, width, dtype).unsqueeze(1))
    return q_aux, waves(keys, width, gamma.dtype).unsqueeze(1)


def sinusoid_bias(gamma: Tensor, held: int) -> Tensor:
    """What distances add to the scores of the last of ``held`` tokens, not scaled, ``[B, H, 1, held]``.

    Args:
        gamma: ``[B, H, 1, Da]``.
        held: Tokens, the row's own the last; a token's position is its slot.
    """
    if torch.compiler.is_compiling():
        return compute_hidden("distances", (gamma,), held, width=held)
    # The row lies at position 0, where cosines are 1 and sines 0.
    a, c = gamma.chunk(2, -1)
    table = waves_behind(held, gamma.shape[-1], gamma)
    return torch.matmul(torch.cat((c, -a), -1).to(table.dtype), table.t()).to(gamma.dtype)


@hidden_from_compilers("distances")
def _sinusoid_bias(row: HiddenRow) -> Tensor:
    return sinusoid_bias(row.tensors[0], row.held)


def clipped_bias(tau: Tensor, held: int) -> Tensor:
    """As :func:`sinusoid_bias` of learned vectors: ``tau [B, H, 1, R + 1]`` has each distance's part.

    Args:
        tau: Of distances 0 to R; all farther ones share the last.
        held: Tokens, the row's own the last.
    """
    if torch.compiler.is_compiling():
        return compute_hidden("clipped distances", (tau,), held, width=held)
    reach = tau.shape[-1] - 1
    near = tau[..., : min(held, reach + 1)].flip(-1)
    if held <= reach + 1:
        return near
    return torch.cat((tau[..., reach:].expand(*tau.shape[:3], held - reach - 1), near), -1)


@hidden_from_compilers("clipped distances")
def _clipped_bias(row: HiddenRow) -> Tensor:
    return clipped_bias(row.tensors[0], row.held)


@dataclass(frozen=True, eq=False)
class Clipped:
    """A call of the operation whose scores have a part for each distance.

    Attributes:
        q: ``[B, H, T, D]``.
        k: ``[B, G, S, D]``.
        v: ``[B, G, S, Dv]``.
        extras: ``q_pos`` and ``key_bias`` of the call.
        first: The slot of the first row, an int or int64 ``[B]``.
        scale: The factor on scores.
        impl: The implementation.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    extras: Extras
    first: int | Tensor
    scale: float
    impl: str


def attend_clipped(call: Clipped, tau: Tensor, *, causal: bool, block: int) -> Tensor:
    r"""Attention whose scores have :math:`\tau_i[clip(i - j)]` added before the scale, ``[B, H, T, Dv]``.

    Distances below R are told apart by a key's slot modulo the number of distances: among the keys of a window there
    is one of each residue, so that channels of zeros and ones pick a row's value exactly. All farther keys share one
    value, which moves the log-sum-exp over them. The parts are joined.

    Args:
        call: Queries, keys, values.
        tau: ``[B, H, T, R + 1]`` for distances 0 to R, or, not causal, ``[B, H, T, 2 R + 1]`` for -R to R.
        causal: Whether keys behind the row alone are read.
        block: Tokens in a block of the layouts.
    """
    tokens = call.q.shape[2]
    slots = call.k.shape[2]
    reach = tau.shape[-1] - 1 if causal else (tau.shape[-1] - 1) // 2
    q_pos = call.extras.q_pos
    if q_pos is None:
        q_pos = (torch.arange(tokens, device=call.q.device) + (slots - tokens)).to(torch.int32).view(1, 1, -1)
    # No distance is larger than the sequence: more channels would be zeros. Traced, each length would be another width.
    near = reach if torch.compiler.is_compiling() else max(1, min(reach, slots))
    states = [_near(call, tau, q_pos, near, causal=causal, block=block)]
    if not is_open(slots) and reach >= slots:
        return states[0][0]
    behind = torch.where(q_pos < 0, -1, q_pos - reach).clamp(min=-1)
    states.append(_far(call, tau[..., -1], behind, block))
    if not causal:
        # What lies ahead lies behind in a sequence that is turned round.
        bias = call.extras.key_bias
        turned = replace(
            call,
            k=call.k.flip(2),
            v=call.v.flip(2),
            extras=replace(call.extras, key_bias=None if bias is None else bias.flip(-1)),
        )
        ahead = torch.where(q_pos < 0, -1, slots - 1 - q_pos - reach).clamp(min=-1)
        states.append(_far(turned, tau[..., 0], ahead, block))
    return merge_states([out for out, _ in states], [lse for _, lse in states])[0]


def _near(call: Clipped, tau: Tensor, q_pos: Tensor, reach: int, *, causal: bool, block: int) -> tuple[Tensor, Tensor]:
    """The state over the keys nearer than ``reach``."""
    tokens = call.q.shape[2]
    slots = call.k.shape[2]
    least = 0 if causal else 1 - reach
    period = reach - least
    residue = torch.arange(period, device=tau.device)
    distance = (q_pos.long().unsqueeze(-1) - residue - least) % period + least  # [B|1, 1, T, P]
    own = 0 if causal else tau.shape[-1] // 2
    q_aux = tau.gather(-1, (distance + own).expand(*tau.shape[:3], -1))
    slot = torch.arange(slots, device=tau.device)
    k_aux = (slot.unsqueeze(-1) % period == residue).to(call.q.dtype)[None, None]  # [1, 1, S, P]
    layout = sink_window_layout(block, tokens, slots, Cover(reach, 0, causal, call.first), call.q)
    return block_sparse_attention_with_lse(
        call.q,
        call.k,
        call.v,
        layout,
        causal=causal,
        scale=call.scale,
        extras=replace(call.extras, q_pos=q_pos, window=reach, aux=(q_aux, k_aux)),
        impl=call.impl,
    )


def _far(call: Clipped, shift: Tensor, q_pos: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The state over the keys up to ``q_pos``, whose scores share a row's ``shift [B, H, T]``."""
    layout = dense_layout(block, call.q.shape[2], call.k.shape[2], call.q)
    extras = replace(call.extras, q_pos=q_pos.to(torch.int32))
    out, lse = block_sparse_attention_with_lse(
        call.q, call.k, call.v, layout, causal=True, scale=call.scale, extras=extras, impl=call.impl
    )
    return out, lse + call.scale * shift.to(lse.dtype)
