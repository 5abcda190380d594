"""Generation after every kind of conversion: caches, padding, batch mates and beams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import StaticCache

from tests.attnzoo.surgery.hosts.masks import padding_mask
from tests.attnzoo.surgery.tiny import KINDS, assert_close, converted, ids, logits

EXACT = 1e-11
PROMPT = 14
NEW = 12
"""New tokens: more than a window of 9, so that the cache holds what is read no more."""

CACHED = [*((kind, None) for kind in KINDS), *((kind, "static") for kind in KINDS if kind != "replaced")]
"""Every kind with every cache of the host's that it takes."""

_models: dict[str, Any] = {}


def model_of(kind: str) -> Any:
    """One converted model of each kind; nothing here changes it."""
    if kind not in _models:
        _models[kind] = converted(kind, layers=2)
    return _models[kind]


def generate(model: Any, tokens: Tensor, **options: Any) -> Any:
    return model.generate(tokens, **{"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options})


def by_full_forwards(model: Any, tokens: Tensor, count: int) -> Tensor:
    """The greedy continuation without any cache."""
    for _ in range(count):
        best = logits(model, tokens, use_cache=False)[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, best], 1)
    return tokens


@pytest.mark.parametrize(("kind", "cache"), CACHED)
def test_generating_with_a_cache_equals_full_forwards(kind: str, cache: str | None) -> None:
    model, tokens = model_of(kind), ids(3, PROMPT)
    found = generate(model, tokens, cache_implementation=cache)
    assert found.tolist() == by_full_forwards(model, tokens, NEW).tolist()
    # A model that says one thing over and over would hide every mistake.
    assert len(set(found[:, PROMPT:].flatten().tolist())) > 5


@pytest.mark.parametrize(("kind", "cache"), CACHED)
def test_left_padded_items_generate_what_they_generate_alone(kind: str, cache: str | None) -> None:
    model, padding, tokens = model_of(kind), [0, 9, 3], ids(3, PROMPT)
    mask = padding_mask(padding, PROMPT)
    found = generate(model, tokens * mask, attention_mask=mask, cache_implementation=cache)
    for item, left in enumerate(padding):
        alone = generate(model, tokens[item : item + 1, left:], cache_implementation=cache)
        assert found[item, left:].tolist() == alone[0].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_padding_and_who_else_is_in_the_batch_does_not_matter(kind: str) -> None:
    model, tokens = model_of(kind), ids(2, PROMPT)
    mask = padding_mask([6, 0], PROMPT)
    others = torch.cat([tokens[:1], ids(1, PROMPT, seed=9)])
    others[0, :6] = 17
    said = [logits(model, x, attention_mask=mask)[0, 6:] for x in (tokens, others)]
    assert_close(said[0], said[1], EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_right_padded_items_say_what_they_say_alone(kind: str) -> None:
    model, tokens = model_of(kind), ids(2, PROMPT)
    mask = padding_mask([5, 0], PROMPT).flip(1)
    said = logits(model, tokens, attention_mask=mask)
    assert_close(said[:1, : PROMPT - 5], logits(model, tokens[:1, : PROMPT - 5]), EXACT)
    assert_close(said[1:], logits(model, tokens[1:]), EXACT)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from([None, 0, 4]))
def test_chunks_of_any_lengths_say_what_one_forward_says(kind: str, chunks: list[int], left: int | None) -> None:
    model, length = model_of(kind), sum(chunks)
    tokens = ids(2, length, seed=length)
    mask = None if left is None else padding_mask([min(left, length - 1), 0], length)
    expected = logits(model, tokens, attention_mask=mask)
    cache, begin, found = None, 0, []
    for size in chunks:
        end = begin + size
        seen = None if mask is None else mask[:, :end]
        with torch.no_grad():
            said = model(tokens[:, begin:end], attention_mask=seen, past_key_values=cache, use_cache=True)
        cache, begin = said.past_key_values, end
        found.append(said.logits)
    real = torch.ones(2, length, dtype=torch.bool) if mask is None else mask.bool()
    assert_close(torch.cat(found, 1)[real], expected[real], EXACT)


@pytest.mark.parametrize(("kind", "cache"), CACHED)
def test_beams_take_their_caches_along(kind: str, cache: str | None) -> None:
    model, tokens, padding = model_of(kind), ids(2, PROMPT), [0, 5]
    mask = padding_mask(padding, PROMPT)
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 6, "attention_mask": mask}
    with_cache = generate(model, tokens * mask, cache_implementation=cache, **options)
    without = generate(model, tokens * mask, use_cache=False, **options)
    assert with_cache.tolist() == without.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_several_continuations_of_one_prompt_equal_those_of_repeated_prompts(kind: str) -> None:
    model, tokens = model_of(kind), ids(1, PROMPT)
    torch.manual_seed(0)
    together = generate(model, tokens, do_sample=True, num_return_sequences=3)
    torch.manual_seed(0)
    repeated = generate(model, tokens.expand(3, -1).contiguous(), do_sample=True)
    assert together.tolist() == repeated.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_cut_back_goes_on_as_if_the_rest_had_never_been(kind: str) -> None:
    # Assisted generation rejects tokens so.
    model, tokens, other = model_of(kind), ids(2, 20), ids(2, 6, seed=8)
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
        cache.crop(-7)
        said = model(other, past_key_values=cache).logits
    expected = logits(model, torch.cat([tokens[:, :13], other], 1))[:, 13:]
    assert_close(said, expected, EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_of_one_token_and_one_longer_than_everything_generate(kind: str) -> None:
    model = model_of(kind)
    for length in (1, 70):
        tokens = ids(1, length)
        found = generate(model, tokens, max_new_tokens=4)
        assert found.tolist() == by_full_forwards(model, tokens, 4).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_text_to_come_is_not_read(kind: str) -> None:
    model, tokens = model_of(kind), ids(2, PROMPT)
    other = torch.cat([tokens[:, :8], ids(2, PROMPT - 8, seed=3)], 1)
    assert_close(logits(model, tokens)[:, :8], logits(model, other)[:, :8], EXACT)


@pytest.mark.parametrize("kind", ["window", "s2", "latent"])
def test_inputs_given_as_embeddings_say_the_same(kind: str) -> None:
    model, tokens = model_of(kind), ids(2, PROMPT)
    with torch.no_grad():
        said = model(inputs_embeds=model.get_input_embeddings()(tokens)).logits
    assert torch.equal(said, logits(model, tokens))


@pytest.mark.parametrize("kind", ["mha", "window", "s2", "latent"])
def test_a_static_cache_longer_than_the_text_is_not_read_beyond_it(kind: str) -> None:
    model, tokens = model_of(kind), ids(2, PROMPT)
    said = []
    for length in (PROMPT, 64):
        cache = StaticCache(config=model.config, max_cache_len=length)
        with torch.no_grad():
            said.append(model(tokens, past_key_values=cache).logits)
    assert_close(said[0], logits(model, tokens), EXACT)
    assert_close(said[1], logits(model, tokens), EXACT)
