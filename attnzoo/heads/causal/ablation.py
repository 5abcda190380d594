"""What a metric loses without each head.

Letters: B batch, T tokens, L layers, H query heads, D width of a head's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnzoo.heads.causal.batches import HeadBatch, Metric, Progress
from attnzoo.heads.causal.capture import capture
from attnzoo.heads.causal.each_head import EachHead, even_places
from attnzoo.reporting.choices import check_choice
from attnzoo.surgery.edits.edit import ABLATIONS, Ablation, HeadEdit
from attnzoo.surgery.edits.places import HeadSite, sites
from attnzoo.surgery.lowrank.calibration import evaluating
from attnzoo_kernels.errors import UnsupportedError


def ablation_scores(
    model: Any,
    batch: Any,
    metric: Metric,
    ablate: Ablation = "zero",
    heads: Sequence[tuple[int, int]] | None = None,
    *,
    progress: Progress | None = None,
) -> Tensor:
    """What a metric loses where each head is ablated by itself: the metric as it is less that without the head.

    The heads of a layer are ablated at once, along the batch, and layers before them are not run again where they can
    be told apart; else the model runs whole.

    Args:
        model: A model of a known family, converted or not. It is left as it was.
        batch: int64 ``[B, T]``, or a mapping for ``model(**batch)``, padded or not; the same number of tokens an item.
        metric: From what the model says ``[B, T, V]`` to one number, of which more is better, such as a log-likelihood:
            then a head that helps has a score above 0.
        ablate: "zero"; "mean", of the head's outputs over all tokens of the batch; "resample", the output for the next
            item of the batch at the same place; "uniform", the mean of all values that a row may read.
        heads: Pairs (layer, head); all by default. The others are NaN.
        progress: Told of each layer.

    Returns:
        fp64 ``[L, H]`` on the CPU.

    Raises:
        ConfigError: If no block is known, or an argument is none of these.
        ShapeError: If the metric gives several numbers.
        UnsupportedError: If heads cannot be edited, layers have different numbers of heads, or "resample" is asked of
            one item or of padded ones.
    """
    check_choice("ablate", ablate, ABLATIONS)
    places = even_places(sites(model))
    given = HeadBatch.of("batch", batch, model)
    if ablate == "resample" and (given.size < 2 or given.padded):
        got = "one" if given.size < 2 else "padded ones"
        raise UnsupportedError(f"batch: expected several items without padding to resample among, got {got}")
    with torch.no_grad(), evaluating(model):
        values = _values(model, given, ablate)
        each = EachHead(model, places, given, metric, progress)
        each.run()

        def edit(place: HeadSite, head: int, times: int, rows: Tensor) -> list[HeadEdit]:
            value = values.get(place.layer)
            if value is not None:
                # Means [H, D], or outputs of all rows [B, T, H, D].
                value = value[head] if value.dim() == 2 else value[:, :, head : head + 1].repeat(times, 1, 1, 1)
            return [HeadEdit(place.layer, head, ablate=ablate, value=value, where=rows)]

        return each.lost(edit, heads)


def _values(model: Any, batch: HeadBatch, ablate: Ablation) -> dict[int, Tensor]:
    """By layer what outputs of heads are replaced by: means ``[H, D]``, or those of other items ``[B, T, H, D]``."""
    if ablate not in ("mean", "resample"):
        return {}
    with capture(model, ("z",)) as seen:
        batch.call(model)
    if ablate == "resample":
        return {layer: z.roll(-1, 0) for layer, z in seen["z"].items()}
    rows = batch.rows()
    return {layer: z[rows.to(z.device)].mean(0) for layer, z in seen["z"].items()}
