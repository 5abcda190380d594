"""The oracle's answers for a tiny Llama: its weights, the same edits item by item, and the rows that padding leaves.

Letters: B batch, T slots of a call, V words, D head width, n heads of an edit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnzoo.heads import HeadEdit, KeyBias
from attnzoo.oracles.heads import edits as oracle
from attnzoo.oracles.heads.decoder import Decoder, sees_all

LIMIT = 1e-10
"""Of fp64 results after two layers whose scores are far from uniform, as a share of the largest."""


def decoder_of(model: Any, sees: Any = sees_all) -> Decoder:
    """A Llama's weights and numbers."""
    config = model.config
    return Decoder(
        weights={name: x.detach().clone() for name, x in model.state_dict().items()},
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        eps=config.rms_norm_eps,
        base=config.rope_parameters["rope_theta"],
        sees=sees,
    )


def given_heads(edit: HeadEdit, count: int) -> list[int]:
    """Its heads as they were given."""
    if isinstance(edit.head, slice):
        return list(range(count))[edit.head]
    return [edit.head] if isinstance(edit.head, int) else list(edit.head)


def of_item(edits: Sequence[HeadEdit], decoder: Decoder, item: int, slots: Sequence[int]) -> list[oracle.Edit]:
    """Edits as the oracle takes them, of one item whose tokens lie in these slots."""
    return [one for edit in edits for one in _one_edit(edit, decoder, item, slots)]


def _one_edit(edit: HeadEdit, decoder: Decoder, item: int, slots: Sequence[int]) -> list[oracle.Edit]:
    made: list[oracle.Edit] = []
    given = given_heads(edit, decoder.kv_heads if edit.kv else decoder.heads)
    for i, head in enumerate(given):
        value = None if edit.value is None else _value_of(edit.value, i, item, slots)
        one = oracle.Edit(
            layer=edit.layer,
            head=head,
            scale=edit.scale[i] if isinstance(edit.scale, Tensor) and edit.scale.dim() == 2 else edit.scale,
            offset=edit.offset[i] if edit.offset is not None and edit.offset.dim() == 2 else edit.offset,
            ablate="value" if edit.ablate in ("mean", "resample") else edit.ablate,  # type: ignore[arg-type]
            value=value,
            key_bias=None if edit.key_bias is None else _bias_of(edit.key_bias, item),
            sinks=frozenset() if edit.post is None else frozenset(_members(edit.post.keys, item)),
            beta=1.0 if edit.post is None else edit.post.beta,
            where=_rows(edit.where, item, slots),
        )
        made += oracle.of_kv_head(one, decoder) if edit.kv else [one]
    return made


def _value_of(value: Tensor, place: int, item: int, slots: Sequence[int]) -> Tensor:
    if value.dim() == 4:
        return value[item, list(slots), place]
    return value if value.dim() == 1 else value[place]


def _rows(where: Any, item: int, slots: Sequence[int]) -> Any:
    if not isinstance(where, Tensor):
        return where
    row = where[item if len(where) > 1 else 0]
    # Calls that come later are not edited where a mask is of the first.
    return [bool(row[slot]) for slot in slots] + [False] * 64


def _members(tokens: Tensor, item: int) -> list[int]:
    if tokens.dtype == torch.bool:
        tokens = tokens[item if len(tokens) > 1 else 0].nonzero().flatten()
    return [int(token) for token in tokens]


def _bias_of(bias: KeyBias, item: int) -> oracle.Bias:
    keys = _members(bias.keys, item)
    queries = None if bias.queries is None else set(_members(bias.queries, item))
    amounts: dict[int, float] = {}
    for i, key in enumerate(keys):
        given = bias.bias
        if isinstance(given, Tensor) and given.dim() == 2:
            given = given[item if len(given) > 1 else 0, key]
        elif isinstance(given, Tensor) and given.dim() == 1:
            given = given[i]
        amounts[key] = float(given)

    def at(t: int, s: int) -> float:
        if queries is not None and t not in queries:
            return 0.0
        if bias.others:
            return 0.0 if s in amounts else -math.inf
        return amounts.get(s, 0.0)

    return at


def slots_of(mask: Tensor | None, batch: int, length: int) -> list[list[int]]:
    """The slots of each item's tokens."""
    if mask is None:
        return [list(range(length))] * batch
    return [row.nonzero().flatten().tolist() for row in mask]


def oracle_logits(
    decoder: Decoder, tokens: Tensor, edits: Sequence[HeadEdit] = (), mask: Tensor | None = None
) -> list[Tensor]:
    """What the edited model says of each item's tokens, ``[n, V]`` without padding."""
    found = []
    for item, slots in enumerate(slots_of(mask, *tokens.shape)):
        own = [int(tokens[item, slot]) for slot in slots]
        found.append(oracle.run(own, decoder, of_item(edits, decoder, item, slots)).logits)
    return found


def assert_items(actual: Tensor, expected: Sequence[Tensor], mask: Tensor | None = None, limit: float = LIMIT) -> None:
    """Rows ``[B, T, ...]`` are those of each item, apart from padding."""
    for item, slots in enumerate(slots_of(mask, *actual.shape[:2])):
        near(actual[item, slots], expected[item], limit)


def near(actual: Tensor, expected: Tensor, limit: float = LIMIT) -> None:
    """Equal up to a share of the largest expected value, or of 1."""
    assert actual.shape == expected.shape
    largest = max(1.0, float(expected.detach().abs().max()))
    off = float((actual.detach() - expected.detach()).abs().max()) / largest
    assert off <= limit, f"off by {off:.3g}"
