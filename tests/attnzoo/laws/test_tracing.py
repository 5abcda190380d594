"""Torch's tracers round the operation and every layer: the same numbers, other sizes refused, or refused by name."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import attnzoo
from attnzoo_kernels import (
    BlockLayout,
    Extras,
    UnsupportedError,
    block_sparse_attention,
    block_sparse_attention_with_lse,
)
from attnzoo_kernels.runtime.tracing import traceable

VARIANTS = pytest.mark.parametrize("name", attnzoo.list_variants())
BOTH = pytest.mark.parametrize("size", [pytest.param("default", marks=pytest.mark.slow), "small"])
TOKENS = 40


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit\..* is deprecated")
        # Whatever a trace takes for a constant is an error here.
        warnings.simplefilter("error", torch.jit.TracerWarning)
        yield


def layer_of(name: str, size: str = "small") -> attnzoo.AttentionLayer:
    torch.manual_seed(0)
    config = attnzoo.get_config(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return attnzoo.create(config.small() if size == "small" else config(dim=32, num_heads=4)).eval()


def tokens_of(layer: attnzoo.AttentionLayer, seed: int, tokens: int = TOKENS) -> Tensor:
    return torch.randn(2, tokens, layer.config.dim, generator=torch.Generator().manual_seed(seed))


@VARIANTS
@BOTH
def test_a_traced_layer_gives_the_same_numbers_saved_or_not_and_refuses_other_sizes(name: str, size: str) -> None:
    layer = layer_of(name, size)
    traced = torch.jit.trace(layer, (tokens_of(layer, 0),))
    x = tokens_of(layer, 1)
    assert torch.equal(traced(x), layer(x))
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    assert torch.equal(torch.jit.load(buffer)(x), layer(x))
    other = tokens_of(layer, 1, TOKENS - 1)
    with pytest.raises(RuntimeError, match=rf"expected a tensor of \[2, {TOKENS}, .*got \[2, {TOKENS - 1}, "):
        traced(other)


@VARIANTS
def test_a_layer_inside_a_traced_model_takes_padding_and_gives_gradients(name: str) -> None:
    layer = layer_of(name)
    padding = torch.zeros(2, TOKENS, dtype=torch.bool)
    padding[0, 30:] = True

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = layer, nn.LayerNorm(layer.config.dim)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            out: Tensor = self.norm(x + self.layer(x, key_padding=padding))
            return out

    model = Model().eval()
    traced = torch.jit.trace(model, (tokens_of(layer, 0), padding))
    x, other = tokens_of(layer, 1), torch.zeros_like(padding)
    other[1, 20:] = True
    assert torch.equal(traced(x, other), model(x, other))
    weight = layer.q_proj.weight
    mine, expected = (torch.autograd.grad(f(x, other).sin().sum(), weight)[0] for f in (traced, model))
    assert torch.equal(mine, expected)


@VARIANTS
def test_make_fx_gives_the_same_numbers(name: str) -> None:
    layer = layer_of(name)
    with torch.no_grad():
        graph = make_fx(layer)(tokens_of(layer, 0, 20))
        x = tokens_of(layer, 1, 20)
        assert torch.equal(graph(x), layer(x))


@VARIANTS
def test_torchs_flop_counter_sees_the_projections_and_the_operation(name: str) -> None:
    layer = layer_of(name)
    with FlopCounterMode(display=False) as counter:
        layer(tokens_of(layer, 0))
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.attnzoo.bsa_fwd] > 0
    assert counter.get_total_flops() > counts[torch.ops.attnzoo.bsa_fwd]


@VARIANTS
def test_script_and_symbolic_trace_are_refused_by_name(name: str) -> None:
    layer = layer_of(name)
    model = nn.Sequential(nn.Identity(), layer)
    for module in (layer, model):
        with pytest.raises(UnsupportedError, match=rf"torch\.jit\.script: {type(layer).__name__} .*torch\.export"):
            torch.jit.script(module)
    with pytest.raises(TypeError, match=r"x: expected a Tensor, got Proxy; torch\.fx\.symbolic_trace .*make_fx"):
        torch.fx.symbolic_trace(model)


# The operation by itself.

LAYOUT = BlockLayout.window(8, 8, 40, 40, window=9)
KEPT_ORIGIN = BlockLayout.from_indices(
    *[torch.tensor([[[[0, 1]]]]), 40, 20, 40, 40], origin=torch.zeros(1, 1, 1, 2).int()
)
SINKS = torch.tensor([1, 2, 3, 4], dtype=torch.int32)
ANGLES = torch.arange(12.0).view(3, 4)

CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "layout of sizes": lambda q, k, v: block_sparse_attention(
        q, k, v, BlockLayout.sink_window(8, 8, q.shape[2], k.shape[2], window=9, sink=3)
    ),
    "dense of sizes": lambda q, k, v: block_sparse_attention(q, k, v, BlockLayout.dense(8, 8, q.size(2), k.size(2))),
    "mask of sizes": lambda q, k, v: block_sparse_attention(
        q, k, v, BlockLayout.from_mask(torch.ones(1, 1, 5, 5).bool(), 8, 8, q.shape[2], k.shape[2])
    ),
    "kept layout": lambda q, k, v: block_sparse_attention(q, k, v, LAYOUT, extras=Extras(window=9, sink=SINKS)),
    "log-sum-exp": lambda q, k, v: block_sparse_attention_with_lse(q, k, v, LAYOUT, causal=False),
    "bias": lambda q, k, v: block_sparse_attention(q, k, v, LAYOUT, extras=Extras(key_bias=k[:, :1, :, 0].float())),
    "gate": lambda q, k, v: block_sparse_attention(q, k, v, LAYOUT, extras=Extras(gate="last", gate_mix=0.5)),
    "gate keys": lambda q, k, v: block_sparse_attention(q, k, v, LAYOUT, extras=Extras(gate=k[:, :, ::8])),
    "channels": lambda q, k, v: block_sparse_attention(q, k, v, LAYOUT, extras=Extras(aux=(q[..., :3], k[..., :3]))),
    "origins": lambda q, k, v: block_sparse_attention(
        q, k, v, KEPT_ORIGIN, extras=Extras(rope=(ANGLES.cos(), ANGLES.sin()))
    ),
    "reference": lambda q, k, v: block_sparse_attention(q, k, v, LAYOUT, impl="reference"),
    "by name": lambda q, k, v: block_sparse_attention(q=q, k=k, v=v, layout=LAYOUT),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_traced_call_gives_the_same_numbers_and_refuses_other_sizes(call: Any) -> None:
    q, k, v = torch.randn(3, 2, 4, 40, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    traced = torch.jit.trace(call, (q, k, v))
    for got, expected in zip(traced(-q, k, v), call(-q, k, v), strict=True):
        assert torch.equal(got, expected)
    with pytest.raises(RuntimeError, match=r"expected a tensor of \[2, 4, 40, 8\].*got \[2, 4, 41, 8\]"):
        traced(*(torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (q, k, v)))


SIZES: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda x: x.shape[1], "size of all": lambda x: x.size()[1], "size of one": lambda x: x.size(1),
    "numel": lambda x: x.numel() // 2, "nelement": lambda x: x.nelement() // 2, "len": lambda x: len(x[0]),
}  # fmt: skip


@pytest.mark.parametrize("read", SIZES.values(), ids=SIZES.keys())
def test_however_a_size_is_read_inside_it_is_a_number(read: Callable[[Tensor], Any]) -> None:
    found: list[Any] = []

    @traceable("f")
    def scaled(x: Tensor) -> Tensor:
        found.append(read(x))
        return x * found[-1]

    traced = torch.jit.trace(scaled, (torch.ones(2, 7),))
    assert found and all(type(size) is int and size == 7 for size in found)
    assert torch.equal(traced(torch.full((2, 7), 2.0)), torch.full((2, 7), 14.0))


@pytest.mark.parametrize("name", ["kept layout", "dense of sizes"])
def test_symbolic_sizes_are_refused_by_name(name: str) -> None:
    with pytest.raises(TypeError, match=r"(q|seq_q): expected .*Proxy.*symbolic_trace.*torch\.export"):
        torch.fx.symbolic_trace(CALLS[name])
