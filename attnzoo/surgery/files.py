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

from attnzoo.surgery import stored
from attnzoo.surgery.hosts import checkpoint, folders, weights
from attnzoo.surgery.hosts.families.known import block_of
from attnzoo.surgery.kinds import kind_of
from attnzoo.surgery.recipes import Recipe, apply_recipe, beside_of, recipe_of
from attnzoo.surgery.sites import find, share_blocks, shared_blocks
from attnzoo_kernels.errors import ConversionError, UnsupportedError

RECIPE = "attnzoo_config.json"
ADAPTER = "adapter.safetensors"
BESIDE = "policies.safetensors"
"""What a recipe needs beside its entries and the model's weights; where it needs nothing there is no such file."""
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
    in the recipe and equal KV heads everywhere it is also an ordinary checkpoint of the host; else transformers refuses
    it, by a model type that it does not know. Files that lay beside the weights that the model was loaded from, such as
    the tokenizer's, its chat template and preprocessors', are carried along. A model without a configuration of
    transformers cannot be built anew: of it, adapters alone are saved.

    Args:
        model: A model that :func:`attnzoo.surgery.convert` has converted.
        folder: Where to; it appears whole or not at all.
        tokenizer: Saved along, if given, in place of the files of the one that the model was loaded with.
        overwrite: Whether to replace a folder that is not empty.
        adapter_only: Store the changed blocks alone, with a hash of all other weights.

    Raises:
        ConversionError: If the folder exists and is not empty, holds something else than a converted model, the model
            was not converted or has no configuration, or loading would not read it back. Nothing is written then.
        OSError: If the disk refuses. Nothing is left of it then.
    """
    folder = Path(folder)
    recipe = recipe_of(model)
    if not recipe:
        raise ConversionError("model: expected a converted model, got one without conversions")
    if not adapter_only and getattr(model, "config", None) is None:
        raise ConversionError(
            f"model: expected a model of transformers, whose configuration says how to build it anew, got a "
            f"{weights.type_name(model)}; use adapter_only=True here, and load(folder, base=...)"
        )
    check_target(folder, overwrite=overwrite)
    write = _adapter_writer(model, recipe) if adapter_only else _whole_writer(model, recipe)
    beside = stored.apart(beside_of(model, recipe))
    with folders.writing(folder), folders.temporary_folder(folder) as temporary:
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        write(temporary)
        write_beside(beside, temporary)
        swap(temporary, folder)
    return folder


def check_target(folder: Path, *, overwrite: bool) -> None:
    """Raises unless a converted model can be saved in a folder.

    Raises:
        ConversionError: If it exists and is not empty, or holds something else than a converted model.
    """
    if folder.exists() and not folder.is_dir():
        raise ConversionError(f"{folder}: expected a folder, got a file")
    occupied = folder.exists() and any(folder.iterdir())
    if occupied and not overwrite:
        raise ConversionError(f"{folder}: exists and is not empty; overwrite=True replaces it")
    if occupied and not (folder / RECIPE).is_file():
        raise ConversionError(f"{folder}: refused to replace a folder that holds no converted model ({RECIPE})")


def _whole_writer(model: Any, recipe: Recipe) -> Callable[[Path], None]:
    """Writes a self-contained folder; all that may be wrong with the model has been found when this returns."""
    from safetensors.torch import save_file

    settings = stored.settings_of(model)
    tensors = stored.whole_tensors(model, recipe, settings)
    ordinary = stored.is_ordinary(model, recipe)

    def write(folder: Path) -> None:
        file = folders.WHOLE if ordinary else folders.CONVERTED
        save_file(tensors, folder / file, metadata={"format": "pt"})
        write_around(model, recipe, settings, folder)

    return write


def write_beside(tensors: dict[str, Tensor], folder: Path) -> None:
    """Writes what a recipe needs beside its entries and the model's weights, if anything."""
    from safetensors.torch import save_file

    if tensors:
        save_file(tensors, folder / BESIDE, metadata={"format": "pt"})


def write_around(model: Any, recipe: Recipe, settings: Any, folder: Path) -> None:
    """Writes what a self-contained folder holds beside weights: configuration, recipe, and what lay by the source."""
    about: dict[str, Any] = {"format": FORMAT, "recipe": recipe, "adapter": False}
    shared = shared_blocks(model)
    if shared:
        about["shared"] = shared
    stored.write_config(settings, folder, ordinary=stored.is_ordinary(model, recipe))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.to_json_file(folder / "generation_config.json")
    has_tokenizer = any(folder.glob("tokenizer*"))
    source = Path(getattr(model, "name_or_path", "") or "nowhere")
    if (source / "config.json").is_file():
        patterns = folders.OTHER_FILES if has_tokenizer else folders.OTHER_FILES + folders.TOKENIZER_FILES
        folders.copy_beside(source, folder, patterns)
    _write_about(about, folder)


def _adapter_writer(model: Any, recipe: Recipe) -> Callable[[Path], None]:
    """Writes the changed blocks alone, with a hash of all else."""
    from safetensors.torch import save_file

    changed = _changed_prefixes(recipe)
    mine = stored.adapter_tensors(model, recipe, changed)
    about = {"format": FORMAT, "recipe": recipe, "adapter": True, "base_sha256": _base_hash(model, changed, "model")}

    def write(folder: Path) -> None:
        save_file(mine, folder / ADAPTER, metadata={"format": "pt"})
        # For readers that ask for a configuration, so that they say what this is.
        host = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        kind = {"model_type": checkpoint.type_of_adapter(host)}
        (folder / "config.json").write_text(json.dumps(kind, indent=2) + "\n", encoding="utf-8")
        _write_about(about, folder)

    return write


