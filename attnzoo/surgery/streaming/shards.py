"""Tensors of a folder that stay in their files until they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo.surgery.hosts import folders
from attnzoo.surgery.hosts.weights import FLOATING
from attnzoo_kernels.errors import ConversionError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What a file calls its dtypes; any other is no dtype of plain weights."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        file: The file.
        name: What the file calls it.
        shape: Its sizes.
        dtype: Its dtype, or the file's own word for one that is not known here.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str

    @property
    def numel(self) -> int:
        """How many values it has."""
        return reduce(lambda a, b: a * b, self.shape, 1)

    @property
    def bytes(self) -> int:
        """How many bytes its values take."""
        return self.numel * (self.dtype.itemsize if isinstance(self.dtype, torch.dtype) else 1)


class Shards(Mapping[str, Tensor]):
    """The tensors of a folder by name, each read when it is asked for.

    Args:
        folder: Where the files lie; which of them is as :func:`attnzoo.surgery.hosts.folders.tensor_files` says.

    Raises:
        ConversionError: If a file is damaged or a pickle, or two files hold a tensor of one name with other values.
    """

    def __init__(self, folder: Path) -> None:
        self.stored: dict[str, StoredTensor] = {}
        for file in folders.tensor_files(folder):
            folders.check_link(file)
            folders.refuse_pickle(file)
            self._add(file)

    def _add(self, file: Path) -> None:
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                part = opened.get_slice(name)
                word = part.get_dtype()
                found = StoredTensor(file, name, tuple(part.get_shape()), DTYPES.get(word, word))
                other = self.stored.get(name)
                if other is not None and (
                    other.dtype != found.dtype or not torch.equal(self[name], opened.get_tensor(name))
                ):
                    raise ConversionError(f"{file}: {name!r} stands in another file too, with other values")
                self.stored[name] = found

    def widest_dtype(self) -> torch.dtype:
        """The dtype that holds every weight."""
        known = {x.dtype for x in self.stored.values() if x.dtype in FLOATING}
        found = [dtype for dtype in known if isinstance(dtype, torch.dtype)]
        return reduce(torch.promote_types, found, found[0] if found else torch.float32)

    def __getitem__(self, name: str) -> Tensor:
        return next(iter(self.read({name: self.stored[name]}).values()))

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    @staticmethod
    def read(wanted: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
        """Tensors in memory of their own: files are closed again, and may change."""
        found: dict[str, Tensor] = {}
        for file in _in_order(x.file for x in wanted.values()):
            with _opened(file) as opened:
                for name, x in wanted.items():
                    if x.file == file:
                        found[name] = opened.get_tensor(x.name).clone(memory_format=torch.contiguous_format)
        return found


def _in_order(files: Iterable[Path]) -> list[Path]:
    return list(dict.fromkeys(files))


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError, ValueError) as error:
        raise ConversionError(f"{file}: damaged: {error}") from error
