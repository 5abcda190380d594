"""Edits of what heads read: biases of keys, two states, plain means, wherever a model's attention is computed.

Blocks of hosts are asked through the attention interface, by which the model attends meanwhile; attnzoo's own layers,
and those in hosts' places, hold who edits their calls. Either way the edits of a call go with its queries and keys to
where these are read, see :mod:`attnzoo.base.editing`.

Letters: B batch, T query tokens, S slots of the host's cache, n tokens of a set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from attnzoo.base.editing.by_token import ByToken
from attnzoo.base.editing.reads import CallRows, ReadEdit, ReadEditor, TwoStates, token_set
from attnzoo.base.layer import AttentionLayer
from attnzoo.surgery.capture import around_attention
from attnzoo.surgery.edits.edit import HeadEdit
from attnzoo.surgery.edits.key_bias import KeyBias, SinkScaling
from attnzoo.surgery.edits.places import HeadSite
from attnzoo.surgery.hosts.attention_function import pattern_of
from attnzoo.surgery.hosts.block import Need
from attnzoo.surgery.hosts.calls import AttentionCall
from attnzoo.surgery.hosts.families.known import WITHOUT_TRANSFORMERS, block_of
from attnzoo.surgery.hosts.families.own import HOST as OWN
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.replacements.replacement import Replacement
from attnzoo_kernels.errors import ShapeError, UnsupportedError


class LayerReads:
    """What is edited of what one layer's heads read: see :class:`attnzoo.base.editing.reads.ReadEditor`.

    Args:
        site: The layer.
        edits: Those that change what heads read, in their order; others are passed over.
    """

    def __init__(self, site: HeadSite, edits: Sequence[HeadEdit]) -> None:
        self.site = site
        self._parts = [(edit, parts) for edit in edits if (parts := _parts_of(edit, site))]

    @property
    def is_empty(self) -> bool:
        """Whether nothing would be read otherwise."""
        return not self._parts

    def for_call(self, rows: CallRows) -> tuple[ReadEdit, ...]:
        """The edits of a call; none where it reads as ever.

        Raises:
            ShapeError: If a mask is of other items or rows, or counts padding.
            UnsupportedError: In a program that is compiled.
        """
        if torch.compiler.is_compiling():
            raise UnsupportedError("edits: expected no compiler where reads are edited, got one")
        found: list[ReadEdit] = []
        for edit, parts in self._parts:
            _check_masks(edit, rows)
            where = _rows_of(edit, rows)
            if where is not None:
                found += [_within(part, where) for part in parts]
        return tuple(found)


def put_reads(model: nn.Module, placed: Sequence[tuple[HeadEdit, HeadSite]]) -> list[Callable[[], None]]:
    """Edits what heads read until what is returned is called.

    Args:
        model: The model.
        placed: Edits in their order, each with its place; those of outputs alone are passed over.

    Raises:
        UnsupportedError: If the attention of a block cannot be edited.
    """
    by_layer: dict[int, list[tuple[HeadEdit, HeadSite]]] = {}
    for edit, place in placed:
        if edit.reads:
            by_layer.setdefault(place.layer, []).append((edit, place))
    reads = [LayerReads(each[0][1], [edit for edit, _ in each]) for each in by_layer.values()]
    reads = [one for one in reads if not one.is_empty]
    around: dict[int, LayerReads] = {}
    sites: list[Site] = []
    own: list[tuple[AttentionLayer, LayerReads]] = []
    for one in reads:
        module, site = attending(model, one.site)
        if isinstance(module, AttentionLayer):
            own.append((module, one))
        else:
            around[site.layer] = one
            sites.append(site)
    with ExitStack() as made:
        if sites:
            made.enter_context(around_attention(model, partial(_answer_edited, around), sites=sites))
        for layer, one in own:
            layer.read_editors = (*layer.read_editors, one)
            made.callback(_take_off, layer, one)
        return [made.pop_all().close] if reads else []


def attending(model: nn.Module, place: HeadSite) -> tuple[nn.Module, Site]:
    """What attends at a place, a block of a host's or a layer of attnzoo's; and the block.

    Raises:
        UnsupportedError: If its attention cannot be edited.
    """
    site = place.site
    module = model.get_submodule(place.path)
    reason = "its family is not known, and so not how it attends" if site is None else _why_not(module, site)
    if site is None or reason is not None:
        raise UnsupportedError(f"{place.path}: reads cannot be edited: {reason}", (str(reason),))
    return module.layer if isinstance(module, Replacement) else module, site


def _why_not(module: nn.Module, site: Site) -> str | None:
    if isinstance(module, Replacement) and module.slots_per_token != 1:
        return "it puts tokens of its own among those of the model"
    layer = module.layer if isinstance(module, Replacement) else module
    if isinstance(layer, AttentionLayer):
        return layer.why_no_read_edits()
    if site.host in WITHOUT_TRANSFORMERS - {OWN}:
        return "it attends by torch's own functions; convert the model by surgery.convert(model, 'mha') first"
    reasons = () if pattern_of(module) is not None else block_of(module).reasons[Need.READING]
    return reasons[0] if reasons else None


def _take_off(layer: AttentionLayer, one: ReadEditor) -> None:
    layer.read_editors = tuple(other for other in layer.read_editors if other is not one)


def _answer_edited(reads: dict[int, LayerReads], site: Site, call: AttentionCall) -> Tensor:
    """A block's attention with the edits of a call; those of contexts within this one come behind them."""
    edits = reads[site.layer].for_call(rows_of_call(call))
    return replace(call, edits=(*edits, *call.edits)).answered()


