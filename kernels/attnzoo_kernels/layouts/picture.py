"""Pictures of layouts: characters for a terminal, and matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnzoo_kernels.layouts.build import LayoutLists, distinct_lists, listed_indices

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from attnzoo_kernels.layouts.layout import BlockLayout

MOST_CELLS = 32
MOST_HEADS = 4
MOST_PIXELS = 512
SHADES = " ░▒▓█"


def _shares(layout: BlockLayout, heads: int, most: int) -> Tensor:
    """Shares of listed blocks in at most so many cells a side, fp32 ``[h, rows, cols]`` of the first item's heads.

    Counted from the lists, each once in each row of cells: a mask of all blocks would be many times as large.
    """
    lists = LayoutLists(layout.start[:1, :heads].cpu(), layout.count[:1, :heads].cpu(), layout.col.cpu())
    blocks_q, blocks_k = layout.grid
    rows = min(blocks_q, most)
    cols = min(blocks_k, most)
    row = torch.arange(blocks_q, device="cpu") * rows // blocks_q
    col = torch.arange(blocks_k, device="cpu") * cols // blocks_k
    # Which list is read how often in which row of cells.
    of_row, once = distinct_lists(lists)
    shown = of_row.shape[1]
    line = torch.arange(shown, device="cpu").unsqueeze(1) * rows + row
    pair, times = (of_row[0] * (shown * rows) + line).unique(return_counts=True)
    chosen = pair // (shown * rows)
    line = pair % (shown * rows)
    entry, listed = listed_indices(LayoutLists(once.start[chosen], once.count[chosen], lists.col))
    cell = line[entry] * cols + col[lists.col.long()[listed]]
    listed = torch.bincount(cell, times[entry].double(), shown * rows * cols).view(shown, rows, cols)
    return listed.float() / (row.bincount().unsqueeze(1) * col.bincount())


def draw(layout: BlockLayout) -> str:
    """The layout of the first batch item in characters: ■ read, ⬚ not read; shades where a cell stands for several."""
    head = repr(layout)
    if 0 in layout.grid or 0 in layout.start.shape:
        return head
    if layout.col.device.type == "meta":
        return f"{head} (no values on the meta device)"
    exact = max(layout.grid) <= MOST_CELLS
    heads = layout.start.shape[1]
    shares = _shares(layout, MOST_HEADS, MOST_CELLS)
    lines = [f"{head}, density {layout.density(causal=True):.3f} of causal"]
    for index, grid in enumerate(shares.tolist()):
        if heads > 1:
            lines.append(f"head {index}")
        lines += ["  " + "".join(_character(cell, exact=exact) for cell in row) for row in grid]
    if heads > MOST_HEADS:
        lines.append(f"... and {heads - MOST_HEADS} more heads")
    return "\n".join(lines)


def _character(share: float, *, exact: bool) -> str:
    if exact:
        return "■" if share > 0 else "⬚"
    return SHADES[0] if share == 0 else SHADES[min(4, 1 + int(share * 3.999))]


def plot(layout: BlockLayout, ax: Axes | None) -> Axes:
    """Draws the first batch item's heads side by side."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plot: needs matplotlib; pip install 'attnzoo[cli]'") from error
    shares = _shares(layout, layout.start.shape[1], MOST_PIXELS)
    heads, rows, cols = shares.shape
    if ax is None:
        _, ax = pyplot.subplots(figsize=(min(2.6 * heads + 1, 16), 3.4), layout="constrained")
    gap = max(1, cols // 12)
    sheet = torch.full((rows, heads * (cols + gap) - gap), torch.nan, device="cpu")
    for head in range(heads):
        left = head * (cols + gap)
        sheet[:, left : left + cols] = shares[head]
    # Axes count blocks, of which a cell may hold several.
    tall, wide = (blocks / cells for blocks, cells in zip(layout.grid, (rows, cols), strict=True))
    extent = (-0.5, sheet.shape[1] * wide - 0.5, layout.grid[0] - 0.5, -0.5)
    ax.imshow(sheet, cmap="Blues", vmin=0.0, vmax=1.25, interpolation="nearest", aspect=wide / tall, extent=extent)
    ax.set_xticks([(head * (cols + gap) + cols / 2) * wide - 0.5 for head in range(heads)])
    ax.set_xticklabels([f"head {head}" for head in range(heads)] if heads > 1 else ["key blocks"])
    ax.set_ylabel(f"query blocks of {layout.block_q}")
    ax.set_title(f"{layout.seq_q} x {layout.seq_k} tokens, density {layout.density():.2f} of causal", fontsize=10)
    for side in ax.spines.values():
        side.set_visible(False)
    return ax
