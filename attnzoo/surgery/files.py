"""Saving and loading converted models: safetensors and a recipe, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo.surgery.convert import apply_recipe, recipe_of
from attnzoo.surgery.hosts import checkpoint
from attnzoo.surgery.seats import SEATS
from attnzoo_kernels.errors import ConversionError, UnsupportedError

RECIPE = "attnzoo_config.json"
ADAPTER = "adapter.safetensors"
FORMAT = 1


def save(
    model: Any,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    adapter_only: bool = False,
) -> Path:
    """Saves a converted model.

    The folder is self-contained: weights, the host's configuration and the recipe of conversions. With only "weights"
    in the recipe and equal KV heads everywhere it is also an ordinary checkpoint of the host.

    Args:
        model: A model that :func:`attnzoo.surgery.convert` has converted.
        folder: Where to; it appears whole or not at all.
        tokenizer: Saved along, if given.
        overwrite: Whether to replace a folder that is not empty.
        adapter_only: Store the changed blocks alone, with a hash of all other weights.

    Raises:
        ConversionError: If the folder exists and is not empty, holds something else than a converted model, or the
            model was not converted.
    """
    folder, recipe = Path(folder), recipe_of(model)
    if not recipe:
        raise ConversionError("model: expected a converted model, got one without conversions")
    if folder.exists() and not folder.is_dir():
        raise ConversionError(f"{folder}: expected a folder, got a file")
    occupied = folder.exists() and any(folder.iterdir())
    if occupied and not overwrite:
        raise ConversionError(f"{folder}: exists and is not empty; overwrite=True replaces it")
    if occupied and not (folder / RECIPE).is_file():
        raise ConversionError(f"{folder}: refused to replace a folder that holds no converted model ({RECIPE})")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        _write(model, temporary, recipe, tokenizer, adapter_only=adapter_only)
        _swap(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write(model: Any, folder: Path, recipe: list[dict[str, Any]], tokenizer: Any, *, adapter_only: bool) -> None:
    from safetensors.torch import save_file

    tensors = _untied(model)
    about: dict[str, Any] = {"format": FORMAT, "recipe": recipe, "adapter": adapter_only}
    if adapter_only:
        changed = _changed_prefixes(recipe)
        kept = {name: x for name, x in tensors.items() if not name.startswith(changed)}
        about["base_sha256"] = tensors_hash(kept)
        mine = {name: x for name, x in tensors.items() if name not in kept}
        save_file(mine, folder / ADAPTER, metadata={"format": "pt"})
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    (folder / RECIPE).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _swap(temporary: Path, folder: Path) -> None:
    """Puts a finished folder in its place; what was there is removed only once that is done."""
    temporary.chmod(0o755)
    if not folder.exists():
        temporary.rename(folder)
        return
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-old-"))
    folder.rename(old / folder.name)
    try:
        temporary.rename(folder)
    except BaseException:
        (old / folder.name).rename(folder)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def load(folder: str | Path, *, base: Any = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Loads what :func:`save` has written.

    Args:
        folder: Where from.
        base: The model that an adapter was made from, which is converted in place; for adapters alone.
        dtype: Of the weights, where the model is built anew.

    Returns:
        ``(model, tokenizer)``; the tokenizer is ``None`` where none was saved.

    Raises:
        ConversionError: If a file is missing, damaged or not to be trusted, or the base is another model.
    """
    # Weights made in inference mode could never be trained.
    with torch.inference_mode(False):
        return _load(Path(folder), base, dtype)


def _load(folder: Path, base: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    if not folder.is_dir():
        raise ConversionError(f"{folder}: no such folder")
    about = checkpoint.read_json(folder / RECIPE, checkpoint.INDEX_BYTES)
    recipe = about.get("recipe")
    if about.get("format") != FORMAT or not isinstance(recipe, list) or not all(isinstance(e, dict) for e in recipe):
        raise ConversionError(f"{folder / RECIPE}: expected format {FORMAT} with a recipe")
    if about.get("adapter"):
        return _load_adapter(folder, about, recipe, base), None
    if base is not None:
        raise ConversionError(f"base: expected None, {folder} is self-contained")
    tensors = checkpoint.read_tensors(folder)
    model = checkpoint.model_of(checkpoint.read_config(folder), dtype=dtype)
    _apply(model, recipe, folder)
    checkpoint.load_into(model, tensors)
    return model.eval(), checkpoint.load_tokenizer(folder)


def _load_adapter(folder: Path, about: dict[str, Any], recipe: list[dict[str, Any]], base: Any) -> Any:
    if base is None:
        raise ConversionError(f"base: expected the model that the adapter in {folder} was made from, got None")
    changed = _changed_prefixes(recipe)
    found = tensors_hash({name: x for name, x in _untied(base).items() if not name.startswith(changed)})
    if found != about.get("base_sha256"):
        raise ConversionError(f"base: expected weights with hash {about.get('base_sha256')}, got {found}")
    tensors = checkpoint.read_tensors(folder, [folder / ADAPTER]) if changed else {}
    undo = _apply(base, recipe, folder)
    own = base.state_dict()
    expected = {name for name in own if name.startswith(changed)} if changed else set()
    odd = sorted(expected ^ set(tensors)) or sorted(n for n, x in tensors.items() if x.shape != own[n].shape)
    if odd:
        undo()
        raise ConversionError(f"{folder / ADAPTER}: {odd[0]!r} is missing, too many or of another shape")
    base.load_state_dict(tensors, strict=False)
    return base


def _apply(model: Any, recipe: list[dict[str, Any]], folder: Path) -> Callable[[], None]:
    try:
        return apply_recipe(model, recipe)
    except (ConversionError, UnsupportedError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConversionError(f"{folder / RECIPE}: does not fit the model: {error}") from error


def _changed_prefixes(recipe: list[dict[str, Any]]) -> tuple[str, ...]:
    changed = [entry for entry in recipe if entry.get("kind") != "read"]
    added = (SEATS[v].model_state for entry in changed if (v := entry.get("variant")) in SEATS)
    return tuple(
        sorted({*(f"{entry.get('path')}." for entry in changed), *(name for names in added for name in names)})
    )


def _untied(model: Any) -> dict[str, Tensor]:
    """A model's tensors, each once, contiguous."""
    seen: set[int] = set()
    tensors = {}
    for name, x in model.state_dict(keep_vars=True).items():
        if id(x) not in seen:
            seen.add(id(x))
            tensors[name] = x.detach().cpu().contiguous()
    return tensors


def tensors_hash(tensors: dict[str, Tensor]) -> str:
    """A SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name].contiguous()
        digest.update(f"{name}|{x.dtype}|{list(x.shape)}|".encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
