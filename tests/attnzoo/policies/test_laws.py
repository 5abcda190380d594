"""The laws that every policy of the registry obeys, in a cache of attnzoo's own layer."""

from __future__ import annotations

import copy
import json
from dataclasses import fields
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attnzoo.cache.pages.cache import PagedCache
from attnzoo.cache.policies.known import policies, policy_from
from attnzoo_kernels.errors import ConfigError
from tests.attnzoo.cases import assert_same
from tests.attnzoo.policies.lives import (
    ITEMS,
    Script,
    asked,
    assert_told,
    calls_of,
    expected_of,
    layer_of,
    poison,
    rows_of,
    script,
    scripts,
    sequences,
    told_by,
)
from tests.attnzoo.policies.settings import Setting, entry_of, names

every_policy = pytest.mark.parametrize("name", names())
SETTINGS = [pytest.param((name, i), id=f"{name}-{i}") for name in names() for i in range(len(entry_of(name).settings))]
every_setting = pytest.mark.parametrize("setting", SETTINGS)


def in_turn(argument: str, options: dict[str, Any]) -> pytest.MarkDecorator:
    """Every setting with one option of several, so that options take turns; all others are slow."""
    each = list(options.items())
    cases = []
    for number, setting in enumerate(SETTINGS):
        for k, (word, option) in enumerate(each):
            marks = () if number % len(each) == k else pytest.mark.slow
            cases.append(pytest.param(*setting.values, option, id=f"{setting.id}-{word}", marks=marks))
    return pytest.mark.parametrize(("setting", argument), cases)


LONG = script([9, 7, *[1] * 7, 5, 1, 1], "any", seed=3)
PLAIN = script([13, 3, 1, 1, 1, 1])
PROMPT = script([13, 1, 1, 1, 1])
CHOSEN = {"reorder": [2, 0, 1], "repeat": [1, 1, 0, 2, 2], "select": [2]}
FAILS = {"prompt": 1, "choice": 2, "step": 4}


def setting_of(named: tuple[str, int]) -> Setting:
    name, number = named
    return entry_of(name).settings[number]


def new_cache(layer: Any, policy: Any, batch: int = ITEMS) -> Any:
    return layer.new_cache(batch, 64, policy=policy)


@every_setting
@settings(max_examples=1, deadline=None)
@given(told=scripts())
@example(told=LONG)
@example(told=PLAIN)
def test_a_policy_is_its_formula(setting: tuple[str, int], told: Script) -> None:
    assert_is_the_formula(setting, told)


@pytest.mark.slow
@every_setting
@settings(max_examples=40, deadline=None)
@given(told=scripts())
def test_a_policy_is_its_formula_whatever_calls_come(setting: tuple[str, int], told: Script) -> None:
    assert_is_the_formula(setting, told)


def assert_is_the_formula(setting: tuple[str, int], told: Script) -> None:
    layer = layer_of()
    items = sequences(layer, told)
    made = setting_of(setting)
    assert_told(told_by(layer, new_cache(layer, made.make()), told, items), expected_of(layer, made, told, items))


@every_policy
def test_a_policy_that_leaves_nothing_out_is_dense(name: str) -> None:
    layer = layer_of()
    items = sequences(layer, LONG)
    actual = told_by(layer, new_cache(layer, entry_of(name).dense()), LONG, items)
    with torch.no_grad():
        for x, out in zip(items, actual.out, strict=True):
            assert_same(out, layer(x[None])[0])


@every_setting
@settings(max_examples=1, deadline=None)
@given(ends=st.sets(st.integers(1, 17), max_size=5))
@example(ends={1, 3, 12, 13})
def test_a_prompt_may_come_in_any_chunks(setting: tuple[str, int], ends: set[int]) -> None:
    """Chunks of one token among them, where what is held follows from place."""
    layer = layer_of()
    made = setting_of(setting)
    if not made.by_place:
        ends = {end for end in ends if end % 3 == 0}
    cuts = [0, *sorted(ends), 19]
    widths = [b - a for a, b in pairwise(cuts)]
    whole = script([19, *[1] * 5])
    items = sequences(layer, whole)
    one = told_by(layer, new_cache(layer, made.make()), whole, items)
    many = told_by(layer, new_cache(layer, made.make()), script([*widths, *[1] * 5]), items)
    assert many.held[-1] == one.held[-1]
    for mine, theirs in zip(many.out, one.out, strict=True):
        assert_same(mine, theirs)


