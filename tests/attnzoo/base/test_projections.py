"""Projections that somebody has packed, wrapped, sharded, hooked or moved: the layer computes, and its cache fits."""

from __future__ import annotations

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
from torch.nn.functional import linear
from torch.nn.utils import parametrizations, parametrize

import attnzoo
from attnzoo.base.projections import computing_device, computing_dtype, rows_held
from tests.attnzoo.cases import Case, assert_same, tokens

SMALL = [
    *(pytest.param(name, {}, id=name) for name in attnzoo.list_variants()),
    pytest.param("lowrank_gqa", {"latent_dim": None, "bias": True}, id="grouped"),
    pytest.param("moh", {"shared_heads": 2, "active_heads": 1, "num_kv_heads": 2}, id="moh-apart"),
    pytest.param("rcmha", {"rel": "learned", "conv_pos": "pre_proj", "conv_share": "per_head"}, id="rcmha-learned"),
    pytest.param("longheads", {"select": "block", "chunk_rep": "mean_key"}, id="longheads-block"),
]


class Packed(nn.Module):
    """A stand-in for 4-bit layers: codes of 4 bits in bytes, or in the bytes of another dtype, ``[N * K / 2, 1]``."""

    def __init__(self, plain: nn.Linear, storage: torch.dtype = torch.uint8) -> None:
        super().__init__()
        self.in_features, self.out_features, self.compute_dtype = (
            plain.in_features,
            plain.out_features,
            plain.weight.dtype,
        )
        self.scale = float(plain.weight.detach().abs().max()) / 7
        codes = (
            (plain.weight.detach() / self.scale).round().clamp(-7, 7).to(torch.int16).add(8).to(torch.uint8).flatten()
        )
        self.weight = nn.Parameter((codes[::2] * 16 + codes[1::2]).view(storage).unsqueeze(1), requires_grad=False)
        self.bias = plain.bias

    def forward(self, x: Tensor) -> Tensor:
        packed = self.weight.squeeze(1).view(torch.uint8)
        codes = torch.stack((packed // 16, packed % 16), -1).view(self.out_features, self.in_features)
        return linear(x, ((codes.to(x.dtype) - 8) * self.scale), self.bias)


class Rounded(nn.Module):
    """A stand-in for int8 layers: a matrix of int8 and a scale, on a module that says nothing of its width."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.scale = float(plain.weight.detach().abs().max()) / 127
        self.weight = nn.Parameter((plain.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = plain.bias

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class Adapted(nn.Module):
    """A stand-in for LoRA layers: the layer itself within, its weight handed through, and a product of two beside."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        inputs, outputs = plain.in_features, plain.out_features
        self.base_layer = plain
        self.lora_A, self.lora_B = nn.Linear(inputs, 3, bias=False), nn.Linear(3, outputs, bias=False)

    @property
    def weight(self) -> Any:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Flat(nn.Module):
    """A stand-in for a flattened shard: a part of the weight in one dimension, whole again within a call."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.whole, self.shape, self.bias = [plain.weight.detach()], plain.weight.shape, plain.bias
        self.weight = nn.Parameter(plain.weight.detach().flatten()[: plain.weight.numel() // 3].clone())

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.whole[0], self.bias)


class Brought:
    """A stand-in for the hook that keeps weights elsewhere between calls."""

    def __init__(self, plain: nn.Linear) -> None:
        self.execution_device, self.kept = "cpu", {name: p.detach() for name, p in plain.named_parameters()}


def offloaded(plain: nn.Linear) -> nn.Module:
    plain._hf_hook = hook = Brought(plain)
    plain.to("meta")
    plain.forward = lambda x: torch.func.functional_call(nn.Linear(1, 1, bias="bias" in hook.kept), hook.kept, (x,))
    return plain


def stored_as(dtype: torch.dtype) -> Callable[[nn.Linear], nn.Module]:
    """Weights that lie in a narrow dtype and are cast for each call."""

    def convert(plain: nn.Linear) -> nn.Module:
        plain.register_forward_pre_hook(lambda module, _: module.to(torch.float32) and None)
        plain.register_forward_hook(lambda module, *_: module.to(dtype) and None)
        return plain.to(dtype)

    return convert


def parametrized(plain: nn.Linear) -> nn.Module:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(plain, "weight", Doubled())
    return plain


PROJECTIONS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "plain": lambda plain: plain,
    "4-bit": Packed,
    "4-bit in bf16": lambda plain: Packed(plain, torch.bfloat16),
    "int8": Rounded,
    "adapted": Adapted,
    "adapted 4-bit": lambda plain: Adapted(Packed(plain)),
    "flat shard": Flat,
    "offloaded": offloaded,
    "stored as fp8": stored_as(torch.float8_e4m3fn),
    "stored as bf16": stored_as(torch.bfloat16),
    "parametrized": parametrized,
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "sequential": nn.Sequential,
}


def converted(layer: nn.Module, convert: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for name, child in list(layer.named_children()):
        if isinstance(child, nn.Linear):
            setattr(layer, name, convert(child))
    return layer


def assert_cached_is_whole(layer: Any, x: Tensor, call: Any = None, *, scale: float = 1.0) -> None:
    call = call or layer
    with torch.no_grad():
        whole = call(x)
        cache = layer.new_cache(*x.shape[:2])
        assert cache.device.type == "cpu"
        assert_same(
            torch.cat([call(part, cache=cache) for part in x.split([30, 1, 1, x.shape[1] - 32], 1)], 1),
            whole,
            scale=scale,
        )
        assert whole.isfinite().all()


@pytest.mark.parametrize("kind", PROJECTIONS)
@pytest.mark.parametrize(("name", "options"), SMALL)
def test_any_kind_of_projection_serves_every_variant(name: str, options: dict[str, Any], kind: str) -> None:
    layer = Case(name, "small").layer(**options)
    x = tokens(layer, 2, 45)
    assert_cached_is_whole(converted(layer, PROJECTIONS[kind]), x)
    if name == "s2":
        with torch.no_grad():
            cache = layer.new_cache(2, 45, evict=True)
            assert_same(torch.cat([layer(part, cache=cache) for part in x.split([30, 15], 1)], 1), layer(x))


@pytest.mark.parametrize(("name", "options"), SMALL)
def test_a_dynamically_quantized_layer_serves_every_variant(name: str, options: dict[str, Any]) -> None:
    layer = Case(name, "small").layer(**options)
    x = tokens(layer, 2, 45)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
    assert callable(layer.q_proj.weight)
    whole = layer(x)
    # What it rounds inputs to depends on the whole call: the same call gives the same, parts do not.
    assert_same(layer(x, cache=layer.new_cache(2, 45)), whole)
    cache = layer.new_cache(2, 45)
    assert all(layer(part, cache=cache).isfinite().all() for part in x.split(15, 1))


def test_what_is_stored_says_nothing_of_width_or_dtype() -> None:
    plain, biased = (nn.Linear(32, 64, bias=bias, dtype=torch.bfloat16) for bias in (False, True))
    kinds = (Packed(plain), Packed(plain, torch.float16), Rounded(biased), Flat(plain), Adapted(Packed(plain)))
    for projection in kinds:
        assert rows_held(projection, 64, 32) == 64
        assert computing_dtype([projection], 32) == torch.bfloat16
    # Of several, those that say something decide; weights that are not here say nothing of where.
    assert computing_dtype([Rounded(plain), plain], 32) == torch.bfloat16
    assert computing_device([nn.Linear(2, 2, device="meta"), plain]) == torch.device("cpu")
    assert computing_device([nn.Linear(2, 2, device="meta")]) == torch.device("meta")
    nothing = nn.Identity()
    assert rows_held(nothing, 64, 32) == 64
    assert computing_dtype([nothing], 32) == torch.float32
    assert computing_device([nothing]) == torch.device("cpu")


def test_reading_what_a_projection_is_does_not_change_it() -> None:
    """A spectral norm takes a step towards the true one whenever its weight is read in training."""
    layer = converted(Case("mha", "small").layer(), parametrizations.spectral_norm).train()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.new_cache(2, 8)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("heads", [(2, 1), (1, 1), (4, 2)])
def test_a_slice_of_plain_weights_is_known_by_its_rows(heads: tuple[int, int]) -> None:
    layer = Case("mha", "small").layer()
    for name, count in zip(("q_proj", "k_proj", "v_proj"), (heads[0], heads[1], heads[1]), strict=True):
        setattr(layer, name, nn.Linear(32, 8 * count, bias=False))
    layer.o_proj = nn.Linear(8 * heads[0], 32, bias=False)
    if heads == (1, 1):
        with pytest.raises(attnzoo.ShapeError, match=r"^k_proj: expected 0 of 2 KV heads beside 1 of 4"):
            layer(tokens(layer, 2, 5))
    else:
        assert_cached_is_whole(layer, tokens(layer, 2, 45))
        assert layer.new_cache(2, 45).streams["k"].shape[1] == heads[1]


SLICES = {
    "q alone": ({"q_proj": 2}, r"^k_proj: expected 1 of 2 KV heads beside 2 of 4 query heads.*got 2"),
    "k alone": ({"k_proj": 1}, r"^k_proj: expected 2 of 2 KV heads beside 4 of 4 query heads.*got 1"),
    "not v": ({"q_proj": 2, "k_proj": 1}, r"^v_proj: expected 1 of 2 KV heads beside 2 of 4 query heads.*got 2"),
    "not o": ({"q_proj": 2, "k_proj": 1, "v_proj": 1}, r"^o_proj: expected to take 16 features.*got 32"),
}


@pytest.mark.parametrize("kind", SLICES)
@pytest.mark.parametrize("name", attnzoo.list_variants())
def test_slices_that_do_not_fit_together_are_refused_by_name(name: str, kind: str) -> None:
    options = {"latent_dim": None} if name == "lowrank_gqa" else {}
    layer = Case(name, "small").layer(num_kv_heads=2, **options)
    rows, message = SLICES[kind]
    for projection, count in rows.items():
        setattr(layer, projection, nn.Linear(32, 8 * count, bias=False))
    if not layer.splits_heads:
        message = rf"^q_proj, k_proj, v_proj: expected all heads.*got .*{name} does not run under tensor parallelism"
    with pytest.raises((attnzoo.ShapeError, attnzoo.UnsupportedError), match=message):
        layer(tokens(layer, 2, 5))


def test_rows_that_are_no_heads_are_refused_by_name() -> None:
    layer = Case("mha", "small").layer()
    layer.k_proj = nn.Linear(32, 12)
    with pytest.raises(attnzoo.ShapeError, match=r"^k_proj: expected 16 output features, or a slice.*got 12"):
        layer.new_cache(1, 8)


@pytest.mark.parametrize("name", attnzoo.list_variants())
def test_sharded_parameters_are_whole_when_they_are_used(name: str, tmp_path: Path) -> None:
    layer = Case(name, "small").layer()
    x = tokens(layer, 2, 45)
    expected = layer(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, **more: Any) -> Tensor:
            out: Tensor = self.layer(x, **more)
            return out

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = fully_shard(Model(), mesh=init_device_mesh("cpu", (1,)))
        assert torch.equal(model(x), expected)
        assert_cached_is_whole(layer, x, model)
    finally:
        dist.destroy_process_group()
