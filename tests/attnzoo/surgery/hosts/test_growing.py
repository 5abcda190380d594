"""A cache that grows without copying: what the host's own says, in every use that hosts make of a cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from attnzoo import surgery
from attnzoo.surgery.hosts.caches.evicting import EvictingCacheLayer
from attnzoo.surgery.hosts.caches.growing import GrowingLayer
from attnzoo_kernels.errors import ConfigError
from tests.attnzoo.surgery.conversions import ALL, convert_as
from tests.attnzoo.surgery.hosts.masks import padding_mask
from tests.attnzoo.surgery.tiny import assert_close, ids, logits, tiny

PROMPT = 15
NEW = 12

_models: dict[str, Any] = {}


def model_of(kind: str) -> Any:
    """One model of each kind, "dense" unconverted; nothing here changes it."""
    if kind not in _models:
        _models[kind] = tiny()
        if kind != "dense":
            convert_as(_models[kind], kind)
    return _models[kind]


def generate(model: Any, tokens: Tensor, **options: Any) -> Any:
    return model.generate(tokens, **{"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options})


def rows(tokens: int, *, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random keys and values of a call, two heads of 4 and of 3."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(batch, 2, tokens, width, generator=generator) for width in (4, 3)]
    return made[0].to(dtype), made[1].to(dtype)


Edit = Callable[[Any], Any]
EDITS: dict[str, Edit] = {
    "crop": lambda layer: layer.crop(-2 if layer.get_seq_length() > 2 else 0),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 0, 0, 1])[: held_batch(layer)] % held_batch(layer)),
    "repeat": lambda layer: layer.batch_repeat_interleave(2) if held_batch(layer) < 3 else None,
    "select": lambda layer: layer.batch_select_indices(torch.tensor([0])) if held_batch(layer) > 1 else None,
    "reset": lambda layer: layer.reset(),
    "deepcopy": copy.deepcopy,
    # As callers do who edit a cache by hand.
    "set": lambda layer: setattr(layer, "keys", 2 * layer.keys) if layer.is_initialized else None,
}


def held_batch(layer: Any) -> int:
    return layer.keys.shape[0] if layer.get_seq_length() else 1


def same(layer: Any, expected: Any) -> None:
    assert layer.get_seq_length() == expected.get_seq_length()
    if expected.get_seq_length():
        assert torch.equal(layer.keys, expected.keys)
        assert torch.equal(layer.values, expected.values)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.integers(1, 40), st.sampled_from(sorted(EDITS))), max_size=14), st.booleans())
def test_any_order_of_calls_and_edits_leaves_what_the_hosts_own_layer_holds(steps: list[Any], inference: bool) -> None:
    layer: Any = GrowingLayer()
    expected: Any = DynamicLayer()
    for number, step in enumerate(steps):
        # Every second call in another mode than the one before.
        mode = torch.inference_mode if inference and number % 2 else torch.no_grad
        with mode():
            if step == "reset":
                # Older versions of the host keep the length, and zeros.
                layer.reset()
                expected = DynamicLayer()
            elif isinstance(step, str):
                made = [EDITS[step](x) for x in (layer, expected)]
                layer, expected = made if step == "deepcopy" else (layer, expected)
            else:
                new = rows(step, batch=held_batch(layer), seed=number)
                found = layer.update(*new)
                assert all(torch.equal(a, b) for a, b in zip(found, expected.update(*new), strict=True))
        same(layer, expected)


@pytest.mark.parametrize("count", [330, 1024, 3000])
def test_it_takes_a_tenth_more_than_its_tokens_at_most_and_moves_them_rarely(count: int) -> None:
    layer: Any = GrowingLayer()
    moves = 0
    layer.update(*rows(count - 300))
    for _ in range(300):
        before = layer._buffers[0].data_ptr()
        layer.update(*rows(1))
        moves += layer._buffers[0].data_ptr() != before
    assert layer.nbytes <= 1.1 * layer.get_seq_length() * 2 * 2 * (4 + 3) * 4
    assert moves <= 300 // 32 + 1


def test_a_step_copies_nothing_of_what_is_held() -> None:
    layer: Any = GrowingLayer()
    keys, values = layer.update(*rows(100))
    later = layer.update(*rows(1))
    assert [x.data_ptr() for x in later] == [keys.data_ptr(), values.data_ptr()]
    layer.crop(-1) if hasattr(layer, "get_max_length") else layer.crop(100)
    assert layer.update(*rows(1, seed=3))[0].data_ptr() == keys.data_ptr()


def test_gradients_reach_earlier_calls_as_they_do_in_the_hosts_own_layer() -> None:
    grads = []
    for layer in (GrowingLayer(), DynamicLayer()):
        given_rows = [x.requires_grad_() for x in rows(5)]
        layer.update(*rows(3, seed=1))
        layer.update(*given_rows)
        keys, values = layer.update(*rows(2, seed=2))
        loss = (keys.square().sum() * values.sum()).tanh() + keys.sum()
        with torch.no_grad():
            # A step without gradients in between writes nothing that a backward needs.
            layer.update(*rows(1, seed=4))
            layer.crop(-3) if hasattr(layer, "get_max_length") else layer.crop(8)
            layer.update(*rows(4, seed=5))
        loss.backward()
        grads.append([x.grad for x in given_rows])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_what_does_not_fit_is_refused_as_the_hosts_own_layer_refuses_it() -> None:
    for layer in (GrowingLayer(), DynamicLayer()):
        layer.update(*rows(3))
        with pytest.raises(RuntimeError, match="size"):
            layer.update(*rows(1, batch=3))


def test_other_dtypes_are_promoted_as_in_the_hosts_own_layer() -> None:
    layer: Any = GrowingLayer()
    expected: Any = DynamicLayer()
    for dtype in (torch.float32, torch.float64, torch.float32, torch.bfloat16):
        new = rows(3, dtype=dtype)
        for a, b in zip(layer.update(*new), expected.update(*new), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_the_whole_vocabulary_of_an_empty_cache() -> None:
    cache = surgery.new_cache(model_of("dense"))
    assert isinstance(cache, DynamicCache)
    assert all(type(layer) is GrowingLayer for layer in cache.layers)
    assert cache.get_seq_length() == 0
    assert cache.get_mask_sizes(3, 0) == (3, 0)
    assert not cache.is_compileable


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), None])
def test_what_is_no_model_of_the_host_gets_no_cache(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"^model: expected a model of transformers, got "):
        surgery.new_cache(model)


@pytest.mark.parametrize("kind", ["dense", *ALL])
def test_a_cache_on_request_serves_every_model(kind: str) -> None:
    model, tokens, mask = model_of(kind), ids(3, PROMPT), padding_mask([0, 6, 3], PROMPT)
    # Of two beams both are looked at, the better one first.
    for options in ({}, {"num_return_sequences": 2, "num_beams": 2}):
        with_ours = generate(
            model, tokens * mask, attention_mask=mask, past_key_values=surgery.new_cache(model), **options
        )
        without = generate(model, tokens * mask, attention_mask=mask, use_cache=False, **options)
        assert with_ours.tolist() == without.tolist()


@pytest.mark.parametrize("kind", ["dense", *ALL])
def test_assisted_decoding_takes_back_what_it_rejects(kind: str) -> None:
    model, tokens = model_of(kind), ids(1, PROMPT)
    assistant = tiny(layers=1, seed=3)
    cache = surgery.new_cache(model)
    found = generate(model, tokens, assistant_model=assistant, past_key_values=cache)
    assert found.tolist() == generate(model, tokens).tolist()


READING = ("mha", "window", "s2", "latent")


@pytest.mark.parametrize("kind", READING)
def test_converted_blocks_take_such_a_layer_by_themselves(kind: str) -> None:
    model, tokens = model_of(kind), ids(2, PROMPT)
    with torch.no_grad():
        for cache in (None, DynamicCache(), DynamicCache(config=model.config)):
            out = model(tokens, past_key_values=cache, use_cache=True)
            held = next(value for value in out.values() if hasattr(value, "get_seq_length"))
            own = EvictingCacheLayer if kind in ("window", "s2") else GrowingLayer
            assert [type(layer) for layer in held.layers] == [own] * 2
            assert held.get_seq_length() == PROMPT


@pytest.mark.parametrize("kind", READING)
def test_a_layer_that_holds_something_stays_what_it_is(kind: str) -> None:
    dense, model, tokens = model_of("dense"), model_of(kind), ids(2, PROMPT)
    cache = DynamicCache(config=model.config)
    if kind == "latent":
        for index in range(2):
            cache.update(torch.zeros(2, 1, 1, 20).double(), torch.zeros(2, 1, 1, 0).double(), index)
        tokens = tokens[:, :1]
    else:
        with torch.no_grad():
            dense(tokens[:, :8], past_key_values=cache)
        tokens = tokens[:, 8:]
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    assert [type(layer) for layer in cache.layers] == [DynamicLayer] * 2


def test_after_undo_a_model_is_handed_the_hosts_own_cache() -> None:
    model, tokens = tiny(), ids(1, PROMPT)
    report = convert_as(model, "window")
    report.undo()
    with torch.no_grad():
        out = model(tokens, use_cache=True)
    held = next(value for value in out.values() if hasattr(value, "get_seq_length"))
    assert [type(layer) for layer in held.layers] == [DynamicLayer] * 2


@pytest.mark.parametrize("kind", ["dense", *READING])
def test_training_through_a_cache_gives_the_gradients_of_the_hosts_own(kind: str) -> None:
    model, tokens = model_of(kind), ids(1, PROMPT)
    weight = model.model.layers[0].self_attn.q_proj.weight
    found = []
    for cut in (None, 8):
        cache = surgery.new_cache(model)
        parts = (tokens,) if cut is None else (tokens[:, :cut], tokens[:, cut:])
        said = [model(part, past_key_values=cache).logits for part in parts]
        found.append(torch.autograd.grad(torch.cat(said, 1).square().mean(), weight)[0])
    assert_close(found[1], found[0], 1e-9)


def test_a_compiled_model_takes_it() -> None:
    model, tokens = model_of("window"), ids(1, PROMPT)
    compiled = torch.compile(model, backend="eager")
    cache = surgery.new_cache(model)
    with torch.no_grad():
        said = [compiled(tokens[:, :9], past_key_values=cache).logits]
        said += [model(tokens[:, 9:], past_key_values=cache).logits]
    assert_close(torch.cat(said, 1), logits(model, tokens), 1e-11)
