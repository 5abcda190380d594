r"""LoFiT: scales say which heads matter to a task, and offsets of these few heads are then all that is trained.

Of what each head h of layer l gives, in front of the output's projection, first a scale is learned,

.. math:: z' = (1 + A_{l,h}) \odot z, \qquad \mathrm{loss} + \lambda \sum_{l,h} \|A_{l,h}\|_1 ,

by which heads are ranked: :math:`\|A_{l,h}\|_2`. Then scales are forgotten, and the best heads learn an offset,

.. math:: z' = z + v_{l,h} .

The model's weights stay as they are, and get no gradients.

Source: Yin, Ye and Durrett 2024, *LoFiT: Localized Fine-tuning on LLM Representations*, section 3 (arXiv:2406.01563);
code: fc2869/lo-fit, lofit_trainer.py and utils/trainers.py, whose optimiser (AdamW without weight decay, a rate that
falls to 0, gradients clipped to a norm of 1), first values, rates and penalty these are. Departures: hooks instead of
the host's forward written anew, so that any family will do; batches in turn instead of epochs that are shuffled; what
is learned is fp32 also where the model is bf16; offsets may be trained together with scales, which the code has an
option for and does not use; a loss of one's own instead of one trainer for each task.

Letters: B batch, T tokens, L layers, H query heads, n chosen heads of a layer, D width of a head's values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attnzoo.base.config import check_int
from attnzoo.heads.scores.head_scores import HeadScores, RankedHead
from attnzoo.surgery.edits.edit import HeadEdit
from attnzoo.surgery.edits.edited import edited
from attnzoo.surgery.edits.places import HeadSite, sites
from attnzoo_kernels.errors import ConfigError, UnsupportedError

LOFIT = "lofit"

IGNORED = -100
"""The label of a token that is not scored, as in transformers."""

SPREAD = 1e-3
"""The standard deviation of first values."""

LARGEST_GRADIENT = 1.0
"""The norm that all gradients together are clipped to."""

Batch = Mapping[str, Tensor]
Loss = Callable[[Any, Any], Tensor]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class LofitTraining:
    """How scales or offsets are trained.

    Attributes:
        steps: A batch each, in turn.
        rate: The first rate; it falls to 0 along a line.
        penalty: The weight of the sum of all scales' distances from 1.
        seed: Of first values; global random numbers are untouched.

    Raises:
        ConfigError: If a number is out of its range.
    """

    steps: int = 100
    rate: float = 1e-2
    penalty: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("steps", self.steps, 1)
        if not 0 < self.rate < math.inf:
            raise ConfigError(f"rate: expected more than 0, got {self.rate!r}")
        if not 0 <= self.penalty < math.inf:
            raise ConfigError(f"penalty: expected at least 0, got {self.penalty!r}")


SELECTION = LofitTraining(rate=5e-3, penalty=1e-3)
"""The paper's training of scales."""

OFFSETS = LofitTraining()
"""The paper's training of offsets."""


@dataclass(frozen=True, eq=False)
class LearnedHeads:
    """What heads of one layer learn.

    Attributes:
        layer: Which one.
        heads: n query heads of it.
        scale: A ``[n, D]``, what is added to a scale of 1; ``None`` learns none.
        offset: v ``[n, D]``; ``None`` learns none.
    """

    layer: int
    heads: tuple[int, ...]
    scale: Tensor | None
    offset: Tensor | None

    @property
    def parameters(self) -> list[Tensor]:
        """What is there to learn."""
        return [x for x in (self.scale, self.offset) if x is not None]

    def edit(self) -> HeadEdit:
        """As an edit, through which gradients come back."""
        scale = 1.0 if self.scale is None else 1 + self.scale
        return HeadEdit(self.layer, self.heads, scale=scale, offset=self.offset)

    def detached(self) -> HeadEdit:
        """As an edit that is learned."""
        scale = 1.0 if self.scale is None else 1 + self.scale.detach()
        offset = None if self.offset is None else self.offset.detach()
        return HeadEdit(self.layer, self.heads, scale=scale, offset=offset)


