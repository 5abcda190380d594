"""Building the wheel and the sdist, and what must hold of their contents."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from email import message_from_bytes
from email.message import Message
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"attnzoo": ROOT / "attnzoo", "attnzoo_kernels": ROOT / "kernels" / "attnzoo_kernels"}
EXTRAS = ("triton", "cli", "hf")
"""What a user may install besides the core; the other extras are for development."""


@dataclass(frozen=True)
class Wheel:
    """A wheel that was built.

    Attributes:
        path: Where it lies.
        files: Its contents by their names.
    """

    path: Path
    files: dict[str, bytes]

    @property
    def metadata(self) -> Message:
        """Its METADATA."""
        return message_from_bytes(next(x for name, x in self.files.items() if name.endswith(".dist-info/METADATA")))

    def requirements(self, extras: Iterable[str]) -> list[Requirement]:
        """What it asks for with some extras."""
        found = [Requirement(line) for line in self.metadata.get_all("Requires-Dist", [])]
        return [one for one in found if applies(one, extras)]


def applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    """Whether a requirement holds on this machine, with some extras of the package that it stands in."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def build(source: Path, out: Path, *targets: str) -> None:
    """Builds with what the build asks for, which development has installed; nothing is fetched."""
    wanted = [word for target in targets for word in ("--target", target)]
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(out), *wanted]
    subprocess.run(command, cwd=source, check=True, capture_output=True)


def read_wheel(folder: Path) -> Wheel:
    """The one wheel of a folder."""
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return Wheel(path, {name: archive.read(name) for name in archive.namelist()})


def wheel_of_sdist(folder: Path, temporary: Path) -> Wheel:
    """The wheel that the one sdist of a folder builds."""
    (path,) = folder.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(temporary, filter="data")
    (source,) = temporary.iterdir()
    build(source, temporary / "dist", "wheel")
    return read_wheel(temporary / "dist")


def check_files(wheel: Wheel) -> None:
    """Both packages whole, and nothing else."""
    wanted = {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    found = {name for name in wheel.files if ".dist-info/" not in name}
    assert found == wanted, f"differ: {sorted(found ^ wanted)}"
    needed = {"attnzoo/py.typed", "attnzoo_kernels/py.typed", "attnzoo/data/botchan.txt", "attnzoo/data/devil.txt"}
    assert needed <= found, f"missing: {needed - found}"
    assert not any("/test" in name or "conftest" in name for name in found), "tests are in the wheel"
    endings = {name.rpartition(".dist-info/")[2] for name in wheel.files if ".dist-info/" in name}
    assert {"METADATA", "entry_points.txt", "licenses/LICENSE"} <= endings, endings


def check_metadata(wheel: Wheel, version: str) -> None:
    """What an index shows: one version, a licence, classifiers, a description without links into the repository."""
    found = wheel.metadata
    assert found["Version"] == version, f"{found['Version']} and {version}"
    assert found["License-Expression"] == "Apache-2.0"
    assert found["Requires-Python"] == ">=3.11"
    assert found["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in found.get_all("Classifier", [])
    description = str(found.get_payload())
    assert description.strip().startswith("# attnzoo")
    relative = re.findall(r"\]\((?!https?://)[^)]*\)|(?:src|href)=\"(?!https?://)[^\"]*\"", description)
    assert not relative, f"lead nowhere from an index: {relative}"


def check_imports(wheel: Wheel) -> None:
    """Every import anywhere in the wheel, within functions too, is of itself, of Python or of what it asks for."""
    asked = {canonicalize_name(one.name) for one in wheel.requirements(EXTRAS)}
    modules = {
        module for module, owners in packages_distributions().items() if asked & set(map(canonicalize_name, owners))
    }
    known = modules | set(PACKAGES) | set(sys.stdlib_module_names)
    for name, text in wheel.files.items():
        if name.endswith(".py"):
            strange = imported(text) - known
            assert not strange, f"{name} imports {sorted(strange)}, which the wheel does not ask for"


def imported(source: bytes) -> set[str]:
    """The outermost names of all modules that a source imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module.partition(".")[0])
    return found
