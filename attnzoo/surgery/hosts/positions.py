"""The positions that a host gives its tokens, beside those that a block counts by itself.

Letters: B batch, T query tokens, S slots of the host's cache.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from attnzoo.base.rope import apply_rotary
from attnzoo_kernels.errors import ShapeError, UnsupportedError
from attnzoo_kernels.runtime.plain import is_readable


def check_consecutive(
    position_ids: Tensor | None, first: int | Tensor, real: Tensor | None, who: str, *, padding_counts: bool = False
) -> None:
    """Raises unless a call's positions are those that a block counts by itself, for blocks that do.

    A sequence may begin anywhere. What a later call continues is not known, but for where it would begin: at 0, or
    behind the padding on its left.

    Args:
        position_ids: ``[B|1, T]``, or ``None`` where the host has none.
        first: The slot of the call's first token; a tensor is not read.
        real: Which slots hold tokens rather than padding, bool ``[B, S]``; ``None`` where all do.
        who: What to call the block.
        padding_counts: Whether the block counts slots; else it counts tokens.

    Raises:
        UnsupportedError: If they are others.
    """
    if position_ids is None or torch.compiler.is_compiling():
        return
    begin = first if isinstance(first, int) else 0
    known, counts, mask = _consecutive.get(position_ids, (None, None, None))
    if known == begin and counts == padding_counts and mask is real:
        # Every block of a model is handed the same tensors.
        return
    end = begin + position_ids.shape[-1]
    place = torch.arange(begin, end, device=position_ids.device).unsqueeze(0)
    seen = None
    margin = place.new_zeros(1)
    if real is not None and isinstance(first, int):
        count = real[:, :end].cumsum(1)
        seen = real[:, begin:end]
        margin = (count == 0).sum(1)
        place, margin = (place, -margin) if padding_counts else (count[:, begin:] - 1, margin)
    shift = (position_ids - place).double()
    hidden = torch.zeros_like(shift, dtype=torch.bool) if seen is None else ~seen
    low = shift.masked_fill(hidden, math.inf).amin(1)
    high = shift.masked_fill(hidden, -math.inf).amax(1)
    right = low == high
    if begin:
        right &= (low == 0) | (low == margin)
    if not bool((right | hidden.all(1)).all()):
        raise UnsupportedError(f"position_ids: expected consecutive positions, which {who} counts by itself")
    _consecutive[position_ids] = (begin, padding_counts, real)


_consecutive: Any = WeakTensorKeyDictionary()
"""For positions that were found right: the first slot, what was counted, and the mask."""


def are_counted(position_ids: Tensor, first: int, tokens_per_landmark: int | None = None) -> bool:
    """Whether a call's positions ``[B|1, T]`` are what a layer counts by itself; not asked where reading synchronises.

    Args:
        position_ids: The positions.
        first: The slot of the call's first token.
        tokens_per_landmark: Of how many slots the last takes no position; ``None`` where positions are slots.
    """
    if not is_readable(position_ids):
        return False
    version = None if position_ids.is_inference() else position_ids._version
    if version is not None and _counted.get(position_ids) == (first, tokens_per_landmark, version):
        # Every block of a model is handed the same tensor.
        return True
    wanted = torch.arange(first, first + position_ids.shape[-1], device=position_ids.device)
    if tokens_per_landmark is not None:
        wanted -= (wanted + 1).div(tokens_per_landmark, rounding_mode="floor")
    if not bool((position_ids == wanted).all()):
        return False
    if version is not None:
        _counted[position_ids] = (first, tokens_per_landmark, version)
    return True


_counted: Any = WeakTensorKeyDictionary()
"""For positions that are counted so: the first slot, how, and the tensor's version."""


def real_slots(real: Tensor | None, before: Tensor | None, first: int, tokens: int) -> Tensor | None:
    """Which slots up to a call's last hold tokens, bool ``[B, S]``; ``None`` where all do.

    Args:
        real: What the call's mask says, ``[B, S]`` or longer.
        before: What earlier calls said ``[B, first]``; ``None`` where all slots held tokens.
        first: The slot of the call's first token.
        tokens: Slots of the call.

    Raises:
        ShapeError: If the mask is too short, or the padding of earlier calls does not come again.
    """
    is_compiling = torch.compiler.is_compiling()
    if real is None:
        # Items that had padding may have been dropped.
        if before is not None and (is_compiling or not bool(before.all())):
            raise ShapeError("attention_mask: expected the padding of earlier calls again, got none")
        return None
    if real.shape[1] < first + tokens:
        raise ShapeError(f"attention_mask: expected {first + tokens} slots, got {real.shape[1]}")
    real = real[:, : first + tokens].bool()
    if first and not is_compiling:
        past = real[:, :first]
        if not (bool(past.all()) if before is None else torch.equal(past, before)):
            raise ShapeError("attention_mask: expected the padding of earlier calls again, got another")
    return real


def tables_as_given(tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[B|1, T, Dr]`` of a host that has them so: those of all planes, twice."""
    return tables


def unrotated(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Heads ``[B, h, T, D]`` before the host rotated their leading values.

    Args:
        x: As they were rotated.
        cos: Cosines ``[B|1, T, Dr]``, with the host's factor on them: those of all planes, twice.
        sin: Sines.
        interleaved: Whether neighbours form a plane, else the halves of what is rotated.
    """
    planes = cos.shape[-1] // 2
    cos, sin = (table[..., :planes].to(x.dtype) for table in (cos, sin))
    # The inverse rotation; what a factor has made of lengths is divided out.
    lengths = cos * cos + sin * sin
    return apply_rotary(x, cos / lengths, -sin / lengths, interleaved)
