"""One call of ``attnzoo convert``: which way it goes, what it takes, and what is printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

from attnzoo.cli import screen
from attnzoo.cli.layers import check_layers, read_layers
from attnzoo.cli.models import AS_STORED, dtype_of, load_model, text_tokens
from attnzoo.cli.progress import Bar
from attnzoo.evaluation.compare import VariantSpec
from attnzoo.evaluation.model_scores import cut_windows
from attnzoo.reporting.outputs import check_place
from attnzoo_kernels.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ConvertCall:
    """What was asked on the command line.

    Attributes:
        model: A folder, a file or a name.
        spec: What to convert to.
        out: The folder to write.
        calibrate: The calibration text.
        length: Tokens in a window of it.
        windows: How many.
        where: Layers, or ``None`` for all.
        dtype: Of the weights, by name.
        run_in: Of the run of the text, by name.
        device: Where a model in memory lies.
        overwrite: Whether to replace a folder that is not empty.
    """

    model: str
    spec: VariantSpec
    out: Path
    calibrate: str
    length: int
    windows: int
    where: str | None
    dtype: str
    run_in: str
    device: str
    overwrite: bool

    def check(self) -> None:
        """Raises unless the folder can be written and the layers are named right: known before minutes of work.

        Raises:
            ConfigError: If it must not be replaced, or no layers are named so.
            OSError: If the disk refuses.
        """
        if self.out.exists() and any(self.out.iterdir() if self.out.is_dir() else [self.out]) and not self.overwrite:
            raise ConfigError(f"out: {self.out} exists and is not empty; --overwrite replaces it")
        if self.where is not None:
            check_layers(self.where)
        check_place(self.out)

    def by_layers(self, *, asked: bool | None) -> bool:
        """Whether to go layer by layer: where that was asked for, else where the model does not fit into memory twice.

        Raises:
            ConfigError: If it was asked for and cannot be.
        """
        from attnzoo.surgery.files import RECIPE
        from attnzoo.surgery.lowrank.one_site import available_bytes
        from attnzoo.surgery.streaming.estimate import LIBRARIES
        from attnzoo.surgery.streaming.shards import Shards

        folder = Path(self.model)
        plain = (folder / "config.json").is_file() and not (folder / RECIPE).is_file()
        if asked:
            if not plain or self.device != "cpu":
                what = "cpu" if plain else "a folder with a plain checkpoint"
                got = self.device if plain else self.model
                raise ConfigError(f"by_layers: expected {what}, got {got!r}")
            return True
        if self.run_in != AS_STORED:
            raise ConfigError(f"run_in: expected auto unless --by-layers, got {self.run_in!r}")
        if asked is not None or not plain or self.device != "cpu":
            return False
        free = available_bytes()
        weights = sum(x.bytes for x in Shards(folder).stored.values())
        return free is not None and LIBRARIES + 2 * weights > free

    def calibration(self, tokenizer: Any, device: Any = "cpu") -> list[Tensor] | None:
        """The calibration text in windows, where one is needed."""
        if not self.spec.needs_calibration:
            return None
        tokens = text_tokens(tokenizer, self.calibrate)
        rows = cut_windows(tokens, length=self.length, offset=0, count=self.windows)
        return [row.unsqueeze(0).to(device) for row in rows]

    def chosen(self, count: Callable[[], int]) -> Any:
        """Which sites, of so many."""
        return None if self.where is None else read_layers(self.where, count())


def convert_in_memory(call: ConvertCall, *, as_json: bool) -> None:
    """Converts a model that is loaded whole."""
    from attnzoo import surgery

    found, tokenizer = load_model(call.model, dtype=call.dtype, device=call.device)
    calibration = call.calibration(tokenizer, found.device)
    conversion = call.spec.conversions[0]
    with Bar() as progress:
        report = surgery.convert(
            found,
            conversion.variant,
            where=call.chosen(lambda: len(surgery.find(found))),
            calibration=calibration,
            progress=progress,
            **conversion.options,
        )
    # The tokenizer's own files are carried along with the others, as they are.
    surgery.save(found, call.out, overwrite=call.overwrite)
    _tell(call, report, str(found.dtype).removeprefix("torch."), as_json=as_json)


def convert_by_layers(call: ConvertCall, *, dry_run: bool, as_json: bool) -> None:
    """Converts a folder with one layer in memory at a time, or says what that would take."""
    from attnzoo import surgery
    from attnzoo.surgery.hosts import checkpoint

    folder = Path(call.model)
    conversion = call.spec.conversions[0]
    dtypes = surgery.Dtypes(weights=dtype_of(call.dtype), run=dtype_of(call.run_in))
    given: dict[str, Any] = {"dtypes": dtypes, **conversion.options}
    tokenizer = checkpoint.load_tokenizer(folder) if call.spec.needs_calibration else None
    given["calibration"] = call.calibration(tokenizer)
    given["where"] = call.chosen(lambda: _layers(folder))
    if dry_run:
        needs = surgery.what_it_takes(folder, conversion.variant, **given)
        if as_json:
            typer.echo(json.dumps(needs.to_dict(), indent=2))
        else:
            screen.table(needs.grid())
        return
    with Bar() as progress:
        report = surgery.convert_folder(
            folder, call.out, conversion.variant, overwrite=call.overwrite, progress=progress, **given
        )
    written = json.loads((call.out / "config.json").read_text(encoding="utf-8"))
    _tell(call, report, str(written["dtype"]), as_json=as_json)


def _layers(folder: Path) -> int:
    """How many attention blocks a checkpoint has, whose weights are not read."""
    from attnzoo import surgery
    from attnzoo.surgery.hosts import checkpoint

    with torch.device("meta"):
        return len(surgery.find(checkpoint.model_of(checkpoint.read_config(folder), dtype=torch.float32)))


def _tell(call: ConvertCall, report: Any, dtype: str, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({**report.to_dict(), "dtype": dtype, "folder": str(call.out)}, indent=2, default=str))
        return
    screen.table(report.grid())
    screen.text(f"saved to {call.out}")
