"""Replacements, shown by plain attention: the same function in the host's hands, its caches, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, QuantizedCache, StaticCache

import attnzoo
from attnzoo import surgery
from attnzoo.surgery.replacements import REPLACEMENTS
from attnzoo.surgery.replacements.replacement import Replacement
from attnzoo.surgery.replacements.spec import ReplacementSpec
from tests.attnzoo.surgery.hosts.masks import padding_mask
from tests.attnzoo.surgery.hosts.test_hosts import HOSTS, ROUNDED, host
from tests.attnzoo.surgery.tiny import (
    assert_close,
    assert_untouched,
    convert,
    ids,
    logits,
    replace_mha,
    snapshot,
    tiny,
)

EXACT = 1e-11
TOKENS = 30


@pytest.mark.parametrize(("heads", "groups"), [(9, 3), (4, 4), (4, 1)])
@pytest.mark.parametrize("padding", [[0, 0], [0, 11], [29, 3]])
@pytest.mark.parametrize("right", [False, True])
def test_a_replacement_by_plain_attention_changes_nothing(
    heads: int, groups: int, padding: list[int], right: bool
) -> None:
    model, tokens, mask = tiny(heads, groups, attention_bias=True), ids(2, TOKENS), padding_mask(padding, TOKENS)
    mask = mask.flip(1) if right else mask
    expected = logits(model, tokens, attention_mask=mask)
    replace_mha(model)
    with attnzoo.record(model) as record:
        found = logits(model, tokens, attention_mask=mask)
    assert_close(found[mask.bool()], expected[mask.bool()], EXACT)
    assert [len(plans) for plans in record.plans.values()] == [1, 1]


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("padding", [[0, 0], [0, 11]])
def test_relatives_of_the_host_say_the_same_with_replacements(name: str, padding: list[int]) -> None:
    model, tokens, mask = host(name), ids(2, TOKENS), padding_mask(padding, TOKENS)
    expected = logits(model, tokens, attention_mask=mask)[mask.bool()]
    replace_mha(model)
    assert_close(logits(model, tokens, attention_mask=mask)[mask.bool()], expected, ROUNDED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replacement_in_low_precision_is_as_close_to_fp64_as_the_host_is(dtype: torch.dtype) -> None:
    model, tokens = tiny(dtype=dtype), ids(2, TOKENS)
    truth, theirs = logits(model.double(), tokens), logits(model.to(dtype), tokens)
    replace_mha(model)
    ours = logits(model, tokens)
    assert ours.dtype == dtype
    errors = [float((x.double() - truth).abs().max()) for x in (theirs, ours)]
    assert errors[1] <= 2 * errors[0] + torch.finfo(dtype).eps * float(truth.abs().max())


def test_the_hosts_positions_are_what_a_replacement_rotates_by() -> None:
    # Positions that leave gaps: what counts is what the host says, not the slot.
    model, tokens = tiny(), ids(2, TOKENS)
    positions = 3 * torch.arange(TOKENS).unsqueeze(0) + torch.tensor([[5], [0]])
    cache = DynamicCache(config=model.config)
    expected = logits(model, tokens, position_ids=positions, past_key_values=cache)
    plain = logits(model, tokens)
    replace_mha(model)
    found = logits(model, tokens, position_ids=positions, past_key_values=DynamicCache(config=model.config))
    assert_close(found, expected, EXACT)
    assert float((found - plain).abs().max()) > 1e-3


def test_weights_modules_and_hooks_stay_the_hosts_own_and_random_numbers_are_not_drawn() -> None:
    model = tiny()
    blocks = [layer.self_attn for layer in model.model.layers]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, state = {id(p) for p in model.parameters()}, torch.get_rng_state()
    calls: list[Any] = []
    blocks[0].k_proj.register_forward_hook(lambda *args: calls.append(args))
    report = replace_mha(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert {id(p) for p in model.parameters()} == before
    for block, layer in zip(blocks, model.model.layers, strict=True):
        assert isinstance(layer.self_attn, Replacement)
        assert all(getattr(layer.self_attn, name) is getattr(block, name) for name in ("q_proj", "k_proj", "o_proj"))
    weight = blocks[0].v_proj.weight.detach().clone()
    model(ids(1, 9)).logits.sum().backward()
    optimizer.step()
    assert len(calls) == 1
    assert not torch.equal(blocks[0].v_proj.weight, weight)
    report.undo()
    assert model.model.layers[0].self_attn is blocks[0]


def test_names_are_the_hosts_and_what_is_put_in_a_projections_place_projects() -> None:
    model, tokens = tiny(), ids(1, 9)
    names = [set(model.state_dict()), set(dict(model.named_parameters()))]
    replace_mha(model)
    assert [set(model.state_dict()), set(dict(model.named_parameters()))] == names
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    said = logits(model, tokens)
    for one in (model, twin):
        block = one.model.layers[1].self_attn
        for role in ("k_proj", "o_proj"):
            # As adapters are put in.
            setattr(block, role, nn.Sequential(getattr(block, role), _Doubled()))
    changed = logits(model, tokens)
    assert torch.equal(logits(twin, tokens), changed)
    assert float((changed - said).abs().max()) > 1e-3
    with torch.no_grad():
        for one in (twin.model.layers[1].self_attn.k_proj[0], twin.model.layers[1].self_attn.o_proj[0]):
            one.weight.div_(2)
    assert_close(logits(twin, tokens), said, EXACT)


class _Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_replacements_beside_blocks_that_stay_share_one_cache() -> None:
    model, tokens = tiny(layers=3), ids(2, 14)
    mask = padding_mask([0, 6], 14)
    options: dict[str, Any] = {"max_new_tokens": 90, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    expected = model.generate(tokens * mask, **options)
    replace_mha(model, where=lambda site: site.layer == 1)
    assert [isinstance(model.get_submodule(site.path), Replacement) for site in surgery.find(model)] == [0, 1, 0]
    # More tokens than a replacement's first buffers hold.
    assert model.generate(tokens * mask, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("padding", [[0, 0, 0], [0, 7, 3]])
def test_a_cache_is_cut_back_repeated_chosen_from_and_emptied(padding: list[int]) -> None:
    model, tokens, other = tiny(), ids(3, 20), ids(3, 6, seed=8)
    mask, more = padding_mask(padding, 20), torch.ones(3, 6, dtype=torch.long)
    plain, replaced = DynamicCache(config=model.config), DynamicCache(config=model.config)
    twins = [copy.deepcopy(model), model]
    replace_mha(model)
    pick = torch.tensor([4, 0, 3])
    said = []
    for twin, cache in zip(twins, (plain, replaced), strict=True):
        logits(twin, tokens, attention_mask=mask, past_key_values=cache)
        cache.crop(-7)
        assert cache.get_seq_length() == 13
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(pick)
        cache.reorder_cache(torch.tensor([2, 1, 0]))
        seen = torch.cat([mask[(pick // 2).flip(0), :13], more], 1)
        kept = copy.deepcopy(cache)
        said.append(logits(twin, other, attention_mask=seen, past_key_values=cache))
        assert torch.equal(logits(twin, other, attention_mask=seen, past_key_values=kept), said[-1])
        if cache is plain:
            # In older versions the host's own layers keep their length when they are reset.
            cache = DynamicCache(config=model.config)
        cache.reset()
        assert cache.get_seq_length() == 0
        said.append(logits(twin, tokens, attention_mask=mask, past_key_values=cache)[mask.bool()])
    assert_close(said[2], said[0], EXACT)
    assert_close(said[3], said[1], EXACT)


def test_gradients_through_a_cache_reach_the_current_tokens() -> None:
    grads = []
    for replaced in (False, True):
        model, tokens = tiny(), ids(2, 12)
        if replaced:
            replace_mha(model)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(tokens, past_key_values=cache)
        model(ids(2, 5, seed=3), past_key_values=cache).logits.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1])
    for ours, theirs in zip(grads[1], grads[0], strict=True):
        assert_close(ours, theirs, 1e-10)


@pytest.mark.parametrize("name", ["static", "offloaded", "foreign", "another", "quantized"])
def test_caches_that_cannot_hold_a_replacements_streams_are_refused_by_name(name: str) -> None:
    model, tokens = tiny(), ids(1, 8)
    cache: Any = DynamicCache(config=model.config)
    if name == "foreign":
        logits(model, tokens, past_key_values=cache)
    twin = copy.deepcopy(model)
    replace_mha(model)
    if name == "static":
        cache = StaticCache(config=model.config, max_cache_len=32)
    elif name == "offloaded":
        cache.offloading = True
    elif name == "quantized":
        cache = QuantizedCache.__new__(QuantizedCache)
        cache.__dict__.update({"layers": [object()] * 2, "offloading": False, "layer_class_to_replicate": None})
    elif name == "another":
        replace_mha(twin)
        logits(twin, tokens, past_key_values=cache)
    replacement = model.model.layers[0].self_attn
    with pytest.raises(attnzoo.AttnzooError, match=r"^(past_key_values|cache): expected"), torch.no_grad():
        replacement(
            torch.zeros(1, 8, 96, dtype=torch.float64),
            None,
            None if name not in ("foreign", "another") else attnzoo_mask(8),
            cache,
            position_ids=torch.arange(8).unsqueeze(0),
        )


def attnzoo_mask(first: int) -> Any:
    from attnzoo.surgery.hosts.attention_function import Geometry

    return Geometry(first, None)


def test_a_cache_that_a_replacement_has_filled_is_refused_by_the_model_without_it() -> None:
    model, tokens = tiny(), ids(1, 8)
    report = replace_mha(model)
    cache = DynamicCache(config=model.config)
    logits(model, tokens, past_key_values=cache)
    report.undo()
    with pytest.raises(attnzoo.UnsupportedError, match=r"^past_key_values: "):
        logits(model, tokens, past_key_values=cache)


@pytest.mark.parametrize("later", [None, [0, 6], [3, 0]])
def test_padding_that_is_forgotten_or_changed_between_calls_is_refused(later: list[int] | None) -> None:
    model, tokens = tiny(), ids(2, 10)
    replace_mha(model)
    cache = DynamicCache(config=model.config)
    logits(model, tokens, attention_mask=padding_mask([0, 3], 10), past_key_values=cache)
    more = {} if later is None else {"attention_mask": padding_mask(later, 11)}
    with pytest.raises(attnzoo.ShapeError, match=r"^attention_mask: "):
        logits(model, tokens[:, :1], past_key_values=cache, **more)
    said = logits(model, tokens[:, :1], past_key_values=cache, attention_mask=padding_mask([0, 3], 11))
    assert bool(said.isfinite().all())


def test_what_a_replacement_cannot_honour_is_refused_by_name() -> None:
    model, tokens = tiny(attention_dropout=0.1), ids(1, 8)
    replace_mha(model)
    logits(model, tokens)
    with pytest.raises(attnzoo.UnsupportedError, match=r"^dropout: "):
        logits(model.train(), tokens)
    model.eval()
    with pytest.raises(attnzoo.UnsupportedError, match=r"^output_attentions: "):
        logits(model, tokens, output_attentions=True)
    with pytest.raises(attnzoo.UnsupportedError, match=r"^attention_mask: "):
        logits(model, tokens, attention_mask=torch.zeros(1, 1, 8, 8, dtype=torch.float64))
    replacement, x = model.model.layers[0].self_attn, torch.zeros(1, 8, 96, dtype=torch.float64)
    with pytest.raises(attnzoo.UnsupportedError, match=r"^position_ids: "):
        replacement(x, (x, x))
    with pytest.raises(attnzoo.UnsupportedError, match=r"^colour: "):
        replacement(x, colour="red")


def test_places_where_no_replacement_fits_are_refused_and_left_alone() -> None:
    for spoil, reason in (("sinks", "sinks that are learned"), ("pattern", "read pattern")):
        model = tiny()
        block = model.model.layers[1].self_attn
        if spoil == "pattern":
            convert(model, "mha", window=9, sink=1, where=lambda site: site.layer == 1)
        else:
            block.register_parameter(spoil, nn.Parameter(torch.zeros(6)))
        before = snapshot(model)
        with pytest.raises(attnzoo.UnsupportedError, match=reason):
            replace_mha(model)
        assert_untouched(model, before)


def test_a_replacement_is_not_converted_a_second_time() -> None:
    model = tiny()
    replace_mha(model)
    before = snapshot(model)
    for variant, options in (("mha", {}), ("lowrank_gqa", {"method": "mean", "num_kv_heads": 1})):
        with pytest.raises(attnzoo.UnsupportedError, match="replacement by 'mha'"):
            convert(model, variant, **options)
    with pytest.raises(attnzoo.UnsupportedError, match="replacement by 'mha'"):
        replace_mha(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("change", [{"num_kv_heads": 3}, {"dim": 48}, {"causal": False}, {"window": -1}, {"colour": 1}])
def test_a_recipe_that_does_not_fit_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(dtype=torch.float32)
    replace_mha(model)
    folder = surgery.save(model, tmp_path / "model")
    about = json.loads((folder / "attnzoo_config.json").read_text())
    about["recipe"][1]["config"] |= change
    (folder / "attnzoo_config.json").write_text(json.dumps(about))
    with pytest.raises(attnzoo.ConversionError, match="does not fit"):
        surgery.load(folder)


class _Mark:
    """A change to a whole model: a parameter and an attribute of its own."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def make(self) -> None:
        assert not hasattr(self.model, "mark")
        self.model.mark = nn.Parameter(torch.ones(3))

    def undo(self) -> None:
        del self.model.mark


