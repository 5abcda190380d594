"""Curves as JSON, Markdown and a picture, and as tables for the pages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attnzoo.evaluation.cost_setting import KINDS
from attnzoo.reporting.outputs import write_together
from bench.crossover.curves import QUICKER, Curve
from bench.crossover.picture import NAMES, picture

CAPTION = (
    f"A layer counts as quicker where its time is at most {QUICKER:g} of that of ten lines of torch (linear maps, a "
    "rotation, `scaled_dot_product_attention`, a preallocated cache), in turns, the median of the rounds' ratios."
)


def summary(curves: Sequence[Curve]) -> list[str]:
    """Lines of Markdown: from which length each layer is quicker."""
    lines = [_line(["layer", *NAMES.values()]), _line(["---"] * (1 + len(KINDS)))]
    for name in dict.fromkeys(curve.layer for curve in curves):
        found = {curve.kind: curve.quicker_from for curve in curves if curve.layer == name}
        lines.append(_line([f"`{name}`", *(found[kind] for kind in KINDS)]))
    return lines


def table(curves: Sequence[Curve]) -> list[str]:
    """Lines of Markdown: a layer's time over that of ten lines of torch, length by length."""
    lengths = sorted({tokens for curve in curves for tokens in curve.tokens})
    lines = [_line(["tokens", *(f"{tokens:,}" for tokens in lengths), "quicker from"])]
    lines.append(_line(["---"] * (2 + len(lengths))))
    for curve in curves:
        ratios = dict(zip(curve.tokens, curve.times_baseline, strict=True))
        cells = [f"{ratios[tokens]:.2f}" if tokens in ratios else "" for tokens in lengths]
        lines.append(_line([NAMES[curve.kind], *cells, curve.quicker_from]))
    return lines


def of_variant(curves: Sequence[Curve], variant: str) -> list[str]:
    """Lines of Markdown: the table of each layer of a variant, below its options."""
    lines: list[str] = []
    for name in dict.fromkeys(curve.layer for curve in curves if curve.layer.partition(":")[0] == variant):
        lines += [f"`{name}`:", "", *table([curve for curve in curves if curve.layer == name]), ""]
    return lines


def where_from(where: dict[str, Any]) -> str:
    """One line about machine and sizes."""
    machine = f"{where['cpu']}, class {where['class']}, threads: {where['threads']}, torch {where['torch']}"
    sizes = f"width {where['dim']}, {where['num_heads']} heads, {where['dtype']}"
    return f"{sizes}; {machine}, {where['date']}"


def markdown(curves: Sequence[Curve], where: dict[str, Any]) -> str:
    """Everything as Markdown."""
    lines = [f"From which length a layer is quicker than ten lines of torch: {where_from(where)}", "", *summary(curves)]
    lines += ["", CAPTION, ""]
    for variant in dict.fromkeys(curve.layer.partition(":")[0] for curve in curves):
        lines += of_variant(curves, variant)
    lines += [f"- {curve.layer}, {curve.kind}: {curve.problem}" for curve in curves if curve.problem]
    return "\n".join([*lines, f"Where it comes from: {json.dumps(where)}", ""])


def to_json(curves: Sequence[Curve], where: dict[str, Any]) -> str:
    """Everything as JSON."""
    return json.dumps({"about": where, "curves": [asdict(curve) for curve in curves]}, indent=2) + "\n"


def read(text: str) -> tuple[list[Curve], dict[str, Any]]:
    """The curves, and where they come from, that :func:`to_json` gave."""
    data = json.loads(text)
    return [Curve(**curve) for curve in data["curves"]], data["about"]


def write(curves: Sequence[Curve], where: dict[str, Any], out: Path) -> None:
    """Writes OUT.json, OUT.md and OUT.png."""
    write_together(
        out,
        {
            "json": lambda path: path.write_text(to_json(curves, where), encoding="utf-8"),
            "md": lambda path: path.write_text(markdown(curves, where), encoding="utf-8"),
            "png": lambda path: picture(curves, where_from(where), path),
        },
    )


def _line(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"
