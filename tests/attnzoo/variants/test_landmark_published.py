"""Landmark attention and its oracle against the numbers of the published code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo.base.steps import AttentionInputs
from attnzoo.oracles.landmark import Landmarks, landmark
from attnzoo.oracles.mha import Recipe

GOLDEN = Path(__file__).parents[2] / "golden"
SOURCE = 3e-6
"""What published arrays stored as fp32 hold to."""


def load(name: str) -> dict[str, Any]:
    file = np.load(GOLDEN / f"landmark_{name}.npz", allow_pickle=False)
    values: dict[str, Any] = {key: torch.from_numpy(file[key]) for key in file.files if key != "config"}
    return {**values, "config": json.loads(str(file["config"]))}


def near(actual: Tensor, expected: Tensor, limit: float) -> None:
    assert float((actual.detach().double() - expected.double()).abs().max()) <= limit


def golden_layer(file: dict[str, Any], dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """The layer of a file that has projections; heads of 16."""
    width = file["x"].shape[1]
    layer = attnzoo.create("landmark", dim=width, num_heads=width // 16, **options)
    with torch.no_grad():
        for role in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(layer, role).weight.copy_(file[f"w.{role}.weight"])
    return layer.to(dtype).eval()


def fed_directly(file: dict[str, Any], **options: Any) -> tuple[Any, Tensor]:
    """A layer whose input holds the file's q, k and v side by side, and that input."""
    _, heads, _, width = file["q"].shape
    size = heads * width
    layer = attnzoo.create("landmark", dim=3 * size, num_heads=heads, head_dim=width, rotary=None, **options).double()
    part = torch.eye(3 * size, dtype=torch.float64).split(size)
    with torch.no_grad():
        for role, rows in zip(("q_proj", "k_proj", "v_proj"), part, strict=True):
            getattr(layer, role).weight.copy_(rows)
        layer.o_proj.weight.copy_(part[0].T)
    x = torch.cat([file[name].double().transpose(1, 2).flatten(2) for name in "qkv"], -1)
    return layer, x.requires_grad_()


@pytest.mark.parametrize("name", ["w8", "w51", "irregular"])
def test_training_is_the_published_one_and_so_are_its_gradients(name: str) -> None:
    file = load(f"train_{name}")
    length = file["config"]["block_length"]
    layer, x = fed_directly(
        file, mode="soft", official_quirks=True, **({} if length is None else {"block_size": length})
    )
    given_mask = file["is_landmark"].bool() if length is None else None
    size = file["q"].shape[1] * file["q"].shape[3]
    out = layer.attend(x, is_landmark=given_mask).out[..., :size]
    near(out, file["out"].transpose(1, 2).flatten(2), 1e-10)
    cotangent = file["d_out"].double().transpose(1, 2).flatten(2)
    (grad,) = torch.autograd.grad((out * cotangent).sum(), x)
    for part, role in zip(grad.split(size, -1), "qkv", strict=True):
        near(part, file[f"d{role}"].transpose(1, 2).flatten(2), 1e-10)


def test_published_weights_are_those_of_the_operation() -> None:
    file = load("train_w8")
    q, k = file["q"].double(), file["k"].double()
    layer = attnzoo.create("landmark", dim=32, num_heads=2, block_size=8, mode="soft", rotary=None).double()
    one_hot = torch.eye(q.shape[2], dtype=torch.float64).expand(1, 2, -1, -1)
    inputs = AttentionInputs(q, k, one_hot)
    near(layer.operate(inputs, layer.plan_for(inputs, offset=0)), file["weights"], SOURCE)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, SOURCE), (torch.float32, 2e-5)])
def test_a_rotated_layer_is_the_published_one(dtype: torch.dtype, limit: float) -> None:
    file = load("train_rope_w16")
    layer = golden_layer(file, dtype, block_size=16, mode="soft", official_quirks=True)
    near(layer(file["x"].to(dtype).unsqueeze(0))[0], file["out"], limit)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(("name", "top_k"), [("resident_w8_k3", 3), ("offload_w8_k2", 2)])
def test_retrieval_call_by_call_is_the_published_one(name: str, top_k: int, dtype: torch.dtype) -> None:
    file = load(f"retrieval_{name}")
    layer = golden_layer(file, dtype, block_size=8, top_k=top_k, mode="topk", official_quirks=True)
    x = file["x"].to(dtype).unsqueeze(0)
    cache = layer.new_cache(1, x.shape[1], offload=name.startswith("offload"))
    outs, first, checked = [], 0, 0
    for count in file["call_lengths"].tolist():
        with torch.no_grad():
            result = layer.attend(x[:, first : first + count], cache=cache)
        outs.append(result.out[0])
        if "blocks" in result.plan.info:
            assert torch.equal(result.plan.info["blocks"][0], file["selected"][:, first : first + count].long())
            checked += count
        first += count
    near(torch.cat(outs), file["out"], SOURCE if dtype == torch.float64 else 2e-5)
    assert checked > x.shape[1] // 2


@pytest.mark.parametrize(("name", "top_k"), [("resident_w8_k3", 3), ("offload_w8_k2", 2)])
def test_oracle_is_the_published_retrieval(name: str, top_k: int) -> None:
    file = load(f"retrieval_{name}")
    calls = tuple(file["call_lengths"].tolist())
    weights = {key.removeprefix("w."): value.double() for key, value in file.items() if key.startswith("w.")}
    recipe = Recipe(num_heads=2, num_kv_heads=2, head_dim=16)
    rule = Landmarks(block=8, top_k=top_k, calls=calls, shared_retrieval=name.startswith("offload"))
    near(landmark(file["x"].double().unsqueeze(0), weights, recipe, rule).out[0], file["out"], SOURCE)


def test_one_token_calls_are_the_default_mode() -> None:
    """What the published inference does with one token a call needs no quirk, whatever the cut."""
    file = load("retrieval_resident_w8_k3")
    layer = golden_layer(file, block_size=8, top_k=3)
    x = file["x"].double().unsqueeze(0)
    single = file["call_lengths"].tolist().count(1)
    near(layer(x)[0, -single:], file["out"][-single:], SOURCE)
    selected = layer.attend(x).plan.info["blocks"][0, :, -single:]
    assert torch.equal(selected, file["selected"][:, -single:].long())
