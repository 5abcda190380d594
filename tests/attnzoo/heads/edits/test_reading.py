"""Edits of what heads read: one rule written out with all scores, wherever a model's attention is computed.

Letters: B batch, T rows, S keys, H query heads, D width.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import attnzoo
from attnzoo import heads, policies, surgery
from attnzoo.heads import HeadEdit, KeyBias
from attnzoo.surgery.edits.key_bias import SinkScaling
from attnzoo_kernels.errors import AttnzooError, ConfigError, ShapeError, UnsupportedError
from tests.attnzoo.surgery.families.hosts import HOSTS
from tests.attnzoo.surgery.tiny import READING, assert_untouched, convert, ids, snapshot, tiny

TOKENS = 21
SINKS = [0, 3, 5]
EDITS = [
    HeadEdit(0, 1, key_bias=KeyBias.knock_out([4, 9, 20], [0, 2, 9])),
    HeadEdit(0, [1, 2], key_bias=KeyBias.emphasise([1, 6], 0.7)),
    HeadEdit(0, 4, ablate="uniform"),
    HeadEdit(0, 5, post=SinkScaling(torch.tensor(SINKS), 0.4)),
    HeadEdit(1, 3, key_bias=KeyBias.only(range(5))),
]
"""In the first layer of every kind, in the second one that leaves early rows what they had."""


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


def outputs(model: Any, tokens: Tensor, edits: list[HeadEdit], **options: Any) -> dict[int, Tensor]:
    """The outputs of both layers' heads ``[B, T, H, D]`` with edits."""
    with heads.edited(model, edits), heads.capture(model) as seen, torch.no_grad():
        model(tokens, **options)
    return dict(seen["z"])


def shares(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The first layer's scores ``[B, H, T, S]`` before softmax, and the values that its query heads read."""
    with heads.capture(model, ("q", "k", "v"), [0]) as seen, torch.no_grad():
        model(tokens, use_cache=False)
    q, k, v = (seen[name][0].transpose(1, 2) for name in ("q", "k", "v"))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * q.shape[3] ** -0.5
    future = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf), v


def written_out(scores: Tensor, v: Tensor) -> Tensor:
    """The first layer's heads ``[B, T, H, D]`` with ``EDITS``, by all scores."""
    scores = scores.clone()
    for row in (4, 9, 20):
        scores[:, 1, row, [0, 2, 9]] = -math.inf
    scores[:, 1:3, :, [1, 6]] += 0.7
    scores[:, 4] = torch.where(scores[:, 4] > -math.inf, 0.0, -math.inf)
    weights = scores.softmax(-1)
    sinks = torch.zeros(scores.shape[-1], dtype=torch.bool)
    sinks[SINKS] = True
    head = weights[:, 5]
    mass = (head * sinks).sum(-1, keepdim=True)
    # What is taken from sinks goes to the others, each in proportion; a row that sees sinks alone stays.
    rest = (head * ~sinks).sum(-1, keepdim=True)
    more = torch.where(rest > 0, (1 - 0.4 * mass) / rest, torch.ones_like(rest))
    less = torch.ones_like(mass).masked_fill(rest > 0, 0.4)
    weights[:, 5] = torch.where(sinks, head * less, head * more)
    return (weights @ v).transpose(1, 2)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-12 * expected.abs().max())


def test_single_heads_read_as_written_out_and_no_others_change(model: Any) -> None:
    tokens = ids(2, TOKENS)
    found = outputs(model, tokens, EDITS)
    assert close(found[0], written_out(*shares(model, tokens)))
    with heads.edited(model, HeadEdit(1, 0, ablate="uniform")):
        plain = outputs(model, tokens, [])
    untouched = [0, 3]
    assert torch.equal(found[0][:, :, untouched], plain[0][:, :, untouched])
    # With the first five keys left, the first five rows see what they saw.
    same = outputs(model, tokens, EDITS[:-1])[1]
    assert close(found[1][:, :5], same[:, :5])
    assert not close(found[1][:, 5:, 3], same[:, 5:, 3])


