"""Policies that hold by place, in hosts: what is said is what a plain model says under masks, and memory is freed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

import attnzoo
from attnzoo import policies, surgery
from attnzoo.surgery.hosts.caches.evicting import EvictingCacheLayer
from tests.attnzoo.policies.masked import CONFIGS, FULL, host, masked
from tests.attnzoo.surgery.hosts.masks import padding_mask
from tests.attnzoo.surgery.tiny import assert_close, assert_untouched, ids, logits, snapshot

EXACT = 1e-12
RULE = {"sink": 1, "near": 3, "block": 4}
PADDING = [7, 0, 13]
TOKENS = 36
NEW = 12
POLICY = policies.Duo(FULL, sink=4, window=8, block=4)
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
_hosts: dict[str, Any] = {}


def host_of(name: str = "llama") -> Any:
    """A host that every test leaves as it was."""
    if name not in _hosts:
        _hosts[name] = host(name)
    return _hosts[name]


def prompts() -> tuple[Tensor, Tensor]:
    """Three prompts with padding on their left, and their mask."""
    mask = padding_mask(PADDING, TOKENS)
    return ids(3, TOKENS) * mask, mask


def said(model: Any, tokens: Tensor, chunks: list[int], cache: Any) -> Tensor:
    """The logits of calls of so many tokens."""
    return torch.cat([logits(model, part, past_key_values=cache) for part in tokens.split(chunks, 1)], 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_generating_says_what_a_masked_model_says_token_for_token(name: str) -> None:
    model = host_of(name)
    tokens, mask = prompts()
    more: dict[str, Any] = {**OPTIONS, "output_logits": True, "return_dict_in_generate": True}
    with masked(model, PADDING, TOKENS + NEW, **RULE):
        expected = model.generate(tokens, attention_mask=mask, use_cache=False, **more)
    dense = logits(model, expected.sequences[1:2])
    before = snapshot(model)
    with policies.applied(model, POLICY) as run:
        found = model.generate(tokens, attention_mask=mask, **more)
        report = run.report(found.past_key_values)
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert_close(torch.stack(found.logits), torch.stack(expected.logits), EXACT)
    # The control: what is not held matters.
    assert float((dense[0, TOKENS - 1 : -1] - torch.stack(found.logits)[:, 1]).abs().max()) > 1
    assert {type(layer) for layer in found.past_key_values.layers} == {EvictingCacheLayer}
    assert_untouched(model, before | {"attributes": snapshot(model)["attributes"]})
    # Of each item, all for full heads and the sink, the near blocks and what lies in the own one for the others.
    lengths = [TOKENS + NEW - 1 - left for left in PADDING]
    streamed = [length - max(0, length // 4 - 2) * 4 + 4 for length in lengths]
    assert [layer.rows for layer in report.layers] == [sum(lengths) + sum(streamed), 2 * sum(streamed)]
    assert report.dense_bytes == 2 * 2 * sum(lengths) * 2 * 16 * 8


def test_beams_and_samples_are_a_masked_model_s() -> None:
    model = host_of()
    tokens, mask = prompts()
    for more in ({"num_beams": 3, "do_sample": False}, {"do_sample": True, "temperature": 2.0}):
        with masked(model, PADDING, TOKENS + NEW, **RULE):
            torch.manual_seed(1)
            expected = model.generate(tokens, attention_mask=mask, use_cache=False, max_new_tokens=NEW, **more)
        with policies.applied(model, POLICY) as run:
            torch.manual_seed(1)
            cache = run.new_cache()
            found = model.generate(tokens, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, **more)
            assert cache.get_seq_length() == TOKENS + NEW - 1
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("chunks", [[60], [13, 1, 30, 16], [1] * 60, [41, *[1] * 19]], ids=lambda x: str(len(x)))
def test_any_split_of_a_prompt_says_the_same(chunks: list[int]) -> None:
    model = host_of()
    tokens = ids(2, 60)
    with masked(model, [0, 0], 60, **RULE):
        expected = logits(model, tokens, use_cache=False)
    with policies.applied(model, POLICY) as run:
        assert_close(said(model, tokens, chunks, run.new_cache()), expected, EXACT)
        assert_close(logits(model, tokens, use_cache=False), expected, EXACT)


def test_a_conversation_goes_on_in_its_cache() -> None:
    model = host_of()
    first = ids(1, 30)
    report = surgery.convert(model, "policy", policy=POLICY)
    try:
        cache = policies.cache(model, POLICY)
        tokens = model.generate(first, past_key_values=cache, **OPTIONS)
        tokens = torch.cat((tokens, ids(1, 9, seed=3)), 1)
        found = model.generate(tokens, past_key_values=cache, **OPTIONS)
    finally:
        report.undo()
    with masked(model, [0], 80, **RULE):
        assert found.tolist() == model.generate(tokens, use_cache=False, **OPTIONS).tolist()


def test_assisted_decoding_takes_back_what_the_slack_holds() -> None:
    model = host_of()
    tokens = ids(1, 30)
    with masked(model, [0], 50, **RULE):
        expected = model.generate(tokens, use_cache=False, **OPTIONS).tolist()
    slack = policies.Duo(FULL, sink=4, window=8, block=4, slack=24)
    with policies.applied(model, slack) as run:
        assistant = host("llama", seed=5)
        assert model.generate(tokens, assistant_model=assistant, **OPTIONS).tolist() == expected
        cache = run.new_cache()
        said(model, tokens, [30], cache)
        assert cache.layers[0].is_croppable
    with policies.applied(model, POLICY) as run:
        cache = run.new_cache()
        said(model, tokens, [30], cache)
        assert not cache.layers[0].is_croppable
        with pytest.raises(attnzoo.UnsupportedError, match=r"crop: a cache that evicts cannot go back; .* with slack"):
            cache.crop(-3)


def test_a_policy_is_taken_off_after_an_exception_and_put_on_once() -> None:
    model = host_of()
    before = snapshot(model)
    run = policies.applied(model, POLICY)
    with pytest.raises(attnzoo.UnsupportedError, match="applied: expected a policy that is on the model"):
        run.new_cache()
    with pytest.raises(KeyError), run:
        with pytest.raises(attnzoo.ConfigError, match=r"applied: expected .* entered twice"), run:
            pass
        other = policies.applied(model, policies.Streaming(sink=4, window=8, block=4))
        with pytest.raises(attnzoo.UnsupportedError, match=r"it follows Duo.*undo that conversion first"), other:
            pass
        with pytest.raises(attnzoo.UnsupportedError, match="it follows Duo"):
            surgery.convert(model, "mha", window=9, sink=1)
        with pytest.raises(attnzoo.UnsupportedError, match=r"policy: expected Streaming.* to be on the model"):
            policies.cache(model, other.policy)
        raise KeyError
    assert_untouched(model, before)
    with run:
        assert "Duo(1 of 4 KV heads full" in str(run.report(run.new_cache()))


def test_caches_that_cannot_follow_a_policy_are_refused_by_name() -> None:
    model = host_of()
    tokens = ids(1, 20)
    plain = model(tokens, use_cache=True).past_key_values
    with policies.applied(model, POLICY) as run:
        refused = pytest.raises(attnzoo.UnsupportedError, match="past_key_values: expected an empty cache, or one that")
        with torch.no_grad(), refused:
            model(tokens, past_key_values=plain)
        refused = pytest.raises(
            attnzoo.UnsupportedError, match=r"past_key_values: expected a DynamicCache .*, got Static"
        )
        with torch.no_grad(), refused:
            model(tokens, past_key_values=StaticCache(config=model.config, max_cache_len=32))
        cache = run.new_cache()
        said(model, tokens, [20], cache)
        with pytest.raises(attnzoo.UnsupportedError, match="expected no gradients through a cache that evicts"):
            model(tokens, past_key_values=cache)
        assert cache.get_seq_length() == 20
        twin = host("llama")
        refused = pytest.raises(attnzoo.UnsupportedError, match="got another model's")
        with policies.applied(twin, POLICY), torch.no_grad(), refused:
            twin(tokens, past_key_values=cache)
    refused = pytest.raises(attnzoo.UnsupportedError, match="got one whose block read something else")
    other = policies.Streaming(sink=4, window=12, block=4)
    with policies.applied(model, other), torch.no_grad(), refused:
        model(tokens, past_key_values=cache)
    with torch.no_grad(), pytest.raises(attnzoo.UnsupportedError, match="past_key_values: expected a cache that this"):
        model(tokens, past_key_values=cache)


def test_policies_that_do_not_fit_are_refused_and_nothing_is_changed() -> None:
    model = host_of()
    before = snapshot(model)
    for policy, words in (
        (policies.Duo(torch.ones(3, 2, dtype=torch.bool)), r"full: expected \[2, 2\], .*got \[3, 2\]"),
        (None, "policy: expected one of attnzoo.policies, got NoneType"),
    ):
        with pytest.raises(attnzoo.ConfigError, match=words):
            surgery.convert(model, "policy", policy=policy)
    with pytest.warns(UserWarning, match="without a sink"):
        surgery.convert(model, "policy", policy=policies.Streaming(sink=0, window=8, block=4)).undo()
    report = surgery.convert(model, "mha", window=9, sink=1)
    with pytest.raises(attnzoo.UnsupportedError, match="it follows a read pattern, which a policy would not"):
        surgery.convert(model, "policy", policy=POLICY)
    report.undo()
    assert_untouched(model, before | {"attributes": snapshot(model)["attributes"]})
    sliding = CONFIGS["mistral"]()
    sliding.sliding_window = 16
    windowed = type(host_of("mistral"))(sliding)
    with pytest.raises(attnzoo.UnsupportedError, match="sliding window of its own"):
        surgery.convert(windowed, "policy", policy=POLICY)


def test_a_fresh_model_is_trained_without_a_cache_under_a_policy() -> None:
    model = host_of()
    tokens = ids(1, 40)
    with policies.applied(model, POLICY):
        out = model(tokens, use_cache=False)
        kept = model(tokens, use_cache=True)
        assert EvictingCacheLayer not in {type(layer) for layer in kept.past_key_values.layers}
        (grad,) = torch.autograd.grad(out.logits.square().sum(), model.model.embed_tokens.weight)
    assert_close(kept.logits.detach(), out.logits.detach(), EXACT)
    with masked(model, [0], 40, **RULE):
        out = model(tokens, use_cache=False)
        (expected,) = torch.autograd.grad(out.logits.square().sum(), model.model.embed_tokens.weight)
    assert_close(grad, expected, 1e-11)


@pytest.mark.parametrize("uses_cache", [False, True])
def test_a_call_without_a_cache_in_which_a_policy_chooses_nothing_says_so(uses_cache: bool) -> None:
    model = host_of()
    tokens = ids(1, 20)
    chooses = policies.KNorm(budget=8, sink=1, window=2)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with policies.applied(model, chooses):
            model.generate(tokens, use_cache=uses_cache, max_new_tokens=2, do_sample=False)
        # What follows from place alone is followed without a cache too.
        with policies.applied(model, POLICY):
            logits(model, tokens, use_cache=False)
    said = [str(warning.message) for warning in found if "use_cache" in str(warning.message)]
    assert bool(said) is not uses_cache
    assert all("'knorm'" in text for text in said)
