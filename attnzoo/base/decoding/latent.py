"""A decoding step over latents, absorbed: of the past, keys alone are expanded, and values only after the weighted sum.

Keys and values of a token are products of its latent c: k = R_s U c and v = V c, R_s the rotation by its slot. A row's
output is sum_s p_s V c_s = V (sum_s p_s c_s), so that V is applied once. The rotation stands between U and the query,
so that keys must be expanded; their planes are laid side by side, as complex numbers, and turned by one product with a
table. A chunk of slots at a time, so that a chunk's keys stay in the processor's cache.

No weight is kept between calls: what is laid out anew, the part of ``kv_up`` that makes keys, is read in any case.

Letters: B batch, S slots, C slots of a chunk, H query heads, G KV heads, D head width, W rotated width, r latent width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnzoo.base.decoding.rotation import rows_for
from attnzoo.base.rope import RotaryConfig, rotary_tables
from attnzoo_kernels import Slots, remembers
from attnzoo_kernels.runtime.plain import is_plain

CHUNK_BYTES = 1 << 20
"""Bytes of a chunk's keys."""


@dataclass(frozen=True)
class LatentHeads:
    """What a block's heads are.

    Attributes:
        kv_heads: KV heads G.
        width: Width D of a head's queries, keys and values.
        rotary: How queries and keys are rotated; ``None`` if they are not.
        scale: The factor on scores.
    """

    kv_heads: int
    width: int
    rotary: RotaryConfig | None
    scale: float


def may_absorb(q: Tensor, latent: Tensor, up: nn.Module) -> bool:
    """Whether a call's one row may be computed so: on a CPU, with a plain product ``up``, and no gradients wanted."""
    if q.shape[2] != 1 or q.device.type != "cpu" or not (is_plain(q) and is_plain(latent)):
        return False
    if type(up) is not nn.Linear or up.bias is not None or _is_watched(up) or not is_plain(up.weight):
        return False
    if not q.dtype == latent.dtype == up.weight.dtype or torch.is_autocast_enabled("cpu"):
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, latent, up.weight)))


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody has put something round a module's call."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__ or "weight" not in module._parameters


