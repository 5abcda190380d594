"""Families through one interface: what each says about a block is what the block does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MistralConfig

import attnzoo
from attnzoo import surgery
from attnzoo.base.rope import apply_rotary, rotary_tables
from attnzoo.surgery.hosts.block import Need, ReplacementModule
from attnzoo.surgery.hosts.families.known import block_of, family_of, is_block, known_classes
from tests.attnzoo.surgery.conversions import REPLACED, convert_as
from tests.attnzoo.surgery.hosts.test_hosts import HOSTS, ROUNDED, SIZES, host
from tests.attnzoo.surgery.tiny import assert_close, ids, tiny

TOKENS = 12


def inputs_and_output(model: Any, attention: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """What a block is given and what it returns in a pass."""
    seen: list[Any] = []
    handle = attention.register_forward_hook(
        lambda module, args, kwargs, out: seen.extend([args[0] if args else kwargs["hidden_states"], out[0]]),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(ids(2, TOKENS))
    handle.remove()
    return seen[0], seen[1]


@pytest.mark.parametrize("name", HOSTS)
def test_projecting_rotating_attending_and_output_are_the_block(name: str) -> None:
    model = host(name)
    attention = model.model.layers[1].self_attn
    x, expected = inputs_and_output(model, attention)
    block = block_of(attention)
    rotary = block.rotary()
    assert rotary is not None
    cos, sin = rotary_tables(rotary, block.head_dim, torch.arange(TOKENS).unsqueeze(0), torch.float32)
    with torch.no_grad():
        q, k, v = block.project(x)
        assert q.shape == (2, block.heads, TOKENS, block.head_dim)
        assert k.shape == (2, block.kv_heads, TOKENS, block.head_dim)
        assert v.shape == (2, block.kv_heads, TOKENS, block.value_dim)
        q, k = (apply_rotary(y, cos, sin, rotary.interleaved) for y in (q, k))
        k, v = (y.repeat_interleave(block.heads // block.kv_heads, 1) for y in (k, v))
        scores = (block.scale * q @ k.mT).masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), float("-inf"))
        found = block.output((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))
    assert_close(found, expected, ROUNDED)


@pytest.mark.parametrize("name", HOSTS)
def test_a_block_says_its_sizes_its_weights_and_what_is_in_the_way(name: str) -> None:
    attention = host(name).model.layers[0].self_attn
    block = block_of(attention)
    assert (block.heads, block.kv_heads, block.head_dim, block.value_dim) == (4, 2, 16, 16)
    assert block.cached_values() == 64
    assert (block.causal, block.window, block.reply) == (True, None, "pair")
    assert block.weights().k is attention.k_proj.weight
    assert list(block.projections.values()) == [getattr(attention, f"{role}_proj") for role in "qkvo"]
    normalised = name == "qwen3"
    assert block.products is not normalised
    assert {need: bool(block.reasons[need]) for need in Need} == {
        Need.READING: False,
        Need.WEIGHTS: normalised,
        Need.REPLACING: False,
    }


def test_a_window_of_the_blocks_own_is_told_and_stands_in_nobodys_way() -> None:
    config = MistralConfig(**SIZES, sliding_window=8)
    block = block_of(AutoModelForCausalLM.from_config(config).model.layers[0].self_attn)
    assert block.window == 8
    assert not any(block.reasons[need] for need in Need)


@pytest.mark.parametrize("kind", REPLACED)
def test_a_replacement_describes_itself_as_the_block_that_it_replaces(kind: str) -> None:
    model = tiny()
    before = surgery.find(model)
    convert_as(model, kind)
    assert surgery.find(model) == before
    for site in before:
        module = model.get_submodule(site.path)
        assert isinstance(module, ReplacementModule)
        assert family_of(module).name == site.host
        block = block_of(module)
        assert all("already" in " ".join(block.reasons[need]) for need in Need)
        q, k, v = block.project(torch.zeros(1, 3, site.width, dtype=torch.float64))
        assert q.shape == (1, site.heads, 3, site.head_dim)
        assert k.shape == v.shape == (1, site.kv_heads, 3, site.head_dim)
        with pytest.raises(attnzoo.ConversionError):
            block.weights()


def test_what_no_family_knows_is_named() -> None:
    module = nn.Linear(8, 2)
    assert not is_block(module)
    with pytest.raises(attnzoo.ConversionError, match=r"LlamaAttention.*got torch.*Linear"):
        block_of(module)
    assert "Qwen3Attention" in known_classes()
