"""LongHeads on a pretrained model far beyond the length it was trained at: ``python -m bench.longheads``.

One window of 16,384 tokens, read with the model's own attention, with that limited to the last 4k, and with LongHeads
at several settings: perplexity by position, and how many keys a decoding step reads at the end.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

from attnzoo import surgery
from attnzoo.base.recording import has_layers, record
from attnzoo.cli.models import load_model, text_tokens
from attnzoo.cli.progress import Bar
from attnzoo.evaluation.model_scores import Progress, cache_of, cut_windows
from attnzoo.reporting.choices import hint
from attnzoo.reporting.outputs import write_together
from bench.cpu.__main__ import about
from bench.longheads_picture import picture

TEXT = Path(__file__).parent / "texts" / "botchan.txt"
FAR = 12_288
GOAL = 45.0
STEPS = 8
"""Tokens at the end that are decoded one by one."""

SPAN = 2048
PIECE = 1024
"""Positions whose logits are held at once: all of them would be gigabytes."""

Conversion = tuple[str, dict[str, Any]] | None


def longheads(length: int, chunk: int, **options: Any) -> Conversion:
    """One setting; if nothing else is said a block of tokens chooses together, which is quicker in a long prefill."""
    return "longheads", {"attention_length": length, "chunk_size": chunk, "select": "block", **options}


ROWS: dict[str, Conversion] = {
    "dense": None,
    "window 4096": ("mha", {"window": 4096}),
    "longheads 2048, chunks of 256": longheads(2048, 256),
    "longheads 1024, chunks of 64": longheads(1024, 64),
    "longheads 1024, chunks of 64, each token": longheads(1024, 64, select="token"),
    "longheads 2048, chunks of 64": longheads(2048, 64),
    "longheads 4096, chunks of 256": longheads(4096, 256),
    "longheads 2048, chunks of 256, mean keys": longheads(2048, 256, chunk_rep="mean_key"),
    "window 4096, sink 4": ("mha", {"window": 4096, "sink": 4}),
    "longheads 2048, chunks of 128": longheads(2048, 128),
    "longheads 1024, chunks of 256": longheads(1024, 256),
}


@dataclass(frozen=True)
class Row:
    """One way of reading.

    Attributes:
        name: What it is called.
        options: How the model was converted.
        perplexity: For each span of ``SPAN`` positions.
        far: Perplexity of the tokens at ``FAR`` and beyond.
        keys: The most key slots that a head gathers for one decoding step at the end.
        same: Largest difference of a token's loss to dense before the first token that selects; ``None`` where none is.
        seconds: Measured; differs from run to run.
    """

    name: str
    options: dict[str, Any]
    perplexity: list[float]
    far: float
    keys: int
    same: float | None
    seconds: float


def losses(model: Any, window: Tensor) -> tuple[Tensor, int]:
    """The loss of each token but the first, ``[L - 1]``, and the most keys that a head gathers for a step.

    The last tokens are decoded one by one, behind a prefill of the others.
    """
    ids, keys = window.unsqueeze(0), len(window)
    with torch.no_grad():
        out = model.model(ids[:, :-STEPS], use_cache=True)
        hidden, cache = [out.last_hidden_state[0]], cache_of(out)
        with record(model) if has_layers(model) else nullcontext() as seen:
            for t in range(len(window) - STEPS, len(window)):
                out = model.model(ids[:, t : t + 1], **cache, use_cache=True)
                hidden.append(out.last_hidden_state[0])
        if seen is not None:
            keys = max(int(plan.layout.kv_rows().max()) for plans in seen.plans.values() for plan in plans)
        states = torch.cat(hidden)[:-1]
        parts = [
            cross_entropy(model.lm_head(state).float(), target, reduction="none")
            for state, target in zip(states.split(PIECE), window[1:].split(PIECE), strict=True)
        ]
    return torch.cat(parts), keys


def measure(model: Any, window: Tensor, name: str, dense: Tensor | None) -> tuple[Row, Tensor]:
    """One row, and the loss of each token."""
    conversion, begin = ROWS[name], time.perf_counter()
    report = None
    if conversion is not None:
        with warnings.catch_warnings():
            # A window without a sink is wanted here.
            warnings.simplefilter("ignore", UserWarning)
            report = surgery.convert(model, conversion[0], **conversion[1])
    try:
        loss, keys = losses(model, window)
    finally:
        if report is not None:
            report.undo()
    options = {} if conversion is None else {"variant": conversion[0], **conversion[1]}
    same = None
    if dense is not None and options.get("variant") == "longheads":
        first = options["attention_length"]
        same = float((loss - dense)[:first].abs().max())
    # The loss at place i is that of the token at position i + 1.
    spans = [loss[max(0, a - 1) : a + SPAN - 1] for a in range(0, len(window), SPAN)]
    perplexity = [math.exp(float(span.mean())) for span in spans]
    far = math.exp(float(loss[FAR - 1 :].mean())) if len(window) > FAR else math.nan
    return Row(name, options, perplexity, far, keys, same, time.perf_counter() - begin), loss


def verdict(rows: list[Row]) -> str:
    """What the figures say about the goal."""
    found = {row.name: row for row in rows}
    tried = [row for row in rows if row.options.get("variant") == "longheads"]
    if not tried or math.isnan(tried[0].far):
        return ""
    best = min(tried, key=lambda row: row.far)
    text = f"best beyond {FAR}: {best.name}, perplexity {best.far:.1f} (goal: {GOAL:g})"
    if "dense" in found:
        text += f"; dense {found['dense'].far:.0f}, {found['dense'].far / best.far:.1f} times as much"
    return text


def holds(rows: list[Row]) -> bool:
    """Whether the best setting is below a third of dense, and all are dense below their threshold."""
    dense = next((row.far for row in rows if row.name == "dense"), None)
    tried = [row for row in rows if row.options.get("variant") == "longheads"]
    same = all(row.same is None or row.same < 1e-3 for row in tried)
    if dense is None or not tried or math.isnan(dense):
        return same
    return same and min(row.far for row in tried) < dense / 3


def header(rows: list[Row]) -> list[str]:
    """The table's columns."""
    spans = [f"{SPAN * i // 1024}k" for i in range(len(rows[0].perplexity))]
    return ["", *(f"from {span}" for span in spans), f"{FAR} on", "keys a step", "off dense before", "s"]


