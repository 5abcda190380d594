"""Every path of the CPU by itself, forced: the definition, what is hidden, the backward, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from attnzoo_kernels import BlockLayout, Extras, UnsupportedError, block_sparse_attention, dispatch, why_not
from attnzoo_kernels.cpu import PATHS, few_rows, key_major
from attnzoo_kernels.cpu.path import CPUPath
from attnzoo_kernels.op import attend_on_path, make_call
from attnzoo_kernels.spec.call import Call
from tests.attnzoo_kernels.cpu.cpu_classes import answering
from tests.attnzoo_kernels.cpu.test_nonfinite import from_one_row_on
from tests.attnzoo_kernels.op.test_agreement import seeds_of
from tests.attnzoo_kernels.op.test_in_place import runs
from tests.attnzoo_kernels.oracle import Answer, Problem, solve, visible
from tests.bounds import assert_near
from tests.strategies import Numbers, extras_of, layout_of, problems, unread

each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)


@pytest.fixture(autouse=True)
def _where_every_path_runs() -> Iterator[None]:
    with answering("amx"), from_one_row_on(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_rows, "MOST_ROWS", 64)
        patch.setattr(key_major, "LEAST_ROWS", 0)
        yield


def rule_of(p: Problem) -> dict[str, Any]:
    return {"causal": p.causal, "scale": p.scale, "extras": extras_of(p)}


def call_of(p: Problem) -> Call:
    scale = p.q.shape[3] ** -0.5 if p.scale is None else p.scale
    extras = extras_of(p) or Extras()
    return make_call((p.q, p.k, p.v), layout_of(p), causal=p.causal, scale=scale, extras=extras)


def takes(path: CPUPath, p: Problem) -> bool:
    call = call_of(p)
    return not path.reasons(call) and not path.declines(call)


def kinds(p: Problem, seed: int) -> Iterator[Problem]:
    """A drawn call, and calls like it that are less and less special: some kind of them is for each path."""
    yield p
    v = Numbers.of(seed).normal(p.batch, p.kv_heads, p.keys, p.q.shape[3])
    for dtype in (torch.bfloat16, torch.float32):
        plain = p.change(q=p.q.to(dtype), k=p.k.to(dtype), v=v.to(dtype), key_bias=None)
        yield plain
        window = p.window if isinstance(p.window, int) else None
        sink = p.sink if isinstance(p.sink, int) else 0
        yield plain.change(q_pos=None, window=window, sink=sink, scale=None)
        keep = runs(Numbers.of(seed), *p.keep.shape[:2], p.keep.shape[2:])
        yield plain.change(keep=keep, sink=0, scale=None)
        by_row = p.keep.repeat_interleave(p.block_q, 2)[:, :, : p.queries]
        yield plain.change(keep=by_row, block_q=1, window=None, sink=0)


@st.composite
def calls(draw: Any, path: CPUPath) -> Problem:
    """Calls that a path computes."""
    p: Problem = draw(problems(dtypes=(torch.float32, torch.bfloat16), longest=24))
    found = next((kind for kind in kinds(p, draw(st.integers(0, 99))) if takes(path, kind)), None)
    assume(found is not None)
    assert found is not None
    return found


def check(path: CPUPath, p: Problem) -> None:
    """Out, log-sum-exp where the path gives it, and gradients are the oracle's."""
    dout, dlse = seeds_of(p)
    nothing = torch.zeros_like(dlse)
    mask = visible(p)
    truth = solve(p, dout, nothing, mask)
    given_ = [p.q, p.k, p.v] + ([] if p.key_bias is None else [p.key_bias])
    leaves = [x.detach().requires_grad_() for x in given_]
    rule = rule_of(p.change(key_bias=leaves[3] if leaves[3:] else None))
    out, _ = attend_on_path(path.name, (leaves[0], leaves[1], leaves[2]), layout_of(p), **rule)
    grads = torch.autograd.grad(out, leaves, dout)
    lse = truth.lse
    if not path.reasons(call_of(p), need_lse=True):
        lse = attend_on_path(path.name, (p.q, p.k, p.v), layout_of(p), **rule_of(p), need_lse=True)[1]
    assert_near(Answer(out.detach(), lse, *grads), truth, p, (dout, nothing), mask)


@each
@settings(max_examples=6)
@given(data=st.data())
def test_a_forced_path_is_the_definition(path: CPUPath, data: st.DataObject) -> None:
    check(path, data.draw(calls(path)))


