"""A decoding step over latents: what the plain way computes, whatever the rotation, and left to it where it must be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attnzoo
from attnzoo import surgery
from attnzoo.base.decoding import latent as latent_step
from attnzoo.base.decoding.latent import LatentHeads, attend_absorbed
from attnzoo.base.rope import RotaryConfig, RotaryScaling
from attnzoo.surgery.replacements import latent
from attnzoo_kernels import Slots
from tests.attnzoo.surgery.conversions import convert_as
from tests.attnzoo.surgery.hosts.masks import padding_mask
from tests.attnzoo.surgery.tiny import assert_close, ids, logits, tiny

YARN = RotaryScaling(kind="yarn", factor=4.0, original_max_position_embeddings=32)
ROTATIONS = {
    "half": RotaryConfig(base=100.0),
    "interleaved": RotaryConfig(base=100.0, interleaved=True),
    "partial": RotaryConfig(base=100.0, dim=4),
    "partial, interleaved": RotaryConfig(base=100.0, dim=4, interleaved=True),
    "attention factor": RotaryConfig(base=100.0, scaling=YARN),
    "partial, of odd heads": RotaryConfig(base=100.0, dim=4),
    "none": None,
}


def turned(x: Tensor, rotary: RotaryConfig | None, slots: Tensor) -> Tensor:
    """Rotation of ``x [n, h, D]`` plane by plane, in fp64."""
    if rotary is None:
        return x
    width = rotary.width(x.shape[-1])
    out = x.clone()
    frequencies = attnzoo.base.rope.rotary_frequencies(rotary, x.shape[-1])
    factor = 1.0 if rotary.scaling is None else rotary.scaling.table_factor
    for plane in range(width // 2):
        a, b = (2 * plane, 2 * plane + 1) if rotary.interleaved else (plane, plane + width // 2)
        angle = (slots.double() * frequencies[plane])[:, None]
        out[..., a] = factor * (x[..., a] * angle.cos() - x[..., b] * angle.sin())
        out[..., b] = factor * (x[..., b] * angle.cos() + x[..., a] * angle.sin())
    return out


def expected_row(q: Tensor, latents: Tensor, up: Tensor, heads: LatentHeads, shown: list[int]) -> Tensor:
    """Every key and value expanded, head by head."""
    out = torch.empty_like(q)
    each = q.shape[1] // heads.kv_heads
    for item, latent_rows in enumerate(latents):
        both = (latent_rows @ up.T).view(len(latent_rows), 2, heads.kv_heads, heads.width)
        keys = turned(both[:, 0], heads.rotary, torch.arange(len(latent_rows)))
        query = turned(q[item].transpose(0, 1), heads.rotary, torch.tensor([len(latent_rows) - 1]))[0]
        for head in range(q.shape[1]):
            scores = keys[shown, head // each] @ query[head] * heads.scale
            out[item, head, 0] = scores.softmax(0) @ both[shown, 1, head // each]
    return out


@pytest.mark.parametrize("rotation", ROTATIONS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 70), st.integers(1, 9), st.integers(1, 80), st.booleans())
def test_a_row_is_what_expanded_keys_and_values_give(
    rotation: str, groups: int, each: int, slots: int, rank: int, chunk: int, window: bool
) -> None:
    generator = torch.Generator().manual_seed(slots)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    width = 7 if "odd" in rotation else 6
    heads = LatentHeads(groups, width, ROTATIONS[rotation], 0.4)
    q, up = made(2, groups * each, 1, width), made(2 * groups * width, rank)
    # A cache's layer has room behind what it holds.
    latents = made(2, slots + 5, rank)[:, :slots]
    runs = ((0, slots),) if not window or slots < 9 else ((0, 2), (slots - 5, slots))
    shown = [slot for first, last in runs for slot in range(first, last)]
    expected = expected_row(q, latents, up, heads, shown)
    latents[:, [slot for slot in range(slots) if slot not in shown]] = torch.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_step, "CHUNK_BYTES", chunk * groups * width * 8)
        assert_close(attend_absorbed(q, latents, up, heads, Slots(runs)), expected, 1e-12)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many rows are absorbed."""
    calls: list[int] = []

    def attend(*args: Any) -> Tensor:
        calls.append(1)
        return attend_absorbed(*args)

    with monkeypatch.context() as patch:
        patch.setattr(latent, "attend_absorbed", attend)
        yield calls


_models: dict[torch.dtype, Any] = {}


