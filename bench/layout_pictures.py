"""Pictures of layouts and of what each switch of a call hides: ``python -m bench.layout_pictures``.

What a panel shows is asked of the operation itself: with scores of 0 and values that are the identity, its output is
the weights. Letters: H heads, T queries, S keys, M and N query and key blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from xml.sax.saxutils import escape

import torch
import typer
from torch import Tensor

from attnzoo import BlockLayout, Extras, block_sparse_attention

OUT = Path(__file__).resolve().parents[1] / "docs" / "pictures"
TOKENS = 32
BLOCK = 4
CELL = 5.0
MARGIN = 26.0
GAP = 22.0
SEEN = "#2f7fc1"
HIDDEN = "#c9631e"
GREY = "#7d7d7d"
LEGEND = (("seen", "read"), ("hidden", "in a listed block, hidden by the rule"), ("free", "not listed: costs nothing"))
DARKER = "; the fuller the colour, the larger the weight"


@dataclass(frozen=True, eq=False)
class Panel:
    """One head of one call.

    Attributes:
        label: What stands above it.
        layout: Which blocks are listed.
        extras: The switches of the call.
        causal: The rule of the call.
        head: Which of the layout's heads.
        shades: Whether weights are drawn, as shades of the largest of their row.
        numbers: Whether rotary origins stand in their blocks.
    """

    label: str
    layout: BlockLayout
    extras: Extras | None = None
    causal: bool = True
    head: int = 0
    shades: bool = False
    numbers: bool = False

    @property
    def weights(self) -> Tensor:
        """What the operation gives each key of each query, fp64 ``[T, S]``, at scores of 0."""
        heads = self.layout.start.shape[1]
        slots = self.layout.seq_k
        q = torch.ones(1, heads, self.layout.seq_q, 2, dtype=torch.float64)
        v = torch.eye(slots, dtype=torch.float64).expand(1, 1, -1, -1)
        out = block_sparse_attention(
            q, v.new_zeros(1, 1, slots, 2), v, self.layout, causal=self.causal, extras=self.extras, impl="reference"
        )
        return out[0, self.head]

    @property
    def origins(self) -> dict[tuple[int, int], int]:
        """The origin of each listed block of this head, by its query and key block."""
        origin = self.layout.origin
        if origin is None:
            return {}
        start = self.layout.start[0, self.head].tolist()
        count = self.layout.count[0, self.head].tolist()
        return {
            (row, int(self.layout.col[entry])): int(origin[entry])
            for row, (first, number) in enumerate(zip(start, count, strict=True))
            for entry in range(first, first + number)
        }


def rectangles(mask: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Covers what is true of a small mask with rectangles ``(x, y, width, height)``, none over another."""
    open_runs: dict[tuple[int, int], int] = {}
    rows = [*mask.tolist(), []]
    for y, row in enumerate(rows):
        runs = set()
        for x, value in enumerate(row):
            if value and (x == 0 or not row[x - 1]):
                end = next((e for e in range(x, len(row)) if not row[e]), len(row))
                runs.add((x, end))
        # A run that the next row does not repeat ends here.
        for run in sorted(set(open_runs) - runs):
            yield run[0], open_runs[run], run[1] - run[0], y - open_runs[run]
            del open_runs[run]
        for run in sorted(runs - set(open_runs)):
            open_runs[run] = y


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _rect(x: float, y: float, wide: float, high: float, more: str) -> str:
    return f'<rect x="{_number(x)}" y="{_number(y)}" width="{_number(wide)}" height="{_number(high)}" {more}/>'


