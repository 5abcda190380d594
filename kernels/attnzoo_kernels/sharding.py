"""Distributed tensors: each process computes the batch items and heads that it holds.

Imported when such a tensor first comes, since importing torch's distributed tensors takes long.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from attnzoo_kernels.errors import UnsupportedError
from attnzoo_kernels.layouts.build import LayoutLists
from attnzoo_kernels.layouts.layout import BlockLayout
from attnzoo_kernels.spec.extras import Extras

BATCH = 0
HEADS = 1
_BY_HEAD_ALONE = ("window", "sink", "gate_mix")


def attend_locally(
    attend: Callable[..., tuple[Tensor, Tensor]],
    tensors: tuple[Tensor, Tensor, Tensor],
    layout: BlockLayout,
    extras: Extras | None,
    *,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Runs a call on what is here of q, k and v, and gives its results their placements.

    Args:
        attend: Takes local tensors, layout and extras.
        tensors: q, k and v, distributed over one mesh in the same way: replicated, or sharded by batch or heads.
        layout: The whole layout.
        extras: The whole extras, plain tensors or distributed ones.
        need_lse: Whether lse is wanted.

    Raises:
        UnsupportedError: If a tensor is placed otherwise, or does not split evenly.
    """
    q = tensors[0]
    if not all(isinstance(x, DTensor) and isinstance(q, DTensor) and x.placements == q.placements for x in tensors):
        raise UnsupportedError("q, k, v: expected distributed tensors with the same placements, got others beside one")
    mesh = q.device_mesh  # type: ignore[attr-defined]
    placements = q.placements  # type: ignore[attr-defined]
    cuts: list[tuple[int, int, int]] = []
    for axis, placement in enumerate(placements):
        if isinstance(placement, Replicate):
            continue
        if not isinstance(placement, Shard) or placement.dim not in (BATCH, HEADS):
            raise UnsupportedError(f"q, k, v: expected placements by batch or heads, got {placement}")
        parts = mesh.size(axis)
        if any(x.shape[placement.dim] % parts for x in tensors):
            raise UnsupportedError(f"q, k, v: expected sizes that {parts} processes share evenly along {placement}")
        cuts.append((placement.dim, parts, mesh.get_coordinate()[axis]))
    if cuts and extras is not None:
        _refuse_shared_gradients(extras, placements)
    local = tuple(x.to_local() for x in tensors)  # type: ignore[attr-defined]
    out, lse = attend(local, _part_of_layout(layout, cuts), None if extras is None else _part_of_extras(extras, cuts))

    def whole(x: Tensor) -> Tensor:
        placed: Tensor = DTensor.from_local(x, mesh, placements, run_check=False)
        return placed

    return whole(out), whole(lse) if need_lse else lse


def _refuse_shared_gradients(extras: Extras, placements: Any) -> None:
    """What all processes share would get a part of its gradient in each."""
    for name in ("key_bias", "aux", "gate"):
        value = getattr(extras, name)
        for x in value if isinstance(value, tuple) else (value,):
            if isinstance(x, Tensor) and x.requires_grad and getattr(x, "placements", None) != placements:
                raise UnsupportedError(
                    f"{name}: expected the placements of q, or no gradient, with distributed tensors"
                )


def _cut(x: Tensor, cuts: list[tuple[int, int, int]], shift: int = 0) -> Tensor:
    """The part of a plain tensor that belongs to this process; dimensions of size 1 are shared."""
    for dim, parts, index in cuts:
        at = dim - shift
        if at >= 0 and x.shape[at] > 1:
            x = x.chunk(parts, at)[index]
    return x


def _part_of_layout(layout: BlockLayout, cuts: list[tuple[int, int, int]]) -> BlockLayout:
    lists = LayoutLists(_cut(layout.start, cuts), _cut(layout.count, cuts), layout.col, layout.origin)
    return BlockLayout._trusted((layout.block_q, layout.block_k, layout.seq_q, layout.seq_k), lists)


def _part_of_extras(extras: Extras, cuts: list[tuple[int, int, int]]) -> Extras:
    def part(name: str, value: Any) -> Any:
        if name == "rope":
            return value
        if isinstance(value, tuple):
            return tuple(part(name, x) for x in value)
        if isinstance(value, DTensor):
            return value.to_local()
        if isinstance(value, Tensor):
            return _cut(value, cuts, shift=1 if name in _BY_HEAD_ALONE else 0)
        return value

    return replace(extras, **{f.name: part(f.name, getattr(extras, f.name)) for f in fields(extras)})
