"""Laws for every class of hosts and every conversion: the same function where it should be, or refused by name."""

from __future__ import annotations

import copy
import pickle
import warnings
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import attnzoo
from attnzoo import surgery
from attnzoo.surgery.hosts.calls import cache_name
from attnzoo.surgery.replacements.replacement import Replacement
from attnzoo.surgery.sites import find
from tests.attnzoo.surgery.families.hosts import CELLS, HOSTS, VOCAB, WEIGHTS
from tests.attnzoo.surgery.hosts.masks import for_host, groups_of, padding_mask, s2_mask
from tests.attnzoo.surgery.tiny import assert_close, assert_untouched, calibration, ids, logits, replace_mha, snapshot

EXACT = 1e-10
ROUNDED = 1e-4
TOKENS = 22

OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window": 4, "block_size": 4},
    "s2": {"block_size": 4, "local_blocks": 2, "vert_stride": 2},
    "policy": {"policy": attnzoo.policies.Streaming()},
    "longheads": {"chunk_size": 4, "attention_length": 32},
    "landmark": {"block_size": 6},
}
SAME = ("mha", "replaced", "policy", "expand", "latent", "moh", "longheads", "landmark", "rcmha")
"""Conversions that are the host's own function at these options and lengths."""
WORKING = [name for name, host in HOSTS.items() if len(host.refused) < len(CELLS)]


@cache
def _made(name: str) -> Any:
    return HOSTS[name].make()


def made(name: str) -> Any:
    """A host that may be changed."""
    return copy.deepcopy(_made(name))


