"""Positions that a converted block counts by itself: those of the host are honoured or refused, never ignored."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from attnzoo import surgery
from attnzoo_kernels.errors import UnsupportedError
from tests.attnzoo.surgery.tiny import LATENT_SMALL, assert_close, calibration, convert, ids, logits, tiny

BY_SLOT = ("latent", "rcmha")


def model_of(kind: str, **host: Any) -> Any:
    model = tiny(**host)
    if kind == "latent":
        width = 2 * model.config.num_key_value_heads * model.config.head_dim
        convert(model, "lowrank_gqa", method="latent", latent_dim=width, calibration=calibration())
    elif kind != "host":
        convert(model, kind)
    return model


def counted(mask: Tensor) -> Tensor:
    """Positions as generation counts them."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def left(*lengths: int, length: int = 12) -> Tensor:
    return (torch.arange(length) >= length - torch.tensor(lengths).unsqueeze(1)).long()


def test_packed_sequences_are_refused_by_landmarks_too() -> None:
    packed = torch.cat([torch.arange(10), torch.arange(10)]).unsqueeze(0)
    for kind in ("landmark", *BY_SLOT, "moh"):
        with pytest.raises(UnsupportedError, match=r"position_ids|attention_mask"):
            logits(model_of(kind), ids(1, 20), position_ids=packed, use_cache=False)


@pytest.mark.parametrize("kind", BY_SLOT)
@pytest.mark.parametrize("count", ["tokens", "slots"])
def test_padding_on_the_left_shifts_nothing_in_later_calls(kind: str, count: str) -> None:
    mask, tokens = left(12, 7), ids(2, 12)
    places = counted(mask) if count == "tokens" else torch.arange(12).expand(2, 12)
    said = []
    for model in (model_of("host"), model_of(kind)):
        cache = DynamicCache(config=model.config)
        parts = [
            logits(
                model,
                tokens[:, part],
                attention_mask=mask[:, : part.stop],
                position_ids=places[:, part],
                past_key_values=cache,
            )
            for part in (slice(0, 9), slice(9, 10), slice(10, 12))
        ]
        said.append(torch.cat(parts, 1)[mask.bool()])
    assert_close(said[1], said[0], 1e-8)


@pytest.mark.parametrize("kind", BY_SLOT)
def test_a_sequence_may_begin_anywhere_but_not_jump(kind: str) -> None:
    model, tokens = model_of(kind), ids(1, 20)
    assert_close(logits(model, tokens, position_ids=torch.arange(5, 25).unsqueeze(0)), logits(model, tokens), 1e-9)
    for places in (torch.arange(10), torch.arange(50, 60)):
        cache = DynamicCache(config=model.config)
        logits(model, tokens[:, :10], past_key_values=cache)
        with pytest.raises(UnsupportedError, match="position_ids: expected consecutive positions"):
            logits(model, tokens[:, 10:], past_key_values=cache, position_ids=places.unsqueeze(0))


@pytest.mark.parametrize("kind", BY_SLOT)
def test_the_same_tensor_of_positions_may_be_right_once_and_wrong_later(kind: str) -> None:
    model, tokens, places = model_of(kind), ids(1, 20), torch.arange(10, 20).unsqueeze(0)
    for length in (10, 9, 10):
        cache = DynamicCache(config=model.config)
        logits(model, tokens[:, :length], past_key_values=cache)
        if length == 10:
            logits(model, tokens[:, 10:], past_key_values=cache, position_ids=places)
        else:
            with pytest.raises(UnsupportedError, match="position_ids: expected consecutive positions"):
                logits(model, tokens[:, 10:], past_key_values=cache, position_ids=places)


def test_padding_between_tokens_is_honoured_or_refused() -> None:
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[0, 7:9] = 0
    tokens, real = ids(1, 20), mask[0].bool()
    for kind in ("host", "rcmha"):
        model = model_of(kind)
        said = logits(model, tokens, attention_mask=mask, position_ids=counted(mask))[:, real]
        assert_close(said, logits(model, tokens[:, real]), 1e-8)
    # Slots are what a latent counts, and tokens what a layer counts.
    said = logits(model_of("latent"), tokens, attention_mask=mask)[:, real]
    assert_close(said, logits(model_of("host"), tokens, attention_mask=mask)[:, real], 1e-8)
    for kind, places in (("latent", counted(mask)), ("rcmha", torch.arange(20).unsqueeze(0))):
        with pytest.raises(UnsupportedError, match="position_ids: expected consecutive positions"):
            logits(model_of(kind), tokens, attention_mask=mask, position_ids=places)


@pytest.mark.parametrize("variant", ["s2", "mha"])
@pytest.mark.parametrize(("method", "heads"), [("mean", 1), ("expand", 6)])
def test_what_is_read_goes_on_with_another_number_of_kv_heads(variant: str, method: str, heads: int) -> None:
    reading = {"s2": {"block_size": 4, "local_blocks": 2, "vert_stride": 2}, "mha": {"window": 9, "sink": 2}}[variant]
    first, last = tiny(), tiny()
    convert(first, variant, **reading)
    convert(first, "lowrank_gqa", method=method, num_kv_heads=heads)
    convert(last, "lowrank_gqa", method=method, num_kv_heads=heads)
    convert(last, variant, **reading)
    assert_close(logits(first, ids(2, 40)), logits(last, ids(2, 40)), 1e-12)


def rotated(**parameters: Any) -> Any:
    return tiny(dtype=torch.float32, rope_parameters={"rope_theta": 1e4, **parameters})


@pytest.mark.parametrize("variant", ["moh", "rcmha", "landmark"])
def test_hosts_that_ignore_a_partial_rotation_are_followed(variant: str) -> None:
    model, tokens = rotated(rope_type="default", partial_rotary_factor=0.5), ids(2, 14)
    before = logits(model, tokens)
    convert(model, variant)
    assert_close(logits(model, tokens), before, 1e-5)


def test_frequencies_that_follow_the_length_are_warned_of_where_they_are_lost() -> None:
    parameters = {"rope_type": "dynamic", "factor": 4.0}
    for variant in ("moh", "rcmha"):
        with pytest.warns(UserWarning, match="rope_type 'dynamic'"):
            surgery.convert(rotated(**parameters), variant)
    with pytest.warns(UserWarning, match="rope_type 'dynamic'"):
        options = {"latent_dim": LATENT_SMALL, "calibration": [ids(2, 14, seed=i) for i in range(9)]}
        surgery.convert(rotated(**parameters), "lowrank_gqa", method="latent", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        surgery.convert(rotated(**parameters), "mha")
