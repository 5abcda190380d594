"""How much outputs of heads differ with and without a context.

Source: He et al. 2024, *Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence*, section 3
(arXiv:2412.13949): the distance of a head's output with an image and without. Departure: any context that stands before
the rows that are compared, and a mean over these rows.

Letters: B batch, T tokens, L layers, H query heads, D width of a head's output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.base.config import check_int
from attnzoo.heads.causal.batches import HeadBatch
from attnzoo.heads.causal.capture import capture
from attnzoo.heads.causal.each_head import even_places
from attnzoo.surgery.edits.places import sites
from attnzoo.surgery.lowrank.calibration import evaluating
from attnzoo_kernels.errors import ConfigError, ShapeError


def divergence(model: Any, batch: Any, without: Any, *, rows: int | None = None) -> Tensor:
    r"""How far each head's output is from what it is without a context, :math:`\lVert z - z' \rVert`.

    Rows of both texts stand for each other from the last token on, padding aside.

    Args:
        model: A model of a known family, converted or not. It is left as it was.
        batch: Texts with their contexts: int64 ``[B, T]``, or a mapping for ``model(**batch)``.
        without: The same texts without them, as many items of any length.
        rows: How many of each item's last tokens are compared; by default all from the last on that are the same in
            both texts of an item.

    Returns:
        The mean over rows and items, fp64 ``[L, H]`` on the CPU.

    Raises:
        ConfigError: If no block is known, an argument is none of these, or texts end differently.
        ShapeError: If there are other items.
        UnsupportedError: If heads cannot be captured, or layers have different numbers of heads.
    """
    places = even_places(sites(model))
    first = HeadBatch.of("batch", batch, model)
    second = HeadBatch.of("without", without, model)
    if first.size != second.size:
        raise ShapeError(f"without: expected {first.size} items as in batch, got {second.size}")
    pairs = [_aligned(first, second, item, rows) for item in range(first.size)]
    outputs = []
    with torch.no_grad(), evaluating(model):
        for given in (first, second):
            with capture(model, ("z",)) as seen:
                given.call(model)
            outputs.append(seen["z"])
    found = []
    for place in places:
        with_context, alone = (x[place.layer] for x in outputs)
        distances = [
            (with_context[item, own].double() - alone[item, other].double()).norm(dim=-1)
            for item, (own, other) in enumerate(pairs)
        ]  # [rows, H] each
        found.append(torch.cat(distances).mean(0).cpu())
    return torch.stack(found)


def _aligned(first: HeadBatch, second: HeadBatch, item: int, rows: int | None) -> tuple[Tensor, Tensor]:
    """The rows of one item that stand for each other, in both texts, int64.

    Raises:
        ConfigError: If there are none, or not so many.
    """
    own, other = (batch.rows()[item].nonzero().flatten() for batch in (first, second))
    shorter = min(len(own), len(other))
    if rows is not None:
        check_int("rows", rows, 1)
        if rows > shorter:
            raise ConfigError(f"rows: expected at most {shorter}, as the shorter text of item {item} has, got {rows}")
        return own[-rows:], other[-rows:]
    tokens = [_tokens(batch, item) for batch in (first, second)]
    if any(x is None for x in tokens):
        raise ConfigError("rows: expected a number, since the batch has no tokens to compare, got None")
    same = 0
    while same < shorter and torch.equal(tokens[0][own[-1 - same]], tokens[1][other[-1 - same]]):  # type: ignore[index]
        same += 1
    if not same:
        raise ConfigError(f"without: expected texts that end as those of batch do, got another end of item {item}")
    return own[-same:], other[-same:]


def _tokens(batch: HeadBatch, item: int) -> Tensor | None:
    """The tokens of an item ``[T]``, where they are known."""
    found = batch.args[0] if batch.args else batch.kwargs.get("input_ids")
    return found[item] if isinstance(found, Tensor) else None