def test_a_change_to_the_model_is_made_once_saved_and_taken_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = ReplacementSpec(model_change=lambda model, config: _Mark(model), model_state=("mark",))
    monkeypatch.setitem(REPLACEMENTS, "mha", spec)
    model, base, tokens = tiny(layers=3), tiny(layers=3), ids(1, 9)
    before = snapshot(model)
    first = replace_mha(model, where=lambda site: site.layer < 2)
    second = replace_mha(model, where=lambda site: site.layer == 2)
    with torch.no_grad():
        model.mark.add_(1)
    loaded, _ = surgery.load(surgery.save(model, tmp_path / "adapter", adapter_only=True), base=base)
    assert torch.equal(loaded.mark, model.mark)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    second.undo()
    assert hasattr(model, "mark")
    first.undo()
    assert_untouched(model, before)


def test_a_replacement_that_cannot_be_built_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def fail_later(layer: Any) -> None:
        calls.append(layer)
        if len(calls) == 2:
            raise RuntimeError("no start")

    monkeypatch.setitem(REPLACEMENTS, "mha", ReplacementSpec(start=fail_later))
    model = tiny(layers=3).train()
    model.model.layers[1].self_attn.eval()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="no start"):
        replace_mha(model)
    assert len(calls) == 2
    assert_untouched(model, before)


def test_a_replacement_that_numbers_tokens_itself_refuses_positions_that_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REPLACEMENTS, "mha", ReplacementSpec(by_slot=True))
    model, tokens, mask = tiny(), ids(2, TOKENS), padding_mask([0, 11], TOKENS)
    expected = logits(model, tokens, attention_mask=mask)
    replace_mha(model)
    assert_close(logits(model, tokens, attention_mask=mask)[mask.bool()], expected[mask.bool()], EXACT)
    jump = torch.arange(TOKENS).roll(1).unsqueeze(0)
    with pytest.raises(attnzoo.UnsupportedError, match=r"^position_ids: "):
        logits(model, tokens, position_ids=jump)