def convert(model: Any, cell: str, **more: Any) -> surgery.ConversionReport:
    """One of the conversions; what it warns of is expected here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if cell == "replaced":
            return replace_mha(model, **more)
        if cell not in WEIGHTS:
            return surgery.convert(model, "mha" if cell == "window" else cell, **{**OPTIONS.get(cell, {}), **more})
        sites = find(model)
        options: dict[str, Any] = {"num_kv_heads": sites[0].heads if cell == "expand" else 1}
        if cell == "latent":
            options = {"latent_dim": 2 * sites[0].kv_heads * sites[0].head_dim}
        text = calibration() if cell in ("commuting", "latent") else None
        return surgery.convert(model, "lowrank_gqa", method=cell, calibration=text, **options, **more)


@pytest.mark.parametrize("name", HOSTS)
def test_all_its_blocks_are_found_and_described(name: str) -> None:
    model = made(name)
    classes = [type(model.get_submodule(site.path)).__name__ for site in find(model)]
    assert classes
    assert set(classes) == {HOSTS[name].attention}


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("cell", CELLS)
def test_a_conversion_works_and_is_undone_or_is_refused_by_name(name: str, cell: str) -> None:
    model = made(name)
    before = snapshot(model)
    refused = HOSTS[name].refused.get(cell)
    if refused is not None:
        with pytest.raises(attnzoo.AttnzooError, match=refused):
            convert(model, cell)
        assert_untouched(model, before)
        return
    tokens = ids(2, TOKENS)
    expected = logits(model, tokens)
    report = convert(model, cell)
    found = logits(model, tokens)
    if cell in SAME:
        assert_close(found, expected, EXACT)
    else:
        assert bool(found.isfinite().all())
        assert float((found - expected).abs().max()) > 1e-3
    report.undo()
    assert_untouched(model, before)
    assert torch.equal(logits(model, tokens), expected)


def cells_of(*cells: str, slow: tuple[str, ...] = ()) -> Any:
    """Hosts with those of the cells that they are not refused; some of them among the slow tests."""
    pairs = [(name, cell) for name in WORKING for cell in (*cells, *slow) if cell not in HOSTS[name].refused]
    cases = [pytest.param(*pair, marks=[pytest.mark.slow] * (pair[1] in slow)) for pair in pairs]
    return pytest.mark.parametrize(("name", "cell"), cases)


@cells_of("mha", "replaced", slow=("latent",))
@pytest.mark.parametrize("padding", [[0, 9], pytest.param([9, 0], marks=pytest.mark.slow)], ids=["left", "right"])
def test_padding_on_either_side_changes_nothing(name: str, cell: str, padding: list[int]) -> None:
    model = made(name)
    tokens = ids(2, TOKENS)
    mask = padding_mask(padding, TOKENS)
    mask = mask.flip(1) if padding[0] else mask
    expected = logits(model, tokens, attention_mask=mask)[mask.bool()]
    convert(model, cell)
    assert_close(logits(model, tokens, attention_mask=mask)[mask.bool()], expected, EXACT)


@cells_of("mha", "replaced")
@pytest.mark.parametrize(
    "how",
    [
        {},
        pytest.param({"num_beams": 3}, marks=pytest.mark.slow),
        pytest.param({"cache_implementation": "static"}, marks=pytest.mark.slow),
    ],
    ids=["greedy", "beams", "static"],
)
def test_it_generates_what_the_host_does(name: str, cell: str, how: dict[str, Any]) -> None:
    model = made(name)
    tokens = ids(2, 10)
    mask = padding_mask([0, 4], 10)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    if cell == "replaced" and "cache_implementation" in how:
        pytest.skip("a replacement's streams have no place in a static cache")
    expected = model.generate(tokens * mask, **options, **how)
    convert(model, cell)
    assert model.generate(tokens * mask, **options, **how).tolist() == expected.tolist()


@cells_of("replaced", slow=("mha",))
def test_gradients_are_the_hosts(name: str, cell: str) -> None:
    grads: list[dict[str, Tensor]] = []
    for changed in (False, True):
        model = made(name)
        if changed:
            convert(model, cell)
        model(ids(2, 12)).logits.square().sum().backward()
        grads.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[0].items():
        assert_close(grads[1][key], grad, EXACT)


@cells_of("moh", slow=("window", "replaced"))
def test_it_is_saved_loaded_copied_and_pickled(name: str, cell: str, tmp_path: Path) -> None:
    model = made(name)
    names = set(model.state_dict())
    convert(model, cell)
    said = logits(model, ids(1, 9))
    assert {key for key in model.state_dict() if ".layer." not in key} == names
    assert torch.equal(logits(pickle.loads(pickle.dumps(copy.deepcopy(model))), ids(1, 9)), said)
    loaded, _ = surgery.load(surgery.save(model, tmp_path / "model"))
    # What is loaded computes norms and rotation as the host does.
    assert_close(logits(loaded.float(), ids(1, 9)).double(), said, ROUNDED)


@cells_of("replaced")
def test_what_is_put_in_a_projections_place_later_projects(name: str, cell: str) -> None:
    model = made(name)
    convert(model, cell)
    said = logits(model, ids(1, 9))
    block = model.get_submodule(find(model)[0].path)
    assert isinstance(block, Replacement)
    for child in [
        key for key, module in block.named_children() if hasattr(module, "weight") and module.weight.dim() == 2
    ]:
        old = block.get_submodule(child)
        other = copy.deepcopy(old)
        with torch.no_grad():
            other.weight.mul_(1.5)
        setattr(block, child, other)
        assert not torch.equal(logits(model, ids(1, 9)), said), child
        setattr(block, child, old)
    assert torch.equal(logits(model, ids(1, 9)), said)


def own_mask(window: int | None, tokens: int, other: int | None = None) -> Tensor:
    """Additive ``[1, 1, T, T]``: what a block reads within its own window and another."""
    t = torch.arange(tokens).unsqueeze(1)
    distance = t - t.T
    seen = (distance >= 0) & (distance < min(window or tokens, other or tokens))
    return torch.zeros(tokens, tokens, dtype=torch.float64).masked_fill(~seen, float("-inf"))[None, None]


def _is_layer(layer: int, site: surgery.Site) -> bool:
    return site.layer == layer


HYBRID = ("Gemma 3", "Qwen2 with windows")


@pytest.mark.parametrize("name", HYBRID)
@pytest.mark.parametrize("window", [4, 9])
def test_a_window_is_read_within_the_blocks_own(name: str, window: int) -> None:
    model = made(name)
    tokens = ids(2, TOKENS)
    own = {site.layer: site.window for site in find(model)}
    assert sorted(own.values(), key=str) == [6, None]
    kinds = model.config.layer_types
    masks = {kinds[layer]: own_mask(size, TOKENS, window) for layer, size in own.items()}
    expected = logits(model, tokens, attention_mask=masks)
    convert(model, "window", window=window)
    assert_close(logits(model, tokens), expected, EXACT)


@pytest.mark.parametrize(
    "name",
    ["Gemma 3", *(pytest.param(x, marks=pytest.mark.slow) for x in ("Qwen2 with windows", "Mistral with a window"))],
)
@pytest.mark.parametrize("cell", ["mha", "s2", "moh", "replaced", "nothing"])
@pytest.mark.parametrize("padding", [pytest.param([0, 0], marks=pytest.mark.slow), [0, 5]], ids=["whole", "padded"])
def test_sliding_caches_beside_what_is_converted_say_what_no_cache_does(
    name: str, cell: str, padding: list[int]
) -> None:
    model = made(name)
    layers = len(find(model))
    tokens = ids(2, TOKENS)
    mask = padding_mask(padding, TOKENS)
    expected = logits(model, tokens, attention_mask=mask)
    for changed in range(layers if cell != "nothing" else 1):
        model = made(name)
        # One block is converted, the other is left alone and called through the same functions.
        convert(model, "mha" if cell == "nothing" else cell, where=partial(_is_layer, changed))
        whole = logits(model, tokens, attention_mask=mask)
        if cell != "s2":
            assert_close(whole[mask.bool()], expected[mask.bool()], EXACT)
        cache = DynamicCache(config=model.config)
        key = cache_name(type(model).forward)
        said = []
        # A prefill longer than the window, single tokens, and a chunk.
        for first, last in ((0, 9), (9, 10), (10, 11), (11, 16), (16, 17), (17, TOKENS)):
            given = {key: cache, "attention_mask": mask[:, :last]}
            said.append(logits(model, tokens[:, first:last], **given))
        assert_close(torch.cat(said, 1)[mask.bool()], whole[mask.bool()], EXACT)


def test_shards_are_read_within_the_blocks_own_window() -> None:
    model = made("Mistral with a window")
    shards = s2_mask(TOKENS, groups_of(4, 2), block=4, local=2, stride=2)
    own = own_mask(6, TOKENS)[0, 0] == 0
    assert bool((shards & ~own).any())
    expected = logits(model, ids(2, TOKENS), attention_mask=for_host(shards & own, [0, 0], torch.float64))
    convert(model, "s2")
    assert_close(logits(model, ids(2, TOKENS)), expected, EXACT)


def test_a_sink_that_the_own_window_leaves_behind_is_refused() -> None:
    model = made("Gemma 3")
    before = snapshot(model)
    with pytest.raises(attnzoo.ConfigError, match=r"sink: expected 0 at .* own sliding window of 6"):
        surgery.convert(model, "mha", window=4, sink=1)
    with pytest.raises(attnzoo.ConfigError, match=r"evict: expected False for 's2'"):
        surgery.convert(model, "s2", evict=True, **OPTIONS["s2"])
    assert_untouched(model, before)
    surgery.convert(model, "mha", window=4, sink=1, where=lambda site: site.window is None)


@pytest.mark.parametrize("name", HOSTS)
def test_inspection_says_what_conversions_do(name: str) -> None:
    inspection = surgery.inspect(made(name))
    cells = {"mha": "mha", "s2": "s2", "policy": "policy", "lowrank_gqa": "commuting"}
    for variant, cell in {**cells, **{x: x for x in ("moh", "longheads", "landmark", "rcmha")}}.items():
        said = [reason for reasons in inspection.reasons for reason in reasons[variant]]
        refused = HOSTS[name].refused.get(cell)
        assert bool(said) == (refused is not None), (variant, said)
        assert refused is None or any(refused in reason for reason in said)
    assert inspection.sites[0].path in str(inspection)


def test_hosts_have_what_the_tests_need() -> None:
    assert all(set(host.refused) <= set(CELLS) for host in HOSTS.values())
    assert VOCAB == 61
