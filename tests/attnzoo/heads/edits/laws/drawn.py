"""Random edits of a tiny Llama with 2 layers, 4 query heads and 2 KV heads, drawn so that they shrink to small ones."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from attnzoo.heads import HeadEdit, KeyBias
from attnzoo.surgery.edits.key_bias import SinkScaling

LAYERS = 2
HEADS = 4
KV_HEADS = 2


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Numbers of their own seed, in fp64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def chosen_heads(draw: st.DrawFn, count: int) -> int | list[int] | slice:
    """A head, several in any order, or a slice."""
    kind = draw(st.sampled_from(("one", "several", "slice")))
    if kind == "one":
        return draw(st.integers(0, count - 1))
    if kind == "slice":
        return slice(draw(st.integers(0, count - 1)), None, draw(st.integers(1, 2)))
    return draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count, unique=True))


def _tensor(draw: st.DrawFn, count: int, width: int) -> Tensor:
    shape = draw(st.sampled_from(((width,), (count, width))))
    return normal(*shape, seed=draw(st.integers(0, 99)))


@st.composite
def output_edits(draw: st.DrawFn, width: int, batch: int, length: int, everywhere: bool = False) -> HeadEdit:
    """An edit of outputs for calls of ``[batch, length]`` tokens, or one that is the same in every row of any."""
    kv = draw(st.booleans())
    head = draw(chosen_heads(KV_HEADS if kv else HEADS))
    count = (
        len(range(KV_HEADS if kv else HEADS)[head])
        if isinstance(head, slice)
        else 1
        if isinstance(head, int)
        else len(head)
    )
    more: dict[str, Any] = {"ablate": draw(st.sampled_from((None, "zero", "mean", "resample")))}
    if more["ablate"] in ("mean", "resample"):
        whole = not everywhere and draw(st.booleans())
        more["value"] = normal(batch, length, count, width) if whole else _tensor(draw, count, width)
    kinds = st.sampled_from(("none", "number", "tensor"))
    scale = draw(kinds)
    if scale != "none":
        more["scale"] = draw(st.sampled_from((0.0, 0.5, -2.0))) if scale == "number" else _tensor(draw, count, width)
    if draw(kinds) == "tensor":
        more["offset"] = _tensor(draw, count, width)
    where: Any = draw(st.sampled_from(("all",) if everywhere else ("all", "prefill", "decode", "last", "mask")))
    if where == "mask":
        items = draw(st.sampled_from((1, batch)))
        where = normal(items, length, seed=draw(st.integers(0, 99))) > 0
    return HeadEdit(draw(st.integers(0, LAYERS - 1)), head, kv=kv, where=where, **more)


@st.composite
def reading_edits(draw: st.DrawFn, width: int, batch: int, length: int) -> HeadEdit:
    """An edit of what heads read, in calls of ``[batch, length]`` tokens, with what may stand beside it."""
    head = draw(st.lists(st.integers(0, HEADS - 1), min_size=1, max_size=2, unique=True))
    keys = draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=3, unique=True))
    kind = draw(st.sampled_from(("knock out", "rows", "emphasise", "each", "only", "uniform", "post")))
    more: dict[str, Any] = {}
    if kind == "knock out":
        more["key_bias"] = KeyBias.knock_out(None, keys)
    elif kind == "rows":
        more["key_bias"] = KeyBias.knock_out(draw(st.lists(st.integers(0, length - 1), min_size=1, unique=True)), keys)
    elif kind == "emphasise":
        more["key_bias"] = KeyBias.emphasise(keys, draw(st.sampled_from((-1.5, 0.7))))
    elif kind == "each":
        more["key_bias"] = KeyBias.emphasise(keys, normal(len(keys)))
    elif kind == "only":
        more["key_bias"] = KeyBias.only(keys)
    elif kind == "uniform":
        more["ablate"] = "uniform"
    else:
        more["post"] = SinkScaling(torch.tensor(keys), draw(st.sampled_from((0.0, 0.4, 1.0))))
    if draw(st.booleans()):
        more["scale"] = 1.5
        more["offset"] = normal(width)
    where: Any = draw(st.sampled_from(("all", "all", "prefill", "decode", "last", "mask")))
    if where == "mask":
        where = normal(batch, length, seed=draw(st.integers(0, 99))) > 0
    return HeadEdit(draw(st.integers(0, LAYERS - 1)), head, where=where, **more)


def may_stand_together(edits: list[HeadEdit]) -> bool:
    """Whether no head is calibrated twice, none edited beside what takes its attention's place."""
    seen: dict[tuple[int, int], list[HeadEdit]] = {}
    for edit in edits:
        for head in edit.head if isinstance(edit.head, list) else ():
            seen.setdefault((edit.layer, head), []).append(edit)
    return all(
        len(own) == 1 or not any(edit.post is not None or edit.ablate == "uniform" for edit in own)
        for own in seen.values()
    )
