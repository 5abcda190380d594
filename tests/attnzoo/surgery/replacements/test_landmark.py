"""Landmark attention in a pretrained model: the same function at first, the same in pieces always, and the way back."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import attnzoo
from attnzoo import surgery
from tests.attnzoo.surgery.hosts.masks import padding_mask
from tests.attnzoo.surgery.hosts.test_hosts import MERGEABLE, ROUNDED, host
from tests.attnzoo.surgery.tiny import assert_close, assert_untouched, ids, logits, snapshot, tiny

EXACT = 1e-11
TOKENS = 33


def replace_blocks(model: Any, **options: Any) -> surgery.ConversionReport:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="landmark with gate_mix > 0")
        return surgery.convert(model, "landmark", **{"block_size": 6, **options})


HEALED: dict[str, dict[str, Any]] = {"soft": {"gate_mix": 1.0}, "topk": {"gate_mix": 1.0, "mode": "topk", "top_k": 2}}


def healed(mode: str, **more: Any) -> Any:
    """A tiny host whose landmarks matter."""
    model = tiny(**more)
    replace_blocks(model, **HEALED[mode])
    return model


@pytest.mark.parametrize(("heads", "groups"), [(9, 3), (4, 4), (4, 1)])
@pytest.mark.parametrize("padding", [[0, 0], [0, 11], [29, 3]])
@pytest.mark.parametrize("right", [False, True])
def test_without_gates_a_converted_model_is_the_original(
    heads: int, groups: int, padding: list[int], right: bool
) -> None:
    model, tokens, mask = tiny(heads, groups, attention_bias=True), ids(2, TOKENS), padding_mask(padding, TOKENS)
    mask = mask.flip(1) if right else mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for more in ({}, {"position_ids": positions}):
        expected = logits(model, tokens, attention_mask=mask, **more)
        report = replace_blocks(model)
        with attnzoo.record(model) as record:
            found = logits(model, tokens, attention_mask=mask, **more)
        assert found.shape == expected.shape
        assert_close(found[mask.bool()], expected[mask.bool()], EXACT)
        assert [len(plans) for plans in record.plans.values()] == [1, 1]
        report.undo()


@pytest.mark.parametrize("name", MERGEABLE)
@pytest.mark.parametrize("padding", [[0, 0], [0, 11]])
def test_relatives_of_the_host_say_the_same(name: str, padding: list[int]) -> None:
    model, tokens, mask = host(name), ids(2, TOKENS), padding_mask(padding, TOKENS)
    expected = logits(model, tokens, attention_mask=mask)[mask.bool()]
    replace_blocks(model)
    assert_close(logits(model, tokens, attention_mask=mask)[mask.bool()], expected, ROUNDED)


def test_the_mix_leads_away_step_by_step_and_back() -> None:
    model, tokens = tiny(), ids(2, TOKENS)
    expected = logits(model, tokens)
    replace_blocks(model)
    distances = []
    for mix in (0.0, 0.1, 0.5, 1.0):
        surgery.set_gate_mix(model, mix)
        distances.append(float((logits(model, tokens) - expected).abs().max()))
    assert distances == sorted(distances)
    assert distances[0] < EXACT * 100 < 1e-3 < distances[1]
    with pytest.raises(ValueError, match="gate_mix: expected a number from 0 to 1, got 2"):
        surgery.set_gate_mix(model, 2)
    with pytest.raises(attnzoo.ConversionError, match="model: expected one that was converted to 'landmark'"):
        surgery.set_gate_mix(tiny(), 1.0)


@pytest.mark.parametrize("mode", HEALED)
@pytest.mark.parametrize(
    "chunks", [[33], pytest.param([1] * 33, marks=pytest.mark.slow), [4, 1, 2, 5, 6, 7, 8], [5, 5, 1, 1, 20, 1]]
)
@pytest.mark.parametrize("padding", [[0, 0], [0, 9]])
def test_calls_of_any_lengths_say_what_one_says(mode: str, chunks: list[int], padding: list[int]) -> None:
    model, tokens, mask = healed(mode), ids(2, TOKENS), padding_mask(padding, TOKENS)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = logits(model, tokens, attention_mask=mask, position_ids=positions)
    cache, found, first = DynamicCache(config=model.config), [], 0
    for count in chunks:
        part = slice(first, first + count)
        first += count
        options = {"attention_mask": mask[:, :first], "position_ids": positions[:, part], "past_key_values": cache}
        found.append(logits(model, tokens[:, part], **options))
        assert cache.get_seq_length() == first
    assert_close(torch.cat(found, 1)[mask.bool()], expected[mask.bool()], EXACT)


def by_full_forwards(model: Any, tokens: Tensor, count: int) -> Tensor:
    for _ in range(count):
        tokens = torch.cat([tokens, logits(model, tokens, use_cache=False)[:, -1:].argmax(-1)], 1)
    return tokens


@pytest.mark.parametrize("mode", HEALED)
def test_generating_equals_full_forwards_and_padding_does_not_matter(mode: str) -> None:
    model, padding, tokens = healed(mode), [0, 9, 3], ids(3, 14)
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    found = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    assert torch.equal(found, by_full_forwards(model, tokens, 30))
    mask = padding_mask(padding, 14)
    together = model.generate(tokens * mask, attention_mask=mask, **options)
    for item, pad in enumerate(padding):
        alone = tokens[item : item + 1, pad:]
        expected = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
        assert torch.equal(together[item, 14:], expected[0, 14 - pad :])


@pytest.mark.parametrize("mode", HEALED)
def test_beams_take_their_caches_along(mode: str) -> None:
    model, tokens, mask = healed(mode), ids(2, 14), padding_mask([0, 5], 14)
    options: dict[str, Any] = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    cached, plain = (
        model.generate(tokens * mask, attention_mask=mask, use_cache=use, **options) for use in (True, False)
    )
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("padding", [[0, 0, 0], [0, 7, 3]])
@pytest.mark.parametrize("mode", HEALED)
def test_a_cache_is_cut_back_repeated_chosen_from_and_emptied(mode: str, padding: list[int]) -> None:
    model, tokens, other = healed(mode), ids(3, 20), ids(3, 8, seed=8)
    mask = padding_mask(padding, 20)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    first = logits(model, tokens, attention_mask=mask, position_ids=positions, past_key_values=cache)
    cache.crop(-7)
    assert cache.get_seq_length() == 13
    cache.batch_repeat_interleave(2)
    pick = torch.tensor([4, 0, 3])
    cache.batch_select_indices(pick)
    source = pick // 2
    seen = torch.cat([mask[source, :13], torch.ones(3, 8, dtype=torch.long)], 1)
    places = (seen.cumsum(1) - 1).clamp(min=0)
    said = logits(model, other, attention_mask=seen, position_ids=places[:, 13:], past_key_values=cache)
    whole = torch.cat([tokens[source, :13], other], 1)
    expected = logits(model, whole, attention_mask=seen, position_ids=places, use_cache=False)
    assert_close(said, expected[:, 13:], EXACT)
    cache.reset()
    assert cache.get_seq_length() == 0
    again = logits(model, tokens, attention_mask=mask, position_ids=positions, past_key_values=cache)
    assert_close(again[mask.bool()], first[mask.bool()], EXACT)


@torch.no_grad()
def test_all_that_comes_out_is_of_the_given_tokens() -> None:
    model, tokens = tiny(), ids(2, TOKENS)
    expected = model(tokens, labels=tokens, output_hidden_states=True)
    embeddings = model.get_input_embeddings()(tokens)
    replace_blocks(model)
    found = model(inputs_embeds=embeddings, labels=tokens, output_hidden_states=True)
    assert_close(found.loss, expected.loss, EXACT)
    assert len(found.hidden_states) == len(expected.hidden_states)
    for mine, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert_close(mine, theirs, EXACT)
    assert found.past_key_values.get_seq_length() == TOKENS
    assert_close(model(tokens, return_dict=False, use_cache=False)[0], expected.logits, EXACT)
    assert_close(model.model(tokens, None).last_hidden_state, expected.hidden_states[-1], EXACT)
    assert_close(model(tokens, logits_to_keep=1).logits, expected.logits[:, -1:], EXACT)
    assert model(tokens[:, :0], use_cache=False).logits.shape == (2, 0, expected.logits.shape[2])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_healing_reaches_the_landmarks_and_checkpointing_recomputes_the_same() -> None:
    model, tokens = healed("soft"), ids(2, TOKENS)
    embedding = model.model.landmark_tokens.embedding
    assert torch.allclose(embedding, model.model.embed_tokens.weight.mean(0))
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert float(embedding.grad.abs().max()) > 0
    for mine, theirs in zip(*grads, strict=True):
        assert_close(mine, theirs, EXACT)


def test_what_is_set_and_learnt_is_saved(tmp_path: Path) -> None:
    model, base, tokens = tiny(), tiny(), ids(2, TOKENS)
    replace_blocks(model, top_k=2)
    surgery.set_gate_mix(model, 0.75)
    with torch.no_grad():
        model.model.landmark_tokens.embedding.add_(0.5)
    for module in model.modules():
        if isinstance(module, attnzoo.LandmarkAttention):
            module.mode = "topk"
    expected = logits(model, tokens)
    adapter, _ = surgery.load(surgery.save(model, tmp_path / "adapter", adapter_only=True), base=base)
    assert torch.equal(logits(adapter, tokens), expected)
    whole = tiny(dtype=torch.float32)
    replace_blocks(whole, gate_mix=1.0)
    loaded, _ = surgery.load(surgery.save(whole, tmp_path / "whole"))
    assert_close(logits(loaded, tokens), logits(whole, tokens), 1e-5)
    assert [m.gate_mix for m in loaded.modules() if isinstance(m, attnzoo.LandmarkAttention)] == [1.0, 1.0]


def test_undo_leaves_nothing_and_copies_go_their_own_way() -> None:
    model, tokens = tiny(), ids(2, TOKENS)
    before, expected = snapshot(model), logits(model, tokens)
    report = replace_blocks(model, gate_mix=1.0)
    converted = logits(model, tokens)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.no_grad():
        model.model.landmark_tokens.embedding.zero_()
    for twin in twins:
        assert torch.equal(logits(twin, tokens), converted)
    report.undo()
    assert_untouched(model, before)
    assert torch.equal(logits(model, tokens), expected)
    assert not model.model._forward_hooks
    assert not model.model._forward_pre_hooks
    with pytest.raises(attnzoo.ConversionError):
        report.undo()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"where": lambda site: site.layer == 1}, "where: expected all 2 sites, which 'landmark' needs, got 1"),
        ({"landmark_positions": True}, "landmark_positions: expected one of options for 'landmark'"),
        ({"official_quirks": True}, "official_quirks: expected one of options for 'landmark'"),
        ({"block_size": 1}, "block_size: expected"),
        ({"calibration": [torch.ones(1, 4, dtype=torch.int64)]}, "calibration: expected None"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_changed(options: dict[str, Any], match: str) -> None:
    model = tiny()
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        replace_blocks(model, **options)
    assert_untouched(model, before)
    replace_blocks(model)
    before = snapshot(model)
    with pytest.raises(attnzoo.UnsupportedError, match="replacement by 'landmark' already"):
        replace_blocks(model)
    assert_untouched(model, before)


def test_landmarks_are_counted_among_the_bytes_of_the_cache() -> None:
    model = tiny()
    before = surgery.cache_bytes(model)
    report = replace_blocks(model, block_size=5)
    assert report.cache_bytes == (before, before * 5 // 4)
    assert surgery.cache_bytes(model) == before * 5 // 4


def test_a_start_that_is_another_function_is_warned_about() -> None:
    for options in ({"gate_mix": 0.5}, {"mode": "topk"}, {"mode": None}):
        with pytest.warns(UserWarning, match="has never seen landmarks"):
            surgery.convert(tiny(), "landmark", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        surgery.convert(tiny(), "landmark")


def test_masks_and_caches_that_cannot_be_honoured_are_refused_by_name() -> None:
    model, tokens = healed("topk"), ids(2, 10)
    foreign = DynamicCache(config=model.config)
    logits(tiny(), tokens, past_key_values=foreign)
    with pytest.raises(attnzoo.ShapeError, match="past_key_values: expected an empty cache"):
        logits(model, tokens, past_key_values=foreign)
    other = tiny()
    replace_blocks(other, block_size=5)
    blocks_of_five = DynamicCache(config=model.config)
    logits(other, tokens, past_key_values=blocks_of_five)
    with pytest.raises(attnzoo.ShapeError, match="past_key_values: expected an empty cache"):
        logits(model, tokens, past_key_values=blocks_of_five)
    with pytest.raises(attnzoo.UnsupportedError, match="past_key_values: expected a DynamicCache"):
        logits(model, tokens, past_key_values=StaticCache(config=model.config, max_cache_len=32))
    with pytest.raises(attnzoo.UnsupportedError, match="attention_mask: expected the host's 2-D padding mask"):
        logits(model, tokens, attention_mask=torch.zeros(2, 1, 10, 10))
    with pytest.raises(ValueError, match="input_ids: expected either ids or inputs_embeds"):
        model.model()
    cache = DynamicCache(config=model.config)
    logits(model, tokens, attention_mask=padding_mask([0, 3], 10), past_key_values=cache)
    for more in ({}, {"attention_mask": padding_mask([0, 2], 11)}, {"attention_mask": padding_mask([0, 3], 10)}):
        with pytest.raises(attnzoo.ShapeError, match=r"^attention_mask: expected"):
            logits(model, tokens[:, :1], past_key_values=cache, **more)
    seen = padding_mask([0, 3], 11)
    assert logits(model, tokens[:, :1], past_key_values=cache, attention_mask=seen).isfinite().all()


def test_a_recipe_for_some_blocks_alone_is_refused(tmp_path: Path) -> None:
    model = tiny(dtype=torch.float32)
    replace_blocks(model)
    folder = surgery.save(model, tmp_path / "model")
    about = json.loads((folder / "attnzoo_config.json").read_text())
    del about["recipe"][1]
    (folder / "attnzoo_config.json").write_text(json.dumps(about))
    with pytest.raises(attnzoo.ConversionError, match="expected replacements by 'landmark' in all 2 blocks, got 1"):
        surgery.load(folder)


@pytest.mark.slow
def test_healing_leads_a_model_that_copies_from_afar_to_its_landmarks() -> None:
    """Copying needs the blocks of 28 tokens ago; suddenly gated it is lost, and a ramp of the mix brings it back."""
    generator, period = torch.Generator().manual_seed(0), 28
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=24,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                pad_token_id=None,
                bos_token_id=None,
                eos_token_id=None,
            )
        )

    def loss(batch: int) -> Tensor:
        tokens = torch.randint(0, 24, (batch, period), generator=generator).repeat(1, 2)
        first = torch.arange(2 * period) < period
        found: Tensor = model(tokens, labels=tokens.masked_fill(first, -100), use_cache=False).loss
        return found

    def train(steps: int, rate: float, ramp: int | None = None) -> None:
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=rate)
        for step in range(steps):
            if ramp is not None:
                surgery.set_gate_mix(model, min(1.0, (step + 1) / ramp))
            optimizer.zero_grad()
            loss(32).backward()
            optimizer.step()
        model.eval()

    def held_out() -> float:
        with torch.no_grad():
            return float(loss(64))

    train(120, 2e-3)
    dense = held_out()
    surgery.convert(model, "landmark", block_size=8)
    assert held_out() <= dense + 0.01
    surgery.set_gate_mix(model, 1.0)
    assert held_out() >= dense + 1
    train(120, 1e-3, ramp=80)
    assert held_out() <= dense + 0.05
