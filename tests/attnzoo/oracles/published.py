"""What the tests of oracles share: the published numbers, and small random layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnzoo.oracles.mha import Recipe

GOLDEN = Path(__file__).parents[2] / "golden"
FP64 = 1e-10
STORED_AS_FP32 = 3e-6


class Golden:
    """A file of published numbers, as fp64 tensors."""

    def __init__(self, name: str) -> None:
        self.file = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
        self.config: dict[str, Any] = json.loads(str(self.file["config"]))

    def __getitem__(self, key: str) -> Tensor:
        x = torch.from_numpy(self.file[key])
        return x.double() if x.is_floating_point() else x

    def __contains__(self, key: str) -> bool:
        return key in self.file.files

    def projections(self) -> dict[str, Tensor]:
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        return {f"{name}.weight": self[f"w.{name}.weight"] for name in names}


def near(actual: Tensor, expected: Tensor, limit: float = FP64) -> None:
    assert actual.shape == expected.shape
    assert float((actual.detach() - expected.detach()).abs().max()) <= limit


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def projections(recipe: Recipe, dim: int = 16) -> dict[str, Tensor]:
    q, kv = recipe.num_heads * recipe.head_dim, recipe.num_kv_heads * recipe.head_dim
    shapes = {"q_proj": (q, dim), "k_proj": (kv, dim), "v_proj": (kv, dim), "o_proj": (dim, q)}
    return {f"{name}.weight": random(*shape, seed=i, scale=0.5) for i, (name, shape) in enumerate(shapes.items())}


GQA = Recipe(num_heads=4, num_kv_heads=2, head_dim=4)
HOLES = torch.zeros(2, 11, dtype=torch.bool)
HOLES[0, :3] = True
HOLES[1, [0, 5, 10]] = True