@each
@settings(max_examples=6)
@given(data=st.data())
def test_what_nobody_sees_may_be_no_number_on_a_forced_path(path: CPUPath, data: st.DataObject) -> None:
    p = data.draw(calls(path))
    mask = visible(p)
    k, v = (x.masked_fill(unread(p, mask).unsqueeze(-1), math.nan) for x in (p.k, p.v))
    check(path, p.change(q=p.q.masked_fill(~mask.any(-1, keepdim=True), math.nan), k=k, v=v))


@each
@settings(max_examples=6)
@given(data=st.data())
def test_an_unforced_call_is_computed_by_the_path_that_is_named(path: CPUPath, data: st.DataObject) -> None:
    p = data.draw(calls(path))
    name = dispatch.path_of(call_of(p))
    out = block_sparse_attention(p.q, p.k, p.v, layout_of(p), **rule_of(p), impl="blocked")
    assert torch.equal(out, attend_on_path(name, (p.q, p.k, p.v), layout_of(p), **rule_of(p))[0])


@each
def test_a_forced_path_computes_by_itself(path: CPUPath, monkeypatch: pytest.MonkeyPatch) -> None:
    p = plain_call(torch.bfloat16 if path.name == "bf16" else torch.float32)
    for other in PATHS:
        if other is not path:
            monkeypatch.setattr(type(other), "forward", lambda *_, **__: pytest.fail("another path was asked"))
    out, lse = attend_on_path(path.name, p, BlockLayout.dense(1 if path.name == "key_major" else 16, 16, 32, 32))
    assert out.shape == (1, 2, 32, 8) and lse.shape == (0,)


def plain_call(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    n = Numbers.of(1)
    q, k, v = (n.normal(1, 2, 32, 8).to(dtype) for _ in range(3))
    return q, k, v


ODD = PATHS[:-1]


@pytest.mark.parametrize("path", ODD, ids=lambda path: path.name)
def test_a_forced_path_with_reasons_raises_them(path: CPUPath) -> None:
    layout = BlockLayout.dense(16, 16, 32, 32)
    given_ = plain_call(torch.float64)
    reasons = why_not(f"blocked/{path.name}", *given_, layout)
    assert reasons and all(reason.startswith(f"{path.name}: ") for reason in reasons)
    with pytest.raises(UnsupportedError) as caught:
        attend_on_path(path.name, given_, layout)
    assert caught.value.reasons == reasons
    # What the checks before the op let through, the op itself does not.
    call = make_call(given_, layout, causal=True, scale=1.0, extras=Extras())
    with pytest.raises(UnsupportedError) as caught:
        dispatch.forward(f"blocked/{path.name}", call, need_lse=False)
    assert caught.value.reasons == reasons


def test_a_log_sum_exp_is_a_reason_where_the_kernel_rounds_it() -> None:
    given_ = plain_call(torch.bfloat16)
    for name in ("few_rows", "flash", "bf16"):
        assert why_not(f"blocked/{name}", *given_, BlockLayout.dense(16, 16, 32, 32)) == ()
        with pytest.raises(UnsupportedError, match="log-sum-exp"):
            attend_on_path(name, given_, BlockLayout.dense(16, 16, 32, 32), need_lse=True)


def test_the_last_path_takes_every_call_and_names_are_unique() -> None:
    names = [path.name for path in PATHS]
    assert len(set(names)) == len(names)
    layout = BlockLayout.dense(16, 16, 32, 32)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert why_not(f"blocked/{names[-1]}", *plain_call(dtype), layout, extras=Extras(gate="last")) == ()
        assert why_not("blocked", *plain_call(dtype), layout, extras=Extras(gate="last")) == ()


@each
def test_reasons_read_metadata_alone(path: CPUPath) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        real = plain_call(dtype)
        wanted = why_not(f"blocked/{path.name}", *real, BlockLayout.dense(16, 16, 32, 32))
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(x) for x in real]
            assert why_not(f"blocked/{path.name}", *fake, BlockLayout.dense(16, 16, 32, 32)) == wanted


def test_paths_are_no_implementations_of_the_public_function() -> None:
    given_ = plain_call(torch.float32)
    layout = BlockLayout.dense(16, 16, 32, 32)
    with pytest.raises(ValueError, match="impl: expected one of"):
        block_sparse_attention(*given_, layout, impl="blocked/flash")
    with pytest.raises(ValueError, match="path: expected one of"):
        attend_on_path("triton", given_, layout)
    with pytest.raises(ValueError, match="impl: expected one of"):
        why_not("blocked/triton", *given_, layout)