def attend_absorbed(q: Tensor, latent: Tensor, up: Tensor, heads: LatentHeads, slots: Slots) -> Tensor:
    """Attention of the last of S slots.

    Args:
        q: Its queries ``[B, H, 1, D]``, not rotated.
        latent: ``[B, S, r]``.
        up: ``[2 G D, r]``: what makes the keys of all heads, then their values; head by head.
        heads: What the heads are.
        slots: Which slots it reads, in runs.

    Returns:
        ``[B, H, 1, D]`` in q's dtype; sums are in fp32 at least.
    """
    given = q.dtype
    dtype = torch.promote_types(given, torch.float32)
    batch, count, _, width = q.shape
    groups = heads.kv_heads
    last = latent.shape[1] - 1
    keys, values = up.to(dtype).chunk(2)  # [G D, r] each
    q = q.squeeze(2).to(dtype)
    weight = keys.t()
    table = None
    if heads.rotary is not None:
        table = _table(heads.rotary, width, rows_for(last + 1), dtype)
        turned = heads.rotary.width(width)
        if heads.rotary.interleaved:
            q = q.clone()
        else:
            q = q.index_select(2, _order(turned, 1, width, q.device))
            weight = weight.index_select(1, _order(turned, groups, width, q.device))
        _rotate(q, table[last : last + 1])
    # One product scores all heads: a query is 0 at the keys of other groups.
    rows = (q.unsqueeze(2) * _groups_of(count, groups, heads.scale, dtype)).flatten(2)  # [B, H, G D]
    # Values of the weighted sums, once for each head.
    values = values.view(groups, width, -1).transpose(1, 2)  # [G, r, D]
    keys_of = _Keys(weight, width, table)
    mixed = [_weighted_latents(rows[item], latent[item], keys_of, slots) for item in range(batch)]
    out = torch.matmul(torch.stack(mixed).view(batch, groups, count // groups, -1), values)
    return out.view(batch, count, 1, width).to(given)


@dataclass(frozen=True, eq=False)
class _Keys:
    """How keys are made: weights ``[r, G D]``, the width of a head, and the rotation's table ``[P, W / 2]``."""

    weight: Tensor
    width: int
    table: Tensor | None

    def expand(self, latent: Tensor, first: int, out: Tensor) -> None:
        """Writes the keys ``[C, G D]`` of the latents ``[C, r]`` of slots from ``first`` on."""
        torch.mm(latent, self.weight, out=out)
        if self.table is not None:
            _rotate(out.view(out.shape[0], -1, self.width), self.table[first : first + out.shape[0]])


def _weighted_latents(rows: Tensor, latent: Tensor, keys: _Keys, slots: Slots) -> Tensor:
    """Softmax of the scores of ``rows [H, G D]``, and the sum of latents ``[S, r]`` that it weighs, ``[H, r]``."""
    runs = slots.runs or ()
    count = sum(last - first for first, last in runs)
    chunk = max(1, CHUNK_BYTES // (keys.weight.shape[1] * rows.element_size()))
    room = rows.new_empty(min(chunk, count), keys.weight.shape[1])
    parts = []
    scores = []
    for first, last in runs:
        part = latent[first:last].to(rows.dtype)
        parts.append(part)
        for begin in range(0, last - first, chunk):
            some = part[begin : begin + chunk]
            made = room[: some.shape[0]]
            keys.expand(some, first + begin, made)
            scores.append(torch.mm(rows, made.t()))
    weights = torch.cat(scores, 1).softmax(1)
    split = weights.split([x.shape[0] for x in parts], 1)
    mixed = torch.mm(split[0], parts[0])
    for weight, part in zip(split[1:], parts[1:], strict=True):
        mixed.addmm_(weight, part)
    return mixed


def _rotate(x: Tensor, table: Tensor) -> None:
    """Turns the planes ``[n, h, W]`` at the front of ``x [n, h, D]``, each two neighbours, by ``table [n, W / 2]``."""
    planes = x[..., : 2 * table.shape[1]]
    # Pairs begin at even places alone where rows are of even length.
    pairs = planes if x.shape[-1] % 2 == 0 else planes.contiguous()
    torch.view_as_complex(pairs.unflatten(-1, (-1, 2))).mul_(table.unsqueeze(1))
    if pairs is not planes:
        planes.copy_(pairs)


@remembers(32)
def _table(rotary: RotaryConfig, width: int, length: int, dtype: torch.dtype) -> Tensor:
    """Complex rotations of slots 0, 1, ... ``[P, W / 2]``, with the form's attention factor."""
    with torch.inference_mode(False):
        cos, sin = rotary_tables(rotary, width, torch.arange(length, device="cpu"), dtype)
        return torch.complex(cos, sin)


@remembers(32)
def _groups_of(heads: int, groups: int, scale: float, dtype: torch.dtype) -> Tensor:
    """The scale where a query head reads a KV head, else 0: ``[H, G, 1]``."""
    with torch.inference_mode(False):
        read = torch.arange(heads, device="cpu").unsqueeze(1) // (heads // groups) == torch.arange(groups, device="cpu")
        return read.to(dtype).mul_(scale).unsqueeze(2)


@remembers(32)
def _order(turned: int, heads: int, width: int, device: torch.device) -> Tensor:
    """Where the values of heads come from, ``[heads * D]``, so that both of a plane are neighbours."""
    with torch.inference_mode(False):
        planes = torch.arange(turned, device=device).view(2, -1).t().reshape(-1)
        one = torch.cat((planes, torch.arange(turned, width, device=device)))
        return (torch.arange(heads, device=device).unsqueeze(1) * width + one).flatten()