def rows_of_call(call: AttentionCall) -> CallRows:
    """Which tokens the rows of a block's call are."""
    geometry = call.geometry
    batch, heads, tokens, _ = call.q.shape
    if isinstance(geometry.first, Tensor):
        raise UnsupportedError("edits: expected no compiler where reads are edited, got one")
    held = geometry.first + tokens
    if geometry.real is None:
        token = torch.arange(geometry.first, held, device=call.q.device).unsqueeze(0)
    else:
        real = geometry.real[:, :held].bool()
        token = (real.cumsum(1) - 1).masked_fill(~real, -1)[:, geometry.first :]
    return CallRows(token, batch, heads)


def _parts_of(edit: HeadEdit, site: HeadSite) -> list[ReadEdit]:
    """An edit as its query heads have it, in all calls alike; nothing of it that changes nothing."""
    parts: list[ReadEdit] = []
    rows = None
    bias = None
    if edit.key_bias is not None:
        bias = _bias_of(edit.key_bias)
        rows = None if edit.key_bias.queries is None else _set_of(edit.key_bias.queries)
    states = None if edit.post is None else _states_of(edit.post)
    for head in edit.query_heads(site):
        if bias is not None and (rows is None or not rows.is_empty):
            parts.append(ReadEdit(head, rows, bias=bias))
        if states is not None:
            parts.append(ReadEdit(head, states=states))
        if edit.ablate == "uniform":
            parts.append(ReadEdit(head, uniform=True))
    return parts


def _set_of(tokens: Tensor) -> ByToken:
    """A set of tokens, of indices ``[n]`` or a mask ``[B|1, S]``."""
    if tokens.dtype == torch.bool:
        return ByToken(tokens)
    count = int(tokens.max()) + 1 if tokens.numel() else 0
    members = torch.zeros(1, count, dtype=torch.bool, device="cpu")
    members[0, tokens.cpu()] = True
    return ByToken(members)


def _bias_of(given: KeyBias) -> ByToken | None:
    """The bias of each token; ``None`` where it is 0 for all."""
    keys = _set_of(given.keys)
    bias = given.bias
    if not isinstance(bias, Tensor):
        # In the widest dtype: it is rounded to that of scores once.
        member, other = (0.0, bias) if given.others else (bias, 0.0)
        values = torch.full(keys.values.shape, other, dtype=torch.float64, device=keys.values.device)
        found = ByToken(values.masked_fill(keys.values, member), other)
        return None if found.is_empty else found
    if bias.dim() == 0 or given.keys.dtype == torch.bool:
        return ByToken(torch.where(keys.values.to(bias.device), bias, torch.zeros_like(bias)))
    index = given.keys.to(bias.device)
    return ByToken(bias.new_zeros(keys.values.shape).index_copy(1, index, bias.unsqueeze(0)))


def _states_of(post: SinkScaling) -> TwoStates | None:
    """Sinks that count less; ``None`` where they count as ever, or there are none."""
    sinks = _set_of(post.keys)
    return None if post.beta == 1 or sinks.is_empty else TwoStates(sinks, float(post.beta))


def _check_masks(edit: HeadEdit, rows: CallRows) -> None:
    """Raises unless masks of tokens are of the call's items, and count no padding."""
    masks = [] if edit.post is None else [("post", edit.post.keys, edit.post.by_token)]
    if edit.key_bias is not None:
        given = (edit.key_bias.queries, edit.key_bias.keys)
        masks += [("key_bias", x, edit.key_bias.by_token) for x in given if x is not None]
    for name, mask, by_token in masks:
        if mask.dtype != torch.bool:
            continue
        if mask.shape[0] not in (1, rows.batch):
            raise ShapeError(f"{name}: expected masks of {rows.batch} items, got {list(mask.shape)}")
        if not by_token and rows.is_padded:
            raise ShapeError(
                f"{name}: expected masks that count no padding for a call with some, got {list(mask.shape)}; give the "
                "attention_mask beside them, or indices of tokens"
            )


def _rows_of(edit: HeadEdit, rows: CallRows) -> ByToken | bool | None:
    """The set of tokens that are rows of an edit in a call: True for all, ``None`` for none."""
    where = edit.where
    tokens = rows.token.shape[1]
    if not tokens:
        return None
    if isinstance(where, Tensor):
        if where.shape[1] != tokens and tokens == 1:
            return None
        if where.shape[1] != tokens or where.shape[0] not in (1, rows.batch):
            raise ShapeError(f"where: expected a mask [{rows.batch}, {tokens}] for this call, got {list(where.shape)}")
        return token_set(where.to(rows.token.device), rows.token)
    if where == "last":
        last = rows.token.amax(1, keepdim=True)
        return token_set((rows.token == last) & (last >= 0), rows.token)
    if where == "all" or (tokens > 1) == (where == "prefill"):
        return True
    return None


def _within(part: ReadEdit, where: ByToken | bool) -> ReadEdit:
    """A part of an edit in some rows of a call."""
    if not isinstance(where, ByToken):
        return part
    return replace(part, rows=where if part.rows is None else part.rows & where)
