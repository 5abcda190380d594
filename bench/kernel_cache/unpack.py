"""Puts an archive of compiled kernels where triton looks for them. Needs nothing but Python."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

MANIFEST = "manifest.json"
GROUP = "__grp__"


def pack(cache: Path, manifest: dict[str, object], archive: Path) -> None:
    """One archive of a cache's folders and what they were made with."""
    (cache / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    archive.parent.mkdir(parents=True, exist_ok=True)
    part = archive.with_name(f".{archive.name}.part")
    with tarfile.open(part, "w:gz") as file:
        for path in sorted(cache.rglob("*")):
            if path.is_file():
                file.add(path, str(path.relative_to(cache)), recursive=False)
    part.replace(archive)


def unpack(archive: Path, cache: Path) -> Path:
    """Unpacks an archive; the path of its manifest.

    A group of files names them by absolute paths, and what is not there is no group: the names become those here.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as file:
        file.extractall(cache, filter="data")
    for path in cache.rglob(f"{GROUP}*"):
        group = json.loads(path.read_text(encoding="utf-8"))
        names = group["child_paths"]
        group["child_paths"] = {name: str(path.with_name(Path(old).name)) for name, old in names.items()}
        path.write_text(json.dumps(group), encoding="utf-8")
    return cache / MANIFEST
