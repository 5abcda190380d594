"""A decoding step of each conversion beside the dense model's, in one process: ``python -m bench.step``.

SmolLM2 in fp32 on one thread, behind 1k, 4k and 8k tokens of a text that ships. Every contestant is checked before it
is timed: its step says what it says where gradients are wanted, without a cache, and what the dense model says where
that is the same function. What is wrong is told in place of its time, and the exit code is 1. ``--quick`` is a tiny
model with random weights, to see that it runs.

OUT.json and OUT.md are written after every reading, and a run with the same OUT goes on with what is there: of the same
machine, code, model and settings; what was wrong is measured anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from attnzoo.cli.models import load_model, text_tokens
from attnzoo.cli.progress import Bar
from attnzoo_kernels.errors import ConfigError
from bench.cpu.parts import choose
from bench.cpu.report import about
from bench.step.kept import Kept, code
from bench.step.measure import Settings, run
from bench.step.report import as_text, render
from bench.step.rows import CONTESTANTS

LENGTHS = (1024, 4096, 8192)
SPARE = 2048
"""Tokens behind the longest length: those of the steps, and those that calibrate."""


def tiny_model() -> Any:
    """A Llama of SmolLM2's heads, with two layers and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=576,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def load(quick: bool, longest: int) -> tuple[Any, Tensor]:
    """A model, and a text of tokens ``[1, L]``."""
    if quick:
        tokens = torch.randint(64, (1, longest + SPARE), generator=torch.Generator().manual_seed(0))
        return tiny_model(), tokens
    model, tokenizer = load_model("smollm2", dtype="fp32")
    return model, text_tokens(tokenizer, "botchan")[None, : longest + SPARE]


def main(
    out: Annotated[
        Path | None, typer.Option(help="Write OUT.json, OUT.md and OUT.png; goes on with what is there.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Rows by name; may be repeated.")] = None,
    length: Annotated[list[int] | None, typer.Option(help="Tokens in the cache; may be repeated.")] = None,
    rounds: Annotated[int, typer.Option(help="Steps timed.")] = 25,
    whole: Annotated[bool, typer.Option(help="Check against a call without a cache too.")] = True,
    quick: Annotated[bool, typer.Option(help="A tiny model with random weights.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Measures a decoding step of every conversion; minutes for all."""
    chosen = choose([row.name for row in CONTESTANTS], only)
    torch.set_num_threads(1)
    lengths = sorted(length or ((96, 160) if quick else LENGTHS))
    rows = [row for row in CONTESTANTS if row.name in chosen]
    settings = Settings(lengths=lengths, rounds=rounds, whole=whole)
    name = "random weights" if quick else "SmolLM2-135M"
    where = {"model": name, "dtype": "float32", "threads": 1, "rounds": rounds, "whole": whole, "code": code()}
    try:
        kept = Kept(out, {**where, **about()})
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from None
    try:
        if not all(kept.has(row.name, tokens) for row in rows for tokens in lengths):
            model, text = load(quick, lengths[-1])
            with Bar() as progress:
                for reading in run(model, text, rows, settings, progress, known=kept.has):
                    kept.add(reading)
    finally:
        kept.draw()
    if as_json:
        typer.echo(as_text(kept.readings, kept.where), nl=False)
    else:
        console = Console()
        (console if console.is_terminal else Console(width=140)).print(render(kept.readings, kept.where))
    if any(reading.wrong or (reading.holds is False and not quick) for reading in kept.readings):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