def test_a_plain_mean_sees_what_is_not_hidden_and_no_weights(model: Any) -> None:
    tokens = ids(1, 9)
    biases = (KeyBias.knock_out(None, [2, 5]), KeyBias.emphasise([1], 2.0))
    edits = [HeadEdit(0, 4, key_bias=bias) for bias in biases] + [HeadEdit(0, 4, ablate="uniform")]
    scores, v = shares(model, tokens)
    seen = (scores[:, 4] > -math.inf) & ~torch.isin(torch.arange(9), torch.tensor([2, 5]))
    expected = (seen.double() / seen.sum(-1, keepdim=True)) @ v[:, 4]
    assert close(outputs(model, tokens, edits)[0][:, :, 4], expected)


def test_rows_that_are_left_with_nothing_give_zeros(model: Any) -> None:
    found = outputs(model, ids(1, 6), [HeadEdit(0, 2, key_bias=KeyBias.knock_out(None, range(3)))])[0]
    assert bool((found[:, :3, 2] == 0).all())
    assert bool((found[:, 3:, 2] != 0).any())


def test_padding_does_not_count(model: Any) -> None:
    tokens = ids(2, TOKENS)
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, :6] = 0
    found = outputs(model, tokens, EDITS, attention_mask=mask)[0]
    assert close(found[1:, 6:], outputs(model, tokens[1:, 6:], EDITS)[0])
    commas = tokens == tokens[1, 9]
    edit = HeadEdit(0, 2, key_bias=KeyBias.knock_out(None, commas, attention_mask=mask), where="last")
    found = outputs(model, tokens, [edit], attention_mask=mask)[0]
    alone = HeadEdit(0, 2, key_bias=KeyBias.knock_out(None, commas[1, 6:]), where="last")
    assert close(found[1:, 6:], outputs(model, tokens[1:, 6:], [alone])[0])
    with pytest.raises(ShapeError, match="key_bias: expected masks that count no padding"):
        outputs(model, tokens, [HeadEdit(0, 2, key_bias=KeyBias.knock_out(None, commas))], attention_mask=mask)


def test_rows_are_those_that_where_says(model: Any) -> None:
    tokens = ids(1, 8)
    edited = outputs(model, tokens, [HeadEdit(0, 4, ablate="uniform")])[0]
    plain = outputs(model, tokens, [HeadEdit(0, 4, ablate="uniform", where="decode")])[0]
    rows = torch.zeros(1, 8, dtype=torch.bool)
    rows[0, [2, 7]] = True
    found = outputs(model, tokens, [HeadEdit(0, 4, ablate="uniform", where=rows)])[0]
    assert close(found, torch.where(rows[..., None, None], edited, plain))
    last = outputs(model, tokens, [HeadEdit(0, 4, ablate="uniform", where="last")])[0]
    assert close(last[:, -1], edited[:, -1])
    assert close(last[:, :-1], plain[:, :-1])


def test_a_plain_mean_is_all_that_is_left_of_what_was_done_before(model: Any) -> None:
    tokens = ids(1, 8)
    mean = HeadEdit(0, 4, ablate="uniform", scale=3.0)
    expected = outputs(model, tokens, [mean])[0]
    assert torch.equal(
        outputs(model, tokens, [HeadEdit(0, [3, 4], ablate="zero"), mean])[0][:, :, 4], expected[:, :, 4]
    )
    with heads.edited(model, HeadEdit(0, [3, 4], scale=2.0)):
        found = outputs(model, tokens, [mean])[0]
    assert torch.equal(found[:, :, 4], expected[:, :, 4])
    assert torch.equal(found[:, :, 3], expected[:, :, 3] * 2)


