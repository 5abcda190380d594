"""What heads do to a metric, taken away, patched and along paths, is what the oracle finds run by run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnzoo import heads
from attnzoo.oracles.heads import effects
from attnzoo.oracles.heads.decoder import Decoder, Node
from attnzoo.oracles.heads.edits import Edit, run
from tests.attnzoo.heads.edits.laws.truth import decoder_of, near
from tests.attnzoo.surgery.tiny import assert_untouched, ids, snapshot, tiny

CLEAN = ids(2, 4)
CORRUPT = CLEAN.clone()
CORRUPT[:, :2] = ids(2, 2, seed=7)
EVERYTHING = [(layer, head) for layer in range(2) for head in range(4)]


def metric(logits: Tensor) -> Tensor:
    """Of items that count one by one, ``[B, T, V]``."""
    return (logits[:, -1, 7] - logits[:, -1, 8] + 0.1 * logits[:, 1, 3].square()).sum()


def metric_of_one(logits: Tensor) -> Tensor:
    """The same of one item ``[T, V]``."""
    return metric(logits[None])


def metric_of_last(logits: Tensor) -> Tensor:
    return (logits[:, -1, 7] - logits[:, -1, 8]).sum()


def last_of_one(logits: Tensor) -> Tensor:
    return metric_of_last(logits[None])


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny(4, 2)


@pytest.fixture(scope="module")
def decoder(model: Any) -> Decoder:
    return decoder_of(model)


@pytest.fixture(scope="module")
def intact(decoder: Decoder) -> Tensor:
    return torch.stack([metric_of_one(run(row, decoder).logits) for row in CLEAN.tolist()]).sum()


def lost(found: list[Tensor], intact: Tensor) -> Tensor:
    """What the metric loses, from what it is for each item ``[L, H]``."""
    return intact - torch.stack(found).sum(0)


@pytest.mark.parametrize("ablate", ["zero", "mean", "resample", "uniform"])
def test_scores_of_ablation(model: Any, decoder: Decoder, intact: Tensor, ablate: Any) -> None:
    z = [run(row, decoder).z for row in CLEAN.tolist()]
    found = []
    for item, row in enumerate(CLEAN.tolist()):

        def edit(layer: int, head: int, item: int = item) -> Edit:
            kind: Any = ablate if ablate in ("zero", "uniform") else "value"
            mean = torch.cat([one[layer][:, head] for one in z]).mean(0)
            value = {"mean": mean, "resample": z[1 - item][layer][:, head]}.get(ablate)
            return Edit(layer=layer, head=head, ablate=kind, value=value)

        found.append(effects.with_edits(row, decoder, metric_of_one, edit))
    before = snapshot(model)
    near(heads.ablation_scores(model, CLEAN, metric, ablate=ablate), lost(found, intact))
    assert_untouched(model, before)


@pytest.mark.parametrize("ablate", ["mean", "uniform"])
def test_scores_of_ablation_of_padded_items(model: Any, decoder: Decoder, ablate: Any) -> None:
    mask = torch.ones_like(CLEAN)
    mask[0, :2] = 0
    rows = [CLEAN[0, 2:].tolist(), CLEAN[1].tolist()]
    plain = [run(row, decoder) for row in rows]
    found = []
    for row in rows:

        def edit(layer: int, head: int) -> Edit:
            kind: Any = "value" if ablate == "mean" else ablate
            # Padding has outputs too, which are in no mean.
            return Edit(
                layer=layer, head=head, ablate=kind, value=torch.cat([one.z[layer][:, head] for one in plain]).mean(0)
            )

        found.append(effects.with_edits(row, decoder, last_of_one, edit))
    whole = torch.stack([last_of_one(one.logits) for one in plain]).sum()
    given = {"input_ids": CLEAN, "attention_mask": mask}
    near(heads.ablation_scores(model, given, metric_of_last, ablate=ablate), lost(found, whole))


@pytest.mark.parametrize("freeze", [None, "attention"])
def test_patching(model: Any, decoder: Decoder, intact: Tensor, freeze: Any) -> None:
    found = []
    for clean, corrupt in zip(CLEAN.tolist(), CORRUPT.tolist(), strict=True):
        own = effects.z_of(run(clean, decoder), EVERYTHING) if freeze else {}
        other = effects.z_of(run(corrupt, decoder), EVERYTHING)
        runs = (run(clean, decoder, put={**own, node: other[node]}) for node in EVERYTHING)
        found.append(effects.by_node(decoder, (metric_of_one(one.logits) for one in runs)))
    before = snapshot(model)
    near(heads.patch(model, CLEAN, CORRUPT, metric, freeze=freeze), lost(found, intact))
    assert_untouched(model, before)


PATHS: dict[str, tuple[list[Node], list[Node] | None]] = {
    "one to one": ([(0, 1)], [(1, 2)]),
    "some to some": ([(0, 0), (0, 3)], [(1, 0), (1, 3)]),
    "to a neighbour": ([(0, 0)], [(0, 1), (1, 1)]),
    "backwards": ([(1, 0)], [(0, 1)]),
    "to what is said": ([(0, 2), (1, 1)], None),
}


@pytest.mark.parametrize("name", PATHS)
def test_paths(model: Any, decoder: Decoder, intact: Tensor, name: str) -> None:
    senders, receivers = PATHS[name]
    found = []
    for clean, corrupt in zip(CLEAN.tolist(), CORRUPT.tolist(), strict=True):
        if receivers is None:
            one = effects.patched(clean, corrupt, decoder, senders, freeze=True)
        else:
            one = effects.path(clean, corrupt, decoder, senders, receivers)
        found.append(metric_of_one(one.logits))
    before = snapshot(model)
    actual = heads.path(model, CLEAN, CORRUPT, senders, receivers, metric)
    near(torch.tensor(actual, dtype=torch.float64), lost(found, intact))
    assert (actual == 0) == (name == "backwards")
    assert_untouched(model, before)


@pytest.fixture(scope="module")
def deep() -> Any:
    return tiny(2, 1, layers=3)


def test_a_path_passes_by_heads_between(deep: Any) -> None:
    # With a layer between, a frozen head keeps from the receiver what it would hand on.
    decoder = decoder_of(deep)
    clean, corrupt = CLEAN[:1], CORRUPT[:1]
    expected = effects.path(clean[0].tolist(), corrupt[0].tolist(), decoder, [(0, 0)], [(1, 1), (2, 0)])
    before = metric_of_one(run(clean[0].tolist(), decoder).logits)
    actual = heads.path(deep, clean, corrupt, [(0, 0)], [(1, 1), (2, 0)], metric)
    near(torch.tensor(actual, dtype=torch.float64), before - metric_of_one(expected.logits))


def test_laws_of_patching(model: Any) -> None:
    nothing = heads.patch(model, CLEAN, CLEAN, metric)
    near(nothing, torch.zeros_like(nothing))
    assert heads.path(model, CLEAN, CLEAN, EVERYTHING, EVERYTHING[4:], metric) == 0
    # Past all other heads: the direct effect of one head, and where all send, the corrupt text's where tokens agree.
    direct = heads.patch(model, CLEAN, CORRUPT, metric_of_last, freeze="attention")
    alone = heads.path(model, CLEAN, CORRUPT, [(0, 2)], None, metric_of_last)
    near(torch.tensor(alone, dtype=torch.float64), direct[0, 2])
    everybody = heads.path(model, CLEAN, CORRUPT, EVERYTHING, None, metric_of_last)
    with torch.no_grad():
        corrupt = metric_of_last(model(CLEAN).logits) - metric_of_last(model(CORRUPT).logits)
    near(torch.tensor(everybody, dtype=torch.float64), corrupt)


def test_attribution(model: Any, decoder: Decoder) -> None:
    found = []
    for clean, corrupt in zip(CLEAN.tolist(), CORRUPT.tolist(), strict=True):
        slope = effects.gradients(clean, decoder, metric_of_one)
        found.append(effects.attribution(clean, corrupt, decoder, slope))
    before = snapshot(model)
    near(heads.attribution(model, CLEAN, CORRUPT, metric), torch.stack(found).sum(0))
    assert_untouched(model, before)


def test_attribution_is_what_patching_measures_where_all_is_linear() -> None:
    # Behind the last heads neither a norm nor an MLP.
    model = tiny(4, 2)
    model.model.norm = nn.Identity()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    exact = heads.patch(model, CLEAN, CORRUPT, metric_of_last)
    near(heads.attribution(model, CLEAN, CORRUPT, metric_of_last)[1], exact[1])


def test_divergence(model: Any, decoder: Decoder) -> None:
    without = CLEAN[:, 2:]
    rows = [
        effects.divergence(one, other, decoder) for one, other in zip(CLEAN.tolist(), without.tolist(), strict=True)
    ]
    found = heads.divergence(model, CLEAN, without)
    near(found, torch.stack(rows).mean((0, -1)))
    near(heads.divergence(model, CLEAN, without, rows=2), torch.stack(rows)[..., -2:].mean((0, -1)))
    same = heads.divergence(model, CLEAN, CLEAN)
    assert torch.equal(same, torch.zeros_like(same))


def test_divergence_is_homogeneous_in_outputs_and_knows_no_order(model: Any) -> None:
    # Of the last layer, whose outputs nothing else follows.
    without = CLEAN[:, 2:]
    plain = heads.divergence(model, CLEAN, without)
    near(heads.divergence(model, without, CLEAN), plain)
    with heads.edited(model, heads.HeadEdit(1, slice(None), scale=-3.0)):
        tripled = heads.divergence(model, CLEAN, without)
    near(tripled[1], 3 * plain[1])
    assert torch.equal(tripled[0], plain[0])


def test_contributions(model: Any, decoder: Decoder) -> None:
    direction = torch.linspace(-1, 1, model.config.hidden_size, dtype=torch.float64)
    with torch.no_grad(), heads.capture(model) as seen:
        model(CLEAN)
    found = heads.contributions(model, seen, direction)
    truth = [effects.contributions(run(row, decoder), decoder, direction) for row in CLEAN.tolist()]
    near(found, torch.stack(truth, 2))
