"""LongHeads in a pretrained model: the same function below the threshold, one function in any split beyond it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import attnzoo
from attnzoo import surgery
from attnzoo.oracles.longheads import Chunks, longheads
from attnzoo.oracles.mha import Recipe
from tests.attnzoo.surgery.hosts.masks import padding_mask
from tests.attnzoo.surgery.tiny import assert_close, assert_untouched, ids, logits, snapshot, tiny

OPTIONS: dict[str, Any] = {"chunk_size": 4, "attention_length": 16}
EXACT = 1e-10


def replace_blocks(model: Any, **options: Any) -> surgery.ConversionReport:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return surgery.convert(model, "longheads", **{**OPTIONS, **options})


class Oracle(nn.Module):
    """The definition in the place of a host's block."""

    def __init__(self, block: Any, recipe: Recipe, chunks: Chunks) -> None:
        super().__init__()
        self.block, self.recipe, self.chunks = block, recipe, chunks

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        weights = {name: p for name, p in self.block.named_parameters() if "proj" in name}
        return longheads(hidden_states, weights, self.recipe, self.chunks).out, None


@pytest.mark.parametrize("select", ["token", "block"])
def test_a_converted_model_computes_the_definition(select: Any) -> None:
    model, tokens = tiny(), ids(2, 41)
    before = logits(model, tokens)
    recipe = Recipe(num_heads=6, num_kv_heads=2, head_dim=16, rotary_base=10000.0)
    chunks = Chunks(size=4, slots=4, select=select, block_q=4 if select == "block" else 1)
    blocks = [layer.self_attn for layer in model.model.layers]
    for layer in model.model.layers:
        layer.self_attn = Oracle(layer.self_attn, recipe, chunks)
    expected = logits(model, tokens)
    for layer, block in zip(model.model.layers, blocks, strict=True):
        layer.self_attn = block
    replace_blocks(model, select=select)
    found = logits(model, tokens)
    assert_close(found, expected, EXACT)
    assert_close(found[:, :16], before[:, :16], EXACT)
    assert float((found - before)[:, 16:].abs().amax(-1).min()) > 1e-6


def test_a_conversion_says_what_it_loses_and_undo_takes_it_back() -> None:
    model, tokens = tiny(), ids(1, 30)
    before, expected = snapshot(model), logits(model, tokens)
    with pytest.warns(UserWarning, match=r"longheads: the same function up to 16 tokens; .* reads 16 of them"):
        report = surgery.convert(model, "longheads", **OPTIONS)
    report.undo()
    assert_untouched(model, before)
    assert torch.equal(logits(model, tokens), expected)


@pytest.mark.parametrize("select", ["token", "block"])
@pytest.mark.parametrize("padding", [[0, 0], [0, 11], [25, 3]])
def test_generating_is_prefill_with_padding_on_both_sides_of_the_threshold(select: Any, padding: list[int]) -> None:
    model, tokens = tiny(), ids(2, 26)
    replace_blocks(model, select=select)
    mask = padding_mask(padding, 26)
    with torch.no_grad():
        out = model.generate(
            tokens * mask, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None
        )
    whole = torch.cat([mask, torch.ones(2, 20, dtype=mask.dtype)], 1)
    said = logits(model, out, attention_mask=whole)[:, 25:-1].argmax(-1)
    assert torch.equal(said, out[:, 26:])


def test_chunks_of_any_size_through_the_hosts_cache_are_one_call() -> None:
    model, tokens = tiny(), ids(2, 45)
    replace_blocks(model)
    expected = logits(model, tokens)
    cache = DynamicCache(config=model.config)
    parts = [logits(model, part, past_key_values=cache) for part in tokens.split([7, 9, 1, 1, 14, 13], 1)]
    assert_close(torch.cat(parts, 1), expected, EXACT)
    cache.crop(-12)
    assert_close(logits(model, tokens[:, 33:], past_key_values=cache), expected[:, 33:], EXACT)


def test_a_saved_model_is_the_same_and_loads_alone(tmp_path: Path) -> None:
    model, tokens = tiny(dtype=torch.float32), ids(1, 40)
    replace_blocks(model, where=lambda site: site.layer == 1, select="block")
    expected = logits(model, tokens)
    surgery.save(model, tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded, _ = surgery.load(tmp_path / "saved")
    assert_close(logits(loaded, tokens), expected, 1e-5)
    assert loaded.model.layers[1].self_attn.layer.config.select == "block"


def test_a_converted_model_trains() -> None:
    model, tokens = tiny(), ids(2, 30)
    replace_blocks(model)
    model.train()
    with attnzoo.record(model) as record:
        model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(0 < plan.density < 1 for plans in record.plans.values() for plan in plans)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"chunk_size": 5}, "attention_length"),
        ({"attention_length": 12}, "attention_length"),
        ({"official_quirks": True}, "official_quirks"),
        ({"num_heads": 3}, "num_heads"),
        ({"chunks": 3}, "chunks"),
    ],
)
def test_bad_options_are_refused_and_change_nothing(options: dict[str, Any], name: str) -> None:
    model = tiny()
    before = snapshot(model)
    with pytest.raises(attnzoo.ConfigError, match=f"^{name}: expected"):
        replace_blocks(model, **options)
    assert_untouched(model, before)
