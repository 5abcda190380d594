"""nn.MultiheadAttention in torch's own models: found and converted where it stands, and taken back to the bit."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnzoo
from attnzoo import surgery
from attnzoo.surgery.hosts.families.known import block_of

WIDTH, HEADS, TOKENS, BATCH = 8, 2, 6, 3
SQUARE = nn.Transformer.generate_square_subsequent_mask(TOKENS)
BOUNDS = {torch.float32: 2e-6, torch.float64: 1e-12}
S2 = {"block_size": 2, "local_blocks": 1, "vert_stride": 2}


def padding() -> Tensor:
    """True at the ends of two items."""
    return torch.arange(TOKENS) >= torch.tensor([TOKENS, 4, 2]).unsqueeze(1)


def encoder(layers: int = 2, **options: Any) -> nn.TransformerEncoder:
    """One of torch's, with weights that are far from their first."""
    defaults: dict[str, Any] = {"dropout": 0.0, "batch_first": True}
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, **{**defaults, **options})
    nested = layer.self_attn.batch_first and not options.get("norm_first", False)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=nested)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def self_attention(site: Any) -> bool:
    """Whether a site of a decoder reads its own tokens."""
    return "multihead_attn" not in site.path


@pytest.fixture(autouse=True)
def _fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_encoders_are_unchanged_with_and_without_the_fast_path(dtype: torch.dtype, batch_first: bool) -> None:
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=dtype)
    x = x if batch_first else x.transpose(0, 1)
    square = SQUARE.to(dtype)
    calls: tuple[dict[str, Any], ...] = (
        {},
        {"src_key_padding_mask": padding()},
        {"mask": square},
        {"mask": square.isinf(), "src_key_padding_mask": padding(), "is_causal": True},
    )
    for norm_first, first in itertools.product([False, True], [0, 1]):
        model = encoder(norm_first=norm_first, batch_first=batch_first).to(dtype)
        converted = copy.deepcopy(model)
        # A layer of torch's before ours makes nested tensors too.
        surgery.convert(converted, "mha", where=lambda site, first=first: site.layer >= first)
        for training, fast, call in itertools.product([True, False], [True, False], calls):
            torch.backends.mha.set_fastpath_enabled(fast)
            model.train(training)
            converted.train(training)
            with torch.set_grad_enabled(training):
                difference = (model(x, **call) - converted(x, **call)).detach().abs().max()
                assert float(difference) < BOUNDS[dtype]


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_padded_rows_of_nested_tensors_are_zero_as_torchs_are() -> None:
    model = encoder().eval()
    x = torch.randn(BATCH, TOKENS, WIDTH)
    for variant, options in (("mha", {}), ("s2", S2)):
        report = surgery.convert(model, variant, **options)
        with torch.no_grad():
            out = model(x, src_key_padding_mask=padding())
            torch.backends.mha.set_fastpath_enabled(False)
            plain = model(x, src_key_padding_mask=padding())
            torch.backends.mha.set_fastpath_enabled(True)
        assert not out[padding()].any()
        torch.testing.assert_close(out[~padding()], plain[~padding()])
        report.undo()
    assert model.use_nested_tensor


def test_decoders_and_whole_transformers_are_unchanged() -> None:
    model = nn.Transformer(WIDTH, HEADS, 1, 1, 16, dropout=0.0, batch_first=True).double()
    source = torch.randn(BATCH, 4, WIDTH, dtype=torch.float64)
    target = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    mask = SQUARE.double()
    expected = [model.train(mode)(source, target, tgt_mask=mask, tgt_is_causal=True) for mode in (True, False)]
    gradients = torch.autograd.grad(expected[0].square().sum(), list(model.parameters()))
    sites = surgery.find(model)
    assert [site.path.rpartition(".")[2] for site in sites] == ["self_attn", "self_attn", "multihead_attn"]
    surgery.convert(model, "mha")
    found = [model.train(mode)(source, target, tgt_mask=mask, tgt_is_causal=True) for mode in (True, False)]
    for a, b in zip(expected, found, strict=True):
        assert float((a - b).abs().max()) < 1e-12
    for a, b in zip(gradients, torch.autograd.grad(found[0].square().sum(), list(model.parameters())), strict=True):
        assert float((a - b).abs().max()) < 1e-11


@pytest.mark.parametrize(("variant", "options"), [("mha", {"window": 2}), ("s2", S2), ("moh", {}), ("rcmha", {})])
def test_undo_puts_back_the_very_modules(variant: str, options: dict[str, Any]) -> None:
    model = encoder().eval()
    x = torch.randn(BATCH, TOKENS, WIDTH)
    modules = dict(model.named_modules())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = model(x)
    report = surgery.convert(model, variant, **options)
    assert type(model.layers[0].self_attn) is attnzoo.MultiheadAttention
    assert [site.host for site in surgery.find(model)] == ["torch", "torch"]
    assert set(state) <= set(model.state_dict())
    same = variant in ("moh", "rcmha")
    assert torch.allclose(model(x), before, atol=1e-5) == same
    report.undo()
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), before)


