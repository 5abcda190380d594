"""Encoders: what their blocks read is theirs to the last digit, on both sides, whatever is padding."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

import attnzoo
from attnzoo import surgery
from attnzoo.surgery.hosts.families.known import block_of
from attnzoo.surgery.lookalikes import lookalikes
from tests.attnzoo.surgery.families.hosts.encoders import CLASSES, HEADS, PICTURES, SITES, TEXTS, encoder
from tests.attnzoo.surgery.families.hosts.host import said
from tests.attnzoo.surgery.tiny import assert_close, assert_untouched, convert, snapshot

EXACT = 1e-10
TEXT = [torch.randint(1, 61, (4, 30), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
WINDOW = {"window": 4, "sink": 2, "block_size": 4}
SHARDS = {"block_size": 4, "local_blocks": 1, "vert_stride": 3, "num_dense_heads": 1}


def inputs(name: str, length: int = 20) -> dict[str, Tensor]:
    """Arguments of a call: ids ``[2, T]``, or pictures of 16 patches."""
    return CLASSES[name].inputs(2, length, seed=1)


def padding(length: int = 20) -> Tensor:
    """A mask ``[2, T]`` as hosts take it, of an item with padding on the left and one on the right."""
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[0, :5] = 0
    mask[1, 13:] = 0
    return mask


@pytest.fixture(scope="module", params=(*TEXTS, *PICTURES))
def host(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """A host that every test here leaves as it was."""
    return request.param, encoder(request.param)


def test_all_attention_modules_are_found_once(host: tuple[str, Any]) -> None:
    name, model = host
    sites = surgery.find(model)
    assert len(sites) == SITES.get(name, 2)
    assert {(site.heads, site.kv_heads, site.head_dim, site.width) for site in sites} == {(HEADS, HEADS, 8, 24)}
    assert surgery.cache_bytes(model) == 0
    assert lookalikes(model) == {}


def _places(mask: Tensor) -> Tensor:
    """The place of each token among its item's real ones, ``[B, T]``."""
    return mask.cumsum(1) - 1


def _window(mask: Tensor) -> Tensor:
    """What a window that looks as far ahead as back reads beside its sink, ``[B, 1, T, T]``."""
    place = _places(mask)
    near = (place[:, :, None] - place[:, None]).abs() < WINDOW["window"]
    return (near | (place[:, None] < WINDOW["sink"])).unsqueeze(1)


def _shards(mask: Tensor) -> Tensor:
    """Blocks beside the own one, every third beyond them, and the first, ``[B, H, T, T]``; the last head reads all."""
    block = _places(mask) // SHARDS["block_size"]
    beyond = (block[:, :, None] - block[:, None]).abs()
    kept = (beyond % SHARDS["vert_stride"] == 0) | (block[:, None] == 0)
    return torch.stack([kept, kept, torch.ones_like(kept)], 1)


@pytest.mark.parametrize(("variant", "options", "rule"), [("mha", WINDOW, _window), ("s2", SHARDS, _shards)])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_rule_reads_what_a_mask_of_four_dimensions_lets_the_host_read(
    variant: str, options: dict[str, Any], rule: Any, padded: bool
) -> None:
    for name in ("bert", "albert"):
        model, given = encoder(name), inputs(name)
        mask = padding() if padded else torch.ones_like(padding())
        real = mask.bool()
        # A padded row reads itself, so that the host has something to weigh.
        seen = (rule(mask) & real[:, None, None]) | torch.eye(20, dtype=torch.bool)
        expected = said(model, given, attention_mask=seen.expand(-1, HEADS, -1, -1))[real]
        convert(model, variant, **options)
        found = said(model, given, attention_mask=mask)[real]
        assert_close(found, expected, EXACT)
        assert not torch.allclose(expected, said(encoder(name), given, attention_mask=mask)[real])


@torch.no_grad()
def test_a_replacement_reads_on_both_sides_of_a_window() -> None:
    for name in ("bert", "albert"):
        model, given = encoder(name), inputs(name)
        mask = torch.ones_like(padding())
        expected = said(model, given, attention_mask=_window(mask))
        convert(model, "moh", **WINDOW)
        assert_close(said(model, given), expected, EXACT)