def _text(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{_number(x)}" y="{_number(y)}"{more}>{escape(words)}</text>'


def _outline(mask: Tensor, corner: tuple[float, float]) -> str:
    """A block's cells as a path, a little apart from those of the next block."""
    found = ""
    for x, y, wide, high in rectangles(mask):
        left = corner[0] + x * CELL + 0.4 * (x == 0)
        top = corner[1] + y * CELL + 0.4 * (y == 0)
        right = corner[0] + (x + wide) * CELL - 0.4 * (x + wide == mask.shape[1])
        bottom = corner[1] + (y + high) * CELL - 0.4 * (y + high == mask.shape[0])
        found += f"M{_number(left)} {_number(top)}H{_number(right)}V{_number(bottom)}H{_number(left)}z"
    return found


def _levels(weights: Tensor, *, shades: bool) -> Tensor:
    """0 where nothing is read, else 4; or 1 to 4, by the share of a row's largest weight."""
    if not shades:
        return (weights > 0) * 4
    share = weights / weights.amax(1, keepdim=True).clamp(min=1e-30)
    return (share * 4).round(decimals=6).ceil().clamp(max=4) * (weights > 0)


def marks(panel: Panel, left: float, top: float) -> Iterator[str]:
    """The elements of a panel whose upper left corner lies there."""
    layout = panel.layout
    level = _levels(panel.weights, shades=panel.shades)
    wide = layout.seq_k * CELL
    high = layout.seq_q * CELL
    if panel.label:
        yield _text(left, top - 8, panel.label)
    lines = [f"M{_number(left + n * layout.block_k * CELL)} {top:g}v{high:g}" for n in range(layout.grid[1] + 1)]
    lines += [f"M{left:g} {_number(top + m * layout.block_q * CELL)}h{wide:g}" for m in range(layout.grid[0] + 1)]
    yield f'<path d="{"".join(lines)}" class="grid"/>'
    paths = dict.fromkeys(range(5), "")
    for row, col in layout.to_mask()[0, panel.head].nonzero().tolist():
        rows = slice(row * layout.block_q, (row + 1) * layout.block_q)
        cols = slice(col * layout.block_k, (col + 1) * layout.block_k)
        corner = (left + cols.start * CELL, top + rows.start * CELL)
        for shade in paths:
            paths[shade] += _outline(level[rows, cols] == shade, corner)
    for shade, path in paths.items():
        fill = f'class="seen" opacity="{_number(0.16 + 0.21 * shade)}"' if shade else 'fill="url(#hidden)"'
        if path:
            yield f'<path d="{path}" {fill}/>'
    if panel.numbers:
        for (row, col), origin in panel.origins.items():
            x = left + (col + 0.5) * layout.block_k * CELL
            yield _text(x, top + (row + 0.5) * layout.block_q * CELL + 3.2, str(origin), ' class="number"')


def svg(title: str, panels: Sequence[Panel], *, legend: bool = True) -> str:
    """A picture of panels side by side; on no ground of its own, for light pages and dark ones."""
    parts: list[str] = []
    left = MARGIN
    top = 36.0 if any(panel.label for panel in panels) else 8.0
    for panel in panels:
        parts += marks(panel, left, top)
        left += panel.layout.seq_k * CELL + GAP
    bottom = top + max(panel.layout.seq_q for panel in panels) * CELL
    parts.append(_text(MARGIN - 8, bottom, "queries", f' transform="rotate(-90 {MARGIN - 8:g} {bottom:g})"'))
    parts.append(_text(MARGIN, bottom + 15, "keys"))
    y = bottom + 26
    width = max(left - GAP + 8, 260.0 * legend)
    told = [(kind, words + DARKER * (kind == "seen" and any(p.shades for p in panels))) for kind, words in LEGEND]
    for kind, words in told if legend else ():
        fill = {"seen": 'class="seen"', "hidden": 'fill="url(#hidden)"', "free": 'class="free"'}[kind]
        parts.append(_rect(MARGIN, y, 10, 10, fill))
        parts.append(_text(MARGIN + 16, y + 9, words))
        y += 16
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_number(width)} {_number(y + 4)}" '
        f'width="{_number(width)}" height="{_number(y + 4)}" role="img">\n<title>{escape(title)}</title>\n'
        f"<style>text{{font:11px sans-serif;fill:{GREY}}}.seen{{fill:{SEEN}}}"
        f".number{{font-size:9px;fill:#fff;text-anchor:middle;stroke:#17405f;stroke-width:2;paint-order:stroke}}"
        f".grid{{stroke:{GREY};stroke-opacity:.35;stroke-width:.6;fill:none}}"
        f".free{{fill:none;stroke:{GREY};stroke-opacity:.6}}</style>\n"
        '<defs><pattern id="hidden" width="4" height="4" patternUnits="userSpaceOnUse" '
        f'patternTransform="rotate(45)"><path d="M1 0V4" stroke="{HIDDEN}" stroke-width="1.3"/></pattern></defs>\n'
    )
    return head + "\n".join(parts) + "\n</svg>\n"


