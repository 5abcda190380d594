"""Laws for every class of hosts and every conversion: the same function where it should be, or refused by name.

Letters: B batch, T tokens.
"""

from __future__ import annotations

import copy
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from attnzoo import surgery
from attnzoo.surgery.lookalikes import lookalikes
from attnzoo.surgery.replacements.replacement import Replacement
from attnzoo.surgery.sites import find
from tests.attnzoo.surgery.families import stored
from tests.attnzoo.surgery.families.hosts import CELLS, HOSTS, in_single, said
from tests.attnzoo.surgery.families.laws import (
    SAME,
    WORKING,
    adapt,
    cases,
    cells_of,
    convert,
    made,
    merge,
    plainly,
    projections_of,
    refuses,
)
from tests.attnzoo.surgery.hosts.masks import padding_mask
from tests.attnzoo.surgery.tiny import assert_close, assert_untouched, ids, snapshot
from tests.child import environment

EXACT = 1e-10
ROUNDED = 1e-4
TOKENS = 22


def spoken(model: Any, name: str, batch: int = 2, tokens: int = TOKENS, **more: Any) -> Tensor:
    """What a host says of the same inputs again and again, without a graph."""
    with torch.no_grad():
        return said(model, HOSTS[name].inputs(batch, tokens), **more)


def plain_cells() -> list[tuple[str, str]]:
    """Each host with the conversion that puts plain attention in its blocks' places."""
    return [(name, plainly(HOSTS[name])) for name in WORKING]


@pytest.mark.parametrize("name", HOSTS)
def test_all_its_blocks_are_found_and_described(name: str) -> None:
    model = made(name)
    classes = {type(model.get_submodule(site.path)).__name__ for site in find(model)}
    assert len(classes) == 1
    assert re.fullmatch(HOSTS[name].attention, classes.pop())
    assert lookalikes(model) == {}


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("cell", CELLS)
def test_a_conversion_works_and_is_undone_or_is_refused_by_name(name: str, cell: str) -> None:
    model = made(name)
    host = HOSTS[name]
    before = snapshot(model)
    refused = host.refused.get(cell)
    if refused is not None:
        with refuses(re.escape(refused)):
            convert(model, cell, name)
        assert_untouched(model, before)
        return
    expected = spoken(model, name)
    report = convert(model, cell, name)
    if cell in host.at_call:
        with refuses(re.escape(host.at_call[cell])):
            spoken(model, name)
    else:
        found = spoken(model, name)
        if cell in SAME and cell not in host.anew:
            assert_close(found, expected, EXACT)
        else:
            assert bool(found.isfinite().all())
            assert float((found - expected).abs().max()) > 1e-3
    report.undo()
    assert_untouched(model, before)
    assert torch.equal(spoken(model, name), expected)


PADDED = [name for name in WORKING if HOSTS[name].sides]


@cases(
    [
        *((name, cell) for name in PADDED for cell in ("mha", "replaced")),
        *((name, "rcmha") for name in PADDED if not HOSTS[name].generates),
    ],
    slow=((name, cell) for name in PADDED for cell in ("latent", "moh", "rcmha")),
)
@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.slow)])
def test_padding_on_either_side_changes_nothing(name: str, cell: str, side: str) -> None:
    host = HOSTS[name]
    side = side if side in host.sides else next(iter(host.sides))
    model = made(name)
    mask = padding_mask([0, 9], TOKENS)
    mask = mask if side == "left" else mask.flip(1)
    expected = spoken(model, name, attention_mask=mask)[mask.bool()]
    convert(model, cell, name)
    assert_close(spoken(model, name, attention_mask=mask)[mask.bool()], expected, EXACT)


@cells_of("mha", "replaced", names=[name for name in WORKING if HOSTS[name].generates])
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
    convert(model, cell, name)
    assert model.generate(tokens * mask, **options, **how).tolist() == expected.tolist()


