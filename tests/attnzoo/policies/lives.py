"""A layer with a policy's cache through a batch of sequences, and what the oracle says of the same calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import attnzoo
from attnzoo.cache.evicting.cache import EvictingCache
from attnzoo.cache.evicting.regions import FullRegion, Region
from attnzoo.cache.pages.rows import gathered
from attnzoo.oracles.evictions import HeldRow
from attnzoo.oracles.mha import linear, rotate, separate
from attnzoo.oracles.policies import Call, life
from attnzoo.reporting.warn import silent
from tests.attnzoo.cases import assert_same, build, recipe_of, tokens
from tests.attnzoo.policies.settings import Setting

ITEMS = 3
KINDS = ("none", "left", "right", "any")


def layer_of(dtype: torch.dtype = torch.float64) -> Any:
    """Four query heads, two KV heads, a width that is no power of two."""
    return build(attnzoo.get_config("mha")(dim=24, num_heads=4, num_kv_heads=2), dtype=dtype)


@dataclass(frozen=True, eq=False)
class Script:
    """The calls of a batch: where each has padding, bool ``[B, T]``."""

    padding: tuple[Tensor, ...]

    def __repr__(self) -> str:
        return " ".join("/".join("".join(".x"[int(p)] for p in row) for row in call) for call in self.padding)

    @property
    def lengths(self) -> list[int]:
        """Real tokens of each item."""
        return [int(n) for n in sum((~call).sum(1) for call in self.padding)]  # type: ignore[arg-type]

    def calls(self, item: int) -> list[Call]:
        """The calls of one item, as the oracle takes them."""
        return [Call(int((~call[item]).sum()), call.shape[1]) for call in self.padding]


def script(widths: Sequence[int], kind: str = "none", seed: int = 0) -> Script:
    """Calls of so many tokens, with padding of a kind; tokens may be missing from any call."""
    generator = torch.Generator().manual_seed(seed)
    calls = []
    for width in widths:
        real = torch.randint(0, width + 1, (ITEMS, 1), generator=generator)
        place = torch.arange(width).expand(ITEMS, -1)
        if kind == "none":
            calls.append(torch.zeros(ITEMS, width, dtype=torch.bool))
        elif kind == "any":
            calls.append(torch.rand(ITEMS, width, generator=generator) < 0.3)
        else:
            calls.append(place < width - real if kind == "left" else place >= real)
    return Script(tuple(calls))


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    """Prompts in chunks, decoding, and both again."""
    prompt = st.lists(st.integers(2, 11), min_size=1, max_size=3)
    steps = st.integers(1, 7).map(lambda n: [1] * n)
    turns = draw(st.lists(st.tuples(prompt, steps), min_size=1, max_size=2))
    first = draw(st.sampled_from([[], [1], [1, 1]]))
    widths = [*first, *(width for turn in turns for part in turn for width in part)]
    return script(widths, draw(st.sampled_from(KINDS)), draw(st.integers(0, 99)))


def sequences(layer: Any, told: Script, seed: int = 0) -> list[Tensor]:
    """The real tokens of each item ``[n, C]``."""
    whole = tokens(layer, ITEMS, max(1, *told.lengths), seed=seed)
    return [whole[item, :n] for item, n in enumerate(told.lengths)]


@dataclass(eq=False)
class Told:
    """What came of a script: outputs of each item's tokens ``[n, C]``, and rows of each call, item and KV head."""

    out: list[Tensor]
    held: list[list[list[tuple[int, float]]]]


