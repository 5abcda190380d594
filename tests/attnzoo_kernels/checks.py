"""A small fixed set of checks of an implementation, each against the oracle."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from attnzoo_kernels import Extras
from attnzoo_kernels.cpu import schedule
from attnzoo_kernels.op import make_call
from tests.attnzoo_kernels.op.test_agreement import run, seeds_of
from tests.attnzoo_kernels.op.test_switches import assert_is, solved, switched
from tests.attnzoo_kernels.oracle import Answer, Problem, attend, solve, visible
from tests.attnzoo_kernels.oracle_switches import Switched
from tests.bounds import assert_near
from tests.strategies import Numbers, layout_of, unread


@functools.cache
def fixed_problems() -> dict[str, Problem]:
    n = Numbers.of(7)

    def make(queries: int, keys: int, layout_heads: int = 2, **rule: Any) -> Problem:
        keep = n.chance(0.7, 2, layout_heads, -(-queries // 8), -(-keys // 6))
        q, k, v = n.normal(2, 4, queries, 5), n.normal(2, 2, keys, 5), n.normal(2, 2, keys, 3)
        return Problem(q, k, v, keep, 8, 6, **rule)

    q_pos = n.integers(0, 30, 2, 4, 21)
    q_pos[:, :, ::3] = -1
    bias = n.normal(2, 4, 27)
    bias[:, 1, :20] = -math.inf
    bias[1, 0] = -math.inf
    per_head = {"window": n.integers(1, 9, 4), "sink": n.integers(0, 7, 4)}
    return {
        "causal": make(21, 27),
        "more queries than keys": make(27, 15, 4),
        "full": make(19, 27, 1, causal=False),
        "window and sink": make(29, 29, 1, window=7, sink=4),
        "window both ways": make(21, 21, causal=False, window=5, sink=3),
        "numbers per head": make(27, 27, **per_head),
        "positions": make(21, 27, 4, q_pos=q_pos, window=9),
        "bias": make(21, 27, key_bias=bias),
        "decoding": make(3, 27, 2, q_pos=torch.tensor([24, -1, 26], dtype=torch.int32).view(1, 1, 3)),
    }


@functools.cache
def truth(name: str) -> tuple[Tensor, Answer]:
    p = fixed_problems()[name]
    mask = visible(p)
    return mask, solve(p, *seeds_of(p), mask)


def check_numbers(impl: str) -> None:
    for name, p in fixed_problems().items():
        mask, answer = truth(name)
        assert_near(run(p, layout_of(p), seeds_of(p), impl), answer, p, seeds_of(p), mask)


def check_nothing_leaks(impl: str) -> None:
    """Absent rows, blocks that nobody reads and hidden keys hold NaN, and nothing else changes."""
    for name in ("positions", "bias", "window and sink"):
        p = fixed_problems()[name]
        mask, answer = truth(name)
        q = p.q if p.q_pos is None else p.q.masked_fill((p.q_pos == -1).unsqueeze(-1), math.nan)
        silent = unread(p, mask)
        if name == "bias":
            assert p.key_bias is not None
            hidden = (p.key_bias == -math.inf).unflatten(1, (2, 2)).all(2)
            silent = ~mask.unflatten(1, (2, 2)).any(3).any(2) & hidden
        k, v = (x.masked_fill(silent.unsqueeze(-1), math.nan) for x in (p.k, p.v))
        got = run(p.change(q=q, k=k, v=v), layout_of(p), seeds_of(p), impl)
        assert_near(got, answer, p, seeds_of(p), mask)


def check_what_is_seen_stays(impl: str) -> None:
    """Values that are no numbers reach the rows that see them, and these alone."""
    p = fixed_problems()["causal"]
    mask, answer = truth("causal")
    v = p.v.clone()
    v[:, :, 20] = math.nan
    out = run(p.change(v=v), layout_of(p), seeds_of(p), impl).out
    seeing = mask[..., 20]
    assert bool(out[seeing].isnan().all())
    torch.testing.assert_close(out[~seeing], answer.out[~seeing], rtol=1e-10, atol=1e-10)


def check_hidden_blocks_are_left_out(impl: str) -> None:
    """What the rule hides wholly is not read, even where it is listed."""
    if impl != "blocked":
        return
    p = fixed_problems()["window and sink"].change(keep=torch.ones(1, 1, 4, 5, dtype=torch.bool))
    call = make_call((p.q, p.k, p.v), layout_of(p), causal=True, scale=1.0, extras=Extras(window=p.window, sink=p.sink))
    seen = pad(visible(p), (0, 1, 0, 3)).unflatten(3, (5, 6)).unflatten(2, (4, 8)).any(5).any(3)
    assert schedule.build_schedule(call).entries == int(seen.sum())


def check_strides_and_halves(impl: str) -> None:
    p = fixed_problems()["causal"]
    mask, answer = truth("causal")
    dout, dlse = seeds_of(p)
    odd = dout.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert_near(run(p, layout_of(p), (odd, dlse), impl), answer, p, (dout, dlse), mask)
    single = p.change(q=p.q.float(), k=p.k.float(), v=p.v.float())
    seeds = seeds_of(single)
    assert_near(run(single, layout_of(p), seeds, impl), solve(single, *seeds, mask), single, seeds, mask)


def check_a_layout_serves_two_rules(impl: str) -> None:
    p = fixed_problems()["window and sink"]
    layout = layout_of(p)
    for window in (3, 15):
        other = p.change(window=window)
        near = run(other, layout, seeds_of(p), impl).out
        torch.testing.assert_close(near, attend(other)[0], rtol=1e-10, atol=1e-10)


@functools.cache
def switch_cases() -> dict[str, Switched]:
    """Calls with auxiliary channels, origins and gates."""
    base = fixed_problems()["full"].change(causal=True)
    per_head = base.change(keep=base.keep.repeat(1, 4, 1, 1) & Numbers.of(3).chance(0.8, 2, 4, *base.keep.shape[2:]))
    return {
        "aux": switched(base, 4, aux=True, rope=False, gate=None, mix=1.0),
        "origins": switched(per_head, 7, aux=False, rope=True, gate=None, mix=1.0),
        "landmarks": switched(base.change(causal=False), 4, aux=False, rope=False, gate="last", mix=0.6),
        "gate keys": switched(per_head, 7, aux=True, rope=True, gate="tensor", mix=0.6),
    }


@functools.cache
def switches() -> dict[str, tuple[Switched, dict[str, Tensor]]]:
    """The same, and what the oracle says, whose loops take seconds."""
    return {name: (p, solved(p)) for name, p in switch_cases().items()}


def check_switches(impl: str) -> None:
    for p, truth_of_it in switches().values():
        assert_is(p, truth_of_it, impl)


def check_runs(impl: str) -> None:
    """Rows one at a time and several at once, which read neighbouring blocks; the last is ragged."""
    base = fixed_problems()["full"].change(causal=True)
    near = torch.ones_like(base.keep).tril().triu(-1)
    for keep in (torch.ones_like(base.keep), near, base.keep):
        p = base.change(keep=keep)
        mask = visible(p)
        answer = solve(p, *seeds_of(p), mask)
        for scores in (1, 1 << 12):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(schedule, "CHUNK_SCORES", scores)
                assert_near(run(p, layout_of(p), seeds_of(p), impl), answer, p, seeds_of(p), mask)


def check_steps(impl: str) -> None:
    """Three tokens that read equally many blocks, of which one row or head sees all and another does not."""
    n = Numbers.of(11)
    q, k, v = n.normal(2, 4, 3, 5), n.normal(2, 2, 30, 5), n.normal(2, 2, 30, 3)
    for window, lists in ((None, ((2, 3, 4), (0, 2, 4))), (17, ((2, 3), (2, 3))), (None, ((1, 2), (1, 3)))):
        keep = torch.zeros(1, 2, 1, 5, dtype=torch.bool)
        for head, blocks in enumerate(lists):
            keep[0, head, 0, list(blocks)] = True
        p = Problem(q, k, v, keep, 8, 6, window=window)
        mask = visible(p)
        assert_near(run(p, layout_of(p), seeds_of(p), impl), solve(p, *seeds_of(p), mask), p, seeds_of(p), mask)


CHECKS = (
    check_numbers,
    check_nothing_leaks,
    check_what_is_seen_stays,
    check_hidden_blocks_are_left_out,
    check_strides_and_halves,
    check_a_layout_serves_two_rules,
    check_switches,
    check_runs,
    check_steps,
)
