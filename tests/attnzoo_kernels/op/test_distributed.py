"""Two processes on one machine: sharded parameters, sharded heads, sharded keys."""

from __future__ import annotations

import multiprocessing
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from attnzoo_kernels import (
    BlockLayout,
    Extras,
    block_sparse_attention,
    block_sparse_attention_with_lse,
    merge_states,
)
from tests.strategies import Numbers

RANKS = 2
LAYOUT = (8, 16, 40, 40)


class Attention(nn.Module):
    """Four heads of width 8; how many of them are here follows from the projections."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32, bias=False, dtype=torch.float64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        out = block_sparse_attention(q, k, v, BlockLayout.window(*LAYOUT, window=20), extras=Extras(window=20))
        return self.o(out.transpose(1, 2).flatten(2))


def model_and_input() -> tuple[Attention, Tensor]:
    torch.manual_seed(1)
    return Attention(), Numbers.of(2).normal(2, 40, 32)


def gradients(model: nn.Module, x: Tensor) -> list[Any]:
    out = model(x)
    out.square().sum().backward()
    grads = [p.grad for p in model.parameters()]
    return [t.detach().tolist() for t in (out, *(g.full_tensor() if isinstance(g, DTensor) else g for g in grads))]


def sharded_parameters() -> list[Any]:
    model, x = model_and_input()
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    return gradients(model, x)


def sharded_heads() -> list[Any]:
    model, x = model_and_input()
    plan = {"q": ColwiseParallel(), "k": ColwiseParallel(), "v": ColwiseParallel(), "o": RowwiseParallel()}
    return gradients(parallelize_module(model, init_device_mesh("cpu", (RANKS,)), plan), x)


def heads() -> tuple[Tensor, Tensor, Tensor]:
    n = Numbers.of(3)
    return n.normal(1, 4, 40, 8), n.normal(1, 4, 40, 8), n.normal(1, 4, 40, 8)


def sharded_keys() -> list[Any]:
    """Each process attends to the blocks of its own keys; the parts are merged."""
    q, k, v = heads()
    mine = torch.arange(3) % RANKS == dist.get_rank()
    layout = BlockLayout.from_mask(mine.expand(1, 1, 5, 3), *LAYOUT)
    parts = block_sparse_attention_with_lse(q, k, v, layout)
    gathered = [[torch.empty_like(x) for _ in range(RANKS)] for x in parts]
    for places, x in zip(gathered, parts, strict=True):
        dist.all_gather(places, x.contiguous())
    return [x.tolist() for x in merge_states(*gathered)]


def distributed_tensors() -> list[Any]:
    mesh = init_device_mesh("cpu", (RANKS,))
    q, k, v = (distribute_tensor(x, mesh, [Shard(1)]) for x in heads())
    return [block_sparse_attention(q, k, v, BlockLayout.dense(*LAYOUT)).full_tensor().tolist()]


def _rank(rank: int, store: str, work: Callable[[], list[Any]], pipe: Any) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
        pipe.send(work())
    except Exception:
        pipe.send(traceback.format_exc())


def on_two_ranks(work: Callable[[], list[Any]], folder: Path) -> list[list[Tensor]]:
    context = multiprocessing.get_context("fork")
    pipes = [multiprocessing.Pipe() for _ in range(RANKS)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        ranks = [
            context.Process(target=_rank, args=(rank, str(folder / "store"), work, there))
            for rank, (_, there) in enumerate(pipes)
        ]
        for process in ranks:
            process.start()
    try:
        assert all(here.poll(60) for here, _ in pipes), "a process hangs"
        results = [here.recv() for here, _ in pipes]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    assert not any(isinstance(result, str) for result in results), results
    return [[torch.tensor(x, dtype=torch.float64) for x in result] for result in results]


@pytest.mark.parametrize("work", [sharded_parameters, sharded_heads])
def test_a_sharded_model_has_the_results_and_gradients_of_the_whole(
    work: Callable[[], list[Any]], tmp_path: Path
) -> None:
    whole = [torch.tensor(x, dtype=torch.float64) for x in gradients(*model_and_input())]
    for rank in on_two_ranks(work, tmp_path):
        for mine, true in zip(rank, whole, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-10)


def test_keys_spread_over_processes_are_merged_to_the_whole(tmp_path: Path) -> None:
    whole = block_sparse_attention_with_lse(*heads(), BlockLayout.dense(*LAYOUT))
    for rank in on_two_ranks(sharded_keys, tmp_path):
        for mine, true in zip(rank, whole, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)


def test_distributed_tensors_sharded_by_heads_are_taken(tmp_path: Path) -> None:
    whole = block_sparse_attention(*heads(), BlockLayout.dense(*LAYOUT))
    for (mine,) in on_two_ranks(distributed_tensors, tmp_path):
        torch.testing.assert_close(mine, whole, rtol=1e-12, atol=1e-12)
