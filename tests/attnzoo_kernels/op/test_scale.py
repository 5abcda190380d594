"""Any finite scale computes what the definition says, on every path; what rounds to 0 gives uniform weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo_kernels import (
    BlockLayout,
    Extras,
    block_sparse_attention,
    block_sparse_attention_with_lse,
    visible_pairs,
    why_not,
)
from tests.attnzoo_kernels.cpu.cpu_classes import PROCESSORS, answering
from tests.attnzoo_kernels.cpu.test_nonfinite import RULES, extras_of, from_one_row_on, layout_of, tensors_of
from tests.attnzoo_kernels.op.test_agreement import run, seeds_of
from tests.attnzoo_kernels.op.test_poison import poison_scratch
from tests.attnzoo_kernels.oracle import Problem, solve, visible
from tests.bounds import assert_near
from tests.strategies import Numbers
from tests.strategies import layout_of as layout_for

NOTHING = (0.0, -0.0, 1e-46, -1e-46)
SCALES = (0.0, -0.0, 1e-46, -0.7, 1e-40)


def problem(dtype: torch.dtype, *, dense: bool) -> Problem:
    n = Numbers.of(4)
    q, k, v = (n.normal(1, h, 20, 16).to(dtype) for h in (2, 1, 1))
    keep = torch.ones(1, 1, 3, 3, dtype=torch.bool) if dense else n.chance(0.7, 1, 1, 3, 3)
    return Problem(q, k, v, keep, 8, 8)


def without_lse(p: Problem, seeds: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (p.q, p.k, p.v)]
    out = block_sparse_attention(*leaves, layout_for(p), scale=p.scale, impl="blocked")
    return (out.detach(), *torch.autograd.grad(out, leaves, seeds[0]))


@pytest.mark.parametrize("dense", [True, False], ids=["runs", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_is_the_definition_on_every_path(scale: float, dtype: torch.dtype, dense: bool) -> None:
    p = problem(dtype, dense=dense).change(scale=0.0 if scale in NOTHING else scale)
    seeds, mask = seeds_of(p), visible(p)
    truth, nothing = solve(p, *seeds, mask), torch.zeros_like(seeds[1])
    plain = solve(p, seeds[0], nothing, mask)
    p = p.change(scale=scale)
    for cpu in ("avx2", "avx512 with bf16", "amx"):
        with answering(cpu), from_one_row_on():
            poison_scratch()
            assert_near(run(p, layout_for(p), seeds, "blocked"), truth, p, seeds, mask)
            poison_scratch()
            out, *grads = without_lse(p, seeds)
            assert_near(
                plain._replace(out=out, dq=grads[0], dk=grads[1], dv=grads[2]), plain, p, (seeds[0], nothing), mask
            )


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize("rule", RULES)
def test_a_scale_that_rounds_to_zero_weighs_all_alike(impl: str, rule: str) -> None:
    chosen = RULES[rule]
    x = tensors_of(chosen, torch.float32)
    named = {name: getattr(x, name) for name in ("v", "q", "k", "q_aux", "k_aux", "gate")}
    leaves = {name: y.requires_grad_() for name, y in named.items() if y is not None}
    call: dict[str, Any] = {"causal": chosen.causal, "extras": extras_of(chosen, x)}
    # Queries of zeros see all keys alike at any scale.
    still = x._replace(q=torch.zeros_like(x.q), q_aux=None if x.q_aux is None else torch.zeros_like(x.q_aux))
    alike: dict[str, Any] = {"causal": chosen.causal, "extras": extras_of(chosen, still), "impl": "reference"}
    wanted = block_sparse_attention_with_lse(still.q, still.k, still.v, layout_of(chosen), **alike)
    for scale in NOTHING:
        poison_scratch()
        found = block_sparse_attention_with_lse(x.q, x.k, x.v, layout_of(chosen), **call, scale=scale, impl=impl)
        _, *grads = torch.autograd.grad(found, list(leaves.values()), (x.dout, x.dlse))
        assert not any(bool(grad.any()) for grad in grads)
        for mine, true in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [-0.0, 1e-46])
def test_nor_does_it_on_a_gpu(scale: float) -> None:
    q, k, v = (Numbers.of(i).normal(1, 1, 9, 8).float().requires_grad_() for i in range(3))
    out = block_sparse_attention(q, k, v, BlockLayout.dense(16, 16, 9, 9), causal=False, scale=scale, impl="triton")
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))
    dq, dk = torch.autograd.grad(out.sum(), (q, k))
    assert not dq.any()
    assert not dk.any()


@pytest.mark.parametrize("cpu", PROCESSORS)
def test_in_double_precision_the_smallest_scale_still_counts(cpu: str) -> None:
    p = problem(torch.float64, dense=True).change(scale=1e-46)
    p = p.change(q=p.q * 1e46)
    seeds, mask = seeds_of(p), visible(p)
    with answering(cpu), from_one_row_on():
        poison_scratch()
        assert_near(run(p, layout_for(p), seeds, "blocked"), solve(p, *seeds, mask), p, seeds, mask)


def arguments(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    x = torch.zeros(1, 2, 20, 8, dtype=dtype)
    return {"q": x, "k": x, "v": x, "layout": BlockLayout.dense(10, 10, 20, 20)}


UNFIT = (math.nan, math.inf, -math.inf, 1e39, -(10**400))


@pytest.mark.parametrize("value", UNFIT, ids=str)
@pytest.mark.parametrize("impl", ["auto", "reference", "blocked", "triton"])
def test_a_scale_or_mix_that_is_no_number_is_refused_by_name(value: float, impl: str) -> None:
    calls: list[dict[str, Any]] = [{"scale": value}]
    calls += [{"extras": Extras(gate="last", gate_mix=value)}, {"extras": Extras(gate_mix=value)}]
    if isinstance(value, float):
        mixes = torch.tensor([0.5, value], dtype=torch.float64)
        calls.append({"extras": Extras(gate="last", gate_mix=mixes)})
    for call in calls:
        name = "scale" if "scale" in call else "gate_mix"
        for entry in (block_sparse_attention, block_sparse_attention_with_lse):
            with pytest.raises(ValueError, match=rf"{name}: expected a finite number, as torch.float32 holds it, got "):
                entry(**arguments(), **call, impl=impl)
        with pytest.raises(ValueError, match=f"{name}: expected a finite number"):
            why_not(impl, **arguments(), **call)


@pytest.mark.parametrize("value", [math.nan, math.inf, torch.tensor([0.0, math.nan])], ids=str)
def test_a_count_of_pairs_refuses_the_same_mix(value: Any) -> None:
    with pytest.raises(ValueError, match="gate_mix: expected a finite number"):
        visible_pairs(
            BlockLayout.dense(10, 10, 20, 20), causal=True, extras=Extras(gate="last", gate_mix=value), batch=1, heads=2
        )


def test_what_only_double_precision_holds_is_taken_in_double_precision() -> None:
    assert block_sparse_attention(**arguments(torch.float64), scale=1e39).isfinite().all()


def test_a_mix_with_a_gradient_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="gate_mix: expected a tensor without gradient"):
        block_sparse_attention(**arguments(), extras=Extras(gate="last", gate_mix=torch.ones(2, requires_grad=True)))


def test_a_compiled_call_takes_one_scale_after_another() -> None:
    def attend(q: Tensor, scale: float) -> Tensor:
        return block_sparse_attention(q, q, q, BlockLayout.dense(10, 10, 20, 20), scale=scale)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    q = Numbers.of(1).normal(1, 2, 20, 8).float()
    for scale in (0.3, 0.5, 0.7):
        torch.testing.assert_close(compiled(q, scale), attend(q, scale))
    with pytest.raises(Exception, match="scale: expected a finite number"):
        compiled(q, math.nan)