def cells(row: Row) -> list[str]:
    """One row's cells."""
    same = "" if row.same is None else f"{row.same:.0e}"
    return [
        row.name,
        *(f"{x:.1f}" for x in row.perplexity),
        f"{row.far:.1f}",
        str(row.keys),
        same,
        f"{row.seconds:.0f}",
    ]


def markdown(rows: list[Row], where: dict[str, Any]) -> str:
    """The rows as Markdown."""
    names = header(rows)
    lines = [
        f"Perplexity of {where['model']} on {where['tokens']} tokens of {where['text']} from {where['offset']}",
        "",
    ]
    lines += ["| " + " | ".join(line) + " |" for line in [names, ["---"] * len(names), *map(cells, rows)]]
    return "\n".join([*lines, "", verdict(rows), "", f"Where it comes from: {json.dumps(where)}", ""])


def write(rows: list[Row], where: dict[str, Any], out: Path) -> str:
    """Writes OUT.json, OUT.md and OUT.png; gives the JSON."""
    text = (
        json.dumps({"about": where, "rows": [asdict(row) for row in rows], "verdict": verdict(rows)}, indent=2) + "\n"
    )
    write_together(
        out,
        {
            "json": lambda path: path.write_text(text, encoding="utf-8"),
            "md": lambda path: path.write_text(markdown(rows, where), encoding="utf-8"),
            "png": lambda path: picture(rows, where, SPAN, path),
        },
    )
    return text


def run(names: list[str], window: Tensor, model: Any, progress: Progress) -> Iterator[Row]:
    """All rows; dense first, if it is among them."""
    dense = None
    for done, name in enumerate(sorted(names, key=lambda name: name != "dense")):
        progress(name, done, len(names))
        row, loss = measure(model, window, name, dense)
        dense = loss if name == "dense" else dense
        yield row


def main(
    out: Annotated[Path, typer.Option(help="Write OUT.json, OUT.md and OUT.png.")] = Path("out/longheads"),
    only: Annotated[list[str] | None, typer.Option(help="Rows by name; may be repeated.")] = None,
    length: Annotated[int, typer.Option(help="Tokens.")] = 16_384,
    offset: Annotated[int, typer.Option(help="Tokens before the window.")] = 1024,
    text: Annotated[str, typer.Option(help="A file, or a text that ships.")] = str(TEXT),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Measures LongHeads on SmolLM2 beyond its length; minutes for each row."""
    unknown = sorted(set(only or []) - set(ROWS))
    if unknown:
        raise typer.BadParameter(
            f"expected one of {', '.join(ROWS)}, got {unknown[0]!r}{hint(unknown[0], ROWS)}", param_hint="--only"
        )
    model, tokenizer = load_model("smollm2")
    window = cut_windows(text_tokens(tokenizer, text), length=length, offset=offset, count=1)[0]
    where = {"model": "SmolLM2-135M", "text": Path(text).stem, "tokens": length, "offset": offset, **about()}
    rows, found = [], ""
    with Bar() as progress:
        for row in run([name for name in ROWS if not only or name in only], window, model, progress):
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