def test_a_module_that_several_layers_apply_stays_one() -> None:
    model = encoder()
    model.layers[1].self_attn = model.layers[0].self_attn
    (site,) = surgery.find(model)
    report = surgery.convert(model, "s2", **S2)
    assert model.layers[1].self_attn is model.layers[0].self_attn
    report.undo()
    assert site.path == "layers.0.self_attn"
    assert type(model.layers[1].self_attn) is nn.MultiheadAttention
    assert model.layers[1].self_attn is model.layers[0].self_attn


def test_a_module_alone_and_one_converted_again() -> None:
    model = nn.ModuleDict({"pool": nn.MultiheadAttention(WIDTH, HEADS, dropout=0.1)}).eval()
    x = torch.randn(TOKENS, BATCH, WIDTH)
    before = model["pool"](x, x, x)[0]
    first = surgery.convert(model, "s2", **S2, dropout=0.0)
    assert model["pool"].dropout == 0.0
    second = surgery.convert(model, "mha")
    torch.testing.assert_close(model["pool"](x, x, x)[0], before)
    second.undo()
    assert model["pool"].variant == "s2"
    first.undo()
    assert torch.equal(model["pool"](x, x, x)[0], before)


def test_what_a_family_says_of_it_is_so() -> None:
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    nn.init.normal_(module.in_proj_bias)
    block = block_of(module)
    x = torch.randn(BATCH, TOKENS, WIDTH)
    q, k, v = block.project(x)
    heads = nn.functional.scaled_dot_product_attention(q, k, v, scale=block.scale)
    torch.testing.assert_close(block.output(heads.transpose(1, 2).flatten(-2)), module(x, x, x)[0])
    weights = block.weights()
    torch.testing.assert_close(k.transpose(1, 2).flatten(-2), nn.functional.linear(x, weights.k, weights.k_bias))


@pytest.mark.parametrize("variant", ["s2", "rcmha"])
def test_a_recipe_is_saved_beside_the_base_and_applied_again(variant: str, tmp_path: Path) -> None:
    model = encoder().eval()
    base = copy.deepcopy(model)
    x = torch.randn(BATCH, TOKENS, WIDTH)
    surgery.convert(model, variant, **(S2 if variant == "s2" else {}))
    with pytest.raises(attnzoo.ConversionError, match="adapter_only=True"):
        surgery.save(model, tmp_path / "whole")
    surgery.save(model, tmp_path / "adapter", adapter_only=True)
    other = copy.deepcopy(base)
    nn.init.zeros_(other.layers[0].linear1.weight)
    with pytest.raises(attnzoo.ConversionError, match="base: expected weights with hash"):
        surgery.load(tmp_path / "adapter", base=other)
    loaded, _ = surgery.load(tmp_path / "adapter", base=base)
    assert torch.equal(loaded(x), model(x))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "shards of others' blocks": ("s2", S2, r"multihead_attn: cannot be converted: it reads the encoder's tokens, and"),
    "a window into others": ("mha", {"window": 2}, r"multihead_attn: cannot be converted: .* counts tokens of one"),
    "no input of its own": ("landmark", {}, "it inserts tokens at the input of a model"),
    "no fewer heads": ("lowrank_gqa", {"method": "mean", "num_kv_heads": 1}, "one key head for each query head"),
    "no cache": ("policy", {}, "torch's module has no cache"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_by_name_and_changes_nothing(case: str) -> None:
    variant, options, message = REFUSED[case]
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, 16), 1)
    modules = dict(model.named_modules())
    with pytest.raises(attnzoo.UnsupportedError, match=message):
        surgery.convert(model, variant, **options)
    assert dict(model.named_modules()) == modules
    with pytest.raises(attnzoo.ConfigError, match="causality: expected one of options for 'mha'"):
        surgery.convert(model, "mha", causality=True)


def test_variants_that_are_none_for_these_modules_are_told_of_beside_the_others() -> None:
    (reasons,) = surgery.inspect(nn.TransformerEncoderLayer(16, 2, 8, batch_first=True)).reasons
    refused = {variant for variant, why in reasons.items() if why}
    assert {"landmark", "lowrank_gqa", "policy"} <= refused
    assert not {"mha", "s2", "moh", "longheads", "rcmha"} & refused
    assert "no cache" in reasons["policy"][0]


def test_weights_of_their_own_are_not_lost_by_another_conversion() -> None:
    model = encoder(1)
    surgery.convert(model, "rcmha")
    with pytest.raises(attnzoo.UnsupportedError, match="a replacement by 'rcmha' already"):
        surgery.convert(model, "mha")
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, 16), 1)
    surgery.convert(decoder, "s2", where=self_attention, **S2)
    assert decoder.layers[0].multihead_attn.__class__ is nn.MultiheadAttention
