"""Auxiliary channels, rotary origins and gates under torch's checks, compilers and transforms, and under bad values."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from attnzoo_kernels import BlockLayout, Extras, block_sparse_attention, block_sparse_attention_with_lse
from tests.attnzoo_kernels.checks import switch_cases
from tests.attnzoo_kernels.op.test_agreement import both
from tests.attnzoo_kernels.op.test_composability import Overheard
from tests.attnzoo_kernels.op.test_poison import poison_scratch
from tests.attnzoo_kernels.op.test_switches import call, extras_of, layout_of, seeds_of, switched
from tests.attnzoo_kernels.oracle_switches import Switched, gradients, leaves_of
from tests.strategies import Numbers

KINDS = ("aux", "origins", "landmarks", "gate keys")
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def answers(p: Switched, impl: str) -> list[Tensor]:
    leaves = leaves_of(p)
    results = call(p.change(**leaves), impl)  # type: ignore[arg-type]
    return [x.detach() for x in results] + list(gradients(results, leaves, seeds_of(p)).values())


@every_kind
@pytest.mark.parametrize("op", ["bsa_fwd", "bsa_bwd"])
def test_the_ops_pass_the_checks_of_torch_with_switches(kind: str, op: str) -> None:
    p = switch_cases()[kind]
    with Overheard() as overheard:
        answers(p, "blocked")
    args = overheard.calls[f"attnzoo.{op}.default"]
    checks = ["test_schema", "test_faketensor", "test_autograd_registration"]
    if op == "bsa_fwd":
        args = tuple(x.clone().requires_grad_() if isinstance(x, Tensor) and i < 3 else x for i, x in enumerate(args))
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.attnzoo, op).default, args, test_utils=checks)


@every_kind
def test_compiled_as_one_graph_switches_are_those_of_the_eager_call(kind: str) -> None:
    p = switch_cases()[kind]
    layout, extras = layout_of(p), extras_of(p)

    def attend(q: Tensor) -> tuple[Tensor, Tensor]:
        return block_sparse_attention_with_lse(q, p.k, p.v, layout, causal=p.causal, extras=extras)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    q = p.q.clone().requires_grad_()
    grads = [torch.autograd.grad(f(q), q, seeds_of(p))[0] for f in (compiled, attend)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@every_kind
def test_vmap_over_queries_with_switches_is_a_loop(kind: str) -> None:
    p = switch_cases()[kind]
    qs = torch.stack([p.q, -p.q, p.q / 2])

    def attend(q: Tensor) -> Tensor:
        return block_sparse_attention(q, p.k, p.v, layout_of(p), causal=p.causal, extras=extras_of(p))

    for mapped, q in zip(torch.vmap(attend)(qs), qs, strict=True):
        torch.testing.assert_close(mapped, attend(q), rtol=1e-12, atol=1e-12)


@every_kind
def test_switches_are_the_same_to_the_bit_whatever_scratch_memory_holds(kind: str) -> None:
    p = switch_cases()[kind]
    first = answers(p, "blocked")
    poison_scratch()
    assert all(torch.equal(x, y) for x, y in zip(answers(p, "blocked"), first, strict=True))


@every_kind
def test_the_reference_has_second_derivatives_with_switches(kind: str) -> None:
    n = Numbers.of(1)
    base = switch_cases()[kind]
    q, k, v = n.normal(1, 2, 4, 2), n.normal(1, 1, 6, 2), n.normal(1, 1, 6, 1)
    p = Switched(q, k, v, torch.tensor([[True, False, True], [True, True, True]])[None, None], 2, 2, causal=False)
    wanted = {"aux": {"aux": True}, "origins": {"rope": True}, "landmarks": {"gate": "last"}}.get(
        kind, {"gate": "tensor", "rope": True, "aux": True}
    )
    p = switched(p, 4, **{"aux": False, "rope": False, "gate": None, "mix": 0.5, **wanted})
    assert (p.gate is None) == (base.gate is None)
    leaves = leaves_of(p)

    def attend(*args: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = call(p.change(**dict(zip(leaves, args, strict=True))), "reference")  # type: ignore[arg-type]
        return out, lse[lse > -torch.inf]

    assert torch.autograd.gradcheck(attend, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(attend, tuple(leaves.values()))


@both
def test_blocks_of_landmarks_alone_leave_every_row_empty(impl: str) -> None:
    q = Numbers.of(1).normal(1, 2, 9, 4).requires_grad_()
    layout = BlockLayout.dense(4, 1, 9, 9)
    out, lse = block_sparse_attention_with_lse(q, q, q, layout, extras=Extras(gate="last"), impl=impl)
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert not torch.autograd.grad(out.sum(), q)[0].any()


@both
def test_the_mix_of_a_gate_has_no_gradient(impl: str) -> None:
    q = Numbers.of(1).normal(1, 2, 9, 4)
    mix, layout = torch.full((2,), 0.5, requires_grad=True), BlockLayout.dense(4, 4, 9, 9)
    with pytest.raises(ValueError, match="gate_mix: expected a tensor without gradient"):
        block_sparse_attention(q, q, q, layout, extras=Extras(gate="last", gate_mix=mix), impl=impl)
    leaf = q.clone().requires_grad_()
    extras = Extras(gate="last", gate_mix=mix.detach())
    block_sparse_attention(leaf, q, q, layout, extras=extras, impl=impl).square().sum().backward()
    assert leaf.grad is not None and bool(leaf.grad.any())


@pytest.mark.parametrize("origin", [40, -1])
@both
def test_an_origin_outside_the_table_is_refused(origin: int, impl: str) -> None:
    q = Numbers.of(1).normal(1, 2, 8, 4)
    index = torch.tensor([0, 1]).expand(1, 1, 2, 2)
    with pytest.raises(ValueError, match="origin"):
        layout = BlockLayout.from_indices(index, 4, 4, 8, 8, origin=torch.full_like(index, origin))
        rope = (torch.ones(40, 2, dtype=torch.float64), torch.zeros(40, 2, dtype=torch.float64))
        block_sparse_attention(q, q, q, layout, extras=Extras(rope=rope), impl=impl)
