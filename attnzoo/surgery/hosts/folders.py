"""Which files of a checkpoint's folder are read: plain names, and links that stay where they belong.

A folder is not trusted. A link may lead elsewhere in the folder, or from a snapshot in the hub's cache to its blobs,
and nowhere else.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attnzoo_kernels.errors import AttnzooError, ConversionError

INDEX_BYTES = 64 << 20
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
WHOLE = "model.safetensors"
"""What transformers reads alone where it is there, whatever lies beside it."""
CONVERTED = "attnzoo.safetensors"
"""The weights of a converted model that is no ordinary checkpoint: a name that nobody else reads."""
INDEX = f"{WHOLE}.index.json"
CONVERTED_INDEX = f"{CONVERTED}.index.json"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "tokenizer.model*",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
    "additional_chat_templates/*",
)
OTHER_FILES = ("*processor_config.json", "LICENSE*", "NOTICE*")

_ASIDE = re.compile(r"(consolidated|adapter|optimizer|lora).*\.safetensors")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HASH = re.compile(r"[0-9a-f]{64}")


def check_link(file: Path) -> None:
    """Raises if a file of a folder is a link that leads out of it, but for those of the hub's cache.

    Raises:
        ConversionError: If it does.
    """
    folder = file.parent.resolve()
    target = file.resolve()
    if not target.is_relative_to(folder) and not _is_blob(target, folder):
        raise ConversionError(
            f"{file.parent}: refused to read {file.name!r}, a link to {target}: expected a file inside the folder, or "
            "a link of the hub's cache (snapshots/... to blobs/...)"
        )


def _is_blob(target: Path, folder: Path) -> bool:
    """Whether a folder is a snapshot in the hub's cache, or lies in one, and the target a blob of the same repository.

    The layout is ``<cache>/models--<owner>--<name>/snapshots/<revision>`` beside ``blobs/<hash>``, where a blob may be
    a link to ``<cache>/blobs/<two digits>/<hash>``, which repositories share.
    """
    for place in (folder, *folder.parents):
        repository = place.parent.parent
        if place.parent.name == "snapshots" and repository.name.startswith("models--"):
            own = target.parent == repository / "blobs"
            shared = target.parent == repository.parent / "blobs" / target.name[:2] and _HASH.fullmatch(target.name)
            return own or bool(shared)
    return False


def plain_file(folder: Path, name: str, ending: str = "") -> Path:
    """A file of a folder, by a name that may come from the folder itself.

    Raises:
        ConversionError: If the name is a path or ends otherwise, or the file is missing or a link that leads outside.
    """
    if name != Path(name).name or name in ("", ".", "..") or "\\" in name or not name.endswith(ending):
        raise ConversionError(f"{folder}: refused to read {name!r}: expected a {ending or 'file'} inside the folder")
    file = folder / name
    check_link(file)
    if not file.is_file():
        raise ConversionError(f"{file}: missing")
    return file


def refuse_pickle(path: Path) -> None:
    """Raises if a file is a pickle or an archive of pickles, by name or by its first bytes.

    Raises:
        ConversionError: If it is.
    """
    with path.open("rb") as file:
        head = file.read(9)
    # The length of a safetensors header, which comes first, may begin like a pickle.
    tensors = head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8
    if path.suffix in PICKLES or (not tensors and (head[:1] == b"\x80" or head[:2] == b"PK")):
        raise ConversionError(f"{path}: pickles are refused, they can run code; convert the file to safetensors")


def read_json(path: Path, most: int) -> dict[str, Any]:
    """A JSON object from a regular file of limited size.

    Raises:
        ConversionError: If it is missing, too large, no object, or a link that leads out of its folder.
    """
    check_link(path)
    if not path.is_file():
        raise ConversionError(f"{path}: missing")
    if path.stat().st_size > most:
        raise ConversionError(f"{path}: expected at most {most} bytes, got {path.stat().st_size}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConversionError(f"{path}: no valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConversionError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def tensor_files(folder: Path) -> list[Path]:
    """The files of a folder that hold the model's weights, as transformers chooses them.

    One whole file stands before all others, then what an index names, else all safetensors but for those whose names
    say that they are something else.

    Raises:
        ConversionError: If there is none, the index names a file outside the folder, or there are pickles instead.
    """
    # An index is checked even where a whole file is read in its stead: one that points outside is a warning sign.
    indices = [folder / name for name in (CONVERTED_INDEX, INDEX) if os.path.lexists(folder / name)]
    parts = [_indexed(folder, index) for index in indices]
    for name in (CONVERTED, WHOLE):
        if (folder / name).is_file():
            return [plain_file(folder, name, ".safetensors")]
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    files = (parts[0] if parts else []) or [name for name in files if not _ASIDE.fullmatch(name)] or files
    if files:
        return [plain_file(folder, name, ".safetensors") for name in files]
    for file in sorted(folder.iterdir()):
        if file.suffix in PICKLES:
            refuse_pickle(file)
    raise ConversionError(f"{folder}: expected safetensors files, got none{other_place(folder)}")


def _indexed(folder: Path, index: Path) -> list[str]:
    mapping = read_json(index, INDEX_BYTES).get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
        raise ConversionError(f"{index}: expected a weight_map of names to files")
    names = sorted(set(mapping.values()))
    for name in names:
        plain_file(folder, name, ".safetensors")
    return names


def files_beside(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Files of a folder that match patterns, each checked.

    Raises:
        ConversionError: If one is a link that leads outside.
    """
    found = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    for file in found:
        check_link(file)
    return found


