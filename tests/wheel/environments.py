"""Environments that hold what a wheel asks for and nothing else, made of what is installed here, in a second.

A folder of links would let a module import what happens to lie beside it. Here each distribution is linked by itself,
if the wheel or one of its requirements asks for it; pip then installs the wheel without an index, and so says whether
what the wheel asks for is enough.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.wheel.build import Wheel, applies


def needed(requirements: Iterable[Requirement]) -> dict[str, Distribution]:
    """The distributions that requirements need, directly and through others, by name."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = list(requirements)
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        key = (name, frozenset(one.extras))
        if key in seen:
            continue
        seen.add(key)
        found[name] = distribution(name)
        further = [Requirement(line) for line in found[name].requires or []]
        waiting += [other for other in further if applies(other, one.extras)]
    return found


def link(found: Distribution, site: Path) -> None:
    """Links what a distribution has put into site-packages."""
    for top in {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}:
        target = site / top
        if not target.is_symlink():
            target.symlink_to(Path(str(found.locate_file(top))))


def clean() -> dict[str, str]:
    """The environment of a user who has never heard of the source."""
    unwanted = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "TRITON_INTERPRET")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    return {**kept, "OMP_NUM_THREADS": "1"}


def make(folder: Path, wheel: Wheel, extras: tuple[str, ...], also: tuple[str, ...] = ()) -> Path:
    """The Python of a new environment in which a wheel is installed with some extras.

    Args:
        folder: Where to.
        wheel: What to install.
        extras: With which extras.
        also: What a user would install besides, without what that asks for.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    for found in needed(wheel.requirements(extras)).values():
        link(found, site)
    for name in also:
        link(distribution(name), site)
    what = f"attnzoo[{','.join(extras)}] @ file://{wheel.path}" if extras else str(wheel.path)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    command += ["install", "--quiet", "--no-index", "--no-compile", what]
    subprocess.run(command, env=clean(), cwd=folder, check=True)
    return python
