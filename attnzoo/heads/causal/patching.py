"""Outputs of heads from another text: what a metric loses by each of them, and by the paths between some of them.

Source: Vig et al. 2020, *Causal Mediation Analysis for Interpreting Neural NLP* (arXiv:2004.12265); frozen attention:
Jin et al. 2024, *Cutting Off the Head Ends the Conflict* (PH3), section 3.2 (arXiv:2402.18154); paths: Wang et al.
2022, *Interpretability in the Wild*, section 3.1 (arXiv:2211.00593). Departures: MLPs compute anew from what arrives,
in paths too; a path ends in a receiver's output, that is in its queries, keys and values together.

Letters: B batch, T tokens, L layers, H query heads, D width of a head's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from attnzoo.heads.causal.batches import HeadBatch, Metric, Progress, check_alike, measured
from attnzoo.heads.causal.capture import capture
from attnzoo.heads.causal.each_head import EachHead, checked_heads, even_places
from attnzoo.reporting.choices import check_choice
from attnzoo.surgery.edits.edit import HeadEdit
from attnzoo.surgery.edits.edited import edited
from attnzoo.surgery.edits.places import HeadSite, sites
from attnzoo.surgery.lowrank.calibration import evaluating
from attnzoo_kernels.errors import ConfigError

Head = tuple[int, int]


def patch(
    model: Any,
    clean: Any,
    corrupt: Any,
    metric: Metric,
    what: Literal["z"] = "z",
    freeze: Literal["attention"] | None = None,
    *,
    heads: Sequence[Head] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """What a metric loses where each head by itself gives what it gave for another text.

    Args:
        model: A model of a known family, converted or not. It is left as it was.
        clean: The text: int64 ``[B, T]``, or a mapping for ``model(**batch)``.
        corrupt: The other one, of as many tokens, padded in the same places.
        metric: From what the model says ``[B, T, V]`` to one number, of which more is better.
        what: "z": outputs of heads.
        freeze: "attention": all other heads give what they gave for the clean text, while MLPs compute anew, so that a
            head's direct effect is measured; ``None`` lets later heads follow.
        heads: Pairs (layer, head); all by default. The others are NaN.
        progress: Told of each layer.

    Returns:
        The metric of the clean text less that with the head's other output, fp64 ``[L, H]`` on the CPU.

    Raises:
        ConfigError: If no block is known, or an argument is none of these.
        ShapeError: If the texts have other sizes, or the metric gives several numbers.
        UnsupportedError: If heads cannot be edited, layers have different numbers of heads, or padding differs.
    """
    check_choice("what", what, ("z",))
    if freeze is not None:
        check_choice("freeze", freeze, ("attention",))
    places = even_places(sites(model))
    first, second = _batches(model, clean, corrupt)
    with torch.no_grad(), evaluating(model):
        other = _outputs(model, second)
        own = _outputs(model, first) if freeze else {}
        each = EachHead(model, places, first, metric, progress)
        each.run()

        def edit(place: HeadSite, head: int, times: int, rows: Tensor) -> list[HeadEdit]:
            value = other[place.layer][:, :, head : head + 1].repeat(times, 1, 1, 1)
            return [HeadEdit(place.layer, head, ablate="resample", value=value, where=rows)]

        def frozen(place: HeadSite, times: int) -> list[HeadEdit]:
            # Heads of the same layer and before see nothing of the patch.
            return [_written(layer, z, times) for layer, z in own.items() if layer > place.layer]

        return each.lost(edit, heads, rest=frozen)


def path(
    model: Any,
    clean: Any,
    corrupt: Any,
    senders: Sequence[Head],
    receivers: Sequence[Head] | None,
    metric: Metric,
) -> float:
    """What a metric loses by what some heads tell others about another text, exactly: nothing is linearised.

    Three passes: in the first both texts are seen; in the second senders give what they gave for the other text and all
    other heads what they gave for the clean one, while it is noted what receivers would give of what arrives; in the
    third receivers give that, and all behind them follows.

    Args:
        model: A model of a known family, converted or not. It is left as it was.
        clean: The text: int64 ``[B, T]``, or a mapping for ``model(**batch)``.
        corrupt: The other one, of as many tokens, padded in the same places.
        senders: Pairs (layer, head).
        receivers: Pairs (layer, head); ``None`` for what the model says itself, past all other heads.
        metric: From what the model says ``[B, T, V]`` to one number, of which more is better.

    Returns:
        The metric of the clean text less that with these paths from the other one.

    Raises:
        ConfigError: If no block is known, or an argument is none of these.
        ShapeError: If the texts have other sizes, or the metric gives several numbers.
        UnsupportedError: If heads cannot be edited, or padding differs.
    """
    places = sites(model)
    sending = checked_heads("senders", senders, places)
    receiving = None if receivers is None else checked_heads("receivers", receivers, places)
    first, second = _batches(model, clean, corrupt)
    with torch.no_grad(), evaluating(model):
        with capture(model, ("z",)) as seen:
            intact = measured(metric, first.call(model))
        own = dict(seen["z"])
        mixed = _mixed(own, _outputs(model, second), sending)
        frozen = [_written(layer, z) for layer, z in mixed.items()]
        # What is seen is what heads give before they are edited.
        with capture(model, ("z",)) as noted, edited(model, frozen):
            direct = first.call(model)
        if receiving is None:
            return float(intact - measured(metric, direct))
        edits = [
            HeadEdit(layer, head, ablate="resample", value=noted["z"][layer][:, :, head : head + 1])
            for layer, head in receiving
        ]
        with edited(model, edits):
            return float(intact - measured(metric, first.call(model)))


def _batches(model: Any, clean: Any, corrupt: Any) -> tuple[HeadBatch, HeadBatch]:
    first = HeadBatch.of("clean", clean, model)
    second = HeadBatch.of("corrupt", corrupt, model)
    check_alike(first, second)
    return first, second


def _outputs(model: Any, batch: HeadBatch) -> dict[int, Tensor]:
    """Outputs of all heads ``[B, T, H, D]`` by layer.

    Raises:
        ConfigError: If a layer has others than the batch has rows.
    """
    with capture(model, ("z",)) as seen:
        batch.call(model)
    found = dict(seen["z"])
    for layer, z in found.items():
        if list(z.shape[:2]) != [batch.size, batch.tokens]:
            raise ConfigError(f"model: expected rows {[batch.size, batch.tokens]} in layer {layer}, got {z.shape[:2]}")
    return found


def _mixed(base: dict[int, Tensor], other: dict[int, Tensor], heads: Sequence[Head]) -> dict[int, Tensor]:
    """Outputs of heads, those of some of them from elsewhere."""
    found = {layer: z.clone() for layer, z in base.items()}
    for layer, head in heads:
        found[layer][:, :, head] = other[layer][:, :, head]
    return found


def _written(layer: int, z: Tensor, times: int = 1) -> HeadEdit:
    """The edit that makes all heads of a layer give ``z [B, T, H, D]``, in each copy of the batch."""
    return HeadEdit(layer, slice(None), ablate="resample", value=z.repeat(times, 1, 1, 1))
