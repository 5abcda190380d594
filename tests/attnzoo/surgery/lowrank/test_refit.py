"""The sequential refit against the text it is fitted on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo import surgery
from tests.attnzoo.surgery.tiny import assert_close, calibration, convert, ids, tiny


def streams(model: Any, tokens: Tensor, **more: Any) -> tuple[list[Tensor], list[Tensor]]:
    """For each layer: what its attention block gives out, and the residual stream behind that block."""
    given: list[Tensor] = []
    behind: list[Tensor] = []
    handles = []
    for layer in model.model.layers:
        handles.append(layer.self_attn.register_forward_hook(lambda m, a, y: given.append(y[0])))
        handles.append(layer.post_attention_layernorm.register_forward_pre_hook(lambda m, a: behind.append(a[0])))
    with torch.no_grad():
        model(tokens, **more)
    for handle in handles:
        handle.remove()
    return given, behind


def convert_to_one(seed: int, text: list[Any], **options: Any) -> tuple[Any, surgery.ConversionReport]:
    model = tiny(6, 2, layers=3, seed=seed)
    return model, convert(model, "lowrank_gqa", method="commuting", num_kv_heads=1, calibration=text, **options)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_the_refit_is_no_worse_than_without_on_the_calibration_text(seed: int, gradients: bool) -> None:
    # The goal of a refit block is the dense model's residual stream behind it. In the first layer inputs are the same,
    # and the refitted output projection is the better one by construction; the others inherit less error.
    text = calibration(3, 4, 40)
    tokens = torch.cat(text)
    _, dense = streams(tiny(6, 2, layers=3, seed=seed), tokens)
    error = {}
    for refit in (True, False):
        model, _ = convert_to_one(seed, text, refit=refit, gradients=gradients)
        _, found = streams(model, tokens)
        error[refit] = [float((x - y).norm()) for x, y in zip(found, dense, strict=True)]
    assert all(ours <= theirs * (1 + 1e-5) for ours, theirs in zip(error[True], error[False], strict=True))


@pytest.mark.parametrize("seed", range(2))
def test_the_reported_error_is_the_one_that_a_run_shows(seed: int) -> None:
    text = calibration(3, 4, 40)
    tokens = torch.cat(text)
    _, dense = streams(tiny(6, 2, layers=3, seed=seed), tokens)
    model, report = convert_to_one(seed, text)
    given, behind = streams(model, tokens)
    for entry, wanted, mine, gave in zip(report.sites, dense, behind, given, strict=True):
        # What the block should have given: the dense stream behind it, less the stream that it was added to.
        goal = wanted - (mine - gave)
        assert entry.error == pytest.approx(float((gave - goal).norm() / goal.norm()), rel=1e-3)


def test_padding_in_the_calibration_text_changes_nothing() -> None:
    tokens = ids(3, 40, seed=9)
    fill = torch.zeros(3, 7, dtype=torch.long)
    found = []
    for whole in (tokens, torch.cat([fill, tokens], 1), torch.cat([tokens, fill], 1)):
        batch = {"input_ids": whole, "attention_mask": (whole != 0).long()}
        model, _ = convert_to_one(0, [batch])
        found.append(model.state_dict())
    for other in found[1:]:
        for name, x in found[0].items():
            # Sums of rounded products in another order, through inverses with a ridge of a fiftieth.
            torch.testing.assert_close(other[name], x, rtol=1e-3, atol=1e-3)


def test_batches_of_different_lengths_are_joined_without_their_padding() -> None:
    text = [ids(2, 40, seed=1), ids(2, 23, seed=2), ids(1, 31, seed=3)]
    padded = []
    for x in text:
        whole = torch.cat([x, torch.full((x.shape[0], 40 - x.shape[1]), 5)], 1)
        mask = torch.zeros_like(whole)
        mask[:, : x.shape[1]] = 1
        padded.append({"input_ids": whole, "attention_mask": mask})
    (here, _), (there, _) = convert_to_one(0, text), convert_to_one(0, padded)
    for name, x in here.state_dict().items():
        torch.testing.assert_close(there.state_dict()[name], x, rtol=1e-3, atol=1e-3)


def test_progress_counts_every_site() -> None:
    told: list[tuple[str, int, int]] = []
    convert_to_one(0, calibration(), progress=lambda *seen: told.append(seen))
    assert told[-1][1:] == (3, 3)
    assert [done for what, done, _ in told if what == told[-1][0]] == [1, 2, 3]


def test_only_chosen_layers_are_refitted_and_the_rest_is_followed() -> None:
    text = calibration(3, 4, 40)
    tokens = torch.cat(text)
    _, dense = streams(tiny(6, 2, layers=3), tokens)
    model, report = convert_to_one(0, text, where=lambda site: site.layer != 1)
    given, behind = streams(model, tokens)
    assert [entry.site.layer for entry in report.sites] == [0, 2]
    goal = dense[2] - (behind[2] - given[2])
    assert report.sites[1].error == pytest.approx(float((given[2] - goal).norm() / goal.norm()), rel=1e-3)


def test_projections_are_solved_for_the_inputs_that_the_converted_layers_before_give() -> None:
    # The second layer has one KV head already, so that nothing is lost there: its scores are those of the weights
    # (I + J) W, with J from ridge regression of what the first layer now gives on what it used to give.
    text = calibration(3, 4, 40)
    tokens = torch.cat(text)
    model = tiny(6, 2)
    convert(model, "lowrank_gqa", method="mean", num_kv_heads=1, where=lambda site: site.layer == 1)
    second = model.model.layers[1]
    q, k = (getattr(second.self_attn, name).weight.detach().clone() for name in ("q_proj", "k_proj"))
    teacher = _inputs(model, tokens)
    convert(model, "lowrank_gqa", method="commuting", num_kv_heads=1, calibration=text)
    student = _inputs(model, tokens)
    gram = student.T @ student
    damped = gram + 0.02 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    moved = student + student @ torch.linalg.solve(damped, student.T @ (teacher - student))
    found = [student[:50] @ getattr(second.self_attn, name).weight.detach().T for name in ("q_proj", "k_proj")]
    assert_close(_scores(*found), _scores(moved[:50] @ q.T, moved[:50] @ k.T), 1e-6)
    # The correction is no small thing here.
    assert float((moved - student).norm()) > 0.1 * float((teacher - student).norm())


def _inputs(model: Any, tokens: Tensor) -> Tensor:
    """What the second layer's projections get."""
    seen: list[Tensor] = []
    hook = model.model.layers[1].self_attn.k_proj.register_forward_pre_hook(
        lambda m, a: seen.append(a[0].flatten(0, 1))
    )
    with torch.no_grad():
        model(tokens)
    hook.remove()
    return seen[0]


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Of every query head with the one key head, before rotation."""
    return q.unflatten(1, (6, -1)) @ k.T