def answer_loss(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy of a batch's labels, in nats, a mean over those that count.

    Args:
        model: A causal language model with ``.logits`` in its output.
        batch: "labels" int64 ``[B, T]``, -100 where nothing is scored, each foretold by the row before it, as in
            transformers; the rest is what the model takes, "input_ids" int64 ``[B, T]`` among it.
    """
    given = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"][:, 1:]
    counts = labels != IGNORED
    said = model(**given, use_cache=False).logits[:, :-1][counts]
    return cross_entropy(said.to(torch.promote_types(said.dtype, torch.float32)), labels[counts])


def select(
    model: Any,
    batches: Iterable[Batch],
    *,
    training: LofitTraining = SELECTION,
    loss: Loss | None = None,
    progress: Progress | None = None,
) -> HeadScores:
    """Scores of all heads for a task: how far the scales that they learn are from 1.

    Args:
        model: A causal model of a known family. It runs in the mode that it is in: in training mode it drops what it
            drops, and recomputes activations where it has been told to. It is left as it was.
        batches: Mappings with "input_ids" and "labels", see :func:`answer_loss`; whatever ``loss`` takes else.
        training: How.
        loss: From the model and a batch to a scalar; :func:`answer_loss` by default. Tensors of a batch are moved to
            the model's device.
        progress: Told of each step.

    Returns:
        Scores of the kind "lofit": ``select(...).top("lofit", 8)`` is what :func:`train` takes. Each step's loss,
        without the penalty, is in ``about``.

    Raises:
        ConfigError: If no block is known, there is no batch, one does not fit, or its loss is not finite.
        UnsupportedError: If the loss does not depend on what heads give, heads cannot be edited, or layers have
            different numbers of them.
    """
    places = sites(model)
    shape = (places[0].heads, places[0].kv_heads)
    for place in places:
        if (place.heads, place.kv_heads) != shape:
            raise UnsupportedError(
                f"model: {place.path}: expected {shape[0]} query and {shape[1]} KV heads as in {places[0].path}, got "
                f"{place.heads} and {place.kv_heads}"
            )
    everywhere = {place.layer: tuple(range(place.heads)) for place in places}
    learned = _begin(model, places, everywhere, scale=True, offset=False, seed=training.seed)
    task = _Task("scales", _checked(batches, loss), loss or answer_loss)
    losses = _fit(model, learned, task, training, progress)
    norms = torch.stack([one.scale.detach().norm(dim=1).cpu() for one in learned if one.scale is not None])
    about = {"kind": LOFIT, **asdict(training), "losses": losses}
    return HeadScores({LOFIT: norms}, shape[1], about)


def train(
    model: Any,
    batches: Iterable[Batch],
    *,
    heads: Iterable[RankedHead | tuple[int, int]],
    scales: bool = False,
    training: LofitTraining = OFFSETS,
    loss: Loss | None = None,
    progress: Progress | None = None,
) -> list[HeadEdit]:
    """Learns offsets of some heads.

    Args:
        model: As for :func:`select`; it is left as it was.
        batches: Likewise.
        heads: (layer, query head), or ranked heads of scores.
        scales: Whether scales are learned too.
        training: How.
        loss: As for :func:`select`.
        progress: Told of each step.

    Returns:
        An edit for each layer that has such a head, for ``heads.edited``, ``heads.fold`` and ``surgery.convert``.

    Raises:
        ConfigError: If there is no head, no such head, one is there twice, or a batch does not fit.
        UnsupportedError: As for :func:`select`.
    """
    places = sites(model)
    learned = _begin(model, places, _by_layer(places, heads), scale=scales, offset=True, seed=training.seed)
    _fit(model, learned, _Task("offsets", _checked(batches, loss), loss or answer_loss), training, progress)
    return [one.detached() for one in learned]


@dataclass(frozen=True, eq=False)
class _Task:
    """What is learned, from what, by which loss."""

    name: str
    batches: Sequence[Any]
    loss: Loss


def _fit(
    model: Any, learned: Sequence[LearnedHeads], task: _Task, training: LofitTraining, progress: Progress | None
) -> list[float]:
    """Trains, and gives each step's loss without the penalty."""
    losses: list[float] = []
    parameters = [x for one in learned for x in one.parameters]
    scales = [one.scale for one in learned if one.scale is not None]
    device = next(model.parameters()).device
    with torch.inference_mode(False), torch.enable_grad(), _frozen(model):
        optimizer = torch.optim.AdamW(parameters, lr=training.rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / training.steps)
        for step in range(training.steps):
            batch = _moved(task.batches[step % len(task.batches)], device)
            optimizer.zero_grad()
            # Checkpointed activations are computed again in the backward, and must be edited there too.
            with edited(model, [one.edit() for one in learned]):
                found = task.loss(model, batch)
                _check_loss(found, step)
                penalty = sum((scale.abs().sum().to(found.device) for scale in scales), found.new_zeros(()))
                (found + training.penalty * penalty).backward()
            torch.nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
            optimizer.step()
            schedule.step()
            losses.append(float(found.detach()))
            if progress is not None:
                progress(task.name, step + 1, training.steps)
    return losses


def _begin(
    model: Any,
    places: Sequence[HeadSite],
    heads: Mapping[int, tuple[int, ...]],
    *,
    scale: bool,
    offset: bool,
    seed: int,
) -> list[LearnedHeads]:
    """First values of what is learned, close to 0: on each block's device, fp32 or fp64."""
    generator = torch.Generator().manual_seed(seed)
    found: list[LearnedHeads] = []
    for place in places:
        if place.layer not in heads:
            continue
        weight = next(model.get_submodule(place.o_proj).parameters(), next(model.parameters()))
        # Weights that are stored as integers say nothing of what runs.
        dtype = torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
        chosen = heads[place.layer]
        with torch.inference_mode(False):
            noise = torch.randn(2, len(chosen), place.head_dim, generator=generator, device="cpu", dtype=torch.float32)
            first = (SPREAD * noise).to(weight.device, dtype)
            own_scale = first[0].clone().requires_grad_() if scale else None
            own_offset = first[1].clone().requires_grad_() if offset else None
        found.append(LearnedHeads(place.layer, chosen, own_scale, own_offset))
    return found


def _by_layer(places: Sequence[HeadSite], heads: Iterable[RankedHead | tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    """Heads of each layer, ascending.

    Raises:
        ConfigError: If there is none, no such head, or one is there twice.
    """
    counts = {place.layer: place.heads for place in places}
    found: dict[int, list[int]] = {}
    for one in heads:
        layer, head = (one.layer, one.head) if isinstance(one, RankedHead) else one
        if layer not in counts or not 0 <= head < counts[layer]:
            raise ConfigError(f"heads: expected (layer, query head) of {len(counts)} layers, got {(layer, head)}")
        if head in found.setdefault(layer, []):
            raise ConfigError(f"heads: expected each one once, got {(layer, head)} twice")
        found[layer].append(head)
    if not found:
        raise ConfigError("heads: expected at least one, got none")
    return {layer: tuple(sorted(those)) for layer, those in found.items()}


def _checked(batches: Iterable[Any], loss: Loss | None) -> list[Any]:
    """Batches that fit the loss, as far as it is known.

    Raises:
        ConfigError: If there is none, or one does not fit.
    """
    found = list(batches)
    if not found:
        raise ConfigError("batches: expected at least one, got none")
    if loss is not None:
        return found
    for batch in found:
        if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= set(batch):
            got = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
            raise ConfigError(f"batches: expected mappings with input_ids and labels, got {got}")
        ids = batch["input_ids"]
        labels = batch["labels"]
        if ids.dtype != torch.int64 or ids.dim() != 2:
            raise ConfigError(f"batches: expected input_ids int64 [B, T], got {ids.dtype} {list(ids.shape)}")
        if labels.dtype != torch.int64 or labels.shape != ids.shape or not bool((labels[:, 1:] != IGNORED).any()):
            raise ConfigError(
                f"batches: expected labels int64 {list(ids.shape)} with one behind the first token that counts, got "
                f"{labels.dtype} {list(labels.shape)}"
            )
    return found


def _check_loss(loss: Tensor, step: int) -> None:
    """Raises unless a loss can be trained on.

    Raises:
        ConfigError: If it is no finite scalar.
        UnsupportedError: If no gradient comes back from it.
    """
    if loss.dim() != 0 or not bool(loss.detach().isfinite()):
        got = loss.item() if loss.dim() == 0 else list(loss.shape)
        raise ConfigError(f"batches: expected a finite scalar as the loss of step {step}, got {got}")
    if not loss.requires_grad:
        raise UnsupportedError(
            "loss: expected one that depends on what the heads give, but no gradient comes back; activation "
            "checkpointing may need use_reentrant=False, since nothing before the heads is trained"
        )


def _moved(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device."""
    if not isinstance(batch, Mapping):
        return batch
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Weights without gradients; those that had some have them again afterwards."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
