"""LongHeads on a pretrained model far beyond the length it was trained at: ``python -m bench.longheads``.

One window of 16,384 tokens, read with the model's own attention, with that limited to the last 4k, and with LongHeads
at several settings: perplexity by position, and how many keys a decoding step reads at the end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from attnzoo.cli.models import load_model, text_tokens
from attnzoo.cli.progress import Bar
from attnzoo.evaluation.model_scores import cut_windows
from bench.cpu.parts import choose
from bench.cpu.report import about
from bench.longheads.report import cells, header, holds, verdict, write
from bench.longheads.rows import ROWS, Reading, run

TEXT = Path(__file__).parents[1] / "texts" / "botchan.txt"


def main(
    out: Annotated[Path, typer.Option(help="Write OUT.json, OUT.md and OUT.png.")] = Path("out/longheads"),
    only: Annotated[list[str] | None, typer.Option(help="Rows by name; may be repeated.")] = None,
    length: Annotated[int, typer.Option(help="Tokens.")] = 16_384,
    offset: Annotated[int, typer.Option(help="Tokens before the window.")] = 1024,
    text: Annotated[str, typer.Option(help="A file, or a text that ships.")] = str(TEXT),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Measures LongHeads on SmolLM2 beyond its length; minutes for each row."""
    chosen = choose(ROWS, only)
    model, tokenizer = load_model("smollm2")
    window = cut_windows(text_tokens(tokenizer, text), length=length, offset=offset, count=1)[0]
    where = {"model": "SmolLM2-135M", "text": Path(text).stem, "tokens": length, "offset": offset, **about()}
    rows: list[Reading] = []
    found = ""
    with Bar() as progress:
        for row in run(chosen, window, model, progress):
            rows.append(row)
            # Each row takes minutes: what has been measured is kept.
            found = write(rows, where, out)
    if as_json:
        typer.echo(found, nl=False)
    else:
        table = Table(*header(rows), title=f"perplexity by position; {verdict(rows)}")
        for row in rows:
            table.add_row(*cells(row))
        console = Console()
        (console if console.is_terminal else Console(width=180)).print(table)
    if not holds(rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
