"""The cells of the GPU table: one measurement each, in the order in which they matter.

Letters: B batch (1 everywhere), T query tokens, S key tokens, H query heads, G KV heads, D head width, M and N blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo_kernels import BlockLayout

FORMS = ("plain", "skewed", "specialised")
DENSITIES = (1.0, 0.5, 0.25, 0.1, 0.05)
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
WIDTHS = (128, 64)
S2 = (16, 8)
"""Local blocks and stride of the paper, for blocks of 64."""

S2_TINY = (1, 2)
PAIRS = 50
"""Random (length, layout) pairs over which nothing may be compiled anew."""


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        what: "forward", "backward", "decode", "form" (of the forward loop) or "recompilations".
        width: D.
        tokens: S; T as well, but for decoding, where T is 1.
        density: Wanted share of the blocks on and below the diagonal; ``None`` where the pattern says it.
        heads: H.
        groups: G.
        block: Tokens in a block of keys, and of queries but for decoding.
        pattern: "random" or "s2", at the settings of Phi-3-small.
        form: Of the forward loop, in cells of forms.
    """

    what: str
    width: int
    tokens: int
    density: float | None
    heads: int = 32
    groups: int = 32
    block: int = 128
    pattern: str = "random"
    form: str = ""

    @property
    def name(self) -> str:
        """What it is called, also as a file."""
        parts = [self.what, *([self.form] if self.form else []), f"d{self.width}", f"t{self.tokens}"]
        parts += [self.pattern if self.density is None else f"rho{self.density:g}"]
        return "-".join([*parts, *([f"h{self.heads}x{self.groups}"] if self.heads != self.groups else [])])

    @property
    def queries(self) -> int:
        """T."""
        return 1 if self.what == "decode" else self.tokens

    @property
    def block_q(self) -> int:
        """Rows of a query block."""
        return 1 if self.what == "decode" else self.block

    def layout(self, device: torch.device, seed: int = 0) -> BlockLayout:
        """What is read; every head of its own where the pattern is random."""
        sizes = (self.block_q, self.block, self.queries, self.tokens)
        if self.pattern == "s2":
            shift = [n + 1 for n in range(self.groups)]
            local, stride = S2_TINY if self.block < 64 else S2
            return BlockLayout.strided(*sizes, local_blocks=local, vert_stride=stride, shift=shift, device=device)
        if self.density == 1.0:
            return BlockLayout.dense(*sizes, device=device)
        blocks = [-(-tokens // block) for tokens, block in ((self.queries, self.block_q), (self.tokens, self.block))]
        own = torch.arange(blocks[0], device=device).unsqueeze(1) + blocks[1] - blocks[0]
        return BlockLayout.from_mask(self._mask(own, blocks[1], seed), *sizes)

    def _mask(self, own: Tensor, blocks: int, seed: int) -> Tensor:
        """The own block and random earlier ones, bool ``[1, G, M, N]``; the heads of a group share."""
        generator = torch.Generator(own.device).manual_seed(seed)
        col = torch.arange(blocks, device=own.device)
        wanted = ((own + 1) * (self.density or 1.0)).round().clamp(min=1).long()
        found = []
        for _ in range(self.groups):
            score = torch.rand(own.shape[0], blocks, generator=generator, device=own.device)
            score = score.masked_fill(col > own, -1.0).masked_fill(col == own, 2.0)
            found.append(score.argsort(-1, descending=True).argsort(-1) < wanted)
        return torch.stack(found).unsqueeze(0)

    def inputs(self, device: torch.device, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Normal q, k, v in bf16."""
        generator = torch.Generator(device).manual_seed(seed)
        shapes = [(1, self.heads, self.queries, self.width)] + [(1, self.groups, self.tokens, self.width)] * 2
        q, k, v = (torch.randn(s, generator=generator, device=device, dtype=torch.bfloat16) for s in shapes)
        return q, k, v

    @property
    def bytes_held(self) -> int:
        """About how much memory it takes: tensors, gradients in fp32 beside them, the check's chunks."""
        copies = 14 if self.what == "backward" else 6
        return copies * 2 * self.tokens * self.width * max(self.heads, self.groups) + (2 << 30)


def _first() -> list[Cell]:
    """Those that a promise hangs on, dearest first."""
    goal = 32768
    found = [Cell("forward", 128, goal, density) for density in (1.0, 0.25, 0.05)]
    found += [Cell("backward", 128, goal, 1.0), Cell("recompilations", 128, 8192, 0.3, 8, 4)]
    found += [Cell("decode", 128, 131072, density, 32, 8) for density in (0.5, 0.25)]
    found += [Cell("form", width, goal, density, form=form) for width in WIDTHS for density in (1.0, 0.25)
              for form in FORMS]  # fmt: skip
    return found


def _rest() -> list[Cell]:
    found = []
    for tokens in (32768, 8192, 131072, 16384, 65536, 4096):
        for width in WIDTHS:
            found += [Cell(what, width, tokens, rho) for rho in DENSITIES for what in ("forward", "backward")]
            found += [Cell("decode", width, tokens, rho, 32, groups) for rho in DENSITIES for groups in (8, 32)]
    found += [Cell(what, 128, tokens, None, 32, 8, 64, "s2") for tokens in LENGTHS for what in ("forward", "backward")]
    found += [Cell("decode", 128, tokens, None, 32, 8, 64, "s2") for tokens in LENGTHS]
    return found


def every() -> list[Cell]:
    """All cells, the dearest first, each once."""
    return list(dict.fromkeys([*_first(), *_rest()]))


def tiny() -> list[Cell]:
    """The same machinery at sizes for the interpreter."""
    common = {"heads": 2, "groups": 1, "block": 16}
    small = [Cell(what, 16, 40, 0.5, **common) for what in ("forward", "backward", "decode")]
    small += [Cell("recompilations", 16, 20, 0.5, **common)]
    forms = [Cell("form", 16, 40, 0.5, **common, form=form) for form in FORMS]
    return [*small, *forms, Cell("forward", 16, 40, 1.0, **common), Cell("forward", 16, 80, None, 2, 2, 16, "s2")]


def pairs(cell: Cell, count: int) -> list[Cell]:
    """Cells of random lengths and layouts, for counting what is compiled."""
    generator = torch.Generator().manual_seed(3)
    low = math.log(max(cell.tokens / 8, 4))
    high = math.log(cell.tokens * 2)
    found = []
    for _ in range(count):
        draw = torch.rand(2, generator=generator)
        tokens = round(math.exp(low + (high - low) * float(draw[0])))
        found.append(
            Cell("forward", cell.width, tokens, 0.05 + 0.9 * float(draw[1]), cell.heads, cell.groups, cell.block)
        )
    return found
