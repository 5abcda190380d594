"""Models and texts as the command line names them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo import data
from attnzoo.cli.progress import Bar
from attnzoo.reporting.choices import hint
from attnzoo.surgery.hosts import checkpoint, folders
from attnzoo_kernels.errors import ConfigError

SMOLLM2 = "smollm2"
MODELS = f"a folder with config.json and safetensors, a .gguf file, or {SMOLLM2}"
AS_STORED = "auto"
TEXT_BYTES = 64 << 20


def load_model(name: str, *, dtype: str = AS_STORED, device: str = "cpu") -> tuple[Any, Any]:
    """A model and its tokenizer from a folder, a ``.gguf`` file, or the word ``smollm2``; converted folders too.

    Args:
        name: Of the model.
        dtype: Of its weights, by its name in torch or a short one; "auto" leaves each as it is stored.
        device: Where to.

    Raises:
        ConfigError: If the dtype or the device is none.
        ConversionError: If there is no such model, or it is not to be trusted.
    """
    from attnzoo.evaluation.cost_setting import read_device

    kind = dtype_of(dtype)
    place = read_device(device)
    # Nothing here may reach for a hub.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from attnzoo import surgery
    from attnzoo.surgery.files import RECIPE

    path = checkpoint.locate_smollm2() if name == SMOLLM2 else Path(name)
    if not path.exists() and (near := hint(name, [SMOLLM2])):
        raise ConfigError(f"model: expected {MODELS}, got {name!r}{near}")
    _check_there(path)
    with Bar() as progress:
        progress(f"reading {name}", 0, 0)
        if (path / RECIPE).is_file():
            model, tokenizer = surgery.load(path, dtype=kind)
        else:
            model, tokenizer = checkpoint.load_checkpoint(path, dtype=kind)
        return model.to(place), tokenizer


def _check_there(path: Path) -> None:
    """Raises where no model can be, with what one is made of.

    Raises:
        ConfigError: If the folder has nothing of a model.
    """
    if path.is_dir() and not any((path / name).exists() for name in ("config.json", "snapshots")):
        other = folders.other_place(path)
        raise ConfigError(f"model: expected {MODELS}, got {str(path)!r}, a folder without config.json{other}")


def dtype_of(name: str) -> torch.dtype | None:
    """A dtype by its name in torch or a short one; ``None`` for "auto".

    Raises:
        ConfigError: If it is none.
    """
    from attnzoo.evaluation.cost_setting import read_dtype

    return None if name == AS_STORED else read_dtype(name)


def text_tokens(tokenizer: Any, name: str) -> Tensor:
    """The tokens of a text that ships, or of a file: int64 ``[n]``, without special tokens.

    Raises:
        ConfigError: If there is no such file, it is no text, or the model has no tokenizer.
    """
    _check_tokenizer(tokenizer)
    if name in data.TEXTS:
        text = data.text(name)
    else:
        path = Path(name)
        if not path.is_file():
            near = hint(name, data.TEXTS)
            raise ConfigError(f"text: expected a file, or one of {', '.join(data.TEXTS)}, got {name!r}{near}")
        if path.stat().st_size > TEXT_BYTES:
            raise ConfigError(f"text: expected at most {TEXT_BYTES} bytes, got {path.stat().st_size} in {name!r}")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"text: {name!r} is no UTF-8 text: {error}") from error
    return encode(tokenizer, text)


def encode(tokenizer: Any, text: str) -> Tensor:
    """The tokens of a text: int64 ``[n]``, without special tokens.

    Raises:
        ConfigError: If the model has no tokenizer.
    """
    _check_tokenizer(tokenizer)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def _check_tokenizer(tokenizer: Any) -> None:
    if tokenizer is None:
        raise ConfigError("model: expected a tokenizer beside the weights, got none")