SQUARE = (BLOCK, BLOCK, TOKENS, TOKENS)


def _by_head(label: str, layout: BlockLayout, extras: Extras | None = None) -> list[Panel]:
    return [Panel(f"{label} {head}", layout, extras, head=head) for head in range(layout.start.shape[1])]


def layouts() -> Iterator[tuple[str, str, list[Panel]]]:
    """Name, title and panels of each picture of a layout."""
    dense = BlockLayout.dense(*SQUARE)
    both = [Panel("causal", dense), Panel("causal=False", dense, causal=False)]
    yield "layout-dense", "Every block is listed; causality hides what comes later", both
    window = BlockLayout.window(*SQUARE, window=10)
    yield "layout-window", "The blocks that cover a window of 10", [
        Panel("the layout alone", window), Panel("with window=10", window, Extras(window=10)),
    ]  # fmt: skip
    sink = BlockLayout.sink_window(*SQUARE, window=10, sink=2)
    rule = Extras(window=10, sink=2)
    yield "layout-sink-window", "A window of 10 and a sink of 2", [
        Panel("the layout alone", sink), Panel("with window=10, sink=2", sink, rule),
    ]  # fmt: skip
    strided = BlockLayout.strided(*SQUARE, local_blocks=2, vert_stride=4, shift=(0, 1, 2, 3))
    yield (
        "layout-strided",
        "Two near blocks, and every fourth block further away, shifted by head",
        _by_head("head", strided),
    )
    keep = torch.zeros(1, 3, 8, 8, dtype=torch.bool)
    keep[0, 0] = torch.ones(8, 8).tril() > 0
    keep[0, 1] = torch.eye(8) > 0
    keep[0, 2, :, 0] = True
    yield "layout-per-head", "A mask of blocks for each head", _by_head("head", BlockLayout.from_mask(keep, *SQUARE))
    index = torch.tensor([[0, -1, -1], [0, 1, -1], [2, 1, -1], [3, 0, 1], [4, 1, -1], [5, 2, 4], [6, 0, 3], [7, 5, 1]])
    chosen = index.view(1, 1, 8, 3)
    yield (
        "layout-from-indices",
        "Blocks by number, as a selection finds them",
        [Panel("index [1, 1, 8, 3]", BlockLayout.from_indices(chosen, *SQUARE))],
    )
    # Blocks that are read lie one behind the other, up to the own one, wherever they are.
    slots = chosen.sort(-1).values
    place = (slots >= 0).cumsum(-1) - 1
    origin = torch.where(slots >= 0, (slots - place) * BLOCK, 0)
    moved = BlockLayout.from_indices(slots, *SQUARE, origin=origin)
    panel = Panel("origins", moved, _turned(), numbers=True)
    yield "layout-origins", "Each entry has a rotary origin", [panel]


def _turned() -> Extras:
    # Tables for all origins; at scores of 0 nothing is turned.
    angles = torch.arange(TOKENS, dtype=torch.float64).unsqueeze(1)
    return Extras(rope=(angles.cos(), angles.sin()))


