"""Landmark tokens: putting them into a batch and taking their outputs out again, and blocks of unequal lengths.

A block has w tokens: w - 1 ordinary ones, then its landmark. A landmark is put in as soon as its block is full, so that
n tokens always become ``n + n // (w - 1)``, whether they come at once or one by one.

Letters: B batch, T given tokens, T' tokens with landmarks, C model width, L slots of the longest block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from attnzoo.base.inputs import check_layout
from attnzoo.cache.lengths import Lengths
from attnzoo_kernels.errors import ShapeError

Length = TypeVar("Length", int, Tensor)


@dataclass(frozen=True, eq=False)
class WithLandmarks:
    """A batch with its landmarks in it.

    Attributes:
        tokens: Ids ``[B, T']`` or embeddings ``[B, T', C]``; 0 at padding.
        is_landmark: bool ``[B, T']``.
        key_padding: bool ``[B, T']``, true at padding: the caller's, and what rows with fewer landmarks than others
            have at their end. ``None`` where there is none.
        positions: int64 ``[B, T']``; meaningless at padding.
        labels: int64 ``[B, T']``, or ``None`` where none were given.
        place: Where each given token lies, int64 ``[B, T]``.
    """

    tokens: Tensor
    is_landmark: Tensor
    key_padding: Tensor | None
    positions: Tensor
    labels: Tensor | None
    place: Tensor

    def drop(self, y: Tensor) -> Tensor:
        """What belongs to the given tokens: ``y [B, T', ...]`` to ``[B, T, ...]``.

        Raises:
            ShapeError: If ``y`` does not begin with B and T'.
        """
        if y.shape[:2] != self.is_landmark.shape:
            raise ShapeError(f"y: expected {[*self.is_landmark.shape, '...']}, got {list(y.shape)}")
        return y.gather(1, self.place.view(*self.place.shape, *[1] * (y.dim() - 2)).expand(-1, -1, *y.shape[2:]))


def length_with_landmarks(length: Length, block_size: int) -> Length:
    """How many tokens a sequence of ``length`` has with its landmarks."""
    return length + length // (block_size - 1)


def mean_embedding(weight: Tensor) -> Tensor:
    """What a new landmark's embedding starts as: the mean of all embeddings ``[V, C]``, ``[C]``, detached."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).mean(0).to(weight.dtype)


def insert_landmarks(
    tokens: Tensor,
    landmark: int | Tensor,
    *,
    block_size: int,
    key_padding: Tensor | None = None,
    labels: Tensor | None = None,
    positions: Tensor | None = None,
    offset: int | Tensor = 0,
    landmark_label: int = -100,
) -> WithLandmarks:
    """Puts a landmark behind every ``block_size - 1`` real tokens of each item.

    Args:
        tokens: Ids, integers ``[B, T]``, or embeddings ``[B, T, C]``; any length.
        landmark: The landmark's id, or its embedding ``[C]``, which receives gradients.
        block_size: Tokens in a block, the landmark included.
        key_padding: bool ``[B, T]``, true at padding, wherever it lies; it counts for no block.
        labels: int64 ``[B, T]``: with every token, what it is (or what follows it; the landmark's is one of its own).
        positions: int64 ``[T]`` or ``[B, T]``, which are kept, and a landmark has that of the token before it. By
            default all tokens count, landmarks too, from what ``offset`` says; a layer whose landmarks take no position
            finds its positions by itself.
        offset: Real tokens given in earlier calls, landmarks not counted: an int, or int64 ``[B]``.
        landmark_label: What labels say at landmarks; -100 leaves them out of the loss, the landmark's id has the model
            learn where they come.

    Raises:
        TypeError: If the landmark is of another kind than the tokens, or a dtype does not fit.
        ShapeError: If a shape or the block size does not fit.

    Example:
        >>> insert_landmarks(torch.tensor([[5, 6, 7, 8, 9]]), 99, block_size=3).tokens
        tensor([[ 5,  6, 99,  7,  8, 99,  9]])
    """
    _check_insertion(tokens, landmark, block_size)
    _check_beside(tokens, (key_padding, labels, positions), offset, landmark_label)
    batch, length = tokens.shape[:2]
    device = tokens.device
    fill = block_size - 1
    real = torch.ones(batch, length, dtype=torch.bool, device=device) if key_padding is None else ~key_padding
    before = Lengths(offset).to(device)
    start = before.column()
    count = start + real.cumsum(1)  # [B, T]: real tokens up to here
    closes = real & (count % fill == 0)
    index = torch.arange(length, device=device) + (count - real.long()) // fill - start // fill
    known = key_padding is None and not before.differ
    # Without reading a value: no more landmarks than that, where items differ.
    most = (Lengths(before.value % fill).most(fill - 1) + length) // fill
    given = torch.full((batch, length + most), -1, dtype=torch.int64, device=device)
    given = given.scatter(1, index, torch.arange(length, device=device).expand(batch, -1))
    # Where no landmark comes, the last slot is written and overruled.
    ends = torch.zeros(batch, length + most + 1, dtype=torch.bool, device=device)
    ends = ends.scatter(1, torch.where(closes, index + 1, length + most), True)[:, : length + most]
    source = given.clamp(min=0) if length else given
    is_real = (given >= 0) & (real.gather(1, source) if length else given >= 0)
    padding = ~(is_real | ends)

    def put(values: Tensor, at_landmark: int | Tensor, at_padding: int) -> Tensor:
        index = source.view(*source.shape, *[1] * (values.dim() - 2)).expand(-1, -1, *values.shape[2:])
        shape = (*source.shape, *[1] * (values.dim() - 2))
        moved = values.gather(1, index).masked_fill(padding.view(shape), at_padding)
        return torch.where(ends.view(shape), torch.as_tensor(at_landmark, dtype=moved.dtype, device=device), moved)

    if positions is not None:
        places = positions.long().expand(batch, -1)
        # A landmark lies right behind the token that it shares a position with.
        places = places.gather(1, (source + torch.roll(source, 1, 1) * ends) if length else source)
    else:
        places = start + start // fill + (~padding).cumsum(1) - 1
    return WithLandmarks(
        tokens=put(tokens, landmark, 0),
        is_landmark=ends,
        key_padding=None if known else padding,
        positions=places.clamp(min=0),
        labels=None if labels is None else put(labels, landmark_label, -100),
        place=index,
    )


def check_landmarks(is_landmark: Tensor, x: Tensor) -> None:
    """Raises unless a mask says of each token of ``x [B, T, C]`` whether it is a landmark.

    Raises:
        TypeError: If it is no bool tensor.
        ShapeError: If its shape or device does not fit.
    """
    if not isinstance(is_landmark, Tensor) or is_landmark.dtype != torch.bool:
        raise TypeError(f"is_landmark: expected a bool Tensor, got {getattr(is_landmark, 'dtype', is_landmark)}")
    check_layout("is_landmark", is_landmark)
    if is_landmark.shape != x.shape[:2] or is_landmark.device != x.device:
        raise ShapeError(
            f"is_landmark: expected {list(x.shape[:2])} on {x.device}, got {list(is_landmark.shape)} on "
            f"{is_landmark.device}"
        )


def _check_insertion(tokens: Tensor, landmark: int | Tensor, block_size: int) -> None:
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens: expected a Tensor, got {type(tokens).__name__}")
    check_layout("tokens", tokens)
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 2:
        raise ShapeError(f"block_size: expected an int >= 2, got {block_size!r}")
    if tokens.dim() not in (2, 3) or tokens.is_floating_point() != (tokens.dim() == 3):
        raise ShapeError(
            f"tokens: expected ids [B, T] or embeddings [B, T, C], got {tokens.dtype} {list(tokens.shape)}"
        )
    if tokens.dim() == 2 and (isinstance(landmark, bool) or not isinstance(landmark, int)):
        raise TypeError(f"landmark: expected an int, as the tokens are ids, got {type(landmark).__name__}")
    if tokens.dim() == 3:
        if not isinstance(landmark, Tensor):
            raise TypeError(f"landmark: expected a Tensor, as the tokens are embeddings, got {type(landmark).__name__}")
        if landmark.shape != tokens.shape[2:]:
            raise ShapeError(f"landmark: expected {list(tokens.shape[2:])}, got {list(landmark.shape)}")


def _check_beside(
    tokens: Tensor, beside: tuple[Tensor | None, Tensor | None, Tensor | None], offset: int | Tensor, label: int
) -> None:
    whole = (torch.int64, torch.int32)
    shape = tokens.shape[:2]
    for name, value, kinds in zip(
        ("key_padding", "labels", "positions"), beside, ((torch.bool,), whole, whole), strict=True
    ):
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.dtype not in kinds:
            raise TypeError(f"{name}: expected {kinds[0]}, got {getattr(value, 'dtype', type(value).__name__)}")
        fits = (shape,) if name != "positions" else (shape, shape[1:], (1, shape[1]))
        if tuple(value.shape) not in map(tuple, fits):
            raise ShapeError(f"{name}: expected {list(shape)}, got {list(value.shape)}")
    if isinstance(label, bool) or not isinstance(label, int):
        raise TypeError(f"landmark_label: expected an int, got {label!r}")
    if isinstance(offset, Tensor):
        if offset.dtype not in whole:
            raise TypeError(f"offset: expected {whole[0]}, got {offset.dtype}")
        if offset.shape != tokens.shape[:1]:
            raise ShapeError(f"offset: expected an int or [{tokens.shape[0]}], got {list(offset.shape)}")
    elif isinstance(offset, bool) or not isinstance(offset, int | torch.SymInt):
        raise TypeError(f"offset: expected an int, got {offset!r}")
    elif offset < 0:
        raise ShapeError(f"offset: expected at least 0, got {offset}")


@dataclass(frozen=True, eq=False)
class LandmarkGrid:
    """Blocks of unequal lengths on a grid of the longest one: the landmark in the last slot, holes before it.

    Attributes:
        slot: Where each token lies, int64 ``[B, T]``; -1 where there is no token.
        block: Slots of a block, L.
        slots: Slots in all.
    """

    slot: Tensor
    block: int
    slots: int

    @classmethod
    def of(cls, is_landmark: Tensor, lengths: int | Tensor) -> LandmarkGrid:
        """The grid of left-aligned items; reads back how long the longest block is.

        Args:
            is_landmark: bool ``[B, T]``.
            lengths: Real tokens of each item.
        """
        token = torch.arange(is_landmark.shape[1], device=is_landmark.device)
        real = Lengths(lengths).holds(token).expand_as(is_landmark)
        ends = is_landmark & real
        number = ends.long().cumsum(1) - ends.long()
        opens = torch.cat([torch.ones_like(ends[:, :1]), ends[:, :-1]], 1)
        within = token - torch.where(opens, token, 0).cummax(1).values
        # A block without its landmark has no token in the last slot, which is no ordinary one.
        needed = (within + 1 + (~ends).long()).masked_fill(~real, 0)
        block = max(1, int(needed.max())) if needed.numel() else 1
        blocks = int(number.max()) + 1 if number.numel() else 0
        slot = number * block + torch.where(ends, block - 1, within)
        return cls(torch.where(real, slot, -1), block, blocks * block)

    @property
    def q_pos(self) -> Tensor:
        """The slot of each row, int32 ``[B, 1, T]``."""
        return self.slot.to(torch.int32).unsqueeze(1)

    @property
    def holes(self) -> Tensor:
        """Slots without a token, bool ``[B, S]``."""
        held = torch.zeros(self.slot.shape[0], self.slots + 1, dtype=torch.bool, device=self.slot.device)
        return ~held.scatter(1, torch.where(self.slot < 0, self.slots, self.slot), True)[:, : self.slots]

    def spread(self, x: Tensor) -> Tensor:
        """Keys or values ``[B, G, T, D]`` on the grid, ``[B, G, S, D]``, zeros in holes."""
        index = torch.where(self.slot < 0, self.slots, self.slot)[:, None, :, None].expand(
            -1, x.shape[1], -1, x.shape[3]
        )
        empty = x.new_zeros(*x.shape[:2], self.slots + 1, x.shape[3])
        return empty.scatter(2, index, x)[:, :, : self.slots]
