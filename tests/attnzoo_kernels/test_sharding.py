"""Distributed tensors, process by process in this one: what each computes is its part of the whole call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from attnzoo_kernels import BlockLayout, Extras, UnsupportedError, block_sparse_attention_with_lse
from tests.strategies import Numbers

B, H, G, T, D = 2, 8, 4, 24, 4
SIZES = (8, 8, T, T)
"""Blocks and lengths of the layouts."""


@contextmanager
def process(rank: int, shape: tuple[int, ...]) -> Iterator[DeviceMesh]:
    """This process as one of several that never speak to each other: nothing here needs to."""
    count = torch.Size(shape).numel()
    dist.init_process_group("fake", rank=rank, world_size=count, store=FakeStore())
    try:
        yield init_device_mesh("cpu", shape)
    finally:
        dist.destroy_process_group()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    n = Numbers.of(5)
    return n.normal(B, H, T, D), n.normal(B, G, T, D), n.normal(B, G, T, D)


def per_item_and_head() -> BlockLayout:
    """Every list of its own, with origins of its own."""
    n = Numbers.of(6)
    index = torch.stack([torch.randperm(3, generator=torch.Generator().manual_seed(i))[:2] for i in range(B * H * 3)])
    origin = (n.normal(B * H * 3, 2).abs() * 9).long() % 16
    return BlockLayout.from_indices(index.view(B, H, 3, 2), *SIZES, origin=origin.view(B, H, 3, 2))


def switches() -> dict[str, tuple[BlockLayout, Extras | None]]:
    n = Numbers.of(7)
    angle = n.normal(16, D // 2)
    by_head = torch.arange(1, H + 1, dtype=torch.int32)
    per_group = torch.rand(1, G, 3, 3, generator=torch.Generator().manual_seed(8)) < 0.7
    return {
        "origins": (per_item_and_head(), Extras(rope=(angle.cos(), angle.sin()))),
        "a list a group": (BlockLayout.from_mask(per_group, *SIZES), None),
        "windows and sinks by head": (BlockLayout.dense(*SIZES), Extras(window=by_head * 2, sink=by_head // 2)),
        "positions by item": (
            BlockLayout.dense(*SIZES),
            Extras(q_pos=torch.stack([torch.arange(T), torch.arange(T) - 5]).int().view(B, 1, T), window=7),
        ),
        "positions by head": (
            BlockLayout.dense(*SIZES),
            Extras(q_pos=(torch.arange(T) - torch.arange(H).view(H, 1)).int().view(1, H, T)),
        ),
        "bias by item": (BlockLayout.dense(*SIZES), Extras(key_bias=n.normal(B, 1, T))),
        "bias by head": (BlockLayout.dense(*SIZES), Extras(key_bias=n.normal(1, H, T))),
        "aux": (BlockLayout.dense(*SIZES), Extras(aux=(n.normal(B, H, T, 3), n.normal(1, 1, T, 3)))),
        "gates": (
            BlockLayout.dense(*SIZES),
            Extras(gate=n.normal(B, G, 3, D), gate_mix=torch.linspace(0, 1, H, dtype=torch.float64)),
        ),
    }


MESHES: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "batch": ((2,), (Shard(0),)),
    "heads": ((2,), (Shard(1),)),
    "both": ((2, 4), (Shard(0), Shard(1))),
    "heads, each on two": ((2, 2), (Replicate(), Shard(1))),
}


def part(x: Tensor, mesh: DeviceMesh, placements: tuple[Any, ...]) -> Tensor:
    """This process's part of a plain tensor."""
    for axis, placement in enumerate(placements):
        if isinstance(placement, Shard):
            x = x.chunk(mesh.size(axis), placement.dim)[mesh.get_coordinate()[axis]]
    return x


def placed(x: Tensor, mesh: DeviceMesh, placements: tuple[Any, ...]) -> DTensor:
    return DTensor.from_local(part(x, mesh, placements).contiguous(), mesh, placements, run_check=False)


@pytest.mark.parametrize("where", MESHES)
@pytest.mark.parametrize("switch", switches())
def test_each_process_computes_its_part_of_results_and_gradients(switch: str, where: str) -> None:
    layout, extras = switches()[switch]
    whole = [x.requires_grad_() for x in inputs()]
    out, lse = block_sparse_attention_with_lse(*whole, layout, extras=extras)
    grads = torch.autograd.grad(out.square().sum() + lse.clamp(min=-9).sum(), whole)
    shape, placements = MESHES[where]
    for rank in range(torch.Size(shape).numel()):
        with process(rank, shape) as mesh:
            mine = [placed(x.detach(), mesh, placements).requires_grad_() for x in whole]
            found = block_sparse_attention_with_lse(*mine, layout, extras=extras)
            assert all(isinstance(x, DTensor) and x.placements == placements for x in found)
            local = [x.to_local() for x in found]
            got = torch.autograd.grad(local[0].square().sum() + local[1].clamp(min=-9).sum(), mine)
            for here, true in zip((*local, *(x.to_local() for x in got)), (out, lse, *grads), strict=True):
                torch.testing.assert_close(here, part(true, mesh, placements), rtol=1e-12, atol=1e-12)


