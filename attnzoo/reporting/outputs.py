"""Files of results that appear together, or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from attnzoo_kernels.errors import ConfigError


def check_place(path: Path) -> None:
    """Raises unless a file or folder can be made at a path: known before minutes of work, not after.

    Raises:
        PermissionError: If its first parent that exists cannot be written to.
        NotADirectoryError: If that is a file.
        OSError: If nothing can be made in it for another reason, such as a file system that takes none.
    """
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"{path}: cannot be written: {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path}: cannot be written: {parent} refuses it (permissions, or a read-only disk)")
    try:
        with tempfile.TemporaryDirectory(prefix=".attnzoo-", dir=parent):
            pass
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {parent} takes no files: {error.strerror}") from error


def check_writable(out: Path, argument: str = "out") -> None:
    """Raises unless files named after ``out`` could be written, see :func:`check_place`.

    Args:
        out: The files' common name.
        argument: Which argument it is.

    Raises:
        ConfigError: If a part of the path is a file, or the folder may not be written to.
    """
    try:
        check_place(out)
    except OSError as error:
        raise ConfigError(
            f"{argument}: expected a place in a folder that can be written to, got {str(out)!r}"
        ) from error


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
