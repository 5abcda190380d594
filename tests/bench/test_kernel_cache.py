"""Kernels compiled without a GPU are found by a launch elsewhere: keys are equal, paths are those of the new place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu_first.child import environment
from bench.kernel_cache import unpack

ROOT = Path(__file__).resolve().parents[2]
RECORD = """
import sys
from pathlib import Path
import torch
from attnzoo_kernels import selftest
from bench.kernel_cache import __main__ as command, record

def plain():
    selftest.solve(selftest.make("plain").to(torch.float16, record.CPU), "triton", torch.float16)

record.PARTS["cells"] = plain
sys.exit(command.main(["--out", sys.argv[1], "--parts", "cells", "--jobs", "1"]))
"""
LAUNCH = """
import json, sys
import torch, triton
from attnzoo_kernels import dispatch, selftest
from attnzoo_kernels._triton import launch
from bench.aot import compiling
from bench.kernel_cache import fits

def warm(kernel, programs, arguments, own, **constants):
    options = {} if own is None else {"num_warps": own.warps, "num_stages": own.stages}
    kernel.warmup(*arguments, grid=(programs,), **constants, **options)

found = []
triton.knobs.compilation.listener = lambda **told: found.append((told["src"].fn.__name__, told["cache_hit"]))
dispatch._against_triton = lambda call: ()
with compiling("sm_90"):
    launch.run = warm
    launch.processors = lambda device: 132
    given = selftest.make("plain").to(torch.float16, torch.device("cpu"))
    selftest.solve(given, "triton", torch.float16)
print(json.dumps({"found": found, "made with": fits.made_with(90)}))
"""


def run(program: str, env: dict[str, str], *arguments: str, cwd: Path = ROOT) -> str:
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=600, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_launch_elsewhere_finds_what_was_compiled_here(tmp_path: Path) -> None:
    """Another process, another folder of the same sources, another place for the cache: every kernel is found."""
    pytest.importorskip("triton")
    archive = tmp_path / "kernels.tar.gz"
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    here = {**env, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    told = run(RECORD, here, str(archive))
    assert "4 kernels" in told or "3 kernels" in told
    elsewhere = tmp_path / "elsewhere"
    for name in ("bench", "kernels"):
        shutil.copytree(ROOT / name, elsewhere / name, ignore=shutil.ignore_patterns("__pycache__", "results", "texts"))
    manifest = unpack.unpack(archive, tmp_path / "work" / "triton")
    there = environment(tmp_path / "work")
    there["PYTHONPATH"] = f"{elsewhere}{os.pathsep}{elsewhere / 'kernels'}"
    seen = json.loads(run(LAUNCH, there, cwd=elsewhere).splitlines()[-1])
    assert {name for name, _ in seen["found"]} >= {"forward_kernel", "query_kernel", "key_kernel"}
    assert all(hit for _, hit in seen["found"]), seen["found"]
    assert json.loads(manifest.read_text(encoding="utf-8")) == seen["made with"]
    # A variable that changes kernels changes their keys: nothing is found, and it is told why.
    other = {**there, "TRITON_DEFAULT_FP_FUSION": "0", "TRITON_CACHE_DIR": str(tmp_path / "work" / "triton")}
    missed = json.loads(run(LAUNCH, other, cwd=elsewhere).splitlines()[-1])
    assert not any(hit for _, hit in missed["found"])
    assert missed["made with"]["variables"] != seen["made with"]["variables"]


def test_groups_name_the_files_of_the_new_place(tmp_path: Path) -> None:
    made = tmp_path / "made" / "KEY"
    made.mkdir(parents=True)
    (made / "kernel.cubin").write_bytes(b"\0")
    group = {"child_paths": {"kernel.cubin": str(made / "kernel.cubin")}}
    (made / "__grp__kernel.json").write_text(json.dumps(group), encoding="utf-8")
    unpack.pack(made.parent, {"triton": "3.6.0"}, tmp_path / "archive.tar.gz")
    shutil.rmtree(made.parent)
    manifest = unpack.unpack(tmp_path / "archive.tar.gz", tmp_path / "there")
    assert json.loads(manifest.read_text(encoding="utf-8")) == {"triton": "3.6.0"}
    moved = json.loads((tmp_path / "there" / "KEY" / "__grp__kernel.json").read_text(encoding="utf-8"))
    (path,) = moved["child_paths"].values()
    assert Path(path) == tmp_path / "there" / "KEY" / "kernel.cubin"
    assert Path(path).exists()


def test_what_differs_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from bench.kernel_cache import fits

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(fits, "made_with", lambda capability: {"capability": capability, "triton": "3.6.0"})
    manifest = tmp_path / "manifest.json"
    for there, reasons in (({"capability": 90, "triton": "3.6.0"}, []), ({"capability": 90}, ["triton differs"])):
        manifest.write_text(json.dumps(there), encoding="utf-8")
        assert fits.reasons_against(manifest) == reasons
