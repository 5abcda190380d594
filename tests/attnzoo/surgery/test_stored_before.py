"""Recipes and folders that were saved before kinds were objects: they load, and say and save the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from attnzoo import surgery
from attnzoo.surgery.files import RECIPE
from attnzoo.surgery.recipes import apply_recipe
from tests.attnzoo.surgery.tiny import logits, tiny

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
RECIPES = sorted((GOLDEN / "recipes").glob("*.json"))
FOLDERS = GOLDEN / "folders"

SAID: dict[str, Any] = json.loads((FOLDERS / "logits.json").read_text())
TOKENS = torch.arange(24).view(2, 12) % 12 + 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_before_is_applied_and_saved_as_it_was(path: Path, tmp_path: Path) -> None:
    model = tiny(dtype=torch.float32)
    apply_recipe(model, json.loads(path.read_text())["recipe"])
    folder = surgery.save(model, tmp_path / "model")
    assert (folder / RECIPE).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", SAID)
def test_a_folder_of_before_says_and_saves_the_same(name: str, tmp_path: Path) -> None:
    source = FOLDERS / name
    adapter = (source / "adapter.safetensors").is_file()
    base = LlamaForCausalLM.from_pretrained(FOLDERS / "base").eval() if adapter else None
    model, _ = surgery.load(source, base=base)
    torch.testing.assert_close(logits(model, TOKENS), torch.tensor(SAID[name]), rtol=0, atol=2e-5)
    again = surgery.save(model, tmp_path / "again", adapter_only=adapter)
    assert (again / RECIPE).read_bytes() == (source / RECIPE).read_bytes()