def switches() -> Iterator[tuple[str, str, list[Panel]]]:
    """Name, title and panels of each picture of a switch."""
    dense = BlockLayout.dense(*SQUARE)
    chunk = BlockLayout.dense(BLOCK, BLOCK, 8, TOKENS)
    rows = torch.arange(8, dtype=torch.int32)
    yield "extras-q-pos", "The last slot a row may read", [
        Panel("8 queries, 32 keys: t + 24", chunk),
        Panel("q_pos = 10 + t", chunk, Extras(q_pos=(rows + 10).view(1, 1, 8))),
        Panel("q_pos = -1 for two rows", chunk, Extras(q_pos=torch.where(rows < 2, -1, rows + 8).int().view(1, 1, 8))),
    ]  # fmt: skip
    bias = torch.zeros(1, 1, TOKENS, dtype=torch.float64)
    bias[..., 6:11] = -torch.inf
    yield (
        "extras-key-bias",
        "Keys 6 to 10 have a bias of -inf",
        [Panel("key_bias = -inf at 6 to 10", dense, Extras(key_bias=bias))],
    )
    yield (
        "extras-window",
        "A window hides what is further back",
        [
            Panel("window=10", dense, Extras(window=10)),
            Panel("window=10, causal=False", dense, Extras(window=10), causal=False),
        ],
    )
    lengths = torch.tensor([4, 16], dtype=torch.int32)
    two = BlockLayout.from_mask(torch.ones(1, 2, 8, 8, dtype=torch.bool), *SQUARE)
    yield (
        "extras-sink",
        "A sink stays visible beside the window",
        [
            Panel("window=10, sink=3", dense, Extras(window=10, sink=3)),
            *_by_head("window=[4, 16], head", two, Extras(window=lengths, sink=3)),
        ],
    )
    far = torch.arange(TOKENS, dtype=torch.float64)
    ones = torch.ones(TOKENS, dtype=torch.float64)
    channels = (torch.stack([-far, ones], -1).view(1, 1, TOKENS, 2), torch.stack([ones, far], -1).view(1, 1, TOKENS, 2))
    faded = (channels[0] * 0.15 * 2**0.5, channels[1])
    yield (
        "extras-aux",
        "Auxiliary channels that lose .15 a token of distance",
        [Panel("aux: weights fall with distance", dense, Extras(aux=faded), shades=True)],
    )
    yield "extras-gate", "A second softmax over blocks", list(_gates(dense))


def variants() -> Iterator[tuple[str, str, list[Panel]]]:
    """Name, title and panel of each picture of the start page."""
    yield "reads-all", "Every query reads all earlier keys", [Panel("", BlockLayout.dense(*SQUARE))]
    near = BlockLayout.sink_window(*SQUARE, window=10, sink=2)
    yield "reads-window", "A window and a sink", [Panel("", near, Extras(window=10, sink=2))]
    strided = BlockLayout.strided(*SQUARE, local_blocks=2, vert_stride=4, shift=(0, 1, 2, 3))
    yield "reads-shard", "Near blocks, and every fourth block further away", [Panel("", strided, head=1)]
    # The first block and the own one are always read, and here one more that was chosen.
    chosen = torch.tensor([[0, -1, -1], [1, 0, -1], [2, 0, 1], [3, 0, 1], [4, 0, 2], [5, 0, 2], [6, 0, 4], [7, 0, 2]])
    layout = BlockLayout.from_indices(chosen.view(1, 1, 8, 3), *SQUARE)
    yield "reads-chosen", "The first block, the own one, and one that was chosen", [Panel("", layout)]


def _gates(dense: BlockLayout) -> Iterator[Panel]:
    gate = torch.zeros(1, 1, TOKENS // BLOCK, 2, dtype=torch.float64)
    gate[0, 0, 2] = 1.5
    yield Panel("gate: block 2 is wanted", dense, Extras(gate=gate), shades=True)
    yield Panel("the same, gate_mix=0", dense, Extras(gate=gate, gate_mix=0.0), shades=True)
    yield Panel('gate="last"', dense, Extras(gate="last"), shades=True)


def pictures() -> dict[str, str]:
    """The text of each picture by the name of its file."""
    found = {f"{name}.svg": svg(title, panels) for name, title, panels in [*layouts(), *switches()]}
    return found | {f"{name}.svg": svg(title, panels, legend=False) for name, title, panels in variants()}


def main(out: Annotated[Path, typer.Option(help="The folder that the pictures are written to.")] = OUT) -> None:
    """Draws the pictures of the operation's page and of the start page."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in pictures().items():
        (out / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
