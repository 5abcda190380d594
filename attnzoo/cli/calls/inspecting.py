"""``attnzoo inspect``: what a model's attention blocks can become."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import typer

from attnzoo import surgery
from attnzoo.cli import screen
from attnzoo.surgery.lookalikes import known_near, lookalikes
from attnzoo_kernels.errors import ConfigError, ConversionError

ELSEWHERE = (
    "attnzoo convert MODEL --to VARIANT --out FOLDER converts. Two words are no variants: policy stands for what "
    "attnzoo compare --policy measures, heads for the edits of attnzoo.heads."
)


def inspect_model(name: str, model: Any, *, as_json: bool) -> None:
    """Prints what each block can become.

    Raises:
        ConversionError: If no block is known; as JSON that is told as an empty list.
    """
    inspection = surgery.inspect(model)
    held = _held(model) if inspection.sites or not as_json else None
    if as_json:
        typer.echo(json.dumps({**inspection.to_dict(), "kv_bytes_per_token": held}, indent=2))
        if not inspection.sites:
            raise typer.Exit(1)
        return
    told = f"{held:,} KV bytes per token" if held else "no KV cache"
    screen.table(replace(inspection.grid(), title=f"{name}: {told}"))
    for note in (*inspection.notes(), ELSEWHERE):
        screen.text(note)


def _held(model: Any) -> int:
    try:
        return surgery.cache_bytes(model)
    except ConfigError as error:
        # The call is right; it is the model of which nothing can be said.
        found = str(error).partition("; known are ")[0]
        raise ConversionError(f"{found}; {known_near(lookalikes(model))}") from error
