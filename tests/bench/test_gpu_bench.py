"""The GPU table without a GPU: cells, check, files and report; and the whole of it in the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo_kernels import BlockLayout, block_sparse_attention
from bench.contestants import Run, Wrong
from bench.gpu import __main__ as gpu
from bench.gpu import cells as gpu_cells
from bench.gpu import gate, peers
from bench.gpu import machine as gpu_machine
from bench.gpu import report as gpu_report
from bench.gpu import run as gpu_run
from bench.gpu.cells import Cell

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMALL = {"width": 16, "tokens": 72, "heads": 4, "groups": 2, "block": 16}


def command(*arguments: str, interpret: bool = True) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    env |= {"TRITON_INTERPRET": "1"} if interpret else {}
    line = [sys.executable, "-m", "bench.gpu", *arguments]
    return subprocess.run(line, env=env, capture_output=True, text=True, check=False, timeout=300, cwd=ROOT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The whole table at toy sizes, in the interpreter, and what was printed."""
    pytest.importorskip("triton")
    path = tmp_path_factory.mktemp("gpu")
    done = command("--device", "cpu", "--tiny", "--out", str(path))
    assert done.returncode == 0, done.stderr
    return path, done.stdout


def test_every_cell_is_checked_and_no_time_is_told(folder: tuple[Path, str]) -> None:
    path, printed = folder
    machine, cells = gpu_report.load(path)
    assert set(cells) == {cell.name for cell in gpu_cells.tiny()}
    assert " ms" not in printed
    assert "TFLOP" not in printed
    assert machine["device"] == "cpu"
    for name, data in cells.items():
        assert not data.get("wrong"), name
        assert all(time is None for time in data["ms"].values()), name
        if data["cell"]["what"] == "recompilations":
            assert data["recompilations"] is None
            continue
        checked = data["errors"][data["cell"]["form"] or "ours"]
        assert set(checked) >= ({"out", "dq", "dk", "dv"} if data["cell"]["what"] == "backward" else {"out"}), name
        assert 0 < checked["out"] < 0.012, name
    assert "sdpa flash: needs a CUDA device" in (path / "report.md").read_text(encoding="utf-8")
    assert not list(path.glob("*.part"))


