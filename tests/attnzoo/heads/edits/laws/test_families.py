"""Laws of edits of outputs, in every family: what changes nothing, what is alike, what is left behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo import heads
from attnzoo.heads import HeadEdit, HeadSite
from tests.attnzoo.heads.edits.laws.drawn import normal
from tests.attnzoo.heads.edits.laws.models import CALLED, say, shared
from tests.attnzoo.heads.edits.laws.truth import near


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def edited(name: str, *edits: HeadEdit) -> Tensor:
    with heads.edited(shared(name), edits):
        return say(name)


def sites_of(name: str) -> tuple[HeadSite, ...]:
    return heads.sites(shared(name))


def random_edit(site: HeadSite, head: int, seed: int = 0, **more: Any) -> HeadEdit:
    width = site.head_dim
    return HeadEdit(
        site.layer, head, **{"scale": normal(width, seed=seed), "offset": normal(width, seed=seed + 1), **more}
    )


@pytest.mark.parametrize("name", CALLED)
def test_edits_that_change_nothing_leave_no_hook_and_no_bit(name: str) -> None:
    model = shared(name)
    plain = say(name)
    before = hooks(model)
    site = sites_of(name)[0]
    nothing = [HeadEdit(0, 0), HeadEdit(0, slice(None), scale=1.0), HeadEdit(0, 0, offset=torch.zeros(site.head_dim))]
    with heads.edited(model, nothing):
        assert hooks(model) == before
        assert torch.equal(say(name), plain)
    with heads.edited(model, []):
        assert hooks(model) == before
    # A hook that finds nothing to do in these rows.
    assert torch.equal(edited(name, HeadEdit(0, 0, ablate="zero", where="decode")), plain)


@pytest.mark.parametrize("name", CALLED)
def test_what_was_edited_is_as_it_was_after_an_exception_too(name: str) -> None:
    model = shared(name)
    plain = say(name)
    before = hooks(model)
    site = sites_of(name)[-1]
    changed = edited(name, random_edit(site, site.heads - 1))
    assert float((changed - plain).abs().max()) > 1e-4
    with pytest.raises(KeyboardInterrupt), heads.edited(model, random_edit(site, 0)):
        say(name)
        raise KeyboardInterrupt
    assert hooks(model) == before
    assert torch.equal(say(name), plain)


@pytest.mark.parametrize("name", CALLED)
def test_edits_of_heads_commute_and_those_of_a_head_are_in_order(name: str) -> None:
    site = sites_of(name)[0]
    one, other = random_edit(site, 0), random_edit(site, site.heads - 1, seed=4, ablate="zero")
    assert torch.equal(edited(name, one, other), edited(name, other, one))
    # What follows an offset acts on it.
    then = random_edit(site, 0, seed=7)
    composed = replace(one, scale=one.scale * then.scale, offset=one.offset * then.scale + then.offset)
    near(edited(name, one, then), edited(name, composed))
    # A value takes the place of all that came before.
    value = replace(then, scale=1.0, offset=None, ablate="mean", value=normal(site.head_dim, seed=9))
    assert torch.equal(edited(name, one, value), edited(name, value))


@pytest.mark.parametrize("name", CALLED)
def test_a_scale_of_zero_is_an_ablation_and_a_group_is_its_heads(name: str) -> None:
    site = sites_of(name)[-1]
    zero = HeadEdit(site.layer, [0, site.heads - 1], ablate="zero")
    assert torch.equal(edited(name, zero), edited(name, replace(zero, ablate=None, scale=0.0)))
    put = replace(zero, ablate="resample", value=torch.zeros(site.head_dim, dtype=torch.float64))
    assert torch.equal(edited(name, zero), edited(name, put))
    group = site.heads // site.kv_heads
    last = site.kv_heads - 1
    whole = random_edit(site, last, kv=True)
    members = random_edit(site, 0)
    members = replace(members, head=range(last * group, site.heads))
    assert torch.equal(edited(name, whole), edited(name, members))


@pytest.mark.parametrize("name", sorted(CALLED.keys() - {"timm's attention with norms"}))
def test_what_the_projection_gives_is_affine_in_an_offset(name: str) -> None:
    model = shared(name)
    site = sites_of(name)[-1]
    found: list[Tensor] = []
    module = model.get_submodule(site.o_proj)
    offset = normal(site.head_dim, seed=3)
    given = []
    for factor in (0.5, 1.5, 2.5):
        handle = module.register_forward_hook(lambda module, args, out: found.append(out.detach()))
        edited(name, HeadEdit(site.layer, 0, scale=0.3, offset=factor * offset))
        handle.remove()
        # The first application: what comes behind it depends on it.
        given.append(found[0])
        found.clear()
    near(given[1], (given[0] + given[2]) / 2)
    assert float((given[1] - given[0]).abs().max()) > 1e-4