def test_contexts_add_to_each_other_and_leave_nothing_behind(model: Any) -> None:
    tokens = ids(1, TOKENS)
    before = snapshot(model)
    expected = outputs(model, tokens, EDITS)[0]
    with ExitStack() as stack:
        for edit in EDITS[:-1]:
            stack.enter_context(heads.edited(model, edit))
        assert close(outputs(model, tokens, EDITS[-1:])[0], expected)
    assert_untouched(model, before)
    identity = [
        HeadEdit(0, 0, post=SinkScaling(torch.tensor([3]), 1.0)),
        HeadEdit(0, 1, key_bias=KeyBias.emphasise([1], 0.0)),
        HeadEdit(0, 2, key_bias=KeyBias.knock_out([1], [])),
    ]
    plain = outputs(model, tokens, [])
    with heads.edited(model, identity):
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(outputs(model, tokens, [])[0], plain[0])


def run_in_calls(model: Any, tokens: Tensor, sizes: list[int], cache: Any, mask: Tensor | None = None) -> Tensor:
    """The logits of a sequence that comes in calls of so many tokens."""
    parts = []
    first = 0
    for size in sizes:
        end = first + size
        padding = {} if mask is None else {"attention_mask": mask[:, :end]}
        parts.append(model(tokens[:, first:end], past_key_values=cache, use_cache=True, **padding).logits)
        first = end
    return torch.cat(parts, 1)


CONVERTED = {**READING, "streaming": policies.Streaming(sink=4, window=8, block=4)}


@pytest.mark.parametrize("kind", ["plain", "s2", "window", "streaming", "own window"])
@torch.no_grad()
def test_decoding_reads_as_a_prompt_does(kind: str) -> None:
    model = HOSTS["Mistral with a window"].make() if kind == "own window" else tiny()
    given: Any = CONVERTED.get(kind)
    if isinstance(given, tuple):
        surgery.convert(model, given[0], **given[1])
    elif given is not None:
        surgery.convert(model, "policy", policy=given)
    tokens = ids(2, TOKENS)
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, :3] = 0
    real = mask.bool()
    edits = [*EDITS, HeadEdit(1, 0, ablate="uniform"), HeadEdit(1, 2, post=SinkScaling(torch.tensor([1, 2]), 0.0))]
    # The Mistral has four heads.
    count = model.config.num_attention_heads
    edits = [edit for edit in edits if isinstance(edit.head, list) or edit.head < count]
    plain = model(tokens, attention_mask=mask, use_cache=False).logits
    with heads.edited(model, edits):
        whole = model(tokens, attention_mask=mask, use_cache=False).logits
        decoded = run_in_calls(model, tokens, [8, 5, *[1] * (TOKENS - 13)], DynamicCache(config=model.config), mask)
    assert not close(whole[real], plain[real])
    assert close(decoded[real], whole[real])


POLICIES: dict[str, policies.Policy] = {
    "by place": policies.Streaming(sink=4, window=4, block=4),
    "by score": policies.KNorm(budget=9, window=2),
    "by pages": policies.Pages(budget=12, page=4),
}


@pytest.mark.parametrize("kind", POLICIES)
@torch.no_grad()
def test_what_is_held_is_edited_by_its_tokens(model: Any, kind: str) -> None:
    tokens = ids(2, TOKENS)
    # The first token is held, and the one before the row: whatever else is gone, these are told apart.
    last = TOKENS - 1
    edits = [
        HeadEdit(0, [1, 4], key_bias=KeyBias.only([0, last - 1, last])),
        HeadEdit(0, [1, 4], key_bias=KeyBias.emphasise([0, last - 1], torch.tensor([1.5, -0.5]))),
    ]
    expected = outputs(model, tokens, edits)[0][:, -1:]
    with policies.applied(model, POLICIES[kind]) as run:
        cache = run.new_cache()
        model(tokens[:, :last], past_key_values=cache)
        found = outputs(model, tokens[:, last:], edits, past_key_values=cache)[0]
        assert close(found[:, :, [1, 4]], expected[:, :, [1, 4]])
        assert run.report(cache).share < 1 or kind == "by pages"