def gradients(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of all weights that have some."""
    said(model, given).square().sum().backward()
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@cases(plain_cells(), slow=((name, "mha") for name in WORKING))
def test_gradients_are_the_hosts(name: str, cell: str) -> None:
    given = HOSTS[name].inputs(2, 12)
    model = made(name)
    expected = gradients(model, given)
    model = made(name)
    convert(model, cell, name)
    found = gradients(model, given)
    assert found.keys() == expected.keys()
    for key, grad in expected.items():
        assert_close(found[key], grad, EXACT)


def step(model: Any, given: dict[str, Tensor], *, low: bool) -> tuple[Tensor, Tensor]:
    """What a model says, and all gradients of it as one vector; maybe under autocast."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        y = said(model, given).float()
    y.square().mean().backward()
    grads = [p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None]
    return y.detach(), torch.cat(grads)


def error(found: Tensor, truth: Tensor) -> float:
    """The share by which it is off."""
    assert bool(found.isfinite().all())
    return float((found - truth).norm() / truth.norm())


@cases(
    [*((name, "mha") for name in WORKING), ("Qwen3", "replaced"), ("Gemma 3", "replaced")],
    slow=((name, cell) for name in WORKING for cell in ("replaced", "latent", "moh", "rcmha")),
)
def test_a_step_under_autocast_is_as_close_to_full_precision_as_the_hosts(name: str, cell: str) -> None:
    model = made(name).float()
    given = in_single(HOSTS[name].inputs(2, 12))
    truth = step(model, given, low=False)
    theirs = step(model, given, low=True)
    convert(model, cell, name)
    ours = step(model, given, low=True)
    # What has other weights has other gradients.
    told = 2 if cell in ("mha", "replaced") else 1
    for found, host, exact in zip(ours[:told], theirs[:told], truth[:told], strict=True):
        rounding = error(host, exact)
        assert rounding > 1e-4
        assert error(found, exact) <= 3 * rounding


ADAPTED = [name for name in WORKING if HOSTS[name].projects]


@cases(((name, plainly(HOSTS[name])) for name in ADAPTED), slow=((name, "moh") for name in ADAPTED))
def test_it_stands_beside_adapters_of_low_rank(name: str, cell: str) -> None:
    given = HOSTS[name].inputs(2, 12)
    model = made(name)
    paths = projections_of(model)
    adapt(model, paths)
    expected = spoken(model, name)
    grads = gradients(model, given)
    assert sum("lora" in key for key in grads) == 2 * len(paths)
    model = made(name)
    convert(model, cell, name)
    plain = spoken(model, name)
    adapt(model, paths)
    assert_close(spoken(model, name), expected, EXACT)
    found = gradients(model, given)
    for key, grad in grads.items():
        assert_close(found[key], grad, EXACT)
    if HOSTS[name].of_transformers:
        with refuses(r"merge or remove what wraps its modules first \(PEFT: merge_and_unload\(\)\)"):
            surgery.save(model, "nowhere")
    merge(model)
    assert torch.equal(spoken(model, name), plain)


@cells_of("mha", "moh", names=[name for name in ADAPTED if HOSTS[name].of_transformers])
def test_over_adapters_reading_is_changed_and_nothing_else_is(name: str, cell: str) -> None:
    model = made(name)
    adapt(model, projections_of(model))
    if cell == "mha":
        expected = spoken(model, name)
        convert(model, cell, name)
        assert_close(spoken(model, name), expected, EXACT)
        return
    before = snapshot(model)
    with refuses("LoRA"):
        convert(model, cell, name)
    assert_untouched(model, before)


@cells_of("moh", slow=("window", "replaced"))
def test_it_is_copied_and_pickled_and_keeps_its_names(name: str, cell: str) -> None:
    model = made(name)
    names = set(model.state_dict())
    convert(model, cell, name)
    expected = spoken(model, name, 1, 9)
    blocks = tuple(f"{site.path}." for site in find(model))
    after = set(model.state_dict())
    assert names <= after
    # What is new is a block's own.
    assert all(key.startswith(blocks) for key in after - names)
    assert torch.equal(spoken(pickle.loads(pickle.dumps(copy.deepcopy(model))), name, 1, 9), expected)


def save(model: Any, name: str, folder: Path) -> Path:
    """A folder with a converted host, or with what was done to it where it is nobody's class."""
    return surgery.save(model, folder, adapter_only=not HOSTS[name].of_transformers)


@cells_of(slow=("moh", *CELLS))
def test_it_is_saved_and_loaded(name: str, cell: str, tmp_path: Path) -> None:
    model = made(name)
    convert(model, cell, name)
    found = stored.said_by_loaded(save(model, name, tmp_path / "model"), name)
    assert_close(found.double(), spoken(model, name, 1, stored.TOKENS), ROUNDED)


def test_a_fresh_process_loads_what_was_saved(tmp_path: Path) -> None:
    expected = {}
    hosts = {}
    for number, name in enumerate(WORKING):
        # Each host with one of its conversions, and each conversion of some hosts.
        cells = [cell for cell in CELLS if HOSTS[name].works(cell)]
        model = made(name)
        convert(model, cells[number % len(cells)], name)
        key = f"host-{number}"
        save(model, name, tmp_path / key)
        hosts[key] = name
        expected[key] = spoken(model, name, 1, stored.TOKENS)
    (tmp_path / "hosts.json").write_text(json.dumps(hosts), encoding="utf-8")
    subprocess.run([sys.executable, "-m", stored.__name__, str(tmp_path)], env=environment(), check=True)
    found = load_file(tmp_path / "said.safetensors")
    assert found.keys() == expected.keys()
    for key, name in hosts.items():
        assert_close(found[key].double(), expected[key], ROUNDED if HOSTS[name].of_transformers else 0.0)


@cells_of("replaced")
def test_what_is_put_in_a_projections_place_later_projects(name: str, cell: str) -> None:
    model = made(name)
    convert(model, cell, name)
    before = spoken(model, name, 1, 9)
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
        assert not torch.equal(spoken(model, name, 1, 9), before), child
        setattr(block, child, old)
    assert torch.equal(spoken(model, name, 1, 9), before)


def _coloured(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "colour": "red"}


@cells_of("replaced")
def test_no_argument_of_a_call_is_swallowed(name: str, cell: str) -> None:
    model = made(name)
    convert(model, cell, name)
    block = model.get_submodule(find(model)[0].path)
    block.register_forward_pre_hook(_coloured, with_kwargs=True)
    with refuses("^colour: "):
        spoken(model, name, 1, 9)


@pytest.mark.parametrize("name", HOSTS)
def test_inspection_says_what_conversions_do(name: str) -> None:
    inspection = surgery.inspect(made(name))
    cells = {"mha": "mha", "s2": "s2", "policy": "policy", "lowrank_gqa": "commuting"}
    for variant, cell in {**cells, **{x: x for x in ("moh", "longheads", "landmark", "rcmha")}}.items():
        reasons = [reason for reasons in inspection.reasons for reason in reasons[variant]]
        refused = HOSTS[name].refused.get(cell)
        assert bool(reasons) == (refused is not None), (variant, reasons)
        assert refused is None or any(refused in reason for reason in reasons)
    assert inspection.sites[0].path in str(inspection)


def test_hosts_have_what_the_tests_need() -> None:
    assert all(set(host.refused) | set(host.at_call) <= set(CELLS) for host in HOSTS.values())


@pytest.mark.parametrize("name", HOSTS)
def test_a_refusal_says_what_would_have_to_be_there(name: str) -> None:
    assert all("need" in why for why in HOSTS[name].refused.values())
