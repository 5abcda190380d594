"""Memory that nobody wrote, memory that was used before, and inputs that lie in memory in unusual ways."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given

from attnzoo_kernels.runtime import workspace
from tests.attnzoo_kernels.op.test_agreement import both, run, seeds_of
from tests.attnzoo_kernels.op.test_torture import answer, assert_bitwise, problem
from tests.attnzoo_kernels.oracle import Problem, solve, visible
from tests.bounds import assert_near
from tests.strategies import Numbers, layout_of, problems


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    """Every new tensor holds NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def poison_scratch() -> None:
    for kept in workspace._shelf.kept.values():
        kept.fill_(math.nan)


RULES = {
    "causal": {},
    "window": {"window": 9, "sink": 3},
    "absent rows": {"q_pos": torch.arange(40, dtype=torch.int32).view(1, 1, 40) - 3, "window": 12},
    "holes": {"key_bias": torch.zeros(1, 4, 40).masked_fill(Numbers.of(2).chance(0.4, 1, 4, 40), -math.inf)},
}
every_rule = pytest.mark.parametrize("rule", RULES)


def ruled(rule: str) -> Problem:
    q_pos = RULES[rule].get("q_pos")
    fields = dict(RULES[rule]) if q_pos is None else {**RULES[rule], "q_pos": q_pos.clamp(min=-1)}
    return problem(**fields)


@every_rule
@both
def test_fresh_memory_plays_no_part(rule: str, impl: str, request: pytest.FixtureRequest) -> None:
    p = ruled(rule)
    clean = answer(p, impl)
    request.getfixturevalue("fresh_memory_is_nan")
    workspace.clear_scratch()
    assert_bitwise(answer(p, impl), clean)


@every_rule
def test_what_an_earlier_call_left_in_scratch_memory_plays_no_part(rule: str) -> None:
    p = ruled(rule)
    clean = answer(p, "blocked")
    poison_scratch()
    assert_bitwise(answer(p, "blocked"), clean)


@given(problems(longest=24))
def test_no_rule_reads_scratch_memory_before_it_is_written(p: Problem) -> None:
    poison_scratch()
    mask, seeds = visible(p), seeds_of(p)
    assert_near(run(p, layout_of(p), seeds, "blocked"), solve(p, *seeds, mask), p, seeds, mask)


@both
def test_strides_of_positions_bias_and_numbers_change_no_bit(impl: str) -> None:
    n = Numbers.of(3)
    q_pos, bias = n.integers(-1, 39, 1, 4, 40), n.normal(1, 2, 40).float()
    window, sink = n.integers(1, 20, 4), n.integers(0, 9, 4)
    plain = problem(q_pos=q_pos.repeat(2, 1, 1), key_bias=bias.repeat(2, 1, 1), window=window, sink=sink)
    odd = plain.change(
        q_pos=q_pos.transpose(1, 2).contiguous().transpose(1, 2).expand(2, -1, -1),
        key_bias=torch.stack([bias, bias], -1)[..., 0].expand(2, -1, -1),
        window=torch.stack([window, sink], 1)[:, 0],
        sink=torch.stack([window, sink], 1)[:, 1],
    )
    assert_bitwise(answer(odd, impl), answer(plain, impl))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@both
def test_windows_and_sinks_of_any_size_hide_nothing(causal: bool, impl: str) -> None:
    clean = answer(problem(causal=causal), impl)
    most = torch.iinfo(torch.int32).max
    for window, sink in ((2**40, 0), (1, 2**40), (torch.full((4,), most).int(), torch.full((4,), most).int())):
        got = answer(problem(causal=causal, window=window, sink=sink), impl)
        for one, other in zip(got[:5], clean[:5], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@both
def test_positions_of_any_size_see_every_key(impl: str) -> None:
    far = torch.full((1, 1, 40), torch.iinfo(torch.int32).max)
    clean = answer(problem(causal=False), impl)
    got = answer(problem(q_pos=far.int()), impl)
    for one, other in zip(got[:5], clean[:5], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert (answer(problem(q_pos=far.int(), window=5), impl).lse == -math.inf).all()