@every_setting
def test_what_is_held_by_place_is_the_same_in_pages(setting: tuple[str, int]) -> None:
    made = setting_of(setting).make()
    if not made.is_static:
        pytest.skip("lies in pages in any case")
    settings_of = {f.name: getattr(made, f.name) for f in fields(made) if f.init}
    paged = type("InPages", (type(made),), {"is_static": False})(**settings_of)
    layer = layer_of()
    items = sequences(layer, LONG)
    cache = new_cache(layer, paged)
    assert isinstance(cache, PagedCache)
    assert_told(told_by(layer, cache, LONG, items), told_by(layer, new_cache(layer, made), LONG, items))


@every_setting
def test_nobody_reads_what_was_freed(setting: tuple[str, int]) -> None:
    layer = layer_of()
    items = sequences(layer, LONG)
    made = setting_of(setting)
    plain, poisoned = new_cache(layer, made.make()), new_cache(layer, made.make())
    with torch.no_grad():
        for x, padding in calls_of(LONG, items):
            for mine, theirs in zip(asked(layer, poisoned, x, padding), asked(layer, plain, x, padding), strict=True):
                assert_same(mine, theirs)
            poison(poisoned)
    assert rows_of(poisoned) == rows_of(plain)


@in_turn("index", CHOSEN)
def test_items_are_chosen_with_all_that_they_hold(setting: tuple[str, int], index: list[int]) -> None:
    layer = layer_of()
    before = script([11, 1, 1], "left", seed=2)
    items = sequences(layer, before)
    made = setting_of(setting)
    plain, chosen = new_cache(layer, made.make()), new_cache(layer, made.make())
    more = sequences(layer, script([9]), seed=5)
    with torch.no_grad():
        told_by(layer, plain, before, items)
        told_by(layer, chosen, before, items)
        chosen.reorder(torch.tensor(index))
        for x, _ in calls_of(script([1, 1, 3, 1, 1, 1]), more):
            everyone = layer.attend(x, cache=plain).out
            assert_same(layer.attend(x[index], cache=chosen).out, everyone[index])
            held = rows_of(plain)
            assert rows_of(chosen) == [held[item] for item in index]


@every_setting
def test_a_copy_goes_its_own_way(setting: tuple[str, int]) -> None:
    layer = layer_of()
    items = sequences(layer, PROMPT)
    made = setting_of(setting)
    calls = calls_of(PROMPT, items)
    with torch.no_grad():
        cache = new_cache(layer, made.make())
        expected = [layer.attend(x, cache=cache).out for x, _ in calls]
        cache = new_cache(layer, made.make())
        for x, _ in calls[:2]:
            layer.attend(x, cache=cache)
        twin_layer, twin = copy.deepcopy((layer, cache))
        for x, _ in calls[2:4]:
            layer.attend(torch.ones_like(x), cache=cache)
        for (x, _), out in zip(calls[2:], expected[2:], strict=True):
            assert torch.equal(twin_layer.attend(x, cache=twin).out, out)


class BrokenError(RuntimeError):
    """What a module raises in the tests."""


