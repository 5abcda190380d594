"""LongHeads in hosts that are no Llamas: learned positions, partial and interleaved rotation, fused projections."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnzoo.oracles.longheads import Chunks, longheads
from attnzoo.oracles.mha import Recipe
from attnzoo.surgery.hosts.families.known import weights_of
from attnzoo.surgery.sites import find
from tests.attnzoo.surgery.families.laws import convert, made
from tests.attnzoo.surgery.hosts.masks import padding_mask
from tests.attnzoo.surgery.tiny import assert_close, ids, logits

EXACT = 1e-10
SHORT: dict[str, Any] = {"chunk_size": 4, "attention_length": 16}
NAMES = ("OPT", "GPT-NeoX", *(pytest.param(name, marks=pytest.mark.slow) for name in ("GPT-2", "GLM", "StableLM")))


class Definition(nn.Module):
    """The definition in the place of a host's block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        p = weights_of(block)
        named = {"q": p.q, "k": p.k, "v": p.v, "o": p.o}
        self.weights = {f"{role}_proj.weight": x for role, x in named.items()}
        biases = {"q": p.q_bias, "k": p.k_bias, "v": p.v_bias, "o": p.o_bias}
        self.weights |= {f"{role}_proj.bias": x for role, x in biases.items() if x is not None}
        rotary = p.rotary
        self.recipe = Recipe(
            num_heads=p.num_heads,
            num_kv_heads=p.num_kv_heads,
            head_dim=p.head_dim,
            scale=p.scale,
            rotary_base=None if rotary is None else rotary.base,
            rotary_dim=None if rotary is None else rotary.dim,
            interleaved=rotary is not None and rotary.interleaved,
        )

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """``[B, T, C]`` to as much."""
        return longheads(hidden_states, self.weights, self.recipe, Chunks(size=4, slots=4)).out, None


@pytest.mark.parametrize("name", NAMES)
def test_a_host_reads_the_chunks_of_the_definition(name: str) -> None:
    model = made(name)
    tokens = ids(2, 26)
    before = logits(model, tokens)
    paths = [site.path for site in find(model)]
    for path in paths:
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, Definition(model.get_submodule(path)))
    expected = logits(model, tokens)
    model = made(name)
    convert(model, "longheads", name, **SHORT)
    found = logits(model, tokens)
    assert_close(found, expected, EXACT)
    assert_close(found[:, :16], before[:, :16], EXACT)
    assert float((found - before)[:, 16:].abs().amax(-1).min()) > 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_generating_is_prefill_on_both_sides_of_the_threshold(name: str) -> None:
    model = made(name)
    convert(model, "longheads", name, **SHORT)
    tokens = ids(2, 13)
    mask = padding_mask([0, 6], 13)
    with torch.no_grad():
        out = model.generate(tokens * mask, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    whole = torch.cat([mask, torch.ones(2, 8, dtype=mask.dtype)], 1)
    places = (whole.cumsum(1) - 1).clamp(min=0)
    said = logits(model, out, attention_mask=whole, position_ids=places)[:, 12:-1].argmax(-1)
    assert torch.equal(said, out[:, 13:])