def model_of(dtype: torch.dtype = torch.float64) -> Any:
    """A converted model; nothing here changes it but for a while."""
    if dtype not in _models:
        _models[dtype] = tiny(dtype=dtype)
        convert_as(_models[dtype], "latent")
    return _models[dtype]


def decoded(model: Any, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits behind each token of the second half, which is decoded one by one."""
    begin = tokens.shape[1] // 2
    cache = surgery.new_cache(model)
    with torch.no_grad():
        seen = None if mask is None else mask[:, :begin]
        model(tokens[:, :begin], attention_mask=seen, past_key_values=cache)
        said = []
        for at in range(begin, tokens.shape[1]):
            seen = None if mask is None else mask[:, : at + 1]
            said.append(model(tokens[:, at : at + 1], attention_mask=seen, past_key_values=cache).logits)
    return torch.cat(said, 1)


def test_decoding_is_absorbed_and_says_what_one_call_says(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = model_of(), ids(2, 24)
    with counted(monkeypatch) as calls:
        assert_close(decoded(model, tokens), logits(model, tokens)[:, 12:], 1e-11)
        assert len(calls) == 2 * 12


def test_a_window_over_latents_expands_what_it_reads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny(), ids(2, 30)
    convert_as(model, "window")
    convert_as(model, "latent")
    with counted(monkeypatch) as calls:
        assert_close(decoded(model, tokens), logits(model, tokens)[:, 15:], 1e-11)
        assert calls


def watched(model: Any) -> Any:
    model.model.layers[0].self_attn.kv_up.register_forward_hook(lambda *_: None)


def adapted(model: Any) -> Any:
    block = model.model.layers[0].self_attn
    block.kv_up = nn.Sequential(block.kv_up, nn.Identity())


def replaced(model: Any) -> Any:
    up = model.model.layers[0].self_attn.kv_up
    up.forward = lambda x: nn.functional.linear(x, up.weight)


LEFT: dict[str, Callable[[Any], Any]] = {"hook": watched, "adapter": adapted, "forward of its own": replaced}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_round_a_projection_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny(), ids(1, 16)
    convert_as(model, "latent")
    expected = decoded(model, tokens)
    LEFT[name](model)
    with counted(monkeypatch) as calls:
        assert_close(decoded(model, tokens), expected, 1e-12)
        # The other block is as it was.
        assert len(calls) == 8


@pytest.mark.parametrize("what", ["padding", "gradients", "autocast"])
def test_calls_that_need_more_go_the_plain_way(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.float32 if what == "autocast" else torch.float64
    model, tokens = model_of(dtype), ids(2, 8)
    cache = surgery.new_cache(model)
    mask = padding_mask([3, 0], 8) if what == "padding" else None
    around = torch.autocast("cpu", torch.bfloat16) if what == "autocast" else nullcontext()
    with counted(monkeypatch) as calls, around:
        with torch.no_grad():
            model(tokens[:, :7], attention_mask=None if mask is None else mask[:, :7], past_key_values=cache)
        with torch.set_grad_enabled(what == "gradients"):
            said = model(tokens[:, 7:], attention_mask=mask, past_key_values=cache).logits
    assert not calls
    assert said.requires_grad == (what == "gradients")
    if what != "autocast":
        assert_close(said.detach(), logits(model, tokens, attention_mask=mask)[:, 7:], 1e-11)


@pytest.mark.parametrize("change", ["in place", "by data", "another"])
def test_weights_that_change_are_followed(change: str) -> None:
    model, tokens = tiny(), ids(1, 12)
    convert_as(model, "latent")
    before = decoded(model, tokens)
    for layer in model.model.layers:
        up = layer.self_attn.kv_up
        if change == "in place":
            with torch.no_grad():
                up.weight.mul_(1.3)
        elif change == "by data":
            up.weight.data.mul_(1.3)
        else:
            up.weight = nn.Parameter(1.3 * up.weight.detach())
    after = decoded(model, tokens)
    assert_close(after, logits(model, tokens)[:, 6:], 1e-11)
    assert not torch.allclose(after, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_close_to_fp64_as_the_plain_way(dtype: torch.dtype) -> None:
    exact, model, tokens = model_of(), model_of(dtype), ids(2, 32)
    rounded = tiny(dtype=dtype)
    convert_as(rounded, "latent")
    expected = logits(exact, tokens)[:, 16:]
    plain = float((logits(model, tokens)[:, 16:].double() - expected).abs().mean())
    found = float((decoded(model, tokens).double() - expected).abs().mean())
    assert found <= 1.1 * plain
