"""Wrong landmark attention on purpose: a small set of checks that the right one passes must fail on every mutant."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo.oracles.landmark import Landmarks, landmark
from attnzoo.variants.landmark import layer as variant
from attnzoo.variants.landmark import retrieval
from attnzoo.variants.landmark.tokens import LandmarkGrid
from tests.attnzoo.cases import assert_same, build, recipe_of, tokens
from tests.attnzoo_kernels.test_mutants import rewrite

Patch = pytest.MonkeyPatch
LENGTH = 38

SETTINGS: tuple[dict[str, Any], ...] = (
    {"num_kv_heads": 2, "top_k": 2, "block_size": 4, "landmark_positions": False, "gate_mix": 0.6},
    {"num_kv_heads": 2, "top_k": 2, "block_size": 3, "rotary": attnzoo.RotaryConfig(base=50.0, interleaved=True)},
)


def layer_of(options: dict[str, Any]) -> Any:
    return build(attnzoo.LandmarkConfig(**{"dim": 32, "num_heads": 4, "mode": "topk", **options}), dtype=torch.float64)


@lru_cache
def truth(setting: int, marked: bool = False) -> Tensor:
    layer = layer_of(SETTINGS[setting])
    config, slot = layer.config, torch.arange(LENGTH)
    rule = Landmarks(
        block=config.block_size, mode="soft" if marked else "topk", top_k=config.top_k, gate_mix=config.gate_mix
    )
    marks = irregular() if marked else None
    behind = (slot + 1) // config.block_size if marks is None else marks[0].long().cumsum(0)
    places = slot if config.landmark_positions else (slot - behind).clamp(min=0)
    x = tokens(layer, 1, LENGTH)
    out = landmark(x, layer.state_dict(), recipe_of(config), rule, is_landmark=marks, positions=places).out
    return out.detach()


def irregular() -> Tensor:
    return (torch.arange(LENGTH) % 11 % 4 == 3).unsqueeze(0)


def called(layer: Any, cache: Any) -> Tensor:
    x, ends = tokens(layer, 1, LENGTH), [0, 10, 11, 12, 13, 14, 25, 26, LENGTH]
    with torch.no_grad():
        return torch.cat([layer.attend(x[:, a:b], cache=cache).out for a, b in pairwise(ends)], 1)


def cropped(layer: Any) -> None:
    x = tokens(layer, 1, LENGTH)
    with torch.no_grad():
        cache = layer.new_cache(1, LENGTH, offload=True)
        layer.attend(torch.cat([x[:, :22], 2 * x[:, 22:]], 1), cache=cache)
        cache.crop(22)
        assert_same(layer.attend(x[:, 22:], cache=cache).out, layer(x)[:, 22:])


def tied(layer: Any) -> None:
    size, top_k = layer.config.block_size, layer.config.top_k
    x = tokens(layer, 1, LENGTH)
    x[:, size - 1 :: size] = tokens(layer, 1, 1, seed=9)
    blocks = layer.attend(x).plan.info["blocks"][0]
    for t in range(LENGTH):
        for row in blocks[:, t].tolist():
            packed = [block for block in row if 0 <= block < t // size - top_k]
            assert packed == list(range(len(packed)))


def check(setting: int) -> None:
    layer = layer_of(SETTINGS[setting])
    x = tokens(layer, 1, LENGTH)
    assert_same(layer(x), truth(setting))
    padded = torch.cat([torch.full_like(x[:, :5], torch.nan), x], 1)
    key_padding = (torch.arange(LENGTH + 5) < 5).unsqueeze(0)
    assert_same(layer.attend(padded, key_padding=key_padding).out[:, 5:], truth(setting))
    assert_same(called(layer, layer.new_cache(1, LENGTH)), truth(setting))
    assert_same(called(layer, layer.new_cache(1, LENGTH, offload=True)), truth(setting))
    with torch.no_grad():
        cache = layer.new_cache(1, LENGTH, offload=True)
        layer.attend(padded[:, :30], key_padding=key_padding[:, :30], cache=cache)
        assert_same(layer.attend(padded[:, 30:], cache=cache).out, truth(setting)[:, 25:])
    cropped(layer)
    tied(layer)
    layer.mode = "soft"
    assert_same(layer.attend(x, is_landmark=irregular()).out, truth(setting, marked=True))


def passes() -> bool:
    try:
        for setting in range(len(SETTINGS)):
            check(setting)
    except (AssertionError, ValueError, IndexError, RuntimeError):
        return False
    return True


def text(owner: Any, name: str, old: str, new: str) -> Callable[[Patch], None]:
    return lambda patch: rewrite(patch, owner, name, old, new)


def stride_of_tokens(patch: Patch) -> None:
    patch.setattr(variant.LandmarkConfig, "stride", property(lambda config: config.block_size))


def grid_without_room_for_an_unfinished_block(patch: Patch) -> None:
    of = LandmarkGrid.of

    def mutant(is_landmark: Tensor, lengths: Any) -> LandmarkGrid:
        grid = of(is_landmark, lengths)
        return LandmarkGrid(grid.slot - (grid.slot % grid.block == grid.block - 1).long(), grid.block, grid.slots)

    patch.setattr(LandmarkGrid, "of", mutant)


MUTANTS: dict[str, Callable[[Patch], None]] = {
    "older landmarks scored where they stand": text(retrieval, "_scores", "if rotations is not None:", "if False:"),
    "older landmarks scored a place further": text(retrieval, "_scores", "(older - 1).clamp(min=0)", "older"),
    "one block more taken for recent": text(retrieval, "_shift", "taken >= older", "taken >= older - 1"),
    "blocks packed a place nearer": text(retrieval, "_shift", "older - 1 + rank", "older + rank"),
    "blocks not packed": text(retrieval, "_shift", "torch.where(taken >= 0,", "torch.where(taken < -1,"),
    "the own block may be chosen": text(retrieval, "_allowed", "< complete", "<= complete"),
    "heads meet landmarks of other groups": text(
        retrieval, "_products", "grouped.flatten(2, 3)", "grouped.roll(1, 1).flatten(2, 3)"
    ),
    "rounding chooses among equal landmarks": text(retrieval, "rounding", "unit = 16 *", "unit = 0 *"),
    "landmarks that differ taken for equal": text(retrieval, "rounding", "unit = 16 *", "unit = 1e15 *"),
    "the worst landmarks chosen": text(variant, "retrieve", "rotations) * scale", "rotations) * -scale"),
    "landmarks in a slot of ordinary tokens": grid_without_room_for_an_unfinished_block,
    "packed blocks as wide as tokens": stride_of_tokens,
    "top-k takes all for a block too long": text(
        variant.LandmarkAttention, "_reads_all", "(self.config.top_k + 1)", "(self.config.top_k + 2)"
    ),
    "half of a neighbouring pair lost": text(variant, "_apart", ".transpose(-1, -2)", ""),
    "absent rows in the first block": text(
        variant, "_slots", "inputs.q_pos[:, 0].long()", "inputs.q_pos[:, 0].long() + 1"
    ),
    "landmarks of the block before": text(variant, "_complete", "* size + size - 1 :: size", "* size :: size"),
    "landmarks of padded items from the wrong block": text(
        variant, "_complete", "Lengths(step.offset // size)", "Lengths(0 * step.offset)"
    ),
    "offloaded blocks chosen by what was complete before": text(
        variant, "_complete", "landmarks.to(cache.device)", "0 * landmarks.to(cache.device)"
    ),
}


def test_the_right_one_passes() -> None:
    assert passes()


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_one_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    truth(0), truth(1), truth(0, marked=True), truth(1, marked=True)
    MUTANTS[name](monkeypatch)
    assert not passes()
