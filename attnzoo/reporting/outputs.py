"""Files of results that appear together, or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from attnzoo_kernels.errors import ConfigError


def check_writable(out: Path) -> None:
    """Raises unless files named after ``out`` could be written: known before minutes of work, not after.

    Raises:
        ConfigError: If a part of the path is a file, or the folder may not be written to.
    """
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"out: expected a place in a folder that can be written to, got {str(out)!r}")


def write_together(out: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Writes OUT.<suffix> for each suffix; an interruption leaves what was there before.

    Args:
        out: The files' common name, without suffix.
        writers: By suffix; each is given a path to write to.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        made = {suffix: Path(folder) / f"{out.name}.{suffix}" for suffix in writers}
        for suffix, write in writers.items():
            write(made[suffix])
        for suffix, path in made.items():
            path.replace(out.with_name(f"{out.name}.{suffix}"))