@torch.no_grad()
def test_pages_that_hold_everything_are_edited_as_a_prompt_is(model: Any) -> None:
    tokens = ids(2, TOKENS)
    with heads.edited(model, EDITS):
        expected = model(tokens, use_cache=False).logits
    for policy in (policies.H2O(budget=64), policies.Pages(budget=64, page=4)):
        with policies.applied(model, policy) as run, heads.edited(model, EDITS):
            found = run_in_calls(model, tokens, [8, 5, *[1] * (TOKENS - 13)], run.new_cache())
        assert close(found, expected)


@torch.no_grad()
def test_rows_that_stand_for_several_tokens_are_not_told_apart(model: Any) -> None:
    with policies.applied(model, policies.EMS(budget=12, window=4)) as run:
        with heads.edited(model, HeadEdit(0, 1, ablate="uniform")), torch.no_grad():
            run_in_calls(model, ids(1, TOKENS), [TOKENS - 1, 1], run.new_cache())
        with heads.edited(model, EDITS[:1]), pytest.raises(UnsupportedError, match="stand for several tokens"):
            model(ids(1, TOKENS), past_key_values=run.new_cache())


OWN: dict[str, dict[str, Any]] = {
    "mha": {"window": 6, "sink": 2},
    "s2": {"block_size": 4, "local_blocks": 2, "vert_stride": 2},
    "moh": {"shared_heads": 2, "active_heads": 1},
    "lowrank_gqa": {"latent_dim": 12},
    "longheads": {},
}


@pytest.mark.parametrize("variant", OWN)
@torch.no_grad()
def test_own_layers_read_so_in_a_prompt_and_in_decoding(variant: str) -> None:
    torch.manual_seed(0)
    config = attnzoo.get_config(variant).small()
    options = {"dim": 32, "num_heads": 4, **OWN[variant]}
    layer = attnzoo.create(config) if variant == "longheads" else attnzoo.create(variant, **options)
    layer = layer.double().eval()
    x = torch.randn(2, TOKENS, 32, dtype=torch.float64)
    padding = torch.zeros(2, TOKENS, dtype=torch.bool)
    padding[1, :4] = True
    edits = [
        HeadEdit(0, 1, key_bias=KeyBias.knock_out([4, 9, 16], [0, 2, 9])),
        HeadEdit(0, 2, ablate="uniform"),
        HeadEdit(0, 3, post=SinkScaling(torch.tensor([1, 2]), 0.3)),
    ]
    plain = layer(x, key_padding=padding)
    with heads.edited(layer, edits):
        whole = layer(x, key_padding=padding)
        alone = layer(x[1:, 4:])
        cache = layer.new_cache(1, TOKENS)
        parts = [layer(part, cache=cache) for part in x[1:, 4:].split([9, *[1] * (TOKENS - 13)], 1)]
    assert not close(whole, plain)
    assert close(whole[1:, 4:], alone)
    assert close(torch.cat(parts, 1), alone)
    assert not layer.read_editors


def test_gradients_pass_through_edited_heads() -> None:
    torch.manual_seed(0)
    layer = attnzoo.create("mha", dim=16, num_heads=2, rotary=None).double()
    x = torch.randn(1, 7, 16, dtype=torch.float64, requires_grad=True)
    gamma = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    post = HeadEdit(0, 1, post=SinkScaling(torch.tensor([1]), 0.5))

    def function(x: Tensor, gamma: Tensor) -> Tensor:
        bias = KeyBias.emphasise([1, 2], gamma)
        with heads.edited(layer, [HeadEdit(0, 0, key_bias=bias), post]):
            found: Tensor = layer(x)
        return found

    assert torch.autograd.gradcheck(function, (x, gamma), fast_mode=True)


