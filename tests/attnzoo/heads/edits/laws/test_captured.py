"""What is captured is what the oracle computes, and the same under every implementation of attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo import heads, surgery
from attnzoo.heads import HeadEdit
from attnzoo.oracles.heads import edits as oracle
from tests.attnzoo.heads.edits.laws.drawn import normal
from tests.attnzoo.heads.edits.laws.models import CALLED, shared
from tests.attnzoo.heads.edits.laws.truth import assert_items, decoder_of, near, of_item, slots_of
from tests.attnzoo.surgery.families.hosts import HOSTS
from tests.attnzoo.surgery.tiny import WIDTH, ids, logits, tiny

WHAT = ("z", "q", "k", "v", "lse", "pattern")
PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
EAGER = 1e-6
"""Eager attention's softmax is in fp32."""


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny(4, 2)


def runs(model: Any, tokens: Tensor, mask: Tensor | None, edits: list[HeadEdit]) -> list[oracle.DecoderRun]:
    decoder = decoder_of(model)
    return [
        oracle.run(tokens[item, slots].tolist(), decoder, of_item(edits, decoder, item, slots))
        for item, slots in enumerate(slots_of(mask, *tokens.shape))
    ]


@pytest.mark.parametrize("padded", [False, True])
def test_all_that_is_captured_is_the_oracles(model: Any, padded: bool) -> None:
    mask = PADDED if padded else None
    tokens = ids(2, 7)
    edit = HeadEdit(0, 1, scale=normal(WIDTH), offset=normal(WIDTH, seed=1))
    with heads.edited(model, edit), heads.capture(model, WHAT) as seen:
        logits(model, tokens, attention_mask=mask)
    truth = runs(model, tokens, mask, [edit])
    for layer in range(2):
        for name in ("z", "lse"):
            assert_items(seen[name][layer], [getattr(run, name)[layer] for run in truth], mask)
        assert_items(seen["v"][layer], [run.v[layer][:, ::2] for run in truth], mask)
        for item, slots in enumerate(slots_of(mask, 2, 7)):
            near(seen["pattern"][layer][item, slots][..., slots], truth[item].pattern[layer])
        if not padded:
            # Hosts count slots, and padding has some: what is rotated by place alone is not the oracle's then.
            assert_items(seen["q"][layer], [run.q[layer] for run in truth])
            assert_items(seen["k"][layer], [run.k[layer][:, ::2] for run in truth])


def test_patterns_sum_to_one_and_reproduce_outputs(model: Any) -> None:
    tokens = ids(2, 7)
    with heads.capture(model, WHAT, rows="last") as seen:
        logits(model, tokens, attention_mask=PADDED)
    with heads.capture(model) as whole:
        logits(model, tokens, attention_mask=PADDED)
    for layer in range(2):
        pattern = seen["pattern"][layer]
        near(pattern.sum(-1), torch.ones_like(pattern.sum(-1)))
        assert not pattern[0, :, :, :3].any()
        v = seen["v"][layer].repeat_interleave(2, 2)
        near(torch.einsum("brhs,bshd->brhd", pattern, v), seen["z"][layer])
        near(seen["z"][layer], whole["z"][layer][:, -1:])
        scores = (
            torch.einsum("brhd,bshd->brhs", seen["q"][layer], seen["k"][layer].repeat_interleave(2, 2)) / WIDTH**0.5
        )
        near((scores - seen["lse"][layer].unsqueeze(-1)).exp() * (pattern > 0), pattern)


def test_calls_of_a_generation_lie_one_behind_the_other(model: Any) -> None:
    tokens = ids(1, 5)
    with heads.capture(model, ("z", "pattern")) as seen:
        said = model.generate(tokens, max_new_tokens=3, do_sample=False)
    truth = runs(model, said[:, :-1], None, [])[0]
    for layer in range(2):
        near(seen["z"][layer][0], truth.z[layer])
        near(seen["pattern"][layer][0], truth.pattern[layer])


DECODERS = [name for name, host in HOSTS.items() if host.generates and host.works("mha")]


@pytest.mark.parametrize("name", DECODERS)
def test_outputs_are_the_same_under_every_implementation(name: str) -> None:
    model = shared(name)

    def outputs() -> list[Tensor]:
        with torch.no_grad(), heads.capture(model) as seen:
            CALLED[name].say(model)
        return [seen["z"][layer] for layer in seen["z"]]

    plain = outputs()
    model.set_attn_implementation("eager")
    eager = outputs()
    model.set_attn_implementation("sdpa")
    report = surgery.convert(model, "mha")
    own = outputs()
    report.undo()
    assert len(plain) == len(own) == len(eager) == 2
    for one, other, exact in zip(plain, eager, own, strict=True):
        near(other, one, 10 * EAGER)
        near(exact, one)
