"""What policies in hosts refuse, by name and with model and cache as they were; and what compilers get of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import attnzoo
from attnzoo import policies, surgery
from attnzoo.surgery.hosts.calls import cache_name
from tests.attnzoo.cases import assert_same, tokens
from tests.attnzoo.policies.lives import layer_of, rows_of
from tests.attnzoo.policies.masked import FULL, host
from tests.attnzoo.policies.reference import of_all_layers, small_host
from tests.attnzoo.policies.settings import entry_of, names
from tests.attnzoo.surgery.tiny import assert_untouched, ids, logits, snapshot

every_policy = pytest.mark.parametrize("name", names())
PER_HEAD = {"duo": "full", "razor": "full", "compose": "full", "locret": "retaining"}
"""What is set head by head, of those policies of which something is."""
KEPT = policies.Duo(FULL, sink=4, window=8, block=4)
CHOSEN = policies.SnapKV(budget=9, sink=1, window=4, pool=3, page=4)
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


@cache
def host_of(**sizes: int) -> Any:
    """A host that every test leaves as it was."""
    return host("llama", **sizes)


@cache
def small() -> Any:
    return small_host("llama")


def held_by(memory: Any) -> list[Any]:
    """What the layers of a host's cache hold."""
    return [(layer.seen, None if layer.memory is None else rows_of(layer.memory)) for layer in memory.layers]


def said(model: Any, memory: Any, items: int = 2, count: int = 1) -> Any:
    """The logits of a call with a cache."""
    return logits(model, ids(items, count), use_cache=True, **{cache_name(type(model).forward): memory})


@every_policy
def test_policies_of_other_shapes_are_refused_by_name(name: str) -> None:
    model = small()
    before = snapshot(model)
    one = entry_of(name).settings[0].make()
    for policy in (of_all_layers(one, 3), of_all_layers(one, 1)):
        if name in PER_HEAD:
            with pytest.raises(attnzoo.ConfigError, match=f"{PER_HEAD[name]}: expected"):
                surgery.convert(model, "policy", policy=policy)
        else:
            surgery.convert(model, "policy", policy=policy).undo()
    assert_untouched(model, before | {"attributes": snapshot(model)["attributes"]})


@pytest.mark.parametrize("policy", [KEPT, CHOSEN], ids=["kept", "chosen"])
def test_caches_of_other_kinds_are_refused_before_anything_is_read(policy: Any) -> None:
    model = host_of()
    name = cache_name(type(model).forward)
    refused = "past_key_values: expected a DynamicCache that stays in place, which can follow .*, got "
    with policies.applied(model, policy) as run:
        before = snapshot(model)
        for kind, got in (("static", "StaticLayer"), ("offloaded", "one that offloads")):
            with pytest.raises(attnzoo.UnsupportedError, match=refused + got):
                model.generate(ids(2, 20), cache_implementation=kind, **OPTIONS)
        for memory in (
            StaticCache(config=model.config, max_cache_len=32),
            DynamicCache(config=model.config, offloading=True),
        ):
            with pytest.raises(attnzoo.UnsupportedError, match=refused):
                model.generate(ids(2, 20), **{name: memory}, **OPTIONS)
            assert not memory.get_seq_length()
        assert_untouched(model, before)
        assert run.new_cache().get_seq_length() == 0


def foreign(run: Any) -> list[tuple[Callable[[], Any], str]]:
    """Calls with caches of models of other sizes, each with the words that refuse it."""
    other = host_of(num_hidden_layers=3)
    cases: list[tuple[Callable[[], Any], str]] = []
    for memory in (run.new_cache(), _filled(run)):
        cases.append((lambda memory=memory: said(other, copy.deepcopy(memory)), "a layer for each of 3 blocks"))
    shallow = host_of(num_hidden_layers=1)
    cases.append((lambda: said(shallow, _filled(run)), "a layer for each of 1 blocks"))
    grouped = host_of(num_key_value_heads=4)
    cases.append((lambda: said(grouped, _filled(run)), "whose block read something else"))
    return cases


def _filled(run: Any) -> Any:
    memory = run.new_cache()
    said(run.model, memory, count=20)
    return memory


