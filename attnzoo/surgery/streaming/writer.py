"""A checkpoint that is written part by part: one file for each layer, and one for what belongs to none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from attnzoo.surgery import stored
from attnzoo.surgery.hosts import folders


class ShardWriter:
    """Writes tensors as the shards of a checkpoint, and an index of them at the end.

    Args:
        folder: Where to; it is empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: dict[int, tuple[Path, list[str]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.bytes = 0

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes the tensors of a part."""
        from safetensors.torch import save_file

        file = self.folder / f"part-{number}.safetensors"
        save_file(stored.apart(dict(tensors)), file, metadata={"format": "pt"})
        self.parts[number] = (file, list(tensors))
        self.shapes |= {name: tuple(x.shape) for name, x in tensors.items()}
        self.bytes += sum(x.numel() * x.element_size() for x in tensors.values())

    def finish(self, *, ordinary: bool) -> None:
        """Gives the parts their names, in order, and writes the index.

        Args:
            ordinary: Whether the names are those that transformers reads, else such as nobody else does.
        """
        whole = Path(folders.WHOLE if ordinary else folders.CONVERTED)
        weight_map: dict[str, str] = {}
        for place, number in enumerate(sorted(self.parts)):
            file, names = self.parts[number]
            name = f"{whole.stem}-{place + 1:05}-of-{len(self.parts):05}{whole.suffix}"
            file.rename(self.folder / name)
            weight_map |= dict.fromkeys(names, name)
        index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(weight_map.items()))}
        file = self.folder / (folders.INDEX if ordinary else folders.CONVERTED_INDEX)
        file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
