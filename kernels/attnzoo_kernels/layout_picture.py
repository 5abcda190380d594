"""Pictures of layouts: characters for a terminal, and matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from attnzoo_kernels.layout import BlockLayout

MOST_CELLS = 32
MOST_HEADS = 4
SHADES = " ░▒▓█"


def _shares(keep: Tensor) -> Tensor:
    """A mask ``[h, M, N]`` as shares of kept blocks in at most MOST_CELLS cells a side."""
    rows, cols = (min(size, MOST_CELLS) for size in keep.shape[-2:])
    return adaptive_avg_pool2d(keep.float().unsqueeze(0), (rows, cols)).squeeze(0)


def draw(layout: BlockLayout) -> str:
    """The layout of the first batch item in characters: ■ read, ⬚ not read; shades where a cell stands for several."""
    head = repr(layout)
    if 0 in layout.grid or 0 in layout.start.shape:
        return head
    if layout.col.device.type == "meta":
        return f"{head} (no values on the meta device)"
    keep = layout.to_mask()[0].cpu()
    exact = max(keep.shape[1:]) <= MOST_CELLS
    shares = _shares(keep[:MOST_HEADS])
    lines = [f"{head}, density {layout.density(causal=True):.3f} of causal"]
    for index, grid in enumerate(shares):
        if keep.shape[0] > 1:
            lines.append(f"head {index}")
        lines += ["  " + "".join(_character(float(cell), exact=exact) for cell in row) for row in grid]
    if keep.shape[0] > MOST_HEADS:
        lines.append(f"... and {keep.shape[0] - MOST_HEADS} more heads")
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
    keep = layout.to_mask()[0].cpu()
    heads, rows, cols = keep.shape
    if ax is None:
        _, ax = pyplot.subplots(figsize=(min(2.6 * heads + 1, 16), 3.4), layout="constrained")
    gap = max(1, cols // 12)
    sheet = torch.full((rows, heads * (cols + gap) - gap), torch.nan)
    for head in range(heads):
        left = head * (cols + gap)
        sheet[:, left : left + cols] = keep[head].float()
    ax.imshow(sheet, cmap="Blues", vmin=0.0, vmax=1.25, interpolation="nearest", aspect="equal")
    ax.set_xticks([head * (cols + gap) + (cols - 1) / 2 for head in range(heads)])
    ax.set_xticklabels([f"head {head}" for head in range(heads)] if heads > 1 else ["key blocks"])
    ax.set_ylabel(f"query blocks of {layout.block_q}")
    ax.set_title(f"{layout.seq_q} x {layout.seq_k} tokens, density {layout.density():.2f} of causal", fontsize=10)
    for side in ax.spines.values():
        side.set_visible(False)
    return ax
