"""What breaks kernels: NaN next door, memory that nobody wrote, odd strides, threads, far offsets, torch's wrappers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnzoo_kernels import BlockLayout, block_sparse_attention_with_lse
from tests import child
from tests.attnzoo_kernels.op.test_agreement import run, seeds_of
from tests.attnzoo_kernels.op.test_torture import assert_bitwise
from tests.attnzoo_kernels.oracle import Answer, Problem, solve, visible
from tests.attnzoo_kernels.triton.interpreted import grid, only_interpreted, split_lists
from tests.bounds import assert_near
from tests.strategies import STRIDES, Numbers, extras_of, layout_of, strided

pytestmark = only_interpreted


def problem(dtype: torch.dtype = torch.float32, **rule: Any) -> Problem:
    """Four heads on two, eight tiles forward."""
    n = Numbers.of(80)
    shapes = ((4, 30, 8), (2, 40, 8), (2, 40, 6))
    q, k, v = (n.normal(1, *shape).to(dtype) for shape in shapes)
    fields = {"keep": n.chance(0.7, 1, 2, 2, 2), **rule}
    return Problem(q, k, v, block_q=16, block_k=24, **fields)


def answer(p: Problem) -> Answer:
    return run(p, layout_of(p), seeds_of(p), "triton")


HOLES = torch.zeros(1, 4, 40).masked_fill(Numbers.of(2).chance(0.4, 1, 4, 40), -math.inf)
ABSENT = (torch.arange(30, dtype=torch.int32).view(1, 1, 30) - 3).clamp(min=-1)
RULES: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"window": 9, "sink": 3},
    "absent rows": {"q_pos": ABSENT, "window": 12},
    "holes": {"key_bias": HOLES},
    "nothing listed": {"keep": torch.zeros(1, 2, 2, 2, dtype=torch.bool)},
}
every_rule = grid(rule=list(RULES), processors=[1000, 1])


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@every_rule
def test_fresh_memory_plays_no_part_and_calls_repeat_bit_for_bit(
    rule: str, processors: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    split_lists(monkeypatch, processors)
    p = problem(**RULES[rule])
    clean = answer(p)
    request.getfixturevalue("fresh_memory_is_nan")
    assert_bitwise(answer(p), clean)


@every_rule
def test_no_step_computes_what_is_not_a_number(rule: str, processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    split_lists(monkeypatch, processors)
    with np.errstate(invalid="raise", divide="raise"):
        got = answer(problem(**RULES[rule]))
    assert all(x is None or x.isfinite().all() for x in (got.out, *got[2:]))


@pytest.mark.parametrize("stride", STRIDES)
def test_strides_of_inputs_and_gradients_change_no_bit(stride: str) -> None:
    p = problem()
    clean = answer(p)
    odd = p.change(**{name: strided(getattr(p, name), stride) for name in ("q", "k", "v")})
    dout, dlse = seeds_of(p)
    assert_bitwise(run(odd, layout_of(p), (strided(dout, stride), dlse.mT.contiguous().mT), "triton"), clean)


def test_expanded_inputs_are_read_as_what_they_show() -> None:
    p = problem()
    one = p.change(k=p.k[:, :1].expand(-1, 2, -1, -1), v=p.v[:, :, :1].expand(-1, -1, 40, -1))
    copied = one.change(k=one.k.contiguous(), v=one.v.contiguous())
    assert_bitwise(answer(one), answer(copied))


def test_strides_of_positions_bias_and_numbers_change_no_bit() -> None:
    n = Numbers.of(3)
    q_pos, bias = n.integers(-1, 39, 1, 4, 30), n.normal(1, 2, 40).float()
    window, sink = n.integers(1, 20, 4), n.integers(0, 9, 4)
    plain = problem(q_pos=q_pos, key_bias=bias, window=window, sink=sink)
    odd = plain.change(
        q_pos=q_pos.transpose(1, 2).contiguous().transpose(1, 2),
        key_bias=torch.stack([bias, bias], -1)[..., 0],
        window=torch.stack([window, sink], 1)[:, 0],
        sink=torch.stack([window, sink], 1)[:, 1],
    )
    assert_bitwise(answer(odd), answer(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_scores_stay_finite_and_right(dtype: torch.dtype) -> None:
    p = problem(dtype)
    p = p.change(q=p.q * 100)
    seeds, mask = seeds_of(p), visible(p)
    got = answer(p)
    assert got.out.isfinite().all()
    assert_near(got, solve(p, *seeds, mask), p, seeds, mask)


def test_four_threads_find_what_one_finds() -> None:
    cases = [problem(window=width) for width in (1, 9, 20, 33)]
    serial = [answer(p) for p in cases]

    def twice(p: Problem) -> list[Answer]:
        return [answer(p) for _ in range(2)]

    with ThreadPoolExecutor(4) as pool:
        for found, expected in zip(pool.map(twice, cases), serial, strict=True):
            for mine in found:
                assert_bitwise(mine, expected)


def test_inference_first_and_training_after() -> None:
    p = problem(window=9)
    layout = layout_of(p)
    with torch.inference_mode():
        made_inside = layout_of(p)
        first = block_sparse_attention_with_lse(p.q, p.k, p.v, layout, extras=extras_of(p), impl="triton")
        again = block_sparse_attention_with_lse(p.q, p.k, p.v, made_inside, extras=extras_of(p), impl="triton")
    clean = answer(p)
    for one, other, true in zip(first, again, clean[:2], strict=True):
        assert torch.equal(one, true)
        assert torch.equal(other, true)
    assert_bitwise(run(p, made_inside, seeds_of(p), "triton"), clean)


def test_a_layout_written_to_is_read_anew() -> None:
    p = problem(keep=torch.ones(1, 2, 2, 2, dtype=torch.bool), causal=False)
    layout = layout_of(p)
    run(p, layout, seeds_of(p), "triton")
    layout.count[..., 0] = 1
    keep = p.keep.clone()
    keep[..., 0, 1] = False
    assert_bitwise(run(p, layout, seeds_of(p), "triton"), answer(p.change(keep=keep)))


def gradients(call: Callable[..., Any], p: Problem) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (p.q, p.k, p.v)]
    out, lse = call(*leaves)
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, seeds_of(p))]


@pytest.mark.parametrize(
    "rule", [RULES["window"], pytest.param(RULES["absent rows"], marks=pytest.mark.slow)], ids=["window", "absent rows"]
)
def test_compiled_as_one_graph_it_is_the_eager_call(rule: dict[str, Any]) -> None:
    torch._dynamo.reset()
    p = problem(**rule)
    layout, extras = layout_of(p), extras_of(p)

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return block_sparse_attention_with_lse(q, k, v, layout, extras=extras, impl="triton")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for mine, eager in zip(gradients(compiled, p), gradients(call, p), strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()


def test_the_op_passes_the_checks_of_torch() -> None:
    from attnzoo_kernels.registration import flatten
    from attnzoo_kernels.spec.call import Call
    from attnzoo_kernels.spec.token_rule import TokenRule

    n = Numbers.of(2)
    q, k, v = (n.normal(1, heads, 20, 4).float().requires_grad_() for heads in (2, 1, 1))
    layout = BlockLayout.dense(32, 32, 20, 20)
    call = Call(q, k, v, layout.start, layout.count, layout.col, None, TokenRule(True), 32, 32, 0.5)
    torch.library.opcheck(torch.ops.attnzoo.bsa_fwd.default, (*flatten(call), "triton", True))


FAR = """
import tempfile
import torch
from attnzoo_kernels import *

