"""Every policy of the registry in ``generate()``: token for token what the oracle's heads make a plain host say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo import policies
from attnzoo.surgery.hosts.calls import cache_name
from tests.attnzoo.policies.lives import rows_of
from tests.attnzoo.policies.masked import LAYERS
from tests.attnzoo.policies.reference import Lives, of_all_layers, remembering, small_host
from tests.attnzoo.policies.settings import Setting, entry_of, names
from tests.attnzoo.surgery.hosts.masks import padding_mask
from tests.attnzoo.surgery.tiny import assert_close, ids

FAMILIES = ("llama", "qwen3", "mistral")
PADDING = [7, 0, 12]
TOKENS = 17
MORE = 5
EXACT = 2e-7
"""``generate`` hands out logits in fp32, whatever they were computed in."""


@dataclass(frozen=True)
class Way:
    """A way to generate.

    Attributes:
        options: Of ``generate``.
        new: Tokens.
        chunks: Slots of the calls of a prompt; ``None`` is one call.
        turns: Padding before each further message of ``MORE`` slots in the same cache, item by item.
        beams: Sequences of one item, of which not all are given back.
    """

    options: dict[str, Any] = field(default_factory=lambda: {"do_sample": False})
    new: int = 7
    chunks: tuple[int, ...] = (TOKENS,)
    turns: tuple[list[int], ...] = ()
    beams: bool = False


SAMPLED = {"do_sample": True, "temperature": 2.0}
WAYS = {
    "greedy": Way(),
    "sampled": Way(SAMPLED | {"top_k": 20}),
    "beams": Way({"num_beams": 3, "do_sample": False, "num_return_sequences": 2}, new=6, beams=True),
    "chunked": Way({"prefill_chunk_size": 5, "do_sample": False}, chunks=(5, 5, 5, 2)),
    "turns": Way(turns=([0, 0, 0], [3, 0, 1]), new=4),
    "returned": Way(SAMPLED | {"num_return_sequences": 2}, new=5),
    "sampled beams": Way(SAMPLED | {"num_beams": 2}, new=5, beams=True),
}
CASES = [
    (name, number, way, family)
    for name in names()
    for number in range(len(entry_of(name).settings))
    for way in WAYS
    for family in FAMILIES
]


def is_quick(case: tuple[str, int, str, str]) -> bool:
    """Whether a case is tried in every run: one setting of each policy; ways and families take turns."""
    name, number, way, family = case
    turn = names().index(name)
    return (number, way, family) == (0, list(WAYS)[turn % len(WAYS)], FAMILIES[turn % len(FAMILIES)])


def marked(case: tuple[str, int, str, str]) -> Any:
    name, number, way, family = case
    marks = () if is_quick(case) else pytest.mark.slow
    return pytest.param(*case, id=f"{name}-{number}-{way}-{family}", marks=marks)


@cache
def host_of(family: str) -> Any:
    """A host that every test leaves as it was."""
    return small_host(family)


def prompts() -> tuple[Tensor, Tensor]:
    """Three prompts with padding on their left, and their mask."""
    mask = padding_mask(PADDING, TOKENS)
    return ids(3, TOKENS) * mask, mask


@dataclass(eq=False)
class Said:
    """What came of it: the turns' sequences, their logits, and the last mask."""

    sequences: list[Tensor]
    logits: list[Tensor]
    mask: Tensor


def generated(model: Any, way: Way, before: Callable[[int], dict[str, Any]]) -> Said:
    """The turns of a way; ``before`` a turn of so many slots, what ``generate`` is told besides."""
    tokens, mask = prompts()
    said = Said([], [], mask)
    torch.manual_seed(1)
    for turn in range(1 + len(way.turns)):
        if turn:
            front = padding_mask(way.turns[turn - 1], MORE)
            tokens = torch.cat((tokens, ids(3, MORE, seed=turn) * front), 1)
            said.mask = torch.cat((said.mask, torch.ones(3, way.new, dtype=torch.int64), front), 1)
        found = model.generate(
            tokens,
            attention_mask=said.mask,
            max_new_tokens=way.new,
            return_dict_in_generate=True,
            output_logits=True,
            **way.options,
            **before(tokens.shape[1]),
        )
        tokens = found.sequences
        said.sequences.append(tokens)
        said.logits.append(torch.stack(found.logits))
    return said


@cache
def dense(family: str, way: str) -> Said:
    """What is said where everything is held."""
    return generated(host_of(family), WAYS[way], lambda slots: {})


def expected_of(model: Any, setting: Setting, way: Way) -> tuple[Said, Lives]:
    """What the oracle makes the host say."""
    plain = {**way.options}
    plain.pop("prefill_chunk_size", None)
    with remembering(model, setting, list(way.chunks)) as lives:

        def before(slots: int) -> dict[str, Any]:
            done = sum(lives.calls)
            if slots > done:
                # Tokens of earlier turns came one by one; the last of them comes with the message.
                lives.calls += [*[1] * (slots - done - MORE - 1), MORE + 1]
            return {"use_cache": False}

        return generated(model, Way(plain, way.new, way.chunks, way.turns, way.beams), before), lives


@pytest.mark.parametrize(("name", "number", "way", "family"), [marked(case) for case in CASES])
def test_generating_says_what_the_oracle_s_heads_say(name: str, number: int, way: str, family: str) -> None:
    model = host_of(family)
    setting = entry_of(name).settings[number]
    told = WAYS[way]
    expected, lives = expected_of(model, setting, told)
    with policies.applied(model, of_all_layers(setting.make())) as run:
        memory = run.new_cache()
        said = generated(model, told, lambda slots: {cache_name(type(model).forward): memory})
    for mine, theirs in zip(said.sequences, expected.sequences, strict=True):
        assert mine.tolist() == theirs.tolist()
    for mine, theirs in zip(said.logits, expected.logits, strict=True):
        assert_close(mine, theirs, EXACT)
    # The control: what is not held, or not read, matters.
    assert float((said.logits[-1] - dense(family, way).logits[-1]).abs().max()) > 0.1
    if not told.beams:
        assert_same_rows(memory, lives, said)


def assert_same_rows(held: Any, lives: Lives, said: Said) -> None:
    """Every item's heads hold the rows that the oracle says, each with its mass."""
    # The last token has been said, and not been read.
    tokens = said.sequences[-1][:, :-1]
    real = torch.ones_like(tokens)
    each = tokens.shape[0] // said.mask.shape[0]
    real[:, : said.mask.shape[1]] = said.mask.repeat_interleave(each, 0)
    sequences = torch.where(real.bool(), tokens, -1).tolist()
    for layer in range(LAYERS):
        for item, rows in enumerate(rows_of(held.layers[layer].memory)):
            wanted = lives.rows_of(layer, tuple(sequences[item]))
            assert [[p for p, _ in head] for head in rows] == [[p for p, _ in head] for head in wanted]
            masses = [torch.tensor([mass for head in both for _, mass in head]) for both in (rows, wanted)]
            assert torch.allclose(*masses)
