"""What a metric would lose by each head, to first order: a backward for all heads at once.

Source: Syed et al. 2023, *Attribution Patching Outperforms Automated Circuit Discovery* (arXiv:2310.10348), after Nanda
2023. Departure: nodes are outputs of heads alone.

Letters: B batch, T tokens, L layers, H query heads, D width of a head's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.heads.causal.batches import HeadBatch, Metric, check_alike, measured
from attnzoo.heads.causal.capture import capture
from attnzoo.heads.causal.each_head import even_places
from attnzoo.surgery.edits.outputs import heads_of, input_of, with_input
from attnzoo.surgery.edits.places import HeadSite, sites
from attnzoo.surgery.lowrank.calibration import evaluating
from attnzoo_kernels.errors import ConfigError


def attribution(model: Any, clean: Any, corrupt: Any, metric: Metric) -> Tensor:
    r"""What a metric would lose by each head if it gave what it gave for another text, to first order.

    .. math:: \sum_{b, t} \frac{\partial M}{\partial z} \cdot (z^{clean} - z^{corrupt})

    with the gradient for the clean text. :func:`attnzoo.heads.patch` measures what this estimates, by a forward for
    each head. What is nearly linear is estimated well; where a softmax or a norm saturates even signs are wrong.

    Args:
        model: A model of a known family, converted or not. It is left as it was, gradients too.
        clean: The text: int64 ``[B, T]``, or a mapping for ``model(**batch)``.
        corrupt: The other one, of as many tokens, padded in the same places; ``None`` for outputs of 0, which estimates
            :func:`attnzoo.heads.ablation_scores`.
        metric: From what the model says ``[B, T, V]`` to one number that has a gradient, of which more is better.

    Returns:
        fp64 ``[L, H]`` on the CPU.

    Raises:
        ConfigError: If no block is known, an argument is none of these, or the metric has no gradient.
        ShapeError: If the texts have other sizes, or the metric gives several numbers.
        UnsupportedError: If heads cannot be edited, layers have different numbers of heads, or padding differs.
    """
    places = even_places(sites(model))
    first = HeadBatch.of("clean", clean, model)
    second = None if corrupt is None else HeadBatch.of("corrupt", corrupt, model)
    if second is not None:
        check_alike(first, second)
    with torch.inference_mode(False), evaluating(model):
        other: dict[int, Tensor] = {}
        if second is not None:
            with torch.no_grad(), capture(model, ("z",)) as seen:
                second.call(model)
            other = dict(seen["z"])
        outputs, gradients = _gradients(model, places, first, metric)
    rows = []
    for place, z, gradient in zip(places, outputs, gradients, strict=True):
        less = z if second is None else z - other[place.layer]
        # A head's share: the product over its width, of all rows.
        rows.append((gradient.double() * less.double()).sum((0, 1, 3)).cpu())
    return torch.stack(rows)


def _gradients(
    model: Any, places: Sequence[HeadSite], batch: HeadBatch, metric: Metric
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of heads ``[B, T, H, D]`` by layer, and the metric's gradients by them."""
    leaves = [_Leaf(place) for place in places]
    with ExitStack() as restored, torch.enable_grad():
        for place, leaf in zip(places, leaves, strict=True):
            module: nn.Module = model.get_submodule(place.o_proj)
            restored.callback(module.register_forward_pre_hook(leaf, with_kwargs=True).remove)
        value = measured(metric, batch.call(model))
        if not value.requires_grad:
            raise ConfigError(
                "metric: expected a number that follows from what the model says, got one without gradient"
            )
        wanted = [leaf.added for leaf in leaves]
        found = torch.autograd.grad(value, [x for x in wanted if x is not None], allow_unused=True)
    given = iter(found)
    outputs: list[Tensor] = []
    gradients: list[Tensor] = []
    for place, leaf in zip(places, leaves, strict=True):
        if leaf.z is None:
            raise ConfigError(f"model: expected a call of {place.o_proj}, got none")
        gradient = next(given)
        outputs.append(leaf.z)
        gradients.append(torch.zeros_like(leaf.z) if gradient is None else gradient)
    return outputs, gradients


class _Leaf:
    """Adds 0 to the outputs of a layer's heads, so that gradients by them are had whatever is frozen."""

    def __init__(self, place: HeadSite) -> None:
        self.place = place
        self.z: Tensor | None = None
        self.added: Tensor | None = None

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        joined = input_of(self.place, args, kwargs)
        self.z = heads_of(self.place, joined).detach()
        self.added = torch.zeros_like(self.z, requires_grad=True)
        return with_input(joined + self.added.flatten(-2), args, kwargs)