def test_distributed_extras_are_taken_as_they_are_placed() -> None:
    n = Numbers.of(9)
    bias, layout = n.normal(B, H, T), BlockLayout.dense(*SIZES)
    whole = block_sparse_attention_with_lse(*inputs(), layout, extras=Extras(key_bias=bias))
    with process(1, (2,)) as mesh:
        shards = (Shard(1),)
        extras = Extras(key_bias=placed(bias, mesh, shards).requires_grad_())
        found = block_sparse_attention_with_lse(*(placed(x, mesh, shards) for x in inputs()), layout, extras=extras)
        for mine, true in zip(found, whole, strict=True):
            torch.testing.assert_close(mine.to_local(), part(true, mesh, shards), rtol=1e-12, atol=1e-12)
        found[0].to_local().sum().backward()
        assert extras.key_bias is not None and extras.key_bias.grad is not None


@pytest.mark.parametrize("name", ["key_bias", "q_aux", "k_aux", "gate"])
def test_a_gradient_of_what_all_processes_share_is_refused_by_name(name: str) -> None:
    n = Numbers.of(10)
    bias, aux, gate = n.normal(1, 1, T), [n.normal(B, H, T, 3), n.normal(1, 1, T, 3)], n.normal(B, G, 3, D)
    chosen = {"key_bias": bias, "q_aux": aux[0], "k_aux": aux[1], "gate": gate}[name]
    extras = {"key_bias": Extras(key_bias=bias), "gate": Extras(gate=gate)}.get(name, Extras(aux=(aux[0], aux[1])))
    layout = BlockLayout.dense(*SIZES)
    with process(0, (2,)) as mesh:
        shared = [placed(x, mesh, (Shard(1),)) for x in inputs()]
        block_sparse_attention_with_lse(*shared, layout, extras=extras)
        chosen.requires_grad_()
        with pytest.raises(UnsupportedError, match=f"{name.removeprefix('q_').removeprefix('k_')}|{name}"):
            block_sparse_attention_with_lse(*shared, layout, extras=extras)
        # What is whole in every process has its whole gradient there.
        whole = [placed(x, mesh, (Replicate(),)) for x in inputs()]
        block_sparse_attention_with_lse(*whole, layout, extras=extras)


def test_placements_that_do_not_cut_a_call_are_refused_by_name() -> None:
    layout = BlockLayout.dense(*SIZES)
    with process(0, (2,)) as mesh:
        q, _, v = (placed(x, mesh, (Shard(1),)) for x in inputs())
        with pytest.raises(UnsupportedError, match="by batch or heads"):
            block_sparse_attention_with_lse(*(placed(x, mesh, (Shard(2),)) for x in inputs()), layout)
        with pytest.raises(UnsupportedError, match="by batch or heads"):
            block_sparse_attention_with_lse(
                *(DTensor.from_local(x, mesh, (Partial(),), run_check=False) for x in inputs()), layout
            )
        with pytest.raises(UnsupportedError, match="same placements"):
            block_sparse_attention_with_lse(q, inputs()[1], v, layout)
        with pytest.raises(UnsupportedError, match="same placements"):
            block_sparse_attention_with_lse(q, placed(inputs()[1], mesh, (Replicate(),)), v, layout)
    with process(0, (3,)) as mesh:
        uneven = [DTensor.from_local(x[:, :2], mesh, (Shard(1),), run_check=False, shape=x.shape, stride=x.stride())
                  for x in inputs()]  # fmt: skip
        with pytest.raises(UnsupportedError, match="3 processes share evenly"):
            block_sparse_attention_with_lse(*uneven, layout)
    with process(5, (8,)) as mesh:
        q, *rest = inputs()
        few = [DTensor.from_local(x[:, :1], mesh, (Shard(1),), run_check=False, shape=x.shape, stride=x.stride())
               for x in rest]  # fmt: skip
        with pytest.raises(UnsupportedError, match="8 processes share evenly"):
            block_sparse_attention_with_lse(placed(q, mesh, (Shard(1),)), *few, layout)