def _write_about(about: dict[str, Any], folder: Path) -> None:
    (folder / RECIPE).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def swap(temporary: Path, folder: Path) -> None:
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


def load(folder: str | Path, *, base: Any = None, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Loads what :func:`save` has stored.

    Args:
        folder: Where from.
        base: The model that an adapter was made from, which is converted in place; for adapters alone.
        dtype: Of the weights, where the model is built anew; ``None`` leaves each as it is stored.

    Returns:
        ``(model, tokenizer)``; the tokenizer is ``None`` where none was saved.

    Raises:
        ConversionError: If a file is missing, damaged or not to be trusted, or the base is another model.
    """
    # Weights made in inference mode could never be trained.
    with torch.inference_mode(False):
        return _load(folder, base, dtype)


def _load(given: str | Path, base: Any, dtype: torch.dtype | None) -> tuple[Any, Any]:
    folder = Path(given)
    if not folder.exists():
        raise folders.not_here(given)
    if not folder.is_dir():
        raise ConversionError(f"{folder}: no such folder")
    about = checkpoint.read_json(folder / RECIPE, checkpoint.INDEX_BYTES)
    recipe = about.get("recipe")
    shared = about.get("shared", [])
    if about.get("format") != FORMAT or not isinstance(recipe, list) or not all(isinstance(e, dict) for e in recipe):
        raise ConversionError(f"{folder / RECIPE}: expected format {FORMAT} with a recipe")
    if about.get("adapter"):
        return _load_adapter(folder, about, recipe, base), checkpoint.load_tokenizer(folder)
    if base is not None:
        raise ConversionError(f"base: expected None, {folder} is self-contained")
    config = checkpoint.read_config(folder, converted=True)
    tensors = checkpoint.read_tensors(folder)
    model = checkpoint.model_for(config, tensors, dtype=dtype)
    share_blocks(model, shared if isinstance(shared, list) else [shared])
    _apply(model, recipe, folder)
    checkpoint.load_into(model, stored.named_now(tensors, recipe), keep_dtypes=dtype is None)
    return checkpoint.finished(model, folder), checkpoint.load_tokenizer(folder, model.config)


def _load_adapter(folder: Path, about: dict[str, Any], recipe: Recipe, base: Any) -> Any:
    if base is None:
        raise ConversionError(f"base: expected the model that the adapter in {folder} was made from, got None")
    changed = _changed_prefixes(recipe)
    _refuse_absent(base, recipe)
    found = _base_hash(base, changed, "base")
    if found != about.get("base_sha256"):
        raise ConversionError(f"base: expected weights with hash {about.get('base_sha256')}, got {found}")
    tensors = stored.named_now(checkpoint.read_tensors(folder, [folder / ADAPTER]) if changed else {}, recipe)
    undo = _apply(base, recipe, folder)
    own = base.state_dict(keep_vars=True)
    expected = {name for name in stored.once(base) if name.startswith(changed)} if changed else set()
    odd = sorted(expected ^ set(tensors)) or sorted(n for n, x in tensors.items() if x.shape != own[n].shape)
    if odd:
        undo()
        raise ConversionError(f"{folder / ADAPTER}: {odd[0]!r} is missing, too many or of another shape")
    try:
        checkpoint.give(own, tensors, keep_dtypes=True)
    except ConversionError:
        undo()
        raise
    return base


def _refuse_absent(base: Any, recipe: Recipe) -> None:
    """Raises if blocks that an adapter replaces have weights that are not here: nothing could take their place."""
    blocks = {site.path: base.get_submodule(site.path) for site in find(base)}
    for entry in recipe:
        module = blocks.get(str(entry.get("path")))
        if module is None or not _changes_weights(entry):
            continue
        reasons = weights.reasons_against(block_of(module).projections)
        if reasons:
            raise ConversionError(f"base: {entry['path']}: cannot be converted: {'; '.join(reasons)}")


def _apply(model: Any, recipe: Recipe, folder: Path) -> Callable[[], None]:
    try:
        file = folder / BESIDE
        return apply_recipe(model, recipe, checkpoint.read_tensors(folder, [file]) if file.exists() else None)
    except (ConversionError, UnsupportedError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConversionError(f"{folder / RECIPE}: does not fit the model: {error}") from error


def _changed_prefixes(recipe: Recipe) -> tuple[str, ...]:
    changed = [entry for entry in recipe if _changes_weights(entry)]
    added = (kind.model_state(entry) for entry in changed if (kind := kind_of(entry)) is not None)
    return tuple(
        sorted({*(f"{entry.get('path')}." for entry in changed), *(name for names in added for name in names)})
    )


def _changes_weights(entry: dict[str, Any]) -> bool:
    """Whether an adapter stores the block of an entry; one of no kind is refused when the recipe is applied."""
    kind = kind_of(entry)
    return kind is None or kind.changes_weights


def _base_hash(model: Any, changed: tuple[str, ...], who: str) -> str:
    """The hash of all weights that an adapter leaves alone.

    Raises:
        ConversionError: If a weight is not here, or no plain tensor.
    """
    kept = {name: x for name, x in stored.once(model).items() if not name.startswith(changed)}
    for name, x in kept.items():
        reason = weights.why_not_plain(x, floating=False)
        if reason is not None:
            raise ConversionError(f"{who}: {name}: expected a plain tensor, got one that is {reason}")
    return tensors_hash({name: x.detach().cpu() for name, x in kept.items()})


def tensors_hash(tensors: dict[str, Tensor]) -> str:
    """A SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name].contiguous()
        digest.update(f"{name}|{x.dtype}|{list(x.shape)}|".encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
