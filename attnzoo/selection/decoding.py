"""A decoding step over chosen blocks: rotations that are kept, a choice without a sort, tokens gathered once.

Letters: B batch, H query heads, G KV heads, h heads of a choice, n slots of a buffer, m tokens read, N blocks, K blocks
chosen, P rotations of a table, D head width, Dr rotated width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.base.rope import RotaryConfig, rotary_frequencies, rotary_tables
from attnzoo_kernels import remembers


class Rotations(NamedTuple):
    """Rotations in halves: for each value of a head its factor, and that of its partner, ``[.., P, D]`` each."""

    own: Tensor
    partner: Tensor

    def at(self, index: int | slice | Tensor) -> Rotations:
        """Some of them."""
        return Rotations(self.own[index], self.partner[index])


def rotated(x: Tensor, rotations: Rotations, width: int) -> Tensor:
    """Heads ``[.., D]`` by rotations that broadcast against them, of the leading ``width`` values in halves."""
    half = width // 2
    partner = x.roll(half, -1) if width == x.shape[-1] else _partners(x, half)
    return torch.mul(x, rotations.own).add_(partner * rotations.partner)


def _partners(x: Tensor, half: int) -> Tensor:
    return torch.cat((x[..., half : 2 * half], x[..., :half], x[..., 2 * half :]), -1)


@remembers(16)
def rotations_in_slots(
    rotary: RotaryConfig, head_dim: int, size: int, slots: int, dtype: torch.dtype, device: torch.device
) -> Rotations:
    """A row at each place of its chunk, beside chunks in slots before it: ``[w, slots, D]``.

    Chunks have ``size`` tokens w. At place u, slot r of n is rotated to position ``(n - 1 - r) * w + u``, so that the
    last entries of a row serve whoever reads fewer chunks.
    """
    with torch.inference_mode(False), torch.no_grad():
        position = torch.arange(size * slots, device=device)
        cos, sin = rotary_tables(rotary, head_dim, position, dtype)
        made = _rotations(cos, sin, head_dim)
        # [slots * w, D] to [w, slots, D], the farthest slot first.
        in_slots = (x.view(slots, size, head_dim).flip(0).transpose(0, 1).contiguous() for x in made)
        return Rotations(*in_slots)


@remembers(16)
def rotations_back(
    rotary: RotaryConfig, head_dim: int, stride: int, count: int, dtype: torch.dtype, device: torch.device
) -> Rotations:
    """By minus 0, 1, ... ``count - 1`` blocks of ``stride`` positions, ``[count, D]``; pure rotations."""
    with torch.inference_mode(False), torch.no_grad():
        frequencies = rotary_frequencies(rotary, head_dim, device=device)
        angles = torch.arange(count, device=device).to(torch.float64).unsqueeze(-1) * (frequencies * stride)
        return _rotations(angles.cos().to(dtype), -angles.sin().to(dtype), head_dim)


def _rotations(cos: Tensor, sin: Tensor, head_dim: int) -> Rotations:
    """Tables ``[P, Dr / 2]`` laid out for :func:`rotated`; what is not rotated stays."""
    rest = head_dim - 2 * cos.shape[-1]
    own = torch.cat((cos, cos, cos.new_ones(cos.shape[0], rest)), -1)
    return Rotations(own, torch.cat((-sin, sin, sin.new_zeros(sin.shape[0], rest)), -1))


def clear_best(scores: Tensor, count: int, slack: Tensor | None = None) -> Tensor | None:
    """The blocks with the highest scores, ascending, where they are clear of the others; else ``None``.

    Args:
        scores: ``[B, h, N]``, more than ``count`` of them.
        count: Blocks to choose, K.
        slack: By how much more the last one chosen has to score than the best of the others, ``[B, h]``; at least.

    Returns:
        int64 ``[B, h, K]``, the choice of :func:`attnzoo.topk.top_blocks`, or ``None`` where equal scores or
        some that are no numbers need its care.
    """
    value, index = scores.topk(count + 1)
    last = value[..., count - 1]
    if slack is not None:
        last = last - slack
    clear = (value[..., count] < last) & (value[..., 0] < torch.inf)
    if not bool(clear.all()):
        return None
    return index[..., :count].sort(-1).values


def gathered_tokens(x: Tensor, token: Tensor) -> Tensor:
    """Tokens ``[B, h, m]`` of a buffer ``[B, G, n, D]``, each head's from its group: ``[B * h, m, D]``."""
    batch, groups, slots, width = x.shape
    heads = token.shape[1]
    first = torch.arange(batch * heads, device=x.device) // (heads // groups) * slots
    index = token.reshape(batch * heads, -1) + first.unsqueeze(1)
    return x.reshape(-1, width).index_select(0, index.view(-1)).view(batch * heads, -1, width)


def tokens_of(blocks: Tensor, size: int, used: int | None = None) -> Tensor:
    """The first ``used`` tokens of blocks ``[B, h, K]`` of ``size`` tokens, all by default: ``[B, h, K * used]``."""
    within = torch.arange(size if used is None else used, device=blocks.device)
    return (blocks.unsqueeze(-1) * size + within).flatten(-2)
