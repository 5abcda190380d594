"""Compiles the Triton kernels for a GPU that is not there, through the launcher itself, and says what they take.

A driver that knows its target and nothing else stands in for the real one. Run without TRITON_INTERPRET.

    python -m bench.aot --architecture sm_90 --out out/aot
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from attnzoo_kernels import BlockLayout, Extras
from attnzoo_kernels._triton import launch, specialize
from attnzoo_kernels._triton.tile_table import PASSES, WIDTHS, Pass, Tiles, tiles_for
from attnzoo_kernels.op import make_call
from attnzoo_kernels.spec.call import Call
from bench.gpu.peers import SPECIALISED

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
SHARED_LIMIT = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Bytes of shared memory that a program may have."""

TOKENS = 256
DTYPES = {2: torch.bfloat16, 4: torch.float32}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        kernel: Its name.
        tiles: Rows, keys, warps, stages, form.
        registers: Of each thread.
        spill: Bytes, or registers on AMD, that do not fit and go through memory.
        shared: Bytes of shared memory.
        wgmma: Warpgroup products; ``mma`` and ``tcgen05`` those of other generations.
        tma: Copies by descriptor.
        serialized: Whether the assembler says that products wait for each other.
        specialised: Whether warps have different tasks.
        seconds: To compile.
    """

    kernel: str
    tiles: tuple[Any, ...]
    registers: int
    spill: int
    shared: int
    wgmma: int
    mma: int
    tcgen05: int
    tma: int
    serialized: bool
    specialised: bool
    seconds: float


class _Driver:
    """A driver without a device."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def target_of(architecture: str) -> GPUTarget:
    """Triton's target of a table's name."""
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


