"""The closed forms of low-rank conversion against singular values and plain least squares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnzoo.surgery.lowrank import solve

FEW = settings(max_examples=25, deadline=None, derandomize=True)
EXACT = 1e-9
"""Square roots of matrices with condition numbers up to some thousand, in fp64."""


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cost(error: Tensor, samples: Tensor, gradients: Tensor) -> float:
    """The mean squared effect that an error in a projection has: the mean over x and g of ``(x error g)^2``."""
    return float((samples @ error @ gradients.T).square().mean())


def turned(gradients: Tensor, planes: Tensor) -> Tensor:
    """Samples of gradients ``[n, s, D]`` beside themselves turned by quarters, so that no phase is preferred."""
    found = [gradients]
    for _ in range(3):
        last = found[-1].clone()
        first, second = last[..., planes[:, 0]].clone(), last[..., planes[:, 1]].clone()
        last[..., planes[:, 0]], last[..., planes[:, 1]] = -second, first
        found.append(last)
    return torch.cat(found)


def plane_loss(errors: Tensor, gradients: Tensor, dims: list[int]) -> float:
    """The loss within one plane; planes turn at different speeds, so that on average theirs add up."""
    return float(torch.einsum("nsd,msd->nm", errors[..., dims], gradients[..., dims]).square().mean())


def half_planes(width: int, rotated: int) -> Tensor:
    first = torch.arange(rotated // 2)
    return torch.stack([first, first + rotated // 2], 1)


@FEW
@given(st.integers(2, 7), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_reduced_rank_loses_exactly_the_tail_of_the_weighted_singular_values(
    inputs: int, outputs: int, rank: int, seed: int
) -> None:
    samples, weight = randn(40, inputs, seed=seed), randn(inputs, outputs, seed=seed + 1)
    gradients = randn(40, outputs, seed=seed + 2) @ randn(outputs, outputs, seed=seed + 3)
    found = solve.reduce_rank(weight, samples.T @ samples / 40, gradients.T @ gradients / 40, rank)
    values = torch.linalg.svdvals(samples @ weight @ gradients.T).square() / 1600
    lost = cost(weight - found.down @ found.up, samples, gradients)
    # Metrics are floored at 1e-8 of their largest eigenvalue, which may cost as much.
    assert lost == pytest.approx(float(values[rank:].sum()), abs=1e-6 * float(values.sum()))
    assert found.kept == pytest.approx(float(values[:rank].sum() / values.sum()), abs=1e-6)
    assert found.down.shape == (inputs, min(rank, outputs))
    assert found.up.shape == (min(rank, outputs), outputs)


@FEW
@given(st.integers(3, 6), st.integers(0, 99))
def test_no_small_change_of_the_factors_loses_less(outputs: int, seed: int) -> None:
    samples, gradients = randn(30, 6, seed=seed), randn(30, outputs, seed=seed + 1)
    weight = randn(6, outputs, seed=seed + 2)
    found = solve.reduce_rank(weight, samples.T @ samples / 30, gradients.T @ gradients / 30, 2)
    best = cost(weight - found.down @ found.up, samples, gradients)
    for step in (1e-1, 1e-2, 1e-3):
        for attempt in range(10):
            down = found.down + step * randn(6, 2, seed=1000 + attempt)
            up = found.up + step * randn(2, outputs, seed=2000 + attempt)
            assert cost(weight - down @ up, samples, gradients) >= best * (1 - 1e-9)


@FEW
@given(st.integers(1, 5), st.integers(0, 4), st.integers(0, 99))
def test_full_rank_and_more_is_the_identity(outputs: int, more: int, seed: int) -> None:
    moment, metric, weight = torch.eye(4).double(), torch.eye(outputs).double(), randn(4, outputs, seed=seed)
    found = solve.reduce_rank(weight, moment, metric, outputs + more)
    assert float((found.down @ found.up - weight).abs().max()) <= 1e-13
    assert found.kept == 1


@FEW
@given(st.integers(0, 99))
def test_the_basis_of_values_does_not_matter_to_what_is_lost(seed: int) -> None:
    # Any change of basis R undone in the outputs leaves the function, so it must leave the lossy function too.
    samples, weight, outputs = randn(40, 6, seed=seed), randn(6, 5, seed=seed + 1), randn(5, 6, seed=seed + 2)
    basis = randn(5, 5, seed=seed + 3) + 3 * torch.eye(5)
    moment = samples.T @ samples
    here = solve.reduce_rank(weight, moment, outputs @ outputs.T, 3)
    other = torch.linalg.solve(basis, outputs)
    there = solve.reduce_rank(weight @ basis, moment, other @ other.T, 3)
    torch.testing.assert_close(here.down @ here.up @ outputs, there.down @ there.up @ other, rtol=1e-6, atol=1e-6)


@FEW
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_the_scale_of_text_and_gradients_does_not_matter(text: float, gradient: float, seed: int) -> None:
    moment, metric = (torch.cov(randn(n, 30, seed=seed + n)) for n in (6, 5))
    weight = randn(6, 5, seed=seed)
    here = solve.reduce_rank(weight, moment, metric, 2)
    there = solve.reduce_rank(weight, moment * text, metric * gradient, 2)
    torch.testing.assert_close(here.down @ here.up, there.down @ there.up, rtol=1e-8, atol=1e-8)


def test_a_singular_metric_and_a_singular_moment_give_finite_factors() -> None:
    weight, zero = randn(4, 5, seed=0), torch.zeros(5, 5, dtype=torch.float64)
    thin = randn(1, 4, seed=1)
    for moment in (thin.T @ thin, torch.zeros(4, 4, dtype=torch.float64)):
        for metric in (zero, torch.diag(torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64))):
            found = solve.reduce_rank(weight, moment, metric, 2)
            assert bool(found.down.isfinite().all() & found.up.isfinite().all())
            assert 0 <= found.kept <= 1


@FEW
@given(st.integers(1, 8), st.booleans(), st.integers(0, 99))
def test_the_root_of_a_metric_is_its_root_and_has_its_inverse(size: int, is_complex: bool, seed: int) -> None:
    x = randn(30, size, seed=seed)
    x = torch.complex(x, randn(30, size, seed=seed + 1)) if is_complex else x
    metric = x.mH @ x
    half, inverse = solve.root(metric)
    torch.testing.assert_close(half @ half, metric, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(half @ inverse, torch.eye(size, dtype=metric.dtype), rtol=0, atol=EXACT)
    torch.testing.assert_close(half, half.mH, rtol=0, atol=1e-10)


@FEW
@given(st.integers(1, 3), st.sampled_from([(4, 4), (6, 6), (6, 4), (5, 2)]), st.integers(0, 99))
def test_merged_keys_lose_exactly_the_tail_of_each_plane(heads: int, widths: tuple[int, int], seed: int) -> None:
    # Oracle: in a plane, keys and what reads them are complex numbers; the best single key is the first singular vector
    # of (keys of all heads) times (conjugated gradients of all heads). Unrotated dimensions: the same, real, of rank D.
    width, rotated = widths
    planes = half_planes(width, rotated)
    samples, weight = randn(30, 7, seed=seed), randn(7, heads, width, seed=seed + 1)
    gradients = randn(30, heads, width, seed=seed + 2)
    everyone = turned(gradients, planes)
    flat = everyone.flatten(1)
    metric = (flat.T @ flat / len(flat)).view(heads, width, heads, width)
    found = solve.merge_keys(weight, samples.T @ samples / 30, metric, planes)
    keys = torch.einsum("nc,csd->nsd", samples, weight)
    restored = torch.einsum("ne,sde->nsd", samples @ found.key, found.query)
    expected = total = loss = 0.0
    for first, second in planes.tolist():
        loss += plane_loss(keys - restored, everyone, [first, second])
        key = torch.complex(keys[..., first], keys[..., second])
        gradient = torch.complex(gradients[..., first], gradients[..., second])
        values = torch.linalg.svdvals(key @ gradient.conj().T).square() / 1800
        expected, total = expected + float(values[1:].sum()), total + float(values.sum())
    rest = sorted(set(range(width)) - set(planes.flatten().tolist()))
    if rest:
        loss += plane_loss(keys - restored, everyone, rest)
        values = torch.linalg.svdvals(keys[..., rest].flatten(1) @ gradients[..., rest].flatten(1).T).square() / 900
        expected, total = expected + float(values[len(rest) :].sum()), total + float(values.sum())
    assert loss == pytest.approx(expected, abs=1e-6 * total)


@FEW
@given(st.sampled_from([(6, 6), (6, 4)]), st.floats(-10, 10), st.integers(0, 99))
def test_queries_of_merged_keys_commute_with_rotation(widths: tuple[int, int], angle: float, seed: int) -> None:
    width, rotated = widths
    planes = half_planes(width, rotated)
    metric = torch.cov(randn(2 * width, 60, seed=seed)).view(2, width, 2, width)
    found = solve.merge_keys(randn(5, 2, width, seed=seed), torch.eye(5).double(), metric, planes)
    rotation = torch.eye(width, dtype=torch.float64)
    for plane, (i, j) in enumerate(planes.tolist()):
        theta = torch.tensor(angle / (plane + 1), dtype=torch.float64)
        rotation[i, i] = rotation[j, j] = theta.cos()
        rotation[i, j], rotation[j, i] = theta.sin(), -theta.sin()
    for query in found.query:
        torch.testing.assert_close(query @ rotation, rotation @ query, rtol=0, atol=1e-11)


@FEW
@given(st.integers(2, 4), st.integers(0, 99))
def test_heads_that_are_turned_and_scaled_copies_merge_without_loss(heads: int, seed: int) -> None:
    # The conjugate on the wrong side of the query update would show here.
    width, planes = 6, half_planes(6, 6)
    key, phases = randn(5, width, seed=seed), randn(heads, width // 2, 2, seed=seed + 1)
    queries = randn(20, heads, width, seed=seed + 2)
    weight = torch.empty(5, heads, width, dtype=torch.float64)
    for head in range(heads):
        whole = torch.complex(key[:, : width // 2], key[:, width // 2 :]) * torch.view_as_complex(phases[head])
        weight[:, head] = torch.cat([whole.real, whole.imag], 1)
    metric = torch.block_diag(*(q.T @ q for q in queries.unbind(1))).view(heads, width, heads, width)
    found = solve.merge_keys(weight, torch.eye(5).double(), metric, planes)
    for head in range(heads):
        wanted = queries[:, head] @ weight[:, head].T
        scores = queries[:, head] @ found.query[head] @ found.key.T
        torch.testing.assert_close(scores, wanted, rtol=1e-6, atol=1e-6)
    assert found.energy[1] == pytest.approx(found.energy[0], rel=1e-9)


@FEW
@given(st.integers(1, 6), st.floats(1e-4, 1.0), st.integers(0, 99))
def test_the_refit_is_ridge_regression_around_its_start(outputs: int, share: float, seed: int) -> None:
    a, y, start = randn(30, 5, seed=seed), randn(30, outputs, seed=seed + 1), randn(5, outputs, seed=seed + 2)
    lam = share * float((a.T @ a).diagonal().mean())
    rows = torch.cat([a, lam**0.5 * torch.eye(5, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, torch.cat([y, lam**0.5 * start])).solution
    torch.testing.assert_close(solve.refit(a.T @ a, a.T @ y, start, share), expected, rtol=1e-9, atol=1e-9)


@FEW
@given(st.floats(1e-4, 1.0), st.integers(0, 99))
def test_the_correction_is_ridge_regression_of_teacher_on_student_around_the_identity(share: float, seed: int) -> None:
    student, teacher = randn(30, 5, seed=seed), randn(30, 5, seed=seed + 1)
    lam = share * float((student.T @ student).diagonal().mean())
    rows = torch.cat([student, lam**0.5 * torch.eye(5, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, torch.cat([teacher, lam**0.5 * torch.eye(5, dtype=torch.float64)])).solution
    found = solve.correction(student.T @ student, student.T @ (teacher - student), share)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_student_that_sees_what_its_teacher_sees_is_not_corrected() -> None:
    student = randn(30, 5, seed=0)
    found = solve.correction(student.T @ student, torch.zeros(5, 5, dtype=torch.float64), 0.02)
    assert torch.equal(found, torch.eye(5, dtype=torch.float64))


def test_a_balanced_metric_gives_keys_and_values_the_same_energy() -> None:
    samples = randn(50, 6, seed=0)
    weight = torch.cat([10 * randn(6, 4, seed=1), randn(6, 3, seed=2)], 1)
    moment = samples.T @ samples / 50
    metric = solve.balanced_metric(weight, moment, (4, 3))
    outputs = samples @ weight
    energy = (outputs @ metric * outputs).mean(0)
    assert float(energy[:4].sum()) == pytest.approx(float(energy[4:].sum()))


def test_what_reads_keys_and_values_is_summed_over_the_query_heads_of_each() -> None:
    # Two key heads, three query heads each: an error in one key head meets the three queries that read it.
    samples, queries, outputs = randn(40, 5, seed=0), randn(2, 3, 5, 4, seed=1), randn(2, 3, 4, 6, seed=2)
    error = randn(2, 4, seed=3)
    metric = solve.query_metric(queries, samples.T @ samples / 40)
    scores = torch.einsum("nc,hqcd,hd->nhq", samples, queries, error)
    wanted = float(scores.square().sum((1, 2)).mean())
    assert float(torch.einsum("ad,adbe,be->", error, metric, error)) == pytest.approx(wanted)
    values = torch.einsum("hd,hqdc->hqc", error, outputs).square().sum()
    found = error.flatten() @ solve.output_metric(outputs) @ error.flatten()
    assert float(found) == pytest.approx(float(values))


def test_factors_are_of_the_size_of_what_they_stand_for_however_a_metric_spreads() -> None:
    # Factors that spread as the metric does cannot be trained further: an optimiser's step is as large for all weights.
    spread = torch.diag(torch.logspace(0, -7, 8, dtype=torch.float64))
    found = solve.reduce_rank(randn(6, 8, seed=0), torch.eye(6).double(), spread, 4)
    torch.testing.assert_close(found.up @ found.up.T, torch.eye(4).double(), rtol=0, atol=1e-9)
    shared = found.for_heads(2)
    torch.testing.assert_close(shared.down @ shared.up, found.down @ found.up, rtol=1e-12, atol=1e-12)
    assert float(shared.up.square().mean(1).max()) == pytest.approx(2 / 8)
    keys = solve.merge_keys(randn(6, 2, 4, seed=1), torch.eye(6).double(), spread.view(2, 4, 2, 4), half_planes(4, 4))
    for first, second in half_planes(4, 4).tolist():
        assert float(keys.query[:, first, [first, second]].square().sum(1).mean()) == pytest.approx(1)