@in_turn("at", FAILS)
def test_a_call_that_fails_leaves_no_trace(setting: tuple[str, int], at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of()
    told = script([9, 6, 1, 1, 1, 1, 1], "any", seed=1)
    items = sequences(layer, told)
    made = setting_of(setting)
    plain, tried = new_cache(layer, made.make()), new_cache(layer, made.make())

    def breaks(*_: Any) -> None:
        raise BrokenError

    with torch.no_grad():
        for number, (x, padding) in enumerate(calls_of(told, items)):
            if number == at:
                before = rows_of(tried)
                lengths = tried.lengths.tolist()
                with monkeypatch.context() as patch:
                    patch.setattr(type(layer), "combine", breaks)
                    with pytest.raises(BrokenError):
                        layer.attend(torch.full_like(x, 3.0), cache=tried)
                assert rows_of(tried) == before
                assert tried.lengths.tolist() == lengths
            expected = asked(layer, plain, x, padding)
            for mine, theirs in zip(asked(layer, tried, x, padding), expected, strict=True):
                assert torch.equal(mine, theirs)


@every_policy
@pytest.mark.parametrize(("calls", "back"), [(1, 1), (1, 5), (4, 3)])
def test_as_many_tokens_as_the_slack_may_be_taken_back(name: str, calls: int, back: int) -> None:
    """As if they had never come, also where rows were chosen or left meanwhile."""
    make = entry_of(name).slack
    if make is None:
        pytest.skip("no tokens can be taken back from it")
    layer = layer_of()
    told = script([15, *[1] * 8])
    items = sequences(layer, told)
    other = torch.stack(sequences(layer, script([back]), seed=7))
    plain, tried = new_cache(layer, make(5)), new_cache(layer, make(5))
    with torch.no_grad():
        for x, _ in calls_of(told, items)[:calls]:
            assert torch.equal(layer.attend(x, cache=tried).out, layer.attend(x, cache=plain).out)
        for x in other.split(1, 1):
            layer.attend(x, cache=tried)
        tried.crop(14 + calls)
        assert tried.lengths.tolist() == plain.lengths.tolist()
        assert rows_of(tried) == rows_of(plain)
        for x, _ in calls_of(told, items)[calls:]:
            assert_same(layer.attend(x, cache=tried).out, layer.attend(x, cache=plain).out)


@every_setting
def test_a_policy_is_saved_and_made_again(setting: tuple[str, int]) -> None:
    made = setting_of(setting).make()
    again = policy_from(json.loads(json.dumps(made.settings())), {k: v.clone() for k, v in made.weights().items()})
    assert type(again) is type(made)
    assert again.settings() == made.settings()
    layer = layer_of()
    items = sequences(layer, PROMPT)
    one = told_by(layer, new_cache(layer, made), PROMPT, items)
    other = told_by(layer, new_cache(layer, again), PROMPT, items)
    assert other.held == one.held
    assert all(torch.equal(a, b) for a, b in zip(one.out, other.out, strict=True))


@every_policy
def test_bad_settings_are_refused_by_name(name: str) -> None:
    for options, word in entry_of(name).refused:
        with pytest.raises(ConfigError, match=f"^{word}: expected "):
            policies[name](**options)
    with pytest.raises(ConfigError, match=r"^flavour: expected one of "):
        policy_from({**entry_of(name).settings[0].make().settings(), "flavour": 1})


@every_policy
def test_bad_calls_are_refused_and_change_nothing(name: str) -> None:
    layer = layer_of()
    made = entry_of(name).settings[0]
    items = sequences(layer, PROMPT)
    cache = new_cache(layer, made.make())
    calls = calls_of(PROMPT, items)
    with torch.no_grad():
        for x, _ in calls[:2]:
            layer.attend(x, cache=cache)
        before = rows_of(cache)
        with pytest.raises(ValueError, match="expected"):
            layer.attend(calls[2][0][:2], cache=cache)
        with pytest.raises((ValueError, NotImplementedError), match=r"crop|length"):
            cache.crop(-1)
        if entry_of(name).forgets:
            with pytest.raises((ValueError, NotImplementedError), match="crop"):
                cache.crop(5)
        with pytest.raises(ValueError, match="cache"):
            copy.deepcopy(layer).attend(calls[2][0], cache=cache)
        assert rows_of(cache) == before
        twin = new_cache(layer, made.make())
        for x, _ in calls[:2]:
            layer.attend(x, cache=twin)
        for x, _ in calls[2:]:
            assert torch.equal(layer.attend(x, cache=cache).out, layer.attend(x, cache=twin).out)
