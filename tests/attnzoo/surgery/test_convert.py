"""Conversions of what is read: what they compute, and that nothing else changes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import attnzoo
from attnzoo import surgery
from tests.attnzoo.surgery.hosts.masks import for_host, groups_of, padding_mask, s2_mask, window_mask
from tests.attnzoo.surgery.tiny import (
    KINDS,
    READING,
    WIDTH,
    assert_close,
    assert_untouched,
    calibration,
    convert,
    converted,
    ids,
    logits,
    replace_mha,
    snapshot,
    tiny,
)

EXACT = 1e-11
"""What sums of some hundred fp64 products may differ by when taken in another order, through two or three layers."""

TOKENS = 30
PADDING = [0, 11]


def test_sites_are_found_with_path_host_and_sizes() -> None:
    sites = surgery.find(tiny(9, 3, layers=3))
    assert [site.path for site in sites] == [f"model.layers.{i}.self_attn" for i in range(3)]
    assert [site.layer for site in sites] == [0, 1, 2]
    assert {site.host for site in sites} == {"llama"}
    assert {(s.heads, s.kv_heads, s.head_dim, s.width) for s in sites} == {(9, 3, WIDTH, 9 * WIDTH)}


def test_a_block_that_is_applied_twice_is_one_site() -> None:
    model = tiny(layers=3)
    model.model.layers[2].self_attn = model.model.layers[0].self_attn
    assert [site.path for site in surgery.find(model)] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def test_a_model_without_attention_blocks_has_no_sites_and_cannot_be_converted() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    assert surgery.find(model) == ()
    with pytest.raises(attnzoo.ConfigError, match=r"^model: "):
        surgery.convert(model, "mha")


@pytest.mark.parametrize(("heads", "groups"), [(9, 3), (4, 4), (4, 1)])
@pytest.mark.parametrize("padding", [None, PADDING])
def test_converting_to_mha_changes_nothing_and_our_operation_runs(
    heads: int, groups: int, padding: list[int] | None
) -> None:
    model, tokens = tiny(heads, groups), ids(2, TOKENS)
    more = {} if padding is None else {"attention_mask": padding_mask(padding, TOKENS)}
    real = padding_mask(padding or [0, 0], TOKENS).bool()
    expected = logits(model, tokens, **more)[real]
    convert(model, "mha")
    with attnzoo.record(model) as record:
        found = logits(model, tokens, **more)[real]
    assert_close(found, expected, EXACT)
    assert [len(plans) for plans in record.plans.values()] == [1, 1]
    assert all(plan.density == 1 for plans in record.plans.values() for plan in plans)


@pytest.mark.parametrize("padding", [[0, 0], PADDING])
@pytest.mark.parametrize(("heads", "groups"), [(9, 3), (4, 4)])
def test_a_window_with_a_sink_equals_the_host_with_a_dense_mask(heads: int, groups: int, padding: list[int]) -> None:
    model, tokens, real = tiny(heads, groups), ids(2, TOKENS), padding_mask(padding, TOKENS)
    mask = for_host(window_mask(TOKENS, window=9, sink=2), padding, torch.float64)
    expected, plain = logits(model, tokens, attention_mask=mask), logits(model, tokens, attention_mask=real)
    convert(model, "mha", window=9, sink=2, block_size=4)
    found = logits(model, tokens, attention_mask=real)
    assert_close(found[real.bool()], expected[real.bool()], EXACT)
    # The rule is no empty one: the dense model says something else.
    assert float((found - plain)[real.bool()].abs().max()) > 1e-3


@pytest.mark.parametrize("padding", [[0, 0], PADDING])
@pytest.mark.parametrize(("heads", "groups"), [(9, 3), (4, 4), (6, 1)])
@pytest.mark.parametrize("dense", [0, 1])
def test_s2_equals_the_host_with_a_dense_mask(heads: int, groups: int, padding: list[int], dense: int) -> None:
    model, tokens, real = tiny(heads, groups), ids(2, TOKENS), padding_mask(padding, TOKENS)
    # A sink block is the default of surgery: the models were trained to lean on the first tokens.
    mask = s2_mask(TOKENS, groups_of(heads, groups), block=4, local=2, stride=3, sink=1, dense=dense)
    expected = logits(model, tokens, attention_mask=for_host(mask, padding, torch.float64))
    convert(model, "s2", block_size=4, local_blocks=2, vert_stride=3, num_dense_heads=dense)
    with attnzoo.record(model) as record:
        found = logits(model, tokens, attention_mask=real)
    assert_close(found[real.bool()], expected[real.bool()], EXACT)
    lengths = [TOKENS - left for left in padding]
    seen = sum(int(mask[:, :length, :length].sum()) for length in lengths)
    whole = sum(heads * length * (length + 1) // 2 for length in lengths)
    assert all(plan.density == pytest.approx(seen / whole, abs=1e-6) for p in record.plans.values() for plan in p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_mha_in_low_precision_is_as_close_to_fp64_as_the_host_is(dtype: torch.dtype, implementation: str) -> None:
    # Conversion may round otherwise than the host; it may not round worse than the dtype's own unit through two layers.
    model = tiny(dtype=dtype, attn_implementation=implementation)
    tokens = ids(2, TOKENS)
    truth, host = logits(model.double(), tokens), logits(model.to(dtype), tokens)
    convert(model, "mha")
    found = logits(model, tokens)
    assert found.dtype == dtype
    theirs, ours = (float((x.double() - truth).abs().max()) for x in (host, found))
    assert ours <= 2 * theirs + torch.finfo(dtype).eps * float(truth.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_undo_is_bit_exact(kind: str, implementation: str) -> None:
    model, tokens = tiny(attn_implementation=implementation), ids(2, TOKENS)
    before, said = snapshot(model), logits(model, tokens)
    report = _convert_as(model, kind)
    logits(model, tokens)
    report.undo()
    assert_untouched(model, {**before})
    assert torch.equal(logits(model, tokens), said)
    with pytest.raises(attnzoo.ConversionError, match=r"^undo: "):
        report.undo()


def _convert_as(model: Any, kind: str) -> surgery.ConversionReport:
    if kind in READING:
        variant, options = READING[kind]
        return convert(model, variant, **options)
    if kind == "replaced":
        return replace_mha(model)
    size = {"latent": {"latent_dim": 20}, "expand": {"num_kv_heads": 6}}.get(kind, {"num_kv_heads": 1})
    text = calibration() if kind in ("latent", "commuting") else None
    return convert(model, "lowrank_gqa", method=kind, calibration=text, **size)


def test_undo_out_of_order_is_refused_and_in_order_goes_all_the_way_back() -> None:
    model, tokens = tiny(), ids(2, TOKENS)
    before, said = snapshot(model), logits(model, tokens)
    first = _convert_as(model, "window")
    second = _convert_as(model, "mean")
    third = _convert_as(model, "s2")
    with pytest.raises(attnzoo.ConversionError, match=r"^undo: "):
        first.undo()
    third.undo()
    second.undo()
    first.undo()
    assert_untouched(model, before)
    assert torch.equal(logits(model, tokens), said)


def test_a_second_reading_conversion_replaces_the_first() -> None:
    twice, once, tokens = tiny(), tiny(), ids(2, TOKENS)
    _convert_as(twice, "window")
    _convert_as(twice, "s2")
    _convert_as(once, "s2")
    assert torch.equal(logits(twice, tokens), logits(once, tokens))


@pytest.mark.parametrize("order", [("window", "expand"), ("expand", "window")])
def test_reading_rules_and_weights_compose_in_any_order(order: tuple[str, str]) -> None:
    model, tokens = tiny(), ids(2, TOKENS)
    mask = for_host(window_mask(TOKENS, window=9, sink=2), [0, 0], torch.float64)
    before, said = snapshot(model), logits(model, tokens)
    expected = logits(model, tokens, attention_mask=mask)
    reports = [_convert_as(model, kind) for kind in order]
    assert_close(logits(model, tokens), expected, EXACT)
    for report in reversed(reports):
        report.undo()
    assert_untouched(model, before)
    assert torch.equal(logits(model, tokens), said)


def test_a_latent_replacement_follows_a_read_pattern() -> None:
    # A latent of full rank is the identity, so that only the rule is left to be seen.
    model, tokens = tiny(), ids(2, TOKENS)
    mask = for_host(window_mask(TOKENS, window=9, sink=2), [0, 0], torch.float64)
    expected = logits(model, tokens, attention_mask=mask)
    _convert_as(model, "window")
    convert(model, "lowrank_gqa", method="latent", latent_dim=4 * WIDTH, calibration=calibration())
    assert_close(logits(model, tokens), expected, EXACT)


def test_where_chooses_sites_and_leaves_the_others() -> None:
    model, tokens = tiny(layers=3), ids(2, TOKENS)
    untouched = [id(model.model.layers[i].self_attn) for i in (0, 2)]
    report = convert(model, "mha", window=9, sink=2, where=lambda site: site.layer == 1)
    assert [entry.site.layer for entry in report.sites] == [1]
    with attnzoo.record(model) as record:
        found = logits(model, tokens)
    assert {path for path, plans in record.plans.items() if plans} == {"model.layers.1.self_attn"}
    assert [id(model.model.layers[i].self_attn) for i in (0, 2)] == untouched
    everywhere = tiny(layers=3)
    convert(everywhere, "mha", window=9, sink=2)
    assert float((found - logits(everywhere, tokens)).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_prints_one_line_for_each_site_and_goes_into_json(kind: str) -> None:
    model = tiny(layers=2)
    report = _convert_as(model, kind)
    lines = str(report).splitlines()
    assert [any(site.path in line for line in lines) for site in surgery.find(model)] == [True, True]
    assert report.variant in lines[0]
    held = json.loads(json.dumps(report.to_dict()))
    assert (held["variant"], len(held["sites"])) == (report.variant, 2)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("mha", 64),
        ("window", 64),
        ("s2", 64),
        ("latent", 20),
        ("commuting", 32),
        ("mean", 32),
        ("expand", 192),
        ("replaced", 64),
    ],
)
def test_cached_bytes_are_values_of_all_sites_times_their_width(kind: str, values: int) -> None:
    # Two layers; keys and values of two heads of width 16 each make 64 values for a token before.
    model = tiny(dtype=torch.float32)
    assert surgery.cache_bytes(model) == 2 * 64 * 4
    report = _convert_as(model, kind)
    assert report.cache_bytes == (2 * 64 * 4, 2 * values * 4)
    assert surgery.cache_bytes(model) == 2 * values * 4
    report.undo()
    assert surgery.cache_bytes(model) == 2 * 64 * 4


def test_the_cache_really_holds_what_the_report_says() -> None:
    for kind in ("latent", "commuting", "expand"):
        model = converted(kind)
        with torch.no_grad():
            cache = model(ids(1, TOKENS), use_cache=True).past_key_values
        held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
        assert held * 8 == surgery.cache_bytes(model) * TOKENS


@pytest.mark.parametrize("dropped", [("mha", {"window": 9}), ("s2", {"sink_blocks": 0, "block_size": 4})])
def test_dropping_the_sink_warns(dropped: tuple[str, dict[str, Any]]) -> None:
    with pytest.warns(UserWarning, match="sink"):
        convert(tiny(), dropped[0], **dropped[1])


def test_the_mean_of_heads_warns_that_it_is_a_baseline() -> None:
    with pytest.warns(UserWarning, match="baseline"):
        surgery.convert(tiny(), "lowrank_gqa", method="mean", num_kv_heads=1)


def test_training_mode_and_frozen_weights_survive_conversion_and_undo() -> None:
    model = tiny().train()
    model.model.layers[0].self_attn.requires_grad_(False)
    before = snapshot(model)
    report = _convert_as(model, "commuting")
    block = model.model.layers[0].self_attn
    assert block.training
    assert not any(p.requires_grad for p in block.parameters())
    assert all(p.requires_grad for p in model.model.layers[1].self_attn.parameters())
    report.undo()
    assert_untouched(model, before)
