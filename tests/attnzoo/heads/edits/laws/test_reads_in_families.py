"""Laws of edits of what heads read, in every family on transformers' interface, and in attnzoo's own layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo import heads
from attnzoo.heads import HeadEdit, KeyBias
from attnzoo.surgery.edits.key_bias import SinkScaling
from tests.attnzoo.heads.edits.laws.models import CALLED, TOKENS, say, shared
from tests.attnzoo.heads.edits.laws.truth import near
from tests.attnzoo.surgery.families.hosts import HOSTS, said

HIDDEN = [2, 3, 5]
UNKNOWN = {"Gemma 2": "softly", "gpt-oss": "sinks that are learned"}
"""Decoders whose attention ours is not, and a piece of why."""
DECODERS = [name for name, host in HOSTS.items() if host.generates and host.works("mha")]
ENCODERS = ["BERT", "DistilBERT", "ALBERT"]
ATTENDING = [*DECODERS, *ENCODERS, "ViT"]
"""What attends through transformers' interface."""


def everywhere(name: str, **more: Any) -> list[HeadEdit]:
    """The same of all heads of all layers."""
    return [HeadEdit(site.layer, slice(None), **more) for site in heads.sites(shared(name))]


def edited(name: str, edits: list[HeadEdit]) -> Tensor:
    with heads.edited(shared(name), edits):
        return say(name)


@pytest.mark.parametrize("name", ATTENDING)
def test_what_weighs_nothing_otherwise_changes_no_bit(name: str) -> None:
    plain = say(name)
    model = shared(name)
    count = 17 if HOSTS[name].pictures else TOKENS
    for more in ({"key_bias": KeyBias.emphasise([0, 2], 0.0)}, {"post": SinkScaling(torch.tensor([1, 2]), 1.0)}):
        assert torch.equal(edited(name, [HeadEdit(0, 0, **more)]), plain)
    near(edited(name, [HeadEdit(0, 0, key_bias=KeyBias.only(range(count)))]), plain)
    assert torch.equal(say(name), plain)
    assert not any("around" in key for module in model.modules() for key in module.__dict__)


@pytest.mark.parametrize("name", DECODERS)
def test_keys_that_are_knocked_out_are_keys_that_are_not_there(name: str) -> None:
    model = shared(name)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[:, HIDDEN] = 0
    places = torch.arange(9).expand(2, -1)
    with torch.no_grad():
        expected = said(model, CALLED[name].given(), attention_mask=mask, position_ids=places)
    others = [t for t in range(9) if t not in HIDDEN]
    found = edited(name, everywhere(name, key_bias=KeyBias.knock_out(None, HIDDEN)))
    near(found[:, others], expected[:, others])
    assert float((found - say(name)).abs().max()) > 1e-3
    only = edited(name, everywhere(name, key_bias=KeyBias.only(mask.bool())))
    near(only[:, others], expected[:, others])


@pytest.mark.parametrize("name", ENCODERS)
def test_keys_that_are_knocked_out_of_an_encoder_are_hidden_ones(name: str) -> None:
    model = shared(name)
    given = CALLED[name].given()
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[:, HIDDEN] = 0
    with torch.no_grad():
        expected = said(model, given, attention_mask=mask)
    others = [t for t in range(9) if t not in HIDDEN]
    found = edited(name, everywhere(name, key_bias=KeyBias.knock_out(None, HIDDEN)))
    near(found[:, others], expected[:, others])


@pytest.mark.parametrize("name", ATTENDING)
def test_uniform_is_the_mean_of_the_values_that_a_row_may_read(name: str) -> None:
    model = shared(name)
    with heads.edited(model, HeadEdit(0, 1, ablate="uniform")), heads.capture(model, ("z", "v", "pattern")) as seen:
        say(name)
    site = heads.sites(model)[0]
    # Of an encoder that applies its block several times, the first application.
    z, v, pattern = (seen[what].calls(0)[0] for what in ("z", "v", "pattern"))
    values = v.repeat_interleave(site.heads // site.kv_heads, 2)[:, :, 1]
    read = (pattern[:, :, 0] > 0).double()
    near(z[:, :, 1], (read / read.sum(-1, keepdim=True)) @ values)
    assert bool((read.sum(-1) > 1).any())


@pytest.mark.parametrize("name", UNKNOWN)
def test_attention_that_is_not_ours_is_refused_by_name(name: str) -> None:
    with pytest.raises(Exception, match=UNKNOWN[name]):
        edited(name, [HeadEdit(0, 0, ablate="uniform")])


def hosts_own(name: str) -> bool:
    return name in ("own mha", "own s2", "own lowrank_gqa")


@pytest.mark.parametrize("name", [name for name in CALLED if hosts_own(name)])
def test_own_layers_read_as_they_are_told(name: str) -> None:
    plain = say(name)
    near(edited(name, [HeadEdit(0, 0, post=SinkScaling(torch.tensor([1]), 1.0))]), plain)
    # Nobody reads the first tokens, and nobody is the first token: what comes behind is a text without them.
    changed = edited(name, everywhere(name, key_bias=KeyBias.knock_out(None, [0, 1])))
    assert float((changed[:, 2:] - plain[:, 2:]).abs().max()) > 1e-3
    assert torch.equal(say(name), plain)
