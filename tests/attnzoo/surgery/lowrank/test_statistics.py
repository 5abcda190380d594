"""Calibration statistics against sums over what hooks of our own see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnzoo import surgery
from tests.attnzoo.surgery.hosts.hooks import seen_by_hooks, with_one
from tests.attnzoo.surgery.tiny import (
    VOCAB,
    assert_close,
    assert_untouched,
    calibration,
    converted,
    ids,
    snapshot,
    tiny,
)

ROUNDED = 1e-5
"""Sums of some hundred products of rounded fp32 numbers, relative to the largest."""

PATHS = ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def padded_batches() -> list[dict[str, Tensor]]:
    """A batch without padding, one padded on the left and one on the right."""
    left = torch.ones(2, 12, dtype=torch.long)
    left[1, :5] = 0
    right = left.flip(1)
    return [
        {"input_ids": ids(2, 9, seed=1)},
        {"input_ids": ids(2, 12, seed=2), "attention_mask": left},
        {"input_ids": ids(2, 12, seed=3), "attention_mask": right},
    ]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4)])
def test_statistics_are_the_sums_over_what_hooks_see(heads: int, groups: int, padded: bool, bias: bool) -> None:
    model = tiny(heads, groups, attention_bias=bias)
    batches = padded_batches() if padded else [{"input_ids": x} for x in calibration()]
    statistics = surgery.collect(model, surgery.find(model), batches)
    assert list(statistics.sites) == PATHS
    for path, found in statistics.sites.items():
        seen = seen_by_hooks(model, batches, path)
        x, g, first = with_one(seen["x"], bias), seen["g"], with_one(seen["first"], bias)
        weight = g.square().sum(1, keepdim=True)
        assert (found.tokens, found.sequences) == (len(x), len(first))
        assert found.weighted is not None
        assert found.fisher is not None
        for ours, theirs in (
            (found.moment, x.T @ x),
            (found.first, first.T @ first),
            (found.weighted, (x * weight).T @ x),
            (found.fisher, g.T @ g),
        ):
            assert ours.dtype == torch.float64
            scale = float(theirs.abs().max())
            assert_close(ours / scale, theirs / scale, ROUNDED)


def test_streaming_over_batches_equals_one_batch() -> None:
    model, text = tiny(), calibration(4, 2, 20)
    sites = surgery.find(model)
    streamed, whole = (surgery.collect(model, sites, batches) for batches in (iter(text), [torch.cat(text)]))
    for path in PATHS:
        here, there = streamed.sites[path], whole.sites[path]
        assert (here.tokens, here.sequences) == (there.tokens, there.sequences) == (160, 8)
        for name in ("moment", "first", "weighted", "fisher"):
            ours, theirs = getattr(here, name), getattr(there, name)
            scale = float(theirs.abs().max())
            assert_close(ours / scale, theirs / scale, ROUNDED)


def test_what_stands_in_padding_changes_nothing() -> None:
    model = tiny()
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[0, :6] = 0
    one = ids(2, 16)
    other = torch.where(mask.bool(), one, (one + 7) % VOCAB)
    found = [
        surgery.collect(model, surgery.find(model), [{"input_ids": tokens, "attention_mask": mask}])
        for tokens in (one, other)
    ]
    for path in PATHS:
        for name in ("moment", "first", "weighted", "fisher"):
            torch.testing.assert_close(*(getattr(statistics.sites[path], name) for statistics in found))


def test_left_and_right_padding_say_the_same() -> None:
    model, tokens = tiny(), ids(1, 10)
    fill = torch.zeros(1, 6, dtype=torch.long)
    found = []
    for parts in ([fill, tokens], [tokens, fill], [tokens]):
        whole = torch.cat(parts, 1)
        batch = {"input_ids": whole, "attention_mask": (whole != 0).long()}
        found.append(surgery.collect(model, surgery.find(model), [batch]).sites[PATHS[1]])
    for site in found[:2]:
        for name in ("moment", "first", "weighted", "fisher"):
            ours, theirs = getattr(site, name), getattr(found[2], name)
            scale = float(theirs.abs().max())
            assert_close(ours / scale, theirs / scale, ROUNDED)


def test_without_gradients_there_is_no_backward_and_no_fisher_matrix() -> None:
    model = tiny()
    found = surgery.collect(model, surgery.find(model), calibration(), gradients=False)
    assert not found.with_gradients
    assert all(site.fisher is None and site.weighted is None for site in found.sites.values())
    both = surgery.collect(model, surgery.find(model), calibration())
    for path in PATHS:
        torch.testing.assert_close(found.sites[path].moment, both.sites[path].moment)


@pytest.mark.parametrize("gradients", [True, False])
def test_collecting_leaves_the_model_as_it_was(gradients: bool) -> None:
    model = tiny().train()
    model.model.layers[0].requires_grad_(False)
    model.model.layers[1].mlp.eval()
    before = snapshot(model)
    surgery.collect(model, surgery.find(model), calibration(), gradients=gradients)
    assert_untouched(model, before)


def test_collecting_works_inside_no_grad() -> None:
    model = tiny()
    with torch.no_grad():
        found = surgery.collect(model, surgery.find(model), calibration())
    assert all(bool(site.fisher.any()) for site in found.sites.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_of_low_precision_models_are_finite_and_close(dtype: torch.dtype) -> None:
    # Gradients of a summed loss through fp16 must not overflow at this size; moments are of rounded inputs.
    exact, rounded = tiny(), tiny(dtype=dtype)
    there = surgery.collect(exact, surgery.find(exact), calibration())
    here = surgery.collect(rounded, surgery.find(rounded), calibration())
    for path in PATHS:
        ours, theirs = here.sites[path].mean_moment(), there.sites[path].mean_moment()
        scale = float(theirs.abs().max())
        assert ours.dtype == torch.float64
        assert_close(ours / scale, theirs / scale, 16 * torch.finfo(dtype).eps)
        fisher = here.sites[path].fisher
        assert fisher is not None
        assert bool(fisher.isfinite().all())


def test_statistics_can_be_collected_once_and_used_for_several_conversions() -> None:
    text = calibration()
    model = tiny()
    statistics = surgery.collect(model, surgery.find(model), text)
    for options in ({"method": "latent", "latent_dim": 20}, {"method": "commuting", "num_kv_heads": 1}):
        here, there = tiny(), tiny()
        surgery.convert(here, "lowrank_gqa", calibration=statistics, **options)
        surgery.convert(there, "lowrank_gqa", calibration=text, **options)
        for name, x in here.state_dict().items():
            assert torch.equal(x, there.state_dict()[name]), name


def test_ids_of_one_sequence_and_mappings_are_taken_as_batches() -> None:
    model, tokens = tiny(), ids(1, 12)
    sites = surgery.find(model)
    found = [
        surgery.collect(model, sites, [given]).sites[PATHS[0]] for given in (tokens, tokens[0], {"input_ids": tokens})
    ]
    assert torch.equal(found[0].moment, found[1].moment)
    assert torch.equal(found[0].moment, found[2].moment)


def test_progress_is_told_of_every_batch() -> None:
    model, told = tiny(), []
    surgery.collect(model, surgery.find(model), calibration(), progress=lambda *seen: told.append(seen[1:]))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_statistics_of_a_converted_model_are_of_what_it_reads_now() -> None:
    dense, sparse = tiny(), converted("window")
    first, second = (surgery.collect(m, surgery.find(m), calibration()).sites[PATHS[1]] for m in (dense, sparse))
    assert float((first.moment - second.moment).abs().max()) > 1e-3