@torch.no_grad()
def test_encoders_read_so_in_both_directions() -> None:
    model = HOSTS["BERT"].make()
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, :5] = 0
    mask[1, 13:] = 0
    tokens = {**HOSTS["BERT"].inputs(2, 20), "attention_mask": mask}
    edits = [HeadEdit(0, 1, key_bias=KeyBias.knock_out([4, 6], [0, 9])), HeadEdit(0, 2, ablate="uniform")]
    with heads.edited(model, edits), heads.capture(model, ("z", "q", "k", "v"), [0]) as seen:
        model(**tokens)
    q, k, v = (seen[name][0].transpose(1, 2) for name in ("q", "k", "v"))
    scores = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(~mask.bool()[:, None, None], -math.inf)
    # The first item has five slots of padding before its first token.
    for item, first in enumerate((5, 0)):
        scores[item, 1, [4 + first, 6 + first]] = scores[item, 1, [4 + first, 6 + first]].index_fill(
            1, torch.tensor([first, 9 + first]), -math.inf
        )
    scores[:, 2] = torch.where(scores[:, 2] > -math.inf, 0.0, scores[:, 2])
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    assert close(seen["z"][0][mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("variant", ["moh", "rcmha"])
@torch.no_grad()
def test_layers_in_the_place_of_blocks_read_so_too(model: Any, variant: str) -> None:
    tokens = ids(2, TOKENS)
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, :5] = 0
    with heads.edited(model, EDITS):
        expected = model(tokens, attention_mask=mask, use_cache=False).logits
    other = tiny()
    # It starts as the same function.
    convert(other, variant)
    with heads.edited(other, EDITS):
        found = run_in_calls(other, tokens, [8, 5, *[1] * (TOKENS - 13)], DynamicCache(config=other.config), mask)
    assert close(found[mask.bool()], expected[mask.bool()])


REFUSED: dict[str, tuple[Any, type[AttnzooError], str]] = {
    "gates": ("landmark", UnsupportedError, "reads cannot be edited: its gates weigh blocks"),
    "distances": ("rcmha", UnsupportedError, "reads cannot be edited: its learned distances"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_layers_that_read_otherwise_refuse(case: str) -> None:
    variant, error, message = REFUSED[case]
    options: dict[str, Any] = {"rel": "learned"} if variant == "rcmha" else {}
    layer = attnzoo.create(variant, dim=32, num_heads=4, **options)
    with pytest.raises(error, match=message), heads.edited(layer, HeadEdit(0, 1, ablate="uniform")):
        pass


def test_scores_that_attnzoo_does_not_have_are_not_edited() -> None:
    model = HOSTS["Gemma 2"].make()
    with (
        pytest.raises(UnsupportedError, match="reads cannot be edited: it caps its scores softly"),
        heads.edited(model, HeadEdit(0, 1, ablate="uniform")),
    ):
        pass
    with heads.edited(model, HeadEdit(0, 1, ablate="zero")):
        pass


@torch.no_grad()
def test_recipes_keep_them(tmp_path: Path) -> None:
    model = tiny(dtype=torch.float32)
    before = snapshot(model)
    tokens = ids(2, TOKENS)
    with heads.edited(model, EDITS):
        expected = model(tokens).logits
    report = surgery.convert(model, "heads", edits=EDITS)
    assert torch.equal(model(tokens).logits, expected)
    loaded, _ = surgery.load(surgery.save(model, tmp_path / "model", adapter_only=True), base=tiny(dtype=torch.float32))
    assert torch.equal(loaded(tokens).logits, expected)
    report.undo()
    assert_untouched(model, before)


def test_masks_of_other_items_and_two_calibrations_of_a_row_are_refused(model: Any) -> None:
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[:, 1] = True
    with pytest.raises(ShapeError, match="key_bias: expected masks of 2 items"):
        outputs(model, ids(2, 6), [HeadEdit(0, 2, key_bias=KeyBias.knock_out(None, mask))])
    twice = [HeadEdit(0, 2, post=SinkScaling(torch.tensor([n]), 0.5)) for n in (1, 2)]
    with pytest.raises(ConfigError, match="post: expected one for each row of head 2"):
        outputs(model, ids(2, 6), twice)