def calls_of(told: Script, items: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Tokens ``[B, T, C]`` with NaN where there are none, and the padding, of each call."""
    done = [0] * len(items)
    calls = []
    for padding in told.padding:
        x = torch.full((*padding.shape, items[0].shape[1]), math.nan, dtype=items[0].dtype)
        for item, row in enumerate(items):
            count = int((~padding[item]).sum())
            x[item, ~padding[item]] = row[done[item] : done[item] + count]
            done[item] += count
        calls.append((x, padding))
    return calls


def asked(layer: Any, cache: Any, x: Tensor, padding: Tensor) -> list[Tensor]:
    """One call: the outputs of each item's tokens; those of padding are 0."""
    # A call may have no token at all.
    with silent():
        out = layer.attend(x, key_padding=padding if bool(padding.any()) else None, cache=cache).out
    assert bool((out[padding] == 0).all())
    return [out[item, ~padding[item]] for item in range(out.shape[0])]


def told_by(layer: Any, cache: Any, told: Script, items: Sequence[Tensor]) -> Told:
    """What the layer says."""
    parts = []
    held = []
    with torch.no_grad():
        for x, padding in calls_of(told, items):
            parts.append(asked(layer, cache, x, padding))
            held.append(rows_of(cache))
    return Told([torch.cat([part[item] for part in parts]) for item in range(len(items))], held)


def expected_of(layer: Any, setting: Setting, told: Script, items: Sequence[Tensor]) -> Told:
    """What the oracle says."""
    recipe = recipe_of(layer.config)
    weights = layer.state_dict()
    project = separate(weights, recipe)
    group = recipe.num_heads // recipe.num_kv_heads
    outs = []
    lives: list[list[list[list[HeldRow]]]] = []
    for item, x in enumerate(items):
        plain_q, plain_k, v = project(x)
        places = torch.arange(len(x))
        q = rotate(plain_q, places, recipe)
        k = rotate(plain_k, places, recipe)
        given = setting.given(plain_q, plain_k, v)
        heads = []
        for g, policy in enumerate(setting.heads):
            rows = slice(g * group, (g + 1) * group)
            heads.append(
                life(
                    q[:, rows].transpose(0, 1),
                    k[:, g],
                    v[:, g],
                    told.calls(item),
                    policy=policy,
                    scale=recipe.scale,
                    given=None if given is None else given[g],
                )
            )
        joined = torch.cat([head.out for head in heads]).transpose(0, 1).flatten(1)
        outs.append(linear(joined, weights, "o_proj"))
        lives.append([head.held for head in heads])
    held = [
        [
            [sorted((-1 if row.folded else row.position, row.mass) for row in head[call]) for head in item]
            for item in lives
        ]
        for call in range(len(told.padding))
    ]
    return Told(outs, held)


def rows_of(cache: Any) -> list[list[list[tuple[int, float]]]]:
    """Positions and masses of the rows that each item's KV heads hold for the next token.

    They are in the order of positions; first, as position -1, the row that stands for all lost ones.
    """
    held: list[list[list[tuple[int, float]]]] = [[[] for _ in range(2)] for _ in range(cache.batch)]
    if isinstance(cache, EvictingCache):
        for region in cache.regions:
            for item, heads in enumerate(_tokens_read(cache, region).tolist()):
                for head, row in zip(region.heads, heads, strict=True):
                    held[item][head] = [(token, 1.0) for token in sorted(row) if token >= 0]
        return held
    rows, _ = gathered(cache.pool)
    rings = {head: extent.ring for extent in cache.pool.extents for head in extent.heads}
    for item, seen in enumerate(cache.lengths.tolist()):
        for head in range(2):
            lost = 0.0 if cache.lost is None else float(cache.lost.mass[item, head])
            ring = rings[head]
            pairs = zip(rows["position"][item, head].tolist(), rows["bias"][item, head].tolist(), strict=True)
            for position, bias in pairs:
                if position < 0:
                    continue
                if ring is None or ring.is_read(torch.tensor(position // ring.rows), seen // ring.rows):
                    held[item][head].append((position, math.exp(bias)))
                elif cache.policy.folds:
                    lost += 1
            if lost:
                held[item][head].insert(0, (-1, lost))
    return held


def _tokens_read(cache: EvictingCache, region: Region) -> Tensor:
    """Which token lies in each row of a region that the next token reads, int64 ``[B, h, R]``; -1 for no such."""
    token = tokens_in_rows(cache, region).clone()
    if not isinstance(region, FullRegion):
        token[:, :, : region.margin] = -1
    return token


def tokens_in_rows(cache: EvictingCache, region: Region) -> Tensor:
    """The same with those that are held so that tokens may be taken back."""
    rows = cache._buffers[f"k.{region.name}"].shape[2]
    held = cache.lengths.view(-1, 1, 1)
    size = (cache.batch, len(region.heads), rows)
    if isinstance(region, FullRegion):
        row = torch.arange(rows).expand(size)
        return torch.where(row < held, row, -1)
    return region.token_at(rows, held, held.device).expand(size)


def poison(cache: Any) -> None:
    """NaN wherever a cache holds nothing that the next token reads."""
    if isinstance(cache, EvictingCache):
        for region in cache.regions:
            free = _tokens_read(cache, region) < 0
            for stream in ("k", "v"):
                cache._buffers[f"{stream}.{region.name}"][free] = math.nan
        return
    for name in ("k", "v"):
        cache.pool.tensors[name][cache.pool.free] = math.nan


def assert_told(actual: Told, expected: Told) -> None:
    """The same rows behind every call, and the same outputs."""
    for call, (rows, wanted) in enumerate(zip(actual.held, expected.held, strict=True)):
        for item, (heads, other) in enumerate(zip(rows, wanted, strict=True)):
            for g, (mine, theirs) in enumerate(zip(heads, other, strict=True)):
                where = f"call {call}, item {item}, KV head {g}"
                assert [position for position, _ in mine] == [position for position, _ in theirs], where
                assert torch.allclose(torch.tensor([m for _, m in mine]), torch.tensor([m for _, m in theirs])), where
    for mine, theirs in zip(actual.out, expected.out, strict=True):
        assert_same(mine, theirs)
