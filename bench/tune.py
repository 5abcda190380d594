"""Writes the tables of tiles, offline: the largest tiles that compile without fault, and on a GPU the fastest of them.

    python -m bench.tune --architecture sm_90 gfx942

Without a GPU only what the compiler says counts. With --measure the architecture must be the device's own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import triton

from attnzoo_kernels._triton import launch, specialize
from attnzoo_kernels._triton.tile_table import PASSES, WIDTHS, Pass, Tiles, architecture_of
from bench.aot import ARCHITECTURES, DTYPES, call_of, compile_entry, compile_pass, entries, faults

TABLE = Path(launch.__file__).with_name("tiles.json")
SURVIVORS = 6
"""Candidates that are timed."""


def candidates(of: Pass, width: int, size: int) -> Iterator[Tiles]:
    """Tiles worth trying, the largest first; of equal ones those with more stages, then more warps."""
    rows = (64, 32, 16) if of == "decode" else (128, 64, 32, 16)
    keys = (128, 64, 32, 16)
    sides = sorted(itertools.product(rows, keys), key=lambda side: (side[0] * side[1], side[0]), reverse=True)
    if of == "key":
        # Keys stay, rows pass by: more keys before more rows.
        sides.sort(key=lambda side: (side[0] * side[1], side[1]), reverse=True)
    # Accumulators and operands grow with the width: larger tiles have never been seen to fit.
    most = min((1 << 20 if of == "key" else 1 << 21) // (width * size), 16384)
    forms = ("plain",) if size == 2 else ("plain", "stepped")
    for (height, width), stages, warps, form in itertools.product(sides, (3, 2, 1), (8, 4), forms):
        if height * width <= most and height * width * 2 >= warps * 32 * 4:
            yield Tiles(height, width, warps, stages, form)


def fitting(architecture: str, of: Pass, width: int, size: int) -> Iterator[Tiles]:
    """Candidates that compile without fault."""
    for tiles in candidates(of, width, size):
        try:
            found = compile_entry(architecture, of, width, size, tiles)
        except (triton.compiler.errors.CompilationError, RuntimeError) as error:
            print(f"  {tuple(tiles)}: {type(error).__name__}", flush=True)
            continue
        if not faults(found, architecture, of, size):
            yield tiles


def fastest(of: Pass, width: int, size: int, survivors: Sequence[Tiles]) -> Tiles:
    """The fastest of some tiles on the current device, by the median of launches on 64k tokens."""
    timed = {}
    call = call_of(width, DTYPES[size], decoding=of == "decode", tokens=1 << 16, device="cuda")
    for x in (call.q, call.k, call.v):
        # Products of zeros take less power, and run faster than any real ones.
        x.normal_()
    chosen = specialize.tiles_for
    try:
        for tiles in survivors:
            specialize.tiles_for = lambda *_, own=tiles: own
            timed[tiles] = triton.testing.do_bench(lambda: compile_pass(of, call), return_mode="median")
            print(f"  {tuple(tiles)}: {timed[tiles]:.3f} ms", flush=True)
    finally:
        specialize.tiles_for = chosen
    return min(timed, key=timed.__getitem__)


def tune(architecture: str, of: Pass, width: int, size: int, *, measured: bool) -> Tiles:
    """The tiles of an entry.

    Raises:
        RuntimeError: If no candidate compiles without fault.
    """
    found = fitting(architecture, of, width, size)
    survivors = list(itertools.islice(found, SURVIVORS if measured else 1))
    if not survivors:
        raise RuntimeError(f"{architecture} {of} {width} {size}: no tiles without fault")
    return fastest(of, width, size, survivors) if measured else survivors[0]


def write(tables: dict[str, dict[str, list[object]]], path: Path = TABLE) -> None:
    """Writes the tables, one entry a line."""
    parts = []
    for name, table in tables.items():
        lines = ",\n".join(f'  "{key}": {json.dumps(value)}' for key, value in table.items())
        parts.append(f' "{name}": {{\n{lines}\n }}')
    partial = path.with_suffix(".partial")
    partial.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    partial.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Tunes tables, writing each entry as it is found; 1 where an entry has none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", choices=ARCHITECTURES, nargs="+", required=True)
    parser.add_argument("--sizes", type=int, nargs="*", default=[2, 4], help="bytes of a value")
    parser.add_argument("--widths", type=int, nargs="*", default=list(WIDTHS))
    parser.add_argument("--passes", choices=PASSES, nargs="*", default=list(PASSES))
    parser.add_argument("--table", type=Path, default=TABLE, help="the file of tables, written entry by entry")
    parser.add_argument("--measure", action="store_true", help="time the survivors on this machine's GPU")
    options = parser.parse_args(arguments)
    if options.measure and options.architecture != [here := architecture_of(0)]:
        parser.error(f"--measure: expected --architecture {here}, which this machine's GPU is")
    if not options.table.exists():
        write(json.loads(TABLE.read_text(encoding="utf-8")), options.table)
    missing = 0
    for architecture, (of, width, size) in itertools.product(
        options.architecture, entries(options.widths, options.sizes, options.passes)
    ):
        try:
            tiles = tune(architecture, of, width, size, measured=options.measure)
        except RuntimeError as error:
            print(error, flush=True)
            missing += 1
            continue
        tables = json.loads(options.table.read_text(encoding="utf-8"))
        tables.setdefault(architecture, {})[f"{of}/{width}/{size}"] = list(tiles)
        write(tables, options.table)
        print(f"{architecture} {of}/{width}/{size}: {tuple(tiles)}", flush=True)
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main())
