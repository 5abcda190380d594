"""What is measured: sizes, layouts and inputs, the same for every contestant.

Letters: B batch (1 everywhere), T query tokens, S key tokens, H query heads, G KV heads, D head width, M and N blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnzoo_kernels import BlockLayout, Extras


@dataclass(frozen=True)
class Case:
    """One causal call.

    Attributes:
        name: What it is called.
        tokens: T, and S.
        density: Wanted share of the blocks on and below the diagonal.
        heads: H.
        groups: G.
        width: D.
        block: Tokens in a block, of queries and of keys.
        dtype: Of the inputs.
        blocks_each: Blocks in every row, instead of a density.
    """

    name: str
    tokens: int = 4096
    density: float = 0.26
    heads: int = 8
    groups: int = 8
    width: int = 64
    block: int = 64
    dtype: torch.dtype = torch.float32
    blocks_each: int | None = None

    def with_dtype(self, dtype: torch.dtype) -> Case:
        """The same call in another dtype."""
        return replace(self, dtype=dtype)

    def mask(self, seed: int = 0) -> Tensor:
        """Blocks that are read, bool ``[1, H, M, M]``: the own one, and random earlier ones in each head."""
        blocks = -(-self.tokens // self.block)
        generator = torch.Generator().manual_seed(seed)
        score = torch.rand(1, self.heads, blocks, blocks, generator=generator)
        row = torch.arange(blocks).unsqueeze(1)
        col = torch.arange(blocks)
        score = score.masked_fill(col > row, -1.0).masked_fill(col == row, 2.0)
        wanted = (row + 1) * self.density if self.blocks_each is None else torch.full_like(row, self.blocks_each)
        count = wanted.round().clamp(min=1).minimum(row + 1).long().squeeze(1)
        rank = score.argsort(-1, descending=True).argsort(-1)
        return rank < count.view(1, 1, -1, 1)

    def layout(self) -> BlockLayout:
        """The layout of the mask."""
        return BlockLayout.from_mask(self.mask(), self.block, self.block, self.tokens, self.tokens)

    def inputs(self, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Normal q, k, v."""
        generator = torch.Generator().manual_seed(seed)
        shapes = [(1, heads, self.tokens, self.width) for heads in (self.heads, self.groups, self.groups)]
        q, k, v = (torch.randn(shape, generator=generator).to(self.dtype) for shape in shapes)
        return q, k, v


DENSITIES = (0.26, 0.06, 0.03)
FORWARD = tuple(Case(f"density {density}", density=density) for density in DENSITIES)
MEMORY = Case("memory", tokens=8192, density=0.12)
LONG = Case("long", tokens=16384, density=0.03)
SCALING = tuple(
    Case(f"T = {length}", tokens=length, blocks_each=8) for length in (1024, 2048, 4096, 8192, 16384, 32768)
)


@dataclass(frozen=True)
class Decode:
    """One step of decoding: a new token reads selected blocks of a cache.

    Attributes:
        name: What it is called.
        heads: H.
        groups: G.
        width: D.
        cache: Tokens in the cache.
        selected: Tokens read.
        block: Tokens in a block.
    """

    name: str
    heads: int
    groups: int
    width: int
    cache: int = 16384
    selected: int = 2048
    block: int = 64

    def index(self) -> Tensor:
        """Blocks that are read, int64 ``[1, G, 1, K]``, others for each KV head."""
        generator = torch.Generator().manual_seed(0)
        blocks = self.cache // self.block
        count = self.selected // self.block
        score = torch.rand(1, self.groups, 1, blocks, generator=generator)
        score[..., -1] = 2.0
        return score.topk(count, -1).indices

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Normal q ``[1, H, 1, D]`` and k, v ``[1, G, S, D]``."""
        generator = torch.Generator().manual_seed(1)
        shapes = [(1, self.heads, 1, self.width)] + [(1, self.groups, self.cache, self.width)] * 2
        q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
        return q, k, v


DECODES = (Decode("MHA 8:8, D 64", 8, 8, 64), Decode("GQA 32:8, D 128", 32, 8, 128))


def switch(name: str, case: Case, layout: BlockLayout) -> tuple[BlockLayout, Extras]:
    """The layout and extras of one switch on a case."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    heads = case.heads
    groups = case.groups
    tokens = case.tokens
    blocks = layout.grid[1]
    if name == "origin":
        angle = torch.arange(blocks, dtype=torch.float64).unsqueeze(1) * case.block * 0.01
        tables = (angle.cos().float().repeat(1, case.width // 2), angle.sin().float().repeat(1, case.width // 2))
        turned = BlockLayout(
            case.block, case.block, tokens, tokens, layout.start, layout.count, layout.col, layout.col.clone()
        )
        return turned, Extras(rope=tables)
    every_seventh = torch.arange(tokens) % 7 == 3
    made = {
        "none": lambda: Extras(),
        "q_pos": lambda: Extras(q_pos=torch.arange(tokens, dtype=torch.int32).view(1, 1, -1)),
        "key_bias": lambda: Extras(key_bias=normal(1, 1, tokens)),
        "key_bias, -inf": lambda: Extras(key_bias=normal(1, 1, tokens).masked_fill_(every_seventh, -math.inf)),
        "window and sink": lambda: Extras(window=tokens, sink=4),
        "window per head": lambda: Extras(window=torch.full((heads,), tokens, dtype=torch.int32)),
        "aux 16": lambda: Extras(aux=(normal(1, heads, tokens, 16), normal(1, groups, tokens, 16))),
        "aux 64": lambda: Extras(aux=(normal(1, heads, tokens, 64), normal(1, groups, tokens, 64))),
        "gate last": lambda: Extras(gate="last"),
        "gate last, mixed": lambda: Extras(gate="last", gate_mix=0.5),
        "gate keys": lambda: Extras(gate=normal(1, groups, blocks, case.width)),
    }
    return layout, made[name]()


SWITCHES = (
    "none", "q_pos", "key_bias", "key_bias, -inf", "window and sink", "window per head", "aux 16", "aux 64",
    "gate last", "gate last, mixed", "gate keys", "origin",
)  # fmt: skip
