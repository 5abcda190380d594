"""The kernels compiled for GPUs that are not there, with the oldest supported triton and the current one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attnzoo_kernels.triton.interpreted import slow

ROOT = Path(__file__).parents[3]
OLDEST = ROOT / ".venv-oldest" / "bin" / "python"
CURRENT = Path(sys.executable)


def compile_tables(python: Path, *arguments: str) -> str:
    assert python.is_file(), f"{python} is missing: make setup brings it"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [str(python), "-m", "bench.aot", *arguments], capture_output=True, text=True, cwd=ROOT, env=environment,
        timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.parametrize("architecture", ["sm_80", slow("sm_89"), "sm_90", "sm_100", slow("gfx942")])
@pytest.mark.parametrize("size", [4, slow(2)])
def test_every_entry_of_a_table_compiles_without_spills_and_fits(architecture: str, size: int) -> None:
    printed = compile_tables(OLDEST, "--architecture", architecture, "--sizes", str(size))
    assert "triton 3.6.0: 16 kernels, 0 at fault" in printed


@pytest.mark.parametrize(
    ("kernels", "widths"), [slow(24, ("32", "64", "128")), (4, ("256", "--sizes", "4"))], ids=["narrow", "wide"]
)
def test_the_current_triton_compiles_them_too(kernels: int, widths: tuple[str, ...]) -> None:
    printed = compile_tables(CURRENT, "--architecture", "sm_90", "--widths", *widths)
    assert f"{kernels} kernels, 0 at fault" in printed


@pytest.mark.slow
def test_the_current_triton_compiles_wide_half_precision() -> None:
    # Of the gradients of keys it spills 8 bytes, which the oldest does not, in every tile that uses Hopper's products.
    passes = ("forward", "decode", "query")
    printed = compile_tables(CURRENT, "--architecture", "sm_90", "--widths", "256", "--sizes", "2", "--passes", *passes)
    assert "3 kernels, 0 at fault" in printed


@pytest.mark.parametrize("python", [slow(OLDEST), CURRENT], ids=["oldest", "current"])
def test_every_switch_and_form_of_the_loop_compiles_for_hopper(python: Path) -> None:
    printed = compile_tables(python, "--architecture", "sm_90", "--switches")
    assert " 0 at fault" in printed
    assert "specialised" in printed
