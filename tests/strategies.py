"""Random calls of the operation, drawn so that they shrink to small ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from attnzoo_kernels import BlockLayout, Extras
from tests.attnzoo_kernels.oracle import Problem

STRIDES = ("contiguous", "packed", "every second", "last dimension first")
POSITIONS = ("default", "shared", "per head", "per item", "some absent", "all absent")
BIASES = ("none", "finite", "some hidden", "first hidden", "all hidden")


@dataclass(frozen=True)
class Numbers:
    """A seeded source of tensors."""

    generator: torch.Generator

    @classmethod
    def of(cls, seed: int) -> Numbers:
        return cls(torch.Generator().manual_seed(seed))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """From ``low`` up to and with ``high``."""
        return torch.randint(low, high + 1, shape, generator=self.generator, dtype=torch.int32)

    def chance(self, probability: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator) < probability

    def order(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.generator)


def strided(x: Tensor, kind: str) -> Tensor:
    """The same numbers ``[B, h, L, D]`` behind other strides."""
    if kind == "packed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "every second":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), math.nan)
        wide[..., ::2] = x
        return wide[..., ::2]
    if kind == "last dimension first":
        return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    return x.contiguous()


def draw_positions(n: Numbers, kind: str, sizes: tuple[int, int, int, int]) -> Tensor | None:
    batch, heads, queries, keys = sizes
    if kind == "default":
        return None
    shape = {"shared": (1, 1), "per head": (1, heads), "per item": (batch, 1)}.get(kind, (batch, heads))
    if kind == "all absent":
        return torch.full((*shape, queries), -1, dtype=torch.int32)
    q_pos = n.integers(0, keys + 2, *shape, queries)
    if kind == "some absent":
        q_pos[n.chance(0.3, *q_pos.shape)] = -1
    return q_pos


def draw_bias(n: Numbers, kind: str, batch: int, heads: int, keys: int) -> Tensor | None:
    if kind == "none":
        return None
    bias = n.normal(batch, heads, keys)
    if kind == "some hidden":
        bias[n.chance(0.4, *bias.shape)] = -math.inf
    if kind == "first hidden":
        bias[..., : -(-keys // 2)] = -math.inf
    if kind == "all hidden":
        bias[:] = -math.inf
    return bias


@st.composite
def problems(
    draw: Any,
    *,
    dtypes: tuple[torch.dtype, ...] = (torch.float64,),
    longest: int = 40,
    causal: bool | None = None,
    plain: bool = False,
    most_tiles: int | None = None,
) -> Problem:
    """A call; ``plain`` leaves out positions, bias, window and sink; ``most_tiles`` bounds pairs of blocks by head."""
    few = st.integers(1, 3)
    n = Numbers.of(draw(st.integers(0, 2**16)))
    batch, kv_heads, ratio = draw(st.integers(1, 2)), draw(few), draw(few)
    heads = kv_heads * ratio
    queries, keys = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    block_q, block_k = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    width, value_width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    while most_tiles is not None and batch * heads * -(-queries // block_q) * -(-keys // block_k) > max(
        most_tiles, batch * heads
    ):
        # Where time is paid for by the tile, blocks grow until there are few; lengths stay ragged.
        block_q, block_k = (block_q, 2 * block_k) if block_k * queries < block_q * keys else (2 * block_q, block_k)
    grid = (-(-queries // block_q), -(-keys // block_k))
    rows = (draw(st.sampled_from((1, batch))), draw(st.sampled_from((1, kv_heads, heads))))
    keep = n.chance(draw(st.sampled_from((1.0, 0.5, 0.2, 0.0))), *rows, *grid)
    dtype = draw(st.sampled_from(dtypes))
    stride = draw(st.sampled_from(STRIDES))
    amplitude = draw(st.sampled_from((1.0, 3.0)))
    shapes = ((heads, queries, width), (kv_heads, keys, width), (kv_heads, keys, value_width))
    q, k, v = (strided((amplitude * n.normal(batch, *shape)).to(dtype), stride) for shape in shapes)
    is_causal = draw(st.booleans()) if causal is None else causal
    problem = Problem(q, k, v, keep, block_q, block_k, is_causal, draw(st.sampled_from((None, 0.3, 0.0, -0.5))))
    return problem if plain else problem.change(**draw_switches(draw, n, problem))


def draw_switches(draw: Any, n: Numbers, p: Problem) -> dict[str, Any]:
    """Positions, bias, window and sink."""
    some = st.sampled_from(("none", "int", "tensor"))
    window = {
        "none": None,
        "int": draw(st.integers(1, p.keys + 1)),
        "tensor": n.integers(1, p.keys + 1, p.heads),
    }[draw(some)]
    sink = {"none": 0, "int": draw(st.integers(0, p.keys + 1)), "tensor": n.integers(0, 5, p.heads)}[draw(some)]
    of_bias = (draw(st.sampled_from((1, p.batch))), draw(st.sampled_from((1, p.kv_heads, p.heads))))
    bias = draw_bias(n, draw(st.sampled_from(BIASES)), *of_bias, p.keys)
    return {
        "q_pos": draw_positions(n, draw(st.sampled_from(POSITIONS)), (p.batch, p.heads, p.queries, p.keys)),
        "key_bias": None if bias is None else bias.to(lse_dtype(p.q.dtype)),
        "window": window,
        "sink": sink,
    }


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def layout_of(p: Problem) -> BlockLayout:
    """The layout of a problem, straight from its mask."""
    return BlockLayout.from_mask(p.keep, p.block_q, p.block_k, p.queries, p.keys)


def untidy_layout_of(p: Problem, seed: int = 0) -> BlockLayout:
    """The same layout with lists in any order, gaps between them and nonsense in the gaps."""
    n = Numbers.of(seed)
    col: list[int] = [-7]
    start = torch.zeros(p.keep.shape[:3], dtype=torch.int32)
    count = p.keep.sum(-1, dtype=torch.int32)
    cells = [tuple(cell) for cell in torch.ones(start.shape).nonzero().tolist()]
    for cell in [cells[i] for i in n.order(len(cells)).tolist()]:
        blocks = p.keep[cell].nonzero().flatten()
        start[cell] = len(col)
        col += [*blocks[n.order(len(blocks))].tolist(), 10**6]
    return BlockLayout(p.block_q, p.block_k, p.queries, p.keys, start, count, torch.tensor(col, dtype=torch.int32))


def unread(p: Problem, mask: Tensor) -> Tensor:
    """Keys of blocks of which no query of a group sees any, bool ``[B, G, S]``, from the visible set."""
    seen = mask.unflatten(1, (p.kv_heads, -1)).any(2).any(2)
    blocks = pad(seen, (0, -p.keys % p.block_k)).unflatten(-1, (-1, p.block_k)).any(-1)
    return ~blocks.repeat_interleave(p.block_k, -1)[..., : p.keys]


def extras_of(p: Problem) -> Extras:
    return Extras(q_pos=p.q_pos, key_bias=p.key_bias, window=p.window, sink=p.sink)
