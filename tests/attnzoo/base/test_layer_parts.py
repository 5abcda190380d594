"""What a layer owes whatever its variant: windows in chunks, precise rotation, calls that fail, configurations."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo import RotaryConfig, RotaryScaling
from attnzoo.base.recording import record
from attnzoo.factory import read_spec
from tests.attnzoo.cases import tokens

SPLITS = ((0, 37), (0, 17, 37), (0, 5, 6, 7, 30, 37), (0, 16, 32, 37))


@pytest.mark.parametrize("sink", [0, 3])
@pytest.mark.parametrize("window", [1, 9, 40])
@pytest.mark.parametrize("split", SPLITS)
def test_a_window_in_chunks_is_the_window_at_once(split: tuple[int, ...], window: int, sink: int) -> None:
    layer = attnzoo.create(
        "mha", dim=16, num_heads=4, num_kv_heads=2, window=window, sink=sink, block_size=4, dtype=torch.float64
    )
    x = tokens(layer, 2, 37)
    with torch.no_grad():
        expected = layer(x)
        cache = layer.new_cache(2, 37)
        parts = [layer.attend(x[:, a:b], cache=cache) for a, b in pairwise(split)]
    torch.testing.assert_close(torch.cat([part.out for part in parts], 1), expected, rtol=1e-10, atol=1e-10)
    # Of every chunk as of the whole, no block is listed that no row of it sees.
    for part, first in zip(parts, split, strict=False):
        mask = part.plan.layout.to_mask()[0, 0]
        for block, row in enumerate(mask):
            begin, end = first + 4 * block, min(first + 4 * block + 4, first + part.out.shape[1]) - 1
            seen = {slot // 4 for t in range(begin, end + 1) for slot in range(max(0, t - window + 1), t + 1)}
            seen |= {slot // 4 for slot in range(min(sink, end + 1))}
            assert set(row.nonzero().flatten().tolist()) == seen


@pytest.mark.parametrize("name", [name for name in attnzoo.list_variants() if name in ("mha", "s2", "landmark")])
def test_half_precision_layers_rotate_by_precise_tables(name: str) -> None:
    """At position 5,000 a bf16 cosine of the fastest plane would be any number."""
    options = {"landmark": {"block_size": 64}, "s2": {"vert_stride": 1}}.get(name, {})
    layer = attnzoo.create(name, dim=32, num_heads=2, rotary=RotaryConfig(), **options).bfloat16()
    heads = torch.randn(1, 2, 6, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    positions = torch.arange(5000, 5006).unsqueeze(0)
    (found,) = layer.rotate(positions, heads)
    (exact,) = layer.double().rotate(positions, heads.double())
    assert found.dtype == torch.bfloat16
    # Rounded once, at the end: but for a tie here and there, to the very number.
    assert float((found != exact.bfloat16()).double().mean()) < 0.02


@pytest.mark.parametrize("name", attnzoo.list_variants())
def test_a_call_that_fails_leaves_the_cache_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = attnzoo.create(attnzoo.get_config(name).small(), dtype=torch.float64)
    x = tokens(layer, 1, 30)
    with torch.no_grad():
        cache = layer.new_cache(1, 30)
        layer(x[:, :11], cache=cache)
        fork = cache.fork()
        with monkeypatch.context() as patch:
            patch.setattr(layer, "combine", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
            with pytest.raises(RuntimeError, match="no memory"):
                layer(x[:, 11:20], cache=cache)
        assert cache.length == 11
        again = [layer(x[:, 11:], cache=which) for which in (cache, fork)]
    assert torch.equal(*again)


def test_losses_of_all_calls_and_layers_are_added() -> None:
    layers = torch.nn.ModuleList(
        attnzoo.create("moh", dim=16, num_heads=4, shared_heads=1, active_heads=1) for _ in range(2)
    )
    x = torch.randn(2, 9, 16)
    losses: list[Tensor] = []
    with record(layers) as seen:
        for layer in (*layers, layers[0]):
            found = layer.attend(x).plan.aux_loss
            losses.append(found)
    assert len({float(loss.detach()) for loss in losses}) == 2
    torch.testing.assert_close(seen.aux_loss, torch.stack(losses).sum())


def test_a_configuration_keeps_its_scaling_on_the_way_to_text_and_back() -> None:
    scaling = RotaryScaling(
        kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    )
    config = attnzoo.get_config("mha")(
        dim=32, num_heads=4, num_kv_heads=2, rotary=RotaryConfig(base=5e5, scaling=scaling), window=9
    )
    again = type(config).from_json(config.to_json())
    assert again == config
    assert again.rotary is not None and again.rotary.scaling == scaling


def test_options_beside_a_configuration_take_the_place_of_its_fields() -> None:
    config = attnzoo.get_config("mha")(dim=32, num_heads=4, num_kv_heads=2)
    layer = attnzoo.create(config, window=7, sink=2)
    assert (layer.config.window, layer.config.sink, layer.config.kv_heads) == (7, 2, 2)
    assert attnzoo.create(config).config == config


@pytest.mark.parametrize(("text", "value"), [
    ("4", 4), ("0.5", 0.5), ("true", True), ("False", False), ("none", None), ("None", None), ("block", "block"),
])  # fmt: skip
def test_values_in_a_spec_are_read_as_what_they_look_like(text: str, value: Any) -> None:
    variant, options = read_spec(f"mha:window={text},sink=1")
    assert (variant, options) == ("mha", {"window": value, "sink": 1})
    assert type(options["window"]) is type(value)


@pytest.mark.parametrize("conv_pos", ["pre_proj", "post_proj"])
def test_padding_is_not_convolved_where_projections_have_biases(conv_pos: str) -> None:
    """A projection's bias makes something of a row of zeros, which a convolution that looks ahead would meet."""
    layer = attnzoo.create(
        "rcmha", dim=16, num_heads=4, bias=True, causal=False, conv_size=3, conv_pos=conv_pos, dtype=torch.float64
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    x = tokens(layer, 2, 9)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[0, 6:] = True
    padding[1, :2] = True
    with torch.no_grad():
        whole = layer(x, key_padding=padding)
        for item in range(2):
            real = ~padding[item]
            alone = layer(x[item : item + 1, real])
            torch.testing.assert_close(whole[item, real], alone[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("first", [1, 5, 16, 21])
def test_density_of_a_chunk_is_that_of_its_own_rows(first: int) -> None:
    """Query blocks of s2 begin on the sequence's grid: the rows in front of a chunk are no queries."""
    layer = attnzoo.create(attnzoo.get_config("s2").small(), dtype=torch.float64)
    x, block = tokens(layer, 1, 60), layer.config.block_size
    with torch.no_grad():
        cache = layer.new_cache(1, 60)
        layer(x[:, :first], cache=cache)
        plan = layer.attend(x[:, first:], cache=cache).plan
    assert plan.front == first % block
    listed = plan.layout.to_mask()[0]
    seen = dense = 0
    for head in range(listed.shape[0]):
        for t in range(first, 60):
            row = (plan.front + t - first) // plan.layout.block_q
            seen += sum(bool(listed[head, row, slot // block]) for slot in range(t + 1))
            dense += t + 1
    assert plan.density == pytest.approx(seen / dense, abs=1e-12)
