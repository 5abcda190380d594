"""Every check of the operation's arguments, on metadata alone: they also hold on fake and meta tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnzoo_kernels.errors import ShapeError
from attnzoo_kernels.layouts.build import distinct_lists, listed_indices
from attnzoo_kernels.layouts.layout import BlockLayout
from attnzoo_kernels.runtime.autocast import autocasts
from attnzoo_kernels.runtime.plain import NESTED, advice, is_readable, odd_layout
from attnzoo_kernels.spec.extras import Extras

IMPLEMENTATIONS = ("auto", "reference", "blocked", "triton")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MAX_WIDTH = 256


def is_count(value: Any) -> bool:
    """Whether a value is an int, symbolic ones included, and no bool."""
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def check_arguments(
    tensors: tuple[Tensor, Tensor, Tensor],
    layout: BlockLayout,
    *,
    causal: bool,
    scale: float | None,
    extras: Extras | None,
    impl: str,
) -> None:
    """Raises on the first argument that does not fit.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a shape, dtype, device or value does not fit; most are :class:`ShapeError`.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {impl!r}")
    if not isinstance(causal, bool):
        raise TypeError(f"causal: expected a bool, got {type(causal).__name__}")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, float | int)):
        raise TypeError(f"scale: expected a float or None, got {type(scale).__name__}")
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"layout: expected a BlockLayout, got {type(layout).__name__}")
    if extras is not None and not isinstance(extras, Extras):
        raise TypeError(f"extras: expected an Extras or None, got {type(extras).__name__}")
    q, k, v = tensors
    _check_tensors(q, k, v)
    if scale is not None:
        _check_finite("scale", scale, _wide(q.dtype))
    _check_layout(q, k, layout)
    if extras is not None or layout.origin is not None:
        batch, heads, seq_q, width = q.shape
        room = _Room((batch, heads, seq_q, k.shape[2]), (k.shape[1],), width, q.dtype, _wide(q.dtype), q.device)
        _check_extras(room, layout, extras or Extras())


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}{advice(x)}")
        odd = odd_layout(x)
        if odd is not None:
            kind = "a nested one; pad it, and hide padding with q_pos or key_bias" if odd == NESTED else odd
            raise TypeError(f"{name}: expected a plain (strided) Tensor, got {kind}")
        if x.dim() != 4:
            raise ShapeError(f"{name}: expected four dimensions [batch, heads, length, width], got {list(x.shape)}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name}: expected a floating dtype of {[str(d) for d in FLOATS]}, got {x.dtype}")
    if not q.dtype == k.dtype == v.dtype and not _become_one_dtype(q, k, v):
        raise ShapeError(f"q, k, v: expected one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ShapeError(f"q, k, v: expected one device, got {q.device}, {k.device}, {v.device}")
    batch, heads, _, width = q.shape
    groups = k.shape[1]
    if groups == 0 or heads == 0 or heads % groups != 0:
        raise ShapeError(f"q, k: expected query heads to be a multiple of KV heads, got {heads} and {groups}")
    if k.shape[0] != batch or k.shape[3] != width:
        raise ShapeError(f"k: expected [{batch}, {groups}, S, {width}] as q has it, got {list(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ShapeError(f"v: expected [{batch}, {groups}, {k.shape[2]}, Dv] as k has it, got {list(v.shape)}")
    for name, x in (("q", q), ("v", v)):
        if not 1 <= x.shape[3] <= MAX_WIDTH:
            raise ShapeError(f"{name}: expected a head width (head_dim) from 1 to {MAX_WIDTH}, got {x.shape[3]}")


def _become_one_dtype(*tensors: Tensor) -> bool:
    """Whether autocast gives the tensors one dtype, as it does for torch's own attention; it leaves fp64 alone."""
    return autocasts(tensors[0].device.type) and all(x.dtype != torch.float64 for x in tensors)


def _check_layout(q: Tensor, k: Tensor, layout: BlockLayout) -> None:
    batch, heads, seq_q, _ = q.shape
    groups = k.shape[1]
    seq_k = k.shape[2]
    if layout.seq_q != seq_q or layout.seq_k != seq_k:
        raise ShapeError(
            f"layout: expected one for {seq_q} queries and {seq_k} keys, got {layout.seq_q} and {layout.seq_k}"
        )
    blocks = -(-seq_q // layout.block_q)
    got = layout.start.shape
    # No "in": compiled, it takes equal sizes for different ones.
    fits = (got[0] == 1 or got[0] == batch) and (got[1] == 1 or got[1] == groups or got[1] == heads)
    if not fits or got[2] != blocks:
        raise ShapeError(
            f"layout: expected lists of shape [1 or {batch}, one of 1, {groups}, {heads}, {blocks}], got {list(got)}"
        )
    if layout.col.device != q.device:
        raise ShapeError(f"layout: expected it on {q.device} as q is, got {layout.col.device}")


def check_counting(layout: BlockLayout, *, causal: bool, extras: Extras | None, batch: int, heads: int) -> None:
    """Raises on the first argument of a count of pairs that does not fit.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a size or value does not fit; most are :class:`ShapeError`.
    """
    if not isinstance(causal, bool):
        raise TypeError(f"causal: expected a bool, got {type(causal).__name__}")
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"layout: expected a BlockLayout, got {type(layout).__name__}")
    if extras is not None and not isinstance(extras, Extras):
        raise TypeError(f"extras: expected an Extras or None, got {type(extras).__name__}")
    for name, value, least in (("batch", batch, 0), ("heads", heads, 1)):
        if not is_count(value):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    own_batch, own_heads, _ = layout.start.shape
    if own_batch not in (1, batch):
        raise ShapeError(f"batch: expected the layout's {own_batch}, got {batch}")
    if heads % own_heads:
        raise ShapeError(f"heads: expected a multiple of the layout's {own_heads} heads, got {heads}")
    if extras is not None:
        divisors = tuple(n for n in range(1, heads + 1) if heads % n == 0)
        sizes = (batch, heads, layout.seq_q, layout.seq_k)
        _check_extras(_Room(sizes, divisors, None, None, None, layout.col.device), layout, extras)


@dataclass(frozen=True)
class _Room:
    """What the fields of an ``Extras`` have to fit; ``None`` where a count of pairs leaves it open.

    Attributes:
        sizes: ``B, H, T, S``.
        groups: G, or all that it may be.
        width: D.
        dtype: That of q, k and v.
        acc: That of scores.
        device: Where all tensors are.
    """

    sizes: tuple[int, int, int, int]
    groups: tuple[int, ...]
    width: int | None
    dtype: torch.dtype | None
    acc: torch.dtype | None
    device: torch.device

    def widths(self, x: Any, at: int = 3) -> tuple[int, ...]:
        """The widths that a tensor may have: D, or its own where that is open."""
        return (self.width,) if self.width is not None else tuple(x.shape[at:]) if isinstance(x, Tensor) else ()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_rule(extras: Extras, room: _Room) -> None:
    batch, heads, seq_q, seq_k = room.sizes
    if extras.q_pos is not None:
        expect("q_pos", extras.q_pos, ((batch, 1), (heads, 1), (seq_q,)), torch.int32, room.device)
    if extras.key_bias is not None:
        sizes = ((batch, 1), (*room.groups, heads, 1), (seq_k,))
        expect("key_bias", extras.key_bias, sizes, room.acc, room.device)
        _check_floating("key_bias", extras.key_bias)
    _check_number("window", extras.window, 1, heads, room.device, optional=True)
    _check_number("sink", extras.sink, 0, heads, room.device, optional=False)


def _check_extras(room: _Room, layout: BlockLayout, extras: Extras) -> None:
    _check_rule(extras, room)
    if extras.precision not in ("precise", "fast"):
        raise ValueError(f"precision: expected 'precise' or 'fast', got {extras.precision!r}")
    if extras.aux is not None:
        _check_aux(extras.aux, room)
    _check_gate(extras, room, layout)
    # Pairs are the same whatever turns them: a count may leave the tables out.
    counts_alone = room.width is None and extras.rope is None
    if (extras.rope is None) != (layout.origin is None) and not counts_alone:
        raise ValueError("rope: expected together with layout.origin, got one without the other")
    if extras.rope is not None:
        if not isinstance(extras.rope, tuple) or len(extras.rope) != 2:
            raise TypeError(f"rope: expected a pair (cos, sin), got {type(extras.rope).__name__}")
        cos, sin = extras.rope
        for name, table in (("rope cos", cos), ("rope sin", sin)):
            if not isinstance(table, Tensor):
                raise TypeError(f"{name}: expected a Tensor, got {type(table).__name__}")
            _check_constant(name, table, "a table")
            most = table.shape[-1] if room.width is None and table.dim() else (room.width or 0) // 2
            expect(name, table, (tuple(table.shape[:1]), range(1, most + 1)), room.acc, room.device)
            _check_floating(name, table)
        if cos.shape != sin.shape:
            raise ShapeError(f"rope: expected cos and sin of one shape, got {list(cos.shape)} and {list(sin.shape)}")
        _check_origins(layout, cos.shape[0])


def _check_origins(layout: BlockLayout, positions: int) -> None:
    """Reads values, where that costs no synchronisation."""
    if layout.origin is None or not is_readable(layout.origin):
        return
    listed = layout.origin[listed_indices(distinct_lists(layout.lists)[1])[1]]
    if listed.numel() and positions == 0:
        raise ShapeError("rope: expected tables of at least one position for layout.origin to name, got none")
    if listed.numel() and not (int(listed.min()) >= 0 and int(listed.max()) < positions):
        raise ShapeError(
            f"origin: expected positions from 0 to {positions - 1}, which the rope tables have, "
            f"got {int(listed.min())} to {int(listed.max())}"
        )


def _check_aux(aux: tuple[Tensor, Tensor], room: _Room) -> None:
    if not isinstance(aux, tuple) or len(aux) != 2:
        raise TypeError(f"aux: expected a pair (q_aux, k_aux), got {type(aux).__name__}")
    batch, heads, seq_q, seq_k = room.sizes
    q_aux, k_aux = aux
    widths = tuple(q_aux.shape[3:]) if isinstance(q_aux, Tensor) else ()
    dtype = room.dtype or (q_aux.dtype if isinstance(q_aux, Tensor) else None)
    expect("q_aux", q_aux, ((batch,), (heads,), (seq_q,), widths), dtype, room.device)
    expect("k_aux", k_aux, ((batch, 1), (*room.groups, 1), (seq_k,), widths), dtype, room.device)
    _check_floating("q_aux", q_aux)


def _check_gate(extras: Extras, room: _Room, layout: BlockLayout) -> None:
    batch, heads, _, seq_k = room.sizes
    if isinstance(extras.gate, Tensor):
        sizes = ((batch,), room.groups, (-(-seq_k // layout.block_k),), room.widths(extras.gate))
        expect("gate", extras.gate, sizes, room.dtype, room.device)
        _check_floating("gate", extras.gate)
    elif extras.gate not in (None, "last"):
        raise ValueError(f"gate: expected a Tensor, 'last' or None, got {extras.gate!r}")
    mix = extras.gate_mix
    if isinstance(mix, Tensor):
        expect("gate_mix", mix, ((heads,),), None, room.device)
        _check_floating("gate_mix", mix)
        _check_constant("gate_mix", mix, "a tensor")
        # Reads values, where that costs no synchronisation.
        if is_readable(mix):
            for value in mix.tolist():
                _check_finite("gate_mix", value, room.acc)
    elif isinstance(mix, bool) or not isinstance(mix, float | int):
        raise TypeError(f"gate_mix: expected a float or a Tensor, got {type(mix).__name__}")
    else:
        _check_finite("gate_mix", mix, room.acc)


def _check_finite(name: str, value: float, acc: torch.dtype | None) -> None:
    """Raises unless a number is finite in the dtype of scores."""
    acc = acc or torch.float64
    # Of NaN no comparison is true.
    if not abs(value) <= torch.finfo(acc).max:
        raise ValueError(f"{name}: expected a finite number, as {acc} holds it, got {value}")


def _check_constant(name: str, x: Tensor, kind: str) -> None:
    """Raises for a tensor whose derivative somebody waits for, backward or forward: there is none of it."""
    if x.requires_grad:
        raise ValueError(f"{name}: expected {kind} without gradient, got one that requires it; detach it")
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if forward_ad.unpack_dual(x).tangent is not None:
        raise ValueError(f"{name}: expected {kind} without a forward-mode tangent, got one that has it; detach it")


def _check_floating(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")


def _check_number(
    name: str, value: int | Tensor | None, least: int, heads: int, device: torch.device, *, optional: bool
) -> None:
    if isinstance(value, Tensor):
        expect(name, value, ((heads,),), torch.int32, device)
    elif value is None and optional:
        return
    elif not is_count(value):
        raise TypeError(f"{name}: expected an int or an int32 Tensor, got {type(value).__name__}")
    elif value is not None and value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def expect(
    name: str, x: Tensor, allowed: Sequence[Sequence[int]], dtype: torch.dtype | None, device: torch.device
) -> None:
    """Raises unless a tensor has one of the allowed sizes in each dimension, the dtype and the device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    # Not "in": the compiler does not compare two symbolic sizes by it.
    if x.dim() != len(allowed) or not all(
        any(size == one for one in sizes) for size, sizes in zip(x.shape, allowed, strict=True)
    ):
        wanted = ", ".join(" or ".join(str(s) for s in dict.fromkeys(sizes)) for sizes in allowed)
        raise ShapeError(f"{name}: expected shape [{wanted}], got {list(x.shape)}")
    if dtype is not None and x.dtype != dtype:
        raise ShapeError(f"{name}: expected {dtype}, got {x.dtype}")
    if x.device != device:
        raise ShapeError(f"{name}: expected it on {device} as q is, got {x.device}")