def test_caches_of_models_of_other_sizes_are_refused() -> None:
    with policies.applied(host_of(), CHOSEN) as run:
        for number, (call, words) in enumerate(foreign(run)):
            other = [host_of(num_hidden_layers=3)] * 2 + [
                host_of(num_hidden_layers=1),
                host_of(num_key_value_heads=4),
            ]
            before = snapshot(other[number])
            with (
                policies.applied(other[number], CHOSEN),
                pytest.raises(attnzoo.UnsupportedError, match=f"past_key_values: expected a cache .*{words}"),
            ):
                call()
            assert_untouched(other[number], before | {"attributes": snapshot(other[number])["attributes"]})


@pytest.mark.parametrize("policy", [KEPT, CHOSEN], ids=["kept", "chosen"])
def test_other_items_than_those_held_are_refused_and_change_nothing(policy: Any) -> None:
    model = host_of()
    with policies.applied(model, policy) as run:
        tried, plain = _filled(run), _filled(run)
        before = held_by(tried)
        for items in (1, 3):
            with pytest.raises(attnzoo.ShapeError, match=f"past_key_values: expected a call of the 2 .*, got {items}"):
                said(model, tried, items)
        assert held_by(tried) == before
        assert torch.equal(said(model, tried), said(model, plain))


@every_policy
def test_drafts_are_taken_back_with_slack_and_refused_without(name: str) -> None:
    model = small()
    entry = entry_of(name)
    options: dict[str, Any] = {**OPTIONS, "prompt_lookup_num_tokens": 3}
    prompt = ids(1, 6).repeat(1, 3)
    with (
        policies.applied(model, of_all_layers(entry.settings[0].make())),
        pytest.raises((ValueError, attnzoo.UnsupportedError), match="crop"),
    ):
        model.generate(prompt, **options)
    if entry.slack is None:
        return
    with policies.applied(model, of_all_layers(entry.slack(8))):
        found = model.generate(prompt, **options).tolist()
        if entry.settings[0].by_place:
            assert found == model.generate(prompt, **OPTIONS).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("policy", [KEPT, CHOSEN], ids=["kept", "chosen"])
def test_a_compiled_model_refuses_a_policy_s_cache_and_changes_nothing(policy: Any) -> None:
    model = host_of()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    name = cache_name(type(model).forward)
    with policies.applied(model, policy) as run:
        tried, plain = _filled(run), _filled(run)
        before = held_by(tried)
        for memory in (tried, run.new_cache()):
            with (
                torch.no_grad(),
                pytest.raises(attnzoo.UnsupportedError, match=r"past_key_values: expected None under compilation bes"),
            ):
                compiled(ids(2, 1), use_cache=True, **{name: memory})
        assert held_by(tried) == before
        # What is not compiled goes on.
        assert torch.equal(said(model, tried), said(model, plain))


@torch.no_grad()
def test_a_compiled_layer_follows_what_is_held_by_place_in_one_graph() -> None:
    layer = layer_of()
    policy = policies.Duo(torch.tensor([True, False]), sink=4, window=4, block=4)
    torch.compiler.reset()
    compiled = torch.compile(lambda x, memory: layer.attend(x, cache=memory).out, backend="eager", fullgraph=True)
    one, other = (layer.new_cache(2, 64, policy=policy) for _ in range(2))
    x = tokens(layer, 2, 12)
    for part in x.split([9, 1, 1, 1], 1):
        assert_same(compiled(part, one), layer.attend(part, cache=other).out)
    assert rows_of(one) == rows_of(other)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "snapkv" else [pytest.mark.slow]) for name in names()]
)
@torch.no_grad()
def test_a_compiled_layer_refuses_rows_in_pages_and_changes_nothing(name: str) -> None:
    layer = layer_of()
    policy = entry_of(name).settings[0].make()
    if policy.is_static:
        pytest.skip("lies in no pages")
    torch.compiler.reset()
    compiled = torch.compile(lambda x, memory: layer.attend(x, cache=memory).out, backend="eager")
    one, other = (layer.new_cache(2, 64, policy=policy) for _ in range(2))
    x = tokens(layer, 2, 12)
    for memory in (one, other):
        layer.attend(x[:, :11], cache=memory)
    before = rows_of(one)
    with pytest.raises(attnzoo.UnsupportedError, match="cache: expected no compiler where rows are kept in pages"):
        compiled(x[:, 11:], one)
    assert rows_of(one) == before
    assert torch.equal(layer.attend(x[:, 11:], cache=one).out, layer.attend(x[:, 11:], cache=other).out)
