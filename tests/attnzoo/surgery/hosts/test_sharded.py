"""Converted models whose parameters are sharded afterwards (FSDP2): the same logits, gradients and tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from attnzoo_kernels.errors import UnsupportedError
from tests.attnzoo.surgery.tiny import READING, calibration, convert, ids, tiny

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "window": READING["window"],
    "moh": ("moh", {}),
    "latent": (
        "lowrank_gqa",
        {"method": "latent", "latent_dim": 40, "calibration": calibration(1), "gradients": False},
    ),
}


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def shard(model: Any) -> None:
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def trained(model: Any, tokens: Tensor) -> list[Tensor]:
    """Logits, and the gradients of a training step."""
    out = model(input_ids=tokens, labels=tokens)
    out.loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [out.logits.detach(), *(g.full_tensor() if isinstance(g, DTensor) else g for g in grads)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_model_is_sharded_like_any_other(kind: str, alone: None) -> None:
    variant, options = KINDS[kind]
    tokens = ids(2, 24)
    whole, sharded = (tiny(layers=1, dtype=torch.float32) for _ in range(2))
    for model in (whole, sharded):
        convert(model, variant, **options)
    shard(sharded)
    for mine, true in zip(trained(sharded, tokens), trained(whole, tokens), strict=True):
        assert torch.equal(mine, true)
    asked: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(sharded.generate(tokens, **asked), whole.generate(tokens, **asked))


def test_weights_that_are_sharded_are_not_converted(alone: None) -> None:
    model = tiny(layers=1, dtype=torch.float32)
    shard(model)
    with pytest.raises(
        UnsupportedError, match=r"expected an nn.Linear with a plain floating weight, got .*sharding it"
    ):
        convert(model, "moh")
    convert(model, "mha", window=9, sink=2)