def test_a_dry_run_lists_the_cells(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu.main(["--dry-run", "--out", str(tmp_path), "--only", "decode"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "decode-d128-t131072-rho0.5-h32x8" in [line.strip() for line in lines]
    assert lines[-1] == f"{len(lines) - 1} cells"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "told"),
    [(["--device", "cpu"], "--tiny"), (["--device", "cpu", "--tiny"], "TRITON_INTERPRET=1"), ([], "CUDA")],
)
def test_what_cannot_run_is_refused(
    given: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        gpu.main(given)
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_the_cells_are_those_of_the_promise() -> None:
    cells = gpu_cells.every()
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    have = {(c.what, c.width, c.tokens, c.density) for c in cells if c.pattern == "random"}
    for width in (64, 128):
        for tokens in (4096, 8192, 16384, 32768, 65536, 131072):
            for density in (1.0, 0.5, 0.25, 0.1, 0.05):
                assert {(what, width, tokens, density) for what in ("forward", "backward", "decode")} <= have
    assert {cell.form for cell in cells} == {"", *gpu_cells.FORMS}
    assert sum(cell.what == "recompilations" for cell in cells) == 1
    assert {cell.tokens for cell in cells if cell.pattern == "s2"} == set(gpu_cells.LENGTHS)


def test_s2_cells_are_the_paper_s() -> None:
    cell = next(cell for cell in gpu_cells.every() if cell.pattern == "s2" and cell.what == "forward")
    keep = Cell("forward", 128, 2048, None, 32, 8, 64, "s2").layout(CPU).to_mask()
    assert (cell.heads, cell.groups, cell.width, cell.block) == (32, 8, 128, 64)
    for head in range(8):
        for row in (0, 17, 31):
            near = {col for col in range(row + 1) if row - col < 16}
            far = {col for col in range(row + 1) if (col + head + 1) % 8 == 0}
            assert set(keep[0, head, row].nonzero().flatten().tolist()) == near | far


def test_random_layouts_have_their_density_and_read_their_own_block() -> None:
    layout = Cell("forward", 64, 4096, 0.25, 4, 2, 64).layout(CPU)
    assert layout.density() == pytest.approx(0.25, abs=0.02)
    keep = layout.to_mask()
    assert bool(keep.diagonal(dim1=-2, dim2=-1).all())
    assert not torch.equal(keep[:, 0], keep[:, 1])
    decode = Cell("decode", 64, 4096, 0.25, 4, 2, 64).layout(CPU)
    assert decode.seq_q == decode.block_q == 1
    assert decode.count.tolist() == [[[16], [16]]]


def test_pairs_differ_and_repeat() -> None:
    cell = Cell("recompilations", 64, 8192, 0.3, 8, 4)
    drawn = gpu_cells.pairs(cell, 50)
    assert drawn == gpu_cells.pairs(cell, 50)
    assert len({one.tokens for one in drawn}) > 45
    assert all(1000 < one.tokens < 16400 and 0.05 <= (one.density or 0) <= 0.95 for one in drawn)


def by_blocks(layout: BlockLayout) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attention(q, k, v, layout, impl="blocked")

    return run


def solved(cell: Cell) -> tuple[gate.Truth, tuple[Tensor, Tensor, Tensor], BlockLayout, Tensor]:
    layout, inputs = cell.layout(CPU), cell.inputs(CPU)
    dout = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(5)).bfloat16()
    return gate.solve(*inputs, layout, 1, dout), inputs, layout, dout


@pytest.mark.parametrize("density", [0.4, 1.0])
def test_the_check_lets_what_is_right_pass(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("backward", **SMALL, density=density)
    truth, inputs, layout, dout = solved(cell)
    errors = gate.check("blocked", truth, *gpu_run._once(by_blocks(layout), inputs, dout))
    assert set(errors) == {"out", "dq", "dk", "dv"}
    monkeypatch.setattr(gate, "CHUNK", 7 * cell.tokens)
    again = gate.solve(*inputs, layout, 1, dout)
    for name in ("out", "dq", "dk", "dv"):
        torch.testing.assert_close(getattr(again, name), getattr(truth, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv", "another block", "nan"])
def test_the_check_stops_what_is_wrong(name: str) -> None:
    truth, inputs, layout, dout = solved(Cell("backward", **SMALL, density=0.4))
    run = by_blocks(layout)
    if name == "another block":
        keep = layout.to_mask()
        keep[0, 1, 4] = torch.tensor([1, 1, 1, 1, 1]) > 0 if not keep[0, 1, 4].all() else torch.arange(5) > 0
        run = by_blocks(BlockLayout.from_mask(keep, 16, 16, 72, 72))
    out, gradients = gpu_run._once(run, inputs, dout)
    found = {"out": out, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}
    if name in found:
        found[name] = found[name] * 1.03
    elif name == "nan":
        found["dk"][0, 1, 3, 3] = float("nan")
    with pytest.raises(Wrong, match="finite" if name == "nan" else name if name in found else "planted"):
        gate.check("planted", truth, found["out"], (found["dq"], found["dk"], found["dv"]))


def test_what_is_wrong_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("forward", **SMALL, density=0.4)
    monkeypatch.setattr(gpu_run, "milliseconds", lambda run, device: 1.0)
    monkeypatch.setattr(peers, "ours", by_blocks)
    right = gpu_run.measure(cell, CPU, tuned=False, without=["flex"])
    assert right["ms"] == {"ours": 1.0}
    assert right["reasons"]["flex"] == "left out"
    assert right["flops"] < 0.6 * right["dense flops"]
    assert right["dense flops"] == 4 * 16 * 4 * 72 * 73 / 2
    monkeypatch.setattr(peers, "ours", lambda layout: lambda q, k, v: by_blocks(layout)(q, k, v) * 1.03)
    wrong = gpu_run.measure(cell, CPU, tuned=False)
    assert wrong["wrong"] is True
    assert wrong["ms"] == {}
    assert wrong["reasons"]["ours"].startswith("wrong: ours, out: ")


def test_a_cell_that_fails_is_told_and_the_rest_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def ours(layout: BlockLayout) -> Run:
        if layout.seq_q == 1:
            raise RuntimeError("no such kernel\nat all")
        if layout.seq_q == 80:
            raise torch.OutOfMemoryError("tried to allocate 9 GiB")
        return by_blocks(layout)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(peers, "ours", ours)
    few = [Cell(what, **SMALL, density=0.4) for what in ("decode", "forward")]
    monkeypatch.setattr(gpu_cells, "tiny", lambda: [*few, Cell("forward", 16, 80, 0.5, 4, 2, 16)])
    given = ["--device", "cpu", "--tiny", "--out", str(tmp_path)]
    assert gpu.main(given) == 1
    told = capsys.readouterr()
    assert "exit: RuntimeError: no such kernel" in told.out
    assert "out of memory: tried to allocate 9 GiB" in told.out
    assert "Traceback" in told.err
    _, cells = gpu_report.load(tmp_path)
    assert [bool(data.get("wrong")) for data in cells.values()] == [True, False, False]
    assert cells["forward-d16-t80-rho0.5-h4x2"]["reasons"]["ours"] == "out of memory: tried to allocate 9 GiB"
    assert gpu.main(given) == 1


def test_it_goes_on_where_it_stopped_and_refuses_results_of_another_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(peers, "ours", by_blocks)
    few = [Cell("forward", 16, tokens, 0.5, 4, 2, 16) for tokens in (40, 56, 72)]
    monkeypatch.setattr(gpu_cells, "tiny", lambda: few)
    given = ["--device", "cpu", "--tiny", "--out", str(tmp_path)]
    kept, damaged, gone = (tmp_path / f"{cell.name}.json" for cell in few)

    def run(*more: str) -> tuple[int, list[str], str]:
        code = gpu.main([*given, *more])
        out = capsys.readouterr().out
        return code, [line.split()[3] for line in out.splitlines() if line.startswith("[")], out

    assert run("--only", "t40")[:2] == (0, [kept.stem])
    time = kept.stat().st_mtime_ns
    assert run("--max-seconds", "0")[:2] == (0, [])
    assert "2 cells are left" in run("--max-seconds", "0")[2]
    assert run()[1] == [damaged.stem, gone.stem]
    gone.unlink()
    damaged.write_text('{"cell": ', encoding="utf-8")
    assert run()[1] == [damaged.stem, gone.stem]
    assert run()[1] == []
    assert kept.stat().st_mtime_ns == time
    machine = gpu_report.read(tmp_path / "machine.json")
    assert machine is not None
    gpu.write(tmp_path / "machine.json", {**machine, "device": "H200"})
    with pytest.raises(SystemExit, match="device 'H200', here 'cpu'"):
        gpu.main(given)


@pytest.mark.parametrize("width", [64, 128])
def test_a_form_has_tiles_that_it_can_run_with(width: int) -> None:
    pytest.importorskip("triton")
    from attnzoo_kernels._triton import specialize

    table = specialize.tiles_for("sm_90", "forward", width, 2)
    with peers.form("specialised"):
        assert specialize.tiles_for("sm_90", "forward", width, 2)[2:] == (4, 2, "specialised")
        assert specialize.tiles_for("sm_90", "query", width, 2).form == "plain"
    with peers.form("skewed"):
        assert specialize.tiles_for("sm_90", "forward", width, 2) == table._replace(form="skewed")
    assert specialize.tiles_for("sm_90", "forward", width, 2) == table


def test_a_peer_that_a_graph_cannot_hold_leaves_us_our_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Graph:
        def replay(self) -> None: ...

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    monkeypatch.setattr(gpu_run, "milliseconds", lambda run, device: 1.0)

    def refuse(*_: Tensor) -> Tensor:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    reasons: dict[str, str] = {}
    x = torch.zeros(1)
    runs: dict[str, Run] = {"ours": lambda *_: x, "flex": refuse, "sdpa flash": refuse}
    assert gpu_run._graphed(reasons, runs, (x, x, x), CPU) == {"ours, graph": 1.0}
    assert reasons == {"flex, graph": "RuntimeError: operation not permitted when stream is capturing"}
    with pytest.raises(RuntimeError, match="capturing"):
        gpu_run._graphed(reasons, {**runs, "ours": refuse}, (x, x, x), CPU)


ASKED = (
    Cell("forward", 16, 200, 0.5, 4, 2, 64),
    Cell("forward", 16, 256, 1.0, 2, 2, 128),
    Cell("decode", 16, 200, 0.5, 4, 2, 64),
    Cell("forward", 16, 80, None, 4, 2, 16, "s2"),
)


@pytest.mark.parametrize("cell", ASKED, ids=lambda cell: cell.name)
def test_flex_is_asked_for_the_same_blocks(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reads full blocks without a rule, others with causality: together they must be what we read."""
    asked: dict[str, Any] = {}

    def spy(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
        asked.update(more)
        return q

    monkeypatch.setattr(torch, "compile", lambda function, **_: spy)
    monkeypatch.setattr(torch._dynamo, "reset", lambda: None)
    layout = cell.layout(CPU)
    peers.flex(cell, layout, tuned=False)(*cell.inputs(CPU))
    mask = asked["block_mask"]
    blocks_k = -(-cell.tokens // cell.block)

    def tokens(count: Tensor, index: Tensor) -> Tensor:
        listed = torch.arange(index.shape[-1]) < count.unsqueeze(-1)
        keep = torch.zeros(*count.shape, blocks_k + 1, dtype=torch.bool)
        keep = keep.scatter(-1, torch.where(listed, index, blocks_k).long(), listed)[..., :blocks_k]
        keep = keep.repeat_interleave(mask.BLOCK_SIZE[0], 2).repeat_interleave(mask.BLOCK_SIZE[1], 3)
        return keep[:, :, : cell.queries, : cell.tokens]

    causal = torch.ones(cell.queries, cell.tokens, dtype=torch.bool).tril(cell.tokens - cell.queries)
    found = tokens(mask.kv_num_blocks, mask.kv_indices) & causal
    found = found | tokens(mask.full_kv_num_blocks, mask.full_kv_indices)
    ours = layout.to_mask().repeat_interleave(cell.block_q, 2).repeat_interleave(cell.block, 3)
    ours = ours[:, :, : cell.queries, : cell.tokens] & causal
    assert torch.equal(found.expand(1, cell.heads, -1, -1), ours.repeat_interleave(cell.heads // ours.shape[1], 1))
    assert mask.shape[-2:] == (cell.queries, cell.tokens)
    assert asked["enable_gqa"] is (cell.heads != cell.groups)


@pytest.fixture
def results() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    machine = {
        "device": "NVIDIA H200", "torch": "2.11", "triton": "3.6", "tuned": False, "date": "2026-01-01",
        "measured": {}, "peak": {"product": 989e12, "copy": 4.8e12}, "peak is": "the maker's",
    }  # fmt: skip

    def cell(what: str, rho: float, ms: dict[str, float], **more: Any) -> tuple[str, dict[str, Any]]:
        one = Cell(what, 128, more.pop("tokens", 32768), rho, 32, more.pop("groups", 32))
        flops = 4 * 128 * 32 * 32768 * 32769 / 2 * (2.5 if what == "backward" else 1)
        data = {"cell": gpu.asdict(one), "ms": ms, "reasons": {}, "errors": {}, "density": rho, "flops": rho * flops}
        return one.name, data | {"dense flops": flops} | more

    cells = dict([
        cell("forward", 1.0, {"ours": 16.0, "flex": 20.0, "sdpa flash": 18.0, "sdpa cudnn": 15.0}),
        cell("forward", 0.25, {"ours": 4.0, "flex": 6.0}), cell("forward", 0.05, {"ours": 1.0, "flex": None}),
        cell("backward", 1.0, {"ours": 60.0}), cell("recompilations", 0.3, {}, recompilations=2, pairs=50),
        cell("decode", 0.5, {"ours": 0.2, "ours, graph": 0.1, "flex": 0.5}, tokens=131072, groups=8, bytes=240_000_000),
    ])  # fmt: skip
    yield machine, cells


def test_the_report_says_what_was_reached(results: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path) -> None:
    machine, cells = results
    found = {goal.what: (goal.found, goal.holds) for goal in gpu_report.goals(machine, cells)}
    assert found["forward, D 128, dense, 32k: TFLOP/s"] == (pytest.approx(549.8, abs=0.1), True)
    assert found["the same over SDPA flash"] == (pytest.approx(18 / 16), False)
    assert found["forward over compiled FlexAttention, density 0.25"] == (1.5, True)
    assert found["forward over compiled FlexAttention, density 0.05"] == (None, None)
    assert found["backward, D 128, dense, 32k: TFLOP/s"][1] is False
    assert found["share of the bandwidth, decode-d128-t131072-rho0.5-h32x8"] == (pytest.approx(0.5), False)
    assert found["kernels compiled once warm"] == (2, False)
    law = [(what, *rest) for what, rest in found.items() if "rho time(1)" in what]
    assert [
        (pytest.approx(1.0 / (1.1 * 0.05 * 16 + 0.02)), False) in [tuple(x[1:])] for x in law if "0.05" in x[0]
    ] == [True]
    assert [x[2] for x in law if "0.25" in x[0]] == [True]
    gpu.write(tmp_path / "machine.json", machine)
    for name, data in cells.items():
        gpu.write(tmp_path / f"{name}.json", data)
    written = gpu_report.write(tmp_path)
    assert [path.name for path in written] == ["report.md", "forward.png", "backward.png", "decode.png"]
    text = written[0].read_text(encoding="utf-8")
    assert "| the same over SDPA flash | 1.12 | >= 1.2 | missed |" in text
    assert "2 kernels compiled over 50 random calls" in gpu_report.line(
        cells["recompilations-d128-t32768-rho0.3"], machine
    )


def test_peaks_are_found_by_the_longest_name() -> None:
    assert gpu_machine.peak_of("NVIDIA H100 80GB HBM3") == (989e12, 3.35e12)
    assert gpu_machine.peak_of("NVIDIA H100 PCIe") == (756e12, 2.0e12)
    assert gpu_machine.peak_of("NVIDIA H200") == (989e12, 4.8e12)
    assert gpu_machine.peak_of("NVIDIA GeForce RTX 4090") is None


def test_nothing_of_the_table_needs_what_a_gpu_machine_lacks() -> None:
    program = (
        "import sys\n"
        "for name in ('typer', 'rich', 'matplotlib', 'hypothesis', 'einops'): sys.modules[name] = None\n"
        "import bench.contestants, bench.gpu.gate, bench.gpu.peers, bench.gpu.report, bench.gpu.run\n"
        "from bench.gpu import __main__ as gpu\n"
        "assert gpu.main(['--dry-run', '--only', 's2']) == 0\n"
        "assert 'triton' not in sys.modules\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
