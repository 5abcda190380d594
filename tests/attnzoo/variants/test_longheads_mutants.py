"""Wrong LongHeads, wrong rings and wrong fetches on purpose: checks that the right ones pass must fail on each."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo import topk
from attnzoo.cache import streams
from attnzoo.cache.streams import Ring
from attnzoo.selection import offloaded_blocks
from attnzoo.variants.longheads import chunks
from attnzoo.variants.longheads.layer import LongHeadsAttention
from tests.attnzoo.cases import assert_same, build, tokens
from tests.attnzoo.variants.test_longheads import config_of, oracle
from tests.attnzoo_kernels.test_mutants import rewrite

LENGTH = 37
SETTINGS: tuple[dict[str, Any], ...] = (
    {"num_kv_heads": 2, "begin": 20},
    {"select": "block", "query_block": 2, "attention_length": 20},
    {"num_kv_heads": 2, "group_select": True, "chunk_rep": "mean_key"},
    {"rotary": attnzoo.RotaryConfig(interleaved=True)},
    {"official_quirks": True},
)


def padding_of(batch: int) -> Tensor:
    return torch.rand(batch, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.2


@lru_cache
def truth(setting: int) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A configuration, its input, and what the definition gives for it, alone and with padding."""
    config = config_of(**SETTINGS[setting])
    layer = build(config, dtype=torch.float64)
    x = tokens(layer, 2, LENGTH)
    with torch.no_grad():
        return config, x, oracle(layer, x).out, oracle(layer, x, padding_of(2)).out


def check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, in pieces, ragged, and fetched, against the definition."""
    monkeypatch.setattr(streams, "CROP_MARGIN", 2)
    padding = padding_of(2)
    for setting in range(len(SETTINGS)):
        config, x, expected, ragged = truth(setting)
        layer = build(config, dtype=torch.float64)
        with torch.no_grad():
            assert_same(layer(x), expected)
            assert_same(layer.attend(x, key_padding=padding).out, ragged)
            if config.official_quirks:
                continue
            for far, ends in (
                (False, [5, 18, 19, 26, LENGTH]),
                (False, [22, 23, 24, 25, 26, LENGTH]),
                (True, [15, 20]),
            ):
                cache, other = (layer.new_cache(2, LENGTH, offload=far) for _ in range(2))
                for a, b in pairwise([0, *ends]):
                    assert_same(layer.attend(x[:, a:b], cache=cache).out, expected[:, a:b])
                    out = layer.attend(x[:, a:b], key_padding=padding[:, a:b], cache=other).out
                    assert_same(out, ragged[:, a:b])


MUTANTS: dict[str, tuple[Any, str, str, str]] = {
    "the query a slot too near": (LongHeadsAttention, "_moved", "config.slots - 1", "config.slots - 2"),
    "the threshold moved by one": (LongHeadsAttention, "_moved", "slot < config.first", "slot <= config.first"),
    "quirks moved by one": (LongHeadsAttention, "_chunk_inputs", "slot >= self", "slot > self"),
    "the chunk before not forced": (chunks, "_chosen", "last = own - 1", "last = own - 2"),
    "every row asks": (chunks, "_chosen", "first - first % grid.block_q", "first"),
    "chunk 0 among the candidates": (chunks, "_best", "chunk >= 1", "chunk >= 0"),
    "a later query asks": (chunks, "_best", "token + queries", "token + 1 + queries"),
    "the best head of a group decides": (chunks, "_best", ".sum(2)", ".amax(2)"),
    "chunks by the call's own grid": (LongHeadsAttention, "_complete", "offset - offset % size", "offset"),
    "a chunk's rows one too late": (LongHeadsAttention, "_complete", "slot - offset + before", "slot - offset + size"),
    "chunk queries not averaged": (LongHeadsAttention, "chunk_keys", "out.mean(3)", "out.sum(3)"),
    "values as queries in another order": (
        LongHeadsAttention,
        "chunk_keys",
        "self._in_halves(out.mean(3))",
        "out.mean(3)",
    ),
    "no chunk completes in ragged calls": (LongHeadsAttention, "_may_complete", "return bool(", "return False and ("),
    "keys at their own positions": (LongHeadsAttention, "remember", "slot - slot % size", "slot - slot"),
    "the lowest scores": (topk, "top_blocks", "descending=True", "descending=False"),
    "unordered choices": (topk, "top_blocks", "blocks).sort(-1).values", "blocks)"),
    "a ring that starts late": (Ring, "write", "(before + first)", "(before + first + 1)"),
    "a ring that keeps the first tokens": (Ring, "_write_ragged", "token >= count - self.rows", "token < self.rows"),
    "history from before the last token": (Ring, "last", "torch.arange(-count, 0", "torch.arange(-count - 1, -1"),
    "a fetched row one block further": (offloaded_blocks, "_moved_positions", "(before - 1) * block", "before * block"),
    "fetched blocks in another order": (offloaded_blocks, "fetch_blocks", "(~used)", "used"),
}


def test_the_right_one_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, function, old, new = MUTANTS[name]
    rewrite(monkeypatch, owner, function, old, new)
    if function == "top_blocks":
        monkeypatch.setattr("attnzoo.variants.longheads.chunks.top_blocks", topk.top_blocks)
    if function == "fetch_blocks":
        monkeypatch.setattr("attnzoo.selection.offloading.fetch_blocks", offloaded_blocks.fetch_blocks)
    with pytest.raises((AssertionError, ValueError, RuntimeError, IndexError)):
        check(monkeypatch)
