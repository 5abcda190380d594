"""Two processes with half the batch each (DDP): the gradients of the whole batch, for every variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import attnzoo
from tests.attnzoo.cases import Case, assert_same, tokens
from tests.attnzoo_kernels.op.test_distributed import on_two_ranks

TOKENS = 45


def layer_of(name: str) -> Any:
    return Case(name, "small").layer(dtype=torch.float64)


def gradients(layer: Any, model: Any, x: Tensor) -> list[Any]:
    """Of two steps, added: a parameter that the first one missed would stop the second."""
    for part in (x, x.flip(1)):
        model(part).square().mean().backward()
    return [p.grad.tolist() for p in layer.parameters() if p.grad is not None]


def of_this_rank() -> list[Any]:
    found: list[Any] = []
    rank = torch.distributed.get_rank()
    for name in attnzoo.list_variants():
        layer = layer_of(name)
        found += gradients(layer, DistributedDataParallel(layer), tokens(layer, 4, TOKENS)[2 * rank : 2 * rank + 2])
    return found


def test_half_a_batch_each_has_the_gradients_of_the_whole(tmp_path: Path) -> None:
    whole = []
    for name in attnzoo.list_variants():
        layer = layer_of(name)
        whole += gradients(layer, layer, tokens(layer, 4, TOKENS))
    for rank in on_two_ranks(of_this_rank, tmp_path):
        for mine, true in zip(rank, whole, strict=True):
            assert_same(mine, torch.tensor(true, dtype=torch.float64), scale=10)