def copy_beside(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """Copies files that match patterns from folder to folder, where the target has none of that name."""
    for file in files_beside(source, patterns):
        copy = target / file.relative_to(source)
        if not copy.exists():
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def not_here(path: str | Path) -> ConversionError:
    """The error about a path that does not exist, which may be a name on the hub."""
    name = str(path)
    if not _HUB_NAME.fullmatch(name) or name.startswith("."):
        return ConversionError(
            f"{name}: no such file or folder; nothing is downloaded, give the path of a folder or of a .gguf file"
        )
    snapshot = _snapshot(name)
    if snapshot is not None:
        return ConversionError(f"{name}: no such file or folder; this name is in the hub's cache: give {snapshot}")
    return ConversionError(
        f"{name}: no such file or folder; nothing is downloaded. If it is a name on the hub: "
        f"hf download {name} --local-dir {name.partition('/')[2]}, then give that folder"
    )


def _snapshot(name: str) -> Path | None:
    """The newest snapshot of a repository in the hub's cache on this machine."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    found = [path.parent for path in (cache / f"models--{name.replace('/', '--')}").glob("snapshots/*/config.json")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def other_place(folder: Path) -> str:
    """Where the model may be instead, for an error about a folder without one."""
    for pattern in ("*.gguf", "snapshots/*"):
        found = sorted(folder.glob(pattern))
        if found:
            return f"; give {found[-1]}"
    return ""


@contextmanager
def temporary_folder(beside: Path) -> Iterator[Path]:
    """A folder beside a path, and the parents that the path lacks; gone afterwards, with parents of nothing."""
    made = [path for path in beside.absolute().parents if not path.exists()]
    beside.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary = Path(tempfile.mkdtemp(dir=beside.parent, prefix=f".{beside.name}-"))
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    finally:
        if not beside.exists():
            for path in made:
                path.rmdir()


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Names what was to be written in errors of the disk, which some libraries raise as errors of their own.

    Raises:
        OSError: Of the kind that was raised within, on one line.
    """
    try:
        yield
    except OSError as error:
        raise _not_written(target, error, error.strerror or str(error)) from error
    except AttnzooError:
        raise
    except Exception as error:
        # Libraries in Rust give the system's number in their text.
        code = re.search(r"os error (\d+)|code: (\d+)", str(error))
        if code is None:
            raise
        number = int(code[1] or code[2])
        raise _not_written(target, OSError(number, ""), os.strerror(number)) from error


def _not_written(target: Path, error: OSError, reason: str) -> OSError:
    kind = type(error) if type(error).__module__ == "builtins" else OSError
    found = kind(f"{target}: not written, and nothing is left of it: {reason}")
    found.errno = error.errno
    return found