ELEMENTS = 2**31 + 4096
with tempfile.NamedTemporaryFile() as file:
    # A file with a hole: it takes no room, and the far end has offsets that 32 bits do not hold.
    file.truncate(ELEMENTS * 2)
    far = torch.from_file(file.name, shared=True, size=ELEMENTS, dtype=torch.float16)
    stride = 2**30 + 1024
    x = far.as_strided((1, 2, 33, 16), (0, stride, 32, 1), 1024)
    by_row = far.as_strided((1, 1, 3, 16), (0, 0, stride, 1), 0)
    generator = torch.Generator().manual_seed(0)
    x.copy_(torch.randn(1, 2, 33, 16, generator=generator))
    assert x.storage_offset() + stride + 32 * 32 > 2**30
    layout = BlockLayout.window(16, 16, 33, 33, window=20)
    for leaf in (x, x.clone()):
        q, k, v = (leaf.detach().requires_grad_() for _ in range(3))
        out, lse = block_sparse_attention_with_lse(q, k, v, layout, extras=Extras(window=20), impl="triton")
        grads = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
        found = [out, lse, *grads]
        if leaf is not x:
            assert all(torch.equal(a, b) for a, b in zip(found, first))
        first = found
    by_row.copy_(torch.randn(1, 1, 3, 16, generator=generator))
    assert by_row.stride(2) * 2 > 2**31
    layout = BlockLayout.dense(16, 16, 3, 3)
    for leaf in (by_row, by_row.clone()):
        q, k, v = (leaf.detach().requires_grad_() for _ in range(3))
        out, lse = block_sparse_attention_with_lse(q, k, v, layout, impl="triton")
        grads = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
        found = [out, lse, *grads]
        if leaf is not by_row:
            assert all(torch.equal(a, b) for a, b in zip(found, first))
        first = found
print("right")
"""


def test_offsets_that_32_bits_do_not_hold_are_read_right() -> None:
    assert child.run(FAR, TRITON_INTERPRET="1") == "right\n"