def _first(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def measure(compiled: Any, kernel: str, tiles: Tiles | None, architecture: str, seconds: float) -> Resources:
    """Reads what a compiled kernel takes out of its assembly."""
    common = (kernel, () if tiles is None else tuple(tiles))
    shared = compiled.metadata.shared
    if architecture.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        spill = _first(r"\.vgpr_spill_count:\s+(\d+)", text)
        registers = _first(r"\.vgpr_count:\s+(\d+)", text)
        mma = text.count("v_mfma")
        return Resources(*common, registers, spill, shared, 0, mma, 0, 0, False, False, seconds)
    ptx = compiled.asm["ptx"]
    log = _assemble(ptx, int(architecture.removeprefix("sm_")))
    return Resources(
        *common,
        registers=_first(r"Used (\d+) registers", log),
        spill=_first(r"(\d+) bytes spill stores", log) + _first(r"(\d+) bytes spill loads", log),
        shared=shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma=len(re.findall(r"mma\.sync", ptx)),
        tcgen05=ptx.count("tcgen05.mma"),
        tma=ptx.count("cp.async.bulk.tensor"),
        serialized=bool(re.search(r"C75\d\d", log)),
        specialised="setmaxnreg" in ptx,
        seconds=seconds,
    )


def _assemble(ptx: str, capability: int) -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    name = f"sm_{capability}{'a' if capability >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={name}", str(source), "-o", f"{source}.cubin"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


@contextmanager
def compiling(architecture: str, tiles: Tiles | None = None) -> Iterator[list[Resources]]:
    """Inside, launches compile instead of running; the list gets what each took. Tiles replace the table's."""
    found: list[Resources] = []

    def run(kernel: Any, programs: int, arguments: Sequence[Any], own: Tiles | None, **constants: Any) -> None:
        options = {} if own is None else {"num_warps": own.warps, "num_stages": own.stages}
        began = time.perf_counter()
        compiled = kernel.warmup(*arguments, grid=(programs,), **constants, **options)
        found.append(measure(compiled, kernel.fn.__name__, own, architecture, time.perf_counter() - began))

    def choose(name: str, of: Pass, width: int, size: int) -> Tiles:
        return tiles if tiles is not None else tiles_for(name, of, width, size)

    seams: dict[tuple[ModuleType, str], Callable[..., Any]] = {
        (launch, "run"): run,
        (launch, "processors"): lambda device: 1,
        (specialize, "architecture"): lambda device: architecture,
        (specialize, "tiles_for"): choose,
    }
    before = {(module, name): getattr(module, name) for module, name in seams}
    try:
        driver.set_active(_Driver(target_of(architecture)))
        for (module, name), seam in seams.items():
            setattr(module, name, seam)
        yield found
    finally:
        for (module, name), seam in before.items():
            setattr(module, name, seam)
        if torch.cuda.is_available():
            # Where there is a device, what is launched next runs on it.
            driver.reset_active()


def call_of(
    width: int,
    dtype: torch.dtype,
    *,
    decoding: bool = False,
    tokens: int = TOKENS,
    device: str = "cpu",
    extras: Extras | None = None,
) -> Call:
    """A call of a table's entry: aligned, causal; a step that decodes has four heads for each KV head."""
    extras = extras or Extras()
    queries, block = (1, 1) if decoding else (tokens, 128)
    heads = 4 if decoding and extras.aux is None and not isinstance(extras.window, Tensor) else 1
    q = torch.zeros(1, heads, queries, width, dtype=dtype, device=device)
    k = torch.zeros(1, 1, tokens, width, dtype=dtype, device=device)
    layout = BlockLayout.dense(block, 128, queries, tokens, device=device)
    if decoding:
        pos = None if extras.q_pos is None else extras.q_pos[..., :1]
        aux = None if extras.aux is None else (extras.aux[0][:, :, :1], extras.aux[1])
        extras = replace(extras, q_pos=pos, aux=aux)
    if extras.rope is not None:
        layout = BlockLayout(block, 128, queries, tokens, *lists_with_origins(layout))
    return make_call((q, k, k), layout, causal=True, scale=0.1, extras=extras)


def lists_with_origins(layout: BlockLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A layout's lists, with origins of 0."""
    return layout.start, layout.count, layout.col, torch.zeros_like(layout.col)


def compile_pass(of: Pass, call: Call) -> None:
    """Launches one pass of a call."""
    if of in ("forward", "decode"):
        launch.forward(call)
        return
    with launch._on(call.q.device):
        _compile_gradients(of, call)


def _compile_gradients(of: Pass, call: Call) -> None:
    lists = launch.lists_of(call)
    out = torch.zeros_like(call.q)
    lse = torch.zeros(call.q.shape[:3], device=out.device)
    aux = call.aux is not None
    gate = call.gate is not None and call.gate.key is not None
    need = [True, True, True, call.key_bias is not None, aux, aux, gate]
    given: tuple[Tensor | None, ...] = (out, out, lse, None, lse)
    if of == "query":
        launch.query_gradients(specialize.job(call, of, lists.queries), given, need)
    else:
        launch.key_gradients(specialize.job(call, of, lists.keys), (out, lse, lse), need)


def faults(found: Resources, architecture: str, of: Pass, size: int) -> list[str]:
    """What a kernel of a table's entry must not be."""
    wrong = []
    if found.spill:
        wrong.append(f"spills {found.spill}")
    if found.serialized:
        wrong.append("products wait for each other")
    if found.shared > SHARED_LIMIT[architecture]:
        wrong.append(f"{found.shared} bytes of shared memory, {SHARED_LIMIT[architecture]} are there")
    if architecture == "sm_90" and size == 2 and of != "decode":
        wrong += [f"no {name}" for name in ("wgmma", "tma") if not getattr(found, name)]
    if not (found.wgmma or found.mma or found.tcgen05):
        wrong.append("no tensor cores")
    return wrong


def entries(
    widths: Sequence[int] = WIDTHS, sizes: Sequence[int] = (2, 4), passes: Sequence[Pass] = PASSES
) -> Iterator[tuple[Pass, int, int]]:
    """Every entry of a table: pass, width, size."""
    for size in sizes:
        for width in widths:
            for of in passes:
                yield of, width, size


def compile_entry(architecture: str, of: Pass, width: int, size: int, tiles: Tiles | None = None) -> Resources:
    """Compiles an entry as plain attention."""
    with compiling(architecture, tiles) as found:
        compile_pass(of, call_of(width, DTYPES[size], decoding=of == "decode"))
    return found[0]


def compile_table(
    architecture: str, which: Iterator[tuple[Pass, int, int]]
) -> Iterator[tuple[str, Resources, list[str]]]:
    """Entries of a table, with what is at fault."""
    for of, width, size in which:
        found = compile_entry(architecture, of, width, size)
        yield f"{of}/{width}/{size}", found, faults(found, architecture, of, size)


def switches() -> dict[str, Extras]:
    """Each switch of the operation alone, at width 64; and in fp32 all that go together."""
    tokens = torch.zeros(1, 1, TOKENS)
    planes = torch.zeros(TOKENS, 32)
    half = torch.zeros(1, 1, TOKENS, 64, dtype=torch.bfloat16)
    return {
        "q_pos": Extras(q_pos=tokens.int()),
        "key_bias": Extras(key_bias=tokens),
        "window, sink": Extras(window=100, sink=4),
        "window and sink of heads": Extras(window=torch.ones(1, dtype=torch.int32), sink=torch.ones(1).int()),
        "aux": Extras(aux=(half, half)),
        "gate last": Extras(gate="last", gate_mix=0.5),
        "gate keys": Extras(gate=half[:, :, :2]),
        "origin": Extras(rope=(planes, planes)),
        "all in fp32": Extras(
            q_pos=tokens.int(), key_bias=tokens, window=100, sink=4, aux=(half.float(), half.float()),
            gate=half[:, :, :2].float(), rope=(planes, planes),
        ),
    }  # fmt: skip


def compile_switches(architecture: str) -> Iterator[tuple[str, Resources, list[str]]]:
    """Every pass with each switch, and the forms of the forward loop, with what is at fault.

    Spills are allowed here: tables are made for plain attention.
    """
    for name, extras in switches().items():
        size = 4 if name.endswith("fp32") else 2
        for of in PASSES:
            with compiling(architecture) as found:
                compile_pass(of, call_of(64, DTYPES[size], decoding=of == "decode", extras=extras))
            wrong = faults(found[0], architecture, of, size)
            wrong = [text for text in wrong if not text.startswith(("spills", "products"))]
            yield f"{name}, {of}", found[0], wrong
    for form, tiles in (("skewed", Tiles(128, 64, 8, 3, "skewed")), ("specialised", Tiles(**SPECIALISED))):
        with compiling(architecture, tiles) as found:
            compile_pass("forward", call_of(128, torch.bfloat16))
        wrong = faults(found[0], architecture, "forward", 2)
        if form == "specialised" and not found[0].specialised:
            wrong.append("warps are not specialised")
        yield form, found[0], wrong


def line(name: str, r: Resources, wrong: Sequence[str]) -> str:
    """A row of the printed table."""
    return (
        f"{name:32} {r.registers:3} registers  {r.spill:5} spilled  {r.shared:7} shared  "
        f"wgmma {r.wgmma:3} mma {r.mma:3} tma {r.tma:2}  {r.seconds:5.1f} s  {'; '.join(wrong)}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles a table, or every switch, and prints it; 1 where something is at fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="sm_90")
    parser.add_argument("--sizes", type=int, nargs="*", default=[2, 4], help="bytes of a value")
    parser.add_argument("--widths", type=int, nargs="*", default=list(WIDTHS))
    parser.add_argument("--passes", choices=PASSES, nargs="*", default=list(PASSES))
    parser.add_argument("--switches", action="store_true", help="every switch and form instead of the table")
    parser.add_argument("--out", type=Path, help="where a JSON file of the results goes")
    options = parser.parse_args(arguments)
    architecture = options.architecture
    if options.switches:
        made = compile_switches(architecture)
    else:
        made = compile_table(architecture, entries(options.widths, options.sizes, options.passes))
    rows = []
    red = 0
    for name, found, wrong in made:
        red += bool(wrong)
        rows.append({"name": name, "faults": wrong, **asdict(found)})
        print(line(name, found, wrong), flush=True)
    print(f"{architecture}, triton {triton.__version__}: {len(rows)} kernels, {red} at fault")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        part = "switches" if options.switches else "tables"
        target = options.out / f"{architecture}-{part}-triton{triton.__version__}.json"
        target.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return int(red > 0)


if __name__ == "__main__":
    sys.exit(main())
