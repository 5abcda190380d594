"""A random Llama of 1.5 billion parameters in bf16, converted block by block: ``python -m bench.large``.

To half as many KV heads by commuting merges, and to latents of a quarter of what is cached, both calibrated with
gradients; each conversion is a process of its own that does nothing else, whose memory is the most that the system has
counted for it. Beside them the checkpoint loaded whole. ``--quick`` is a tiny model, to see that it runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from attnzoo.cli import screen
from attnzoo.reporting.outputs import check_writable
from bench.cpu.parts import choose
from bench.cpu.report import about
from bench.large import report
from bench.large.checkpoint import TINY, Sizes, parameters_of, write_checkpoint

ROWS: dict[str, dict[str, Any] | None] = {
    "loaded whole": None,
    "mean": {"method": "mean"},
    "commuting": {"method": "commuting"},
    "latent": {"method": "latent"},
}


RUN_IN = "float32"
"""In which dtype the text runs: on most CPUs several times as quick as in the checkpoint's own."""


def options_of(name: str, sizes: Sizes) -> dict[str, Any] | None:
    """The options of a row's conversion; ``None`` where there is none."""
    given = ROWS[name]
    if given is None:
        return None
    if given["method"] == "latent":
        return {**given, "latent_dim": sizes.kv_heads * sizes.head_dim // 2}
    return {**given, "num_kv_heads": sizes.kv_heads // 2}


def measure(name: str, order: dict[str, Any], place: Path) -> dict[str, Any]:
    """A row's reading, from a process of its own."""
    file = place / "order.json"
    file.write_text(json.dumps(order), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "bench.large.worker", str(file)], stdout=subprocess.PIPE, check=True, text=True
    )
    reading: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"name": name, "options": order["options"], **reading}


def _in_order(readings: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [readings[name] for name in ROWS if name in readings]


def main(
    out: Annotated[Path | None, typer.Option(help="Write OUT.json and OUT.md, after every row.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Rows by name; may be repeated.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    windows: Annotated[int, typer.Option(help="Calibration windows.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Where the model lies, or is written to stay; else it goes in the end.")
    ] = None,
    go_on: Annotated[bool, typer.Option("--go-on", help="Keep the other rows that OUT.json has.")] = False,
    quick: Annotated[bool, typer.Option(help="A tiny model.")] = False,
) -> None:
    """Measures conversions of a large checkpoint; an hour on two cores of one's own."""
    chosen = choose(list(ROWS), only)
    if out is not None:
        check_writable(out)
    sizes = TINY if quick else Sizes()
    readings: dict[str, dict[str, Any]] = {}
    where: dict[str, Any] = {"dtype": "bfloat16", "threads": threads}
    where |= {"calibration": f"{windows} x {length} random tokens, run in {RUN_IN}", **about()}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        source = place / "model" if checkpoint is None else checkpoint
        where["parameters"] = parameters_of(source) if source.exists() else write_checkpoint(source, sizes)
        for name in chosen:
            order = {
                "source": str(source),
                "out": str(place / "out" / name),
                "options": options_of(name, sizes),
                "calibrated": name in ("commuting", "latent"),
                "threads": threads,
                "windows": windows,
                "length": length,
                "vocabulary": sizes.vocabulary,
                "run_in": RUN_IN,
            }
            found = measure(name, order, place)
            if out is None:
                readings[name] = found
                continue
            # Each row takes minutes: what has been measured is kept, also by another run of this command.
            readings = {**(report.read(out, where) if go_on or readings else {}), name: found}
            report.write(_in_order(readings), where, out)
    rows = _in_order(readings)
    screen.table(report.grid(rows, where))


if __name__ == "__main__":
    typer.run(main)
