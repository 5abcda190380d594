"""Looking at a model's attention: what is seen is what is computed, and nothing stays behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo import surgery
from attnzoo.surgery.capture import around_attention, watched
from attnzoo.surgery.hosts.calls import AROUND, AttentionCall
from attnzoo.surgery.hosts.site import Site
from attnzoo_kernels.errors import ConfigError, UnsupportedError
from tests.attnzoo.heads.hosts import FAMILIES, host
from tests.attnzoo.surgery.tiny import assert_close, assert_untouched, convert, ids, logits, replace_mha, snapshot, tiny


def seen_in(model: Any, tokens: Tensor, **options: Any) -> tuple[list[AttentionCall], Tensor]:
    calls: list[AttentionCall] = []
    with watched(model, lambda site, call: calls.append(call), **options):
        found = logits(model, tokens)
    return calls, found


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_what_is_seen_gives_the_hosts_own_attention(family: str, implementation: str) -> None:
    model = host(family)
    model.set_attn_implementation(implementation)
    outputs: list[Tensor] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
        for layer in model.model.layers
    ]
    expected = logits(model, ids(2, 19))
    for hook in hooks:
        hook.remove()
    before = snapshot(model)
    calls, found = seen_in(model, ids(2, 19), unrotated=True)
    assert_untouched(model, before)
    assert_close(found, expected, 1e-5)
    cos, sin = model.model.rotary_emb(model.model.embed_tokens(ids(2, 19)), torch.arange(19)[None])
    for call, output in zip(calls, outputs, strict=True):
        group = call.q.shape[1] // call.k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (call.k, call.v))
        own = torch.nn.functional.scaled_dot_product_attention(call.q, k, v, is_causal=True, scale=call.scale)
        assert_close(own.transpose(1, 2).flatten(2), output, 1e-5)
        assert call.unrotated is not None
        for plain, rotated in zip(call.unrotated, (call.q, call.k), strict=True):
            assert_close(turned(plain, cos, sin), rotated, 1e-5)
            assert float((plain - rotated).abs().max()) > 0.1


def test_nobody_asks_for_what_is_not_rotated() -> None:
    calls, _ = seen_in(tiny(), ids(1, 5))
    assert [call.unrotated for call in calls] == [None, None]


@pytest.mark.parametrize("kind", ["plain", "window"])
def test_looking_changes_no_bit_of_a_model_that_calls_us_already(kind: str) -> None:
    model = tiny()
    convert(model, "mha", **({"window": 9, "sink": 2, "block_size": 4} if kind == "window" else {}))
    expected = logits(model, ids(2, 30))
    before = snapshot(model)
    calls, found = seen_in(model, ids(2, 30))
    assert torch.equal(found, expected)
    assert len(calls) == 2
    assert_untouched(model, before)


def test_steps_see_all_that_is_held_and_padding_is_told() -> None:
    model = tiny()
    calls: list[AttentionCall] = []
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    with watched(model, lambda site, call: calls.append(call)):
        model.generate(ids(2, 9), attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert [call.q.shape[2] for call in calls[::2]] == [9, 1, 1]
    assert [call.k.shape[2] for call in calls[::2]] == [9, 10, 11]
    assert [call.geometry.first for call in calls[::2]] == [0, 9, 10]
    assert torch.equal(calls[0].geometry.real[:, :9], mask.bool())


def test_an_answer_takes_the_place_of_attention_and_contexts_go_into_each_other() -> None:
    model = tiny()
    tokens = ids(1, 12)
    expected = logits(model, tokens)
    asked: list[tuple[str, int]] = []

    def half(name: str) -> Any:
        def around(site: Site, call: AttentionCall) -> Tensor:
            asked.append((name, site.layer))
            return call.answered() * 0.5

        return around

    sites = surgery.find(model)
    with around_attention(model, half("outer")):
        with around_attention(model, half("inner"), sites=sites[1:]):
            both = logits(model, tokens)
        outer = logits(model, tokens)
    assert asked[:3] == [("outer", 0), ("inner", 1), ("outer", 1)]
    assert torch.equal(logits(model, tokens), expected)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight *= 0.5
        model.model.layers[1].self_attn.o_proj.weight *= 0.5
        assert_close(outer, logits(model, tokens), 1e-12)
        model.model.layers[1].self_attn.o_proj.weight *= 0.5
        assert_close(both, logits(model, tokens), 1e-12)


@pytest.mark.parametrize("when", ["looking", "between"])
def test_an_exception_leaves_nothing_behind(when: str) -> None:
    model = tiny()
    before = snapshot(model)

    def see(site: Site, call: AttentionCall) -> None:
        if when == "looking":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watched(model, see, unrotated=True):
        logits(model, ids(1, 4))
        raise KeyboardInterrupt
    assert_untouched(model, before)
    assert not any(AROUND in module.__dict__ for module in model.modules())


def test_gradients_go_through_what_is_seen() -> None:
    model = tiny()
    found: list[Tensor] = []
    with watched(model, lambda site, call: found.append(call.q)):
        model(ids(1, 7)).logits.sum().backward()
    assert all(q.requires_grad for q in found)
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


def test_blocks_that_attend_by_themselves_are_refused() -> None:
    model = tiny()
    replace_mha(model, where=lambda site: site.layer == 1)
    before = snapshot(model)
    message = "layers.1.self_attn: expected a block whose attention the host calls"
    with pytest.raises(UnsupportedError, match=message), watched(model, print):
        pass
    assert_untouched(model, before)
    with pytest.raises(ConfigError, match="expected attention blocks"), watched(torch.nn.Linear(2, 2), print):
        pass