def test_what_encoders_cannot_be_is_refused_by_name() -> None:
    model = encoder("bert")
    before = snapshot(model)
    for variant, options, message in (
        ("mha", {"window": 4, "sink": 1, "evict": True}, r"^evict: expected False.* a block that is not causal"),
        (
            "lowrank_gqa",
            {"method": "commuting", "num_kv_heads": 1, "refit": True, "calibration": TEXT},
            r"refit=False$",
        ),
    ):
        with pytest.raises((attnzoo.UnsupportedError, attnzoo.ConfigError), match=message):
            surgery.convert(model, variant, **options)
        assert_untouched(model, before)


def _is_at(path: str, site: surgery.Site) -> bool:
    return site.path == path


def test_decoders_and_cross_attention_are_refused_by_name() -> None:
    settings: dict[str, Any] = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
    model = BertModel(BertConfig(**settings, intermediate_size=32, is_decoder=True, add_cross_attention=True))
    before = snapshot(model)
    paths = [site.path for site in surgery.find(model)]
    assert paths == ["encoder.layer.0.attention.self", "encoder.layer.0.crossattention.self"]
    for path, reason in zip(paths, (r"attention of a decoder \(is_decoder\)", "it is cross attention"), strict=True):
        with pytest.raises(attnzoo.UnsupportedError, match=rf"^{path}: cannot be converted: .*{reason}"):
            surgery.convert(model, "mha", where=partial(_is_at, path))
        assert_untouched(model, before)


def test_a_latent_as_wide_as_the_model_loses_nothing(host: tuple[str, Any]) -> None:
    name, model = host
    given = inputs(name)
    before = snapshot(model)
    with torch.no_grad():
        expected = said(model, given)
    calibration = [given, given] if name in PICTURES else TEXT
    # Keys and values of 24 inputs and a constant lie in 25 dimensions; pictures are too few to say which.
    width = 48 if name in PICTURES else 25
    report = convert(model, "lowrank_gqa", method="latent", latent_dim=width, calibration=calibration)
    with torch.no_grad():
        assert_close(said(model, given), expected, 1e-9)
    report.undo()
    assert_untouched(model, before)


def test_statistics_are_of_every_application_of_a_block() -> None:
    model = encoder("albert")
    site = surgery.find(model)[0]
    found = surgery.collect(model, [site], TEXT)
    known = found.sites[site.path]
    seen = []
    hook = model.get_submodule(site.path).key.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for ids in TEXT:
            model(ids)
    hook.remove()
    assert known.tokens == 3 * sum(ids.numel() for ids in TEXT)
    rows = torch.cat([x.flatten(0, 1) for x in seen])
    assert_close(known.moment[:24, :24], rows.T @ rows, EXACT)
    assert known.fisher is not None
    assert float(known.fisher.trace()) > 0


@pytest.mark.parametrize("variant", ["s2", "moh"])
def test_an_adapter_of_an_encoder_is_loaded(variant: str, tmp_path: Any) -> None:
    model = encoder("bert")
    convert(model, variant, **(SHARDS if variant == "s2" else {"window": 4, "sink": 1}))
    with torch.no_grad():
        expected = said(model, inputs("bert"))
        surgery.save(model, tmp_path / "adapter", adapter_only=True)
        again, _ = surgery.load(tmp_path / "adapter", base=encoder("bert"))
        assert torch.equal(said(again, inputs("bert")), expected)


@pytest.mark.parametrize("name", ["bert", "albert", "distilbert", "vit"])
def test_repeated_heads_are_merged_without_loss_whatever_their_order(name: str) -> None:
    more: dict[str, Any] = {"n_heads" if name == "distilbert" else "num_attention_heads": 4}
    model, given = encoder(name, **more), inputs(name)
    for site in surgery.find(model):
        block = block_of(model.get_submodule(site.path))
        with torch.no_grad():
            for role in ("k_proj", "v_proj"):
                linear = block.projections[role]
                for values in (linear.weight, linear.bias):
                    heads = values.unflatten(0, (4, 6))
                    # The third head is the first again, and the last the second.
                    heads[2:] = heads[:2].clone()
    before = snapshot(model)
    with torch.no_grad():
        expected = said(model, given)
    calibration = [given, given] if name in PICTURES else TEXT
    report = convert(model, "lowrank_gqa", method="commuting", num_kv_heads=2, calibration=calibration)
    assert {site.kv_heads for site in surgery.find(model)} == {2}
    with torch.no_grad():
        assert_close(said(model, given), expected, 1e-8)
        # The host's own implementations take it as one of their blocks.
        model.set_attn_implementation("eager")
        assert_close(said(model, given), expected, 1e-6)
        model.set_attn_implementation("sdpa")
    report.undo()
    assert_untouched(model, before)
