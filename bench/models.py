"""Does a small byte model learn with every variant? ``python -m bench.models`` trains one each on the shipped texts.

All models see the same windows and take turns step by step, so that their times can be compared. What is held out is
scored afterwards, beside the entropy of single bytes: what a model knows that has learnt how often each byte comes.

Letters: B batch, L tokens in a window.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import attnzoo
from attnzoo.models import CausalLM
from attnzoo.reporting.outputs import write_together
from bench.cpu.report import about
from bench.trained.texts import VOCABULARY, Texts, texts

SIZES = {"dim": 64, "num_layers": 4, "num_heads": 4}
BATCH = 4
LENGTH = 128
RATE = 3e-3
OPTIONS: dict[str, dict[str, Any]] = {
    "s2": {"block_size": 16, "local_blocks": 2, "vert_stride": 4},
    "landmark": {"block_size": 16, "top_k": 4},
    "longheads": {"chunk_size": 16, "attention_length": 64},
    "moh": {"shared_heads": 1, "active_heads": 2},
    "lowrank_gqa": {"latent_dim": 48},
}
"""Sizes at which a variant differs from plain attention within a window."""


@dataclass(frozen=True)
class LearntRow:
    """What a model of a variant came to.

    Attributes:
        variant: Its name.
        parameters: How many weights the model has.
        seconds: CPU time of its steps, together.
        times_mha: The median, over the steps, of its time over that of the model of ``mha`` in the same turn.
        held_out: Nats per byte of the text that is held out.
    """

    variant: str
    parameters: int
    seconds: float
    times_mha: float
    held_out: float


def entropy(tokens: Tensor) -> float:
    """Of single tokens, in nats."""
    share = tokens.bincount(minlength=VOCABULARY).double() / len(tokens)
    return float(-torch.special.xlogy(share, share).sum())


def train(variants: Sequence[str], text: Texts, steps: int, seed: int = 0) -> list[LearntRow]:
    """Trains a model of each variant, in turns, and scores it."""
    models: dict[str, CausalLM] = {}
    for name in variants:
        torch.manual_seed(seed)
        models[name] = CausalLM(vocab_size=VOCABULARY, variant=name, **SIZES, **OPTIONS.get(name, {}))
    optimisers = {name: torch.optim.AdamW(model.parameters(), lr=RATE) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for step, batch in zip(range(steps), text.batches(LENGTH, BATCH, seed), strict=False):
        for group in (group for optimiser in optimisers.values() for group in optimiser.param_groups):
            group["lr"] = RATE * min(1.0, (step + 1) / 10)
        for name, model in models.items():
            begin = time.process_time()
            loss = model.loss(batch)
            optimisers[name].zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimisers[name].step()
            seconds[name].append(time.process_time() - begin)
    rows = []
    for name, model in models.items():
        with torch.no_grad():
            held_out = float(model.eval().loss(text.windows(LENGTH), aux_weight=0.0))
        ratios = [own / base for own, base in zip(seconds[name], seconds["mha"], strict=True)]
        parameters = sum(weight.numel() for weight in model.parameters())
        rows.append(LearntRow(name, parameters, sum(seconds[name]), statistics.median(ratios), held_out))
    return rows


def table(rows: Sequence[LearntRow], unigram: float) -> list[str]:
    """Lines of Markdown."""
    lines = ["| variant | weights | nats per byte, held out | below single bytes by | time of a step, mha = 1 |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for row in rows:
        gain = unigram - row.held_out
        lines.append(
            f"| `{row.variant}` | {row.parameters:,} | {row.held_out:.2f} | {gain:.2f} | {row.times_mha:.2f} |"
        )
    return lines


def read(path: Path) -> tuple[dict[str, Any], list[LearntRow]]:
    """What a run wrote: where and how, and the rows."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["about"], [LearntRow(**row) for row in found["rows"]]


def page(where: dict[str, Any], rows: Sequence[LearntRow]) -> list[str]:
    """Lines of Markdown: the table, and where it is from."""
    machine = f"{where['cpu']}, class {where['class']}, one thread, torch {where['torch']}, {where['date']}"
    says = (
        f"{where['steps']} steps of {BATCH} windows of {LENGTH} bytes, width {SIZES['dim']}, {SIZES['num_layers']} "
        f"layers, {SIZES['num_heads']} heads; the entropy of single bytes is {where['unigram']:.2f}; {machine}."
    )
    return [*table(rows, where["unigram"]), "", says]


def main(
    out: Annotated[Path, typer.Option(help="Of the files .json and .md, without suffix.")] = Path("out/models"),
    steps: Annotated[int, typer.Option(min=1, help="Steps of training, for each model.")] = 150,
    variant: Annotated[list[str] | None, typer.Option(help="A variant beside mha; repeat it. Default: all.")] = None,
) -> None:
    """Trains a byte model of each variant; exits with 1 if one stays within .5 nat of the entropy of single bytes."""
    torch.set_num_threads(1)
    names = ["mha", *(name for name in variant or attnzoo.list_variants() if name != "mha")]
    text = texts()
    unigram = entropy(text.windows(LENGTH).flatten())
    rows = train(names, text, steps)
    where = {**about(), "steps": steps, "unigram": unigram, "options": OPTIONS}
    lines = page(where, rows)
    print("\n".join(lines))
    found = json.dumps({"about": where, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
    told = "\n".join(["# Byte models", "", *lines, ""])
    write_together(
        out,
        {
            "json": lambda path: path.write_text(found, encoding="utf-8"),
            "md": lambda path: path.write_text(told, encoding="utf-8"),
        },
    )
    if any(row.held_out > unigram - 0.5 for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
