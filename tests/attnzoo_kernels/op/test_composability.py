"""The operation under everything that torch wraps round operations: checks, compilers, transforms, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from attnzoo_kernels import (
    BlockLayout,
    Extras,
    UnsupportedError,
    block_sparse_attention,
    block_sparse_attention_with_lse,
    why_not,
)
from tests.attnzoo_kernels.op.test_agreement import both, seeds_of
from tests.attnzoo_kernels.op.test_torture import problem
from tests.attnzoo_kernels.oracle import Problem
from tests.strategies import Numbers, extras_of, layout_of


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window and sink": {"window": 9, "sink": 2},
    "tensors": {
        "window": ints(3, 9, 20, 99),
        "sink": ints(0, 1, 2, 3),
        "q_pos": torch.arange(40, dtype=torch.int32).view(1, 1, 40) - 1,
        "key_bias": torch.linspace(-1, 1, 40).view(1, 1, 40),
    },
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


class Overheard(TorchDispatchMode):
    """Notes with which arguments each op is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] = args
        return func(*args, **(kwargs or {}))


def op_inputs(p: Problem, op: str, needed: tuple[str, ...] = ("q", "k", "v")) -> tuple[Any, ...]:
    """What the public function gives to an op."""
    layout, tensors = layout_of(p), {name: getattr(p, name).clone() for name in ("q", "k", "v")}
    for name in needed:
        tensors[name].requires_grad_()
    with Overheard() as overheard:
        results = block_sparse_attention_with_lse(*tensors.values(), layout, extras=extras_of(p), impl="blocked")
        torch.autograd.backward(results, seeds_of(p))
    return overheard.calls[f"attnzoo.{op}.default"]


@every_rule
@pytest.mark.parametrize("need_lse", [True, False], ids=["lse", "no lse"])
def test_the_forward_op_passes_the_checks_of_torch(rule: dict[str, Any], need_lse: bool) -> None:
    *inputs, asked = op_inputs(problem(**rule), "bsa_fwd")
    assert asked is True
    inputs[:3] = [x.clone().requires_grad_() for x in inputs[:3]]
    torch.library.opcheck(torch.ops.attnzoo.bsa_fwd.default, (*inputs, need_lse))


@every_rule
@pytest.mark.parametrize("needed", [("q", "k", "v"), ("k", "v"), ("q",)], ids=str)
def test_the_backward_op_passes_the_checks_of_torch(rule: dict[str, Any], needed: tuple[str, ...]) -> None:
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    inputs = op_inputs(problem(**rule), "bsa_bwd", needed)
    torch.library.opcheck(torch.ops.attnzoo.bsa_bwd.default, inputs, test_utils=utilities)


def gradients(call: Callable[..., Any], p: Problem) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (p.q, p.k, p.v)]
    out, lse = call(*leaves)
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, seeds_of(p))]


@every_rule
@pytest.mark.parametrize("impl", [pytest.param("reference", marks=pytest.mark.slow), "blocked"])
def test_compiled_as_one_graph_it_is_the_eager_call(rule: dict[str, Any], impl: str) -> None:
    p = problem(**rule)
    layout, extras = layout_of(p), extras_of(p)

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return block_sparse_attention_with_lse(q, k, v, layout, extras=extras, impl=impl)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for mine, eager in zip(gradients(compiled, p), gradients(call, p), strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("build_inside", [False, True], ids=["layout given", "layout built inside"])
def test_a_new_length_or_pattern_compiles_nothing_anew(build_inside: bool) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def call(q: Tensor, layout: BlockLayout | None) -> Tensor:
        if layout is None:
            layout = BlockLayout.window(8, 16, q.shape[2], q.shape[2], window=20)
        return block_sparse_attention(q, q, q, layout, extras=Extras(window=20))

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=backend)
    for length in (40, 33, 48, 90):
        q = Numbers.of(length).normal(1, 2, length, 8).float()
        layout = BlockLayout.window(8, 16, length, length, window=20)
        assert torch.equal(compiled(q, None if build_inside else layout), call(q, layout))
    assert len(graphs) <= 2


class Attention(torch.nn.Module):
    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        layout = BlockLayout.sink_window(8, 16, length, length, window=self.window, sink=2)
        return block_sparse_attention(q, k, v, layout, extras=Extras(window=self.window, sink=2))


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_it_exports_and_the_export_takes_other_lengths(strict: bool) -> None:
    # From two key blocks on: torch.export makes another program where a dimension may be 1.
    length = torch.export.Dim("length", min=17, max=4096)
    inputs = tuple(Numbers.of(i).normal(1, 4, 40, 8).float() for i in range(3))
    exported = torch.export.export(Attention(9), inputs, dynamic_shapes=({2: length},) * 3, strict=strict)
    assert "attnzoo.bsa_fwd" in str(exported.graph)
    for other in (40, 17, 131):
        inputs = tuple(Numbers.of(i).normal(1, 4, other, 8).float() for i in range(3))
        assert torch.equal(exported.module()(*inputs), Attention(9)(*inputs))


def test_a_saved_export_loads_and_takes_a_layout_as_data(tmp_path: Path) -> None:
    class Call(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> Tensor:
            return block_sparse_attention(q, k, v, layout, extras=Extras(window=20))

    p = problem()
    torch.export.save(
        torch.export.export(Call(), (p.q, p.k, p.v, BlockLayout.dense(8, 16, 40, 40))), tmp_path / "a.pt2"
    )
    with torch.serialization.safe_globals([BlockLayout]):
        loaded = torch.export.load(tmp_path / "a.pt2").module()
    dense = BlockLayout.dense(8, 16, 40, 40)
    other = BlockLayout(8, 16, 40, 40, dense.start, dense.count, dense.col.flip(0))
    assert torch.equal(loaded(p.q, p.k, p.v, other), Call()(p.q, p.k, p.v, other))


MAPS = {
    "all": (0, 0, 0, None, None),
    "queries alone": (0, None, None, None, None),
    "values alone, last dimension": (None, None, 3, None, None),
    "positions": (None, None, None, 0, None),
    "bias": (0, None, None, None, 0),
    "everything": (1, 2, 0, 0, 0),
}


@pytest.mark.parametrize("dims", MAPS.values(), ids=MAPS.keys())
@pytest.mark.parametrize("shared", [False, True], ids=["per item", "shared by items"])
@both
def test_vmap_of_the_forward_is_a_loop(dims: tuple[int | None, ...], shared: bool, impl: str) -> None:
    n = Numbers.of(1)
    p = problem(dtype=torch.float64)
    layout = layout_of(p)
    items = 1 if shared else 2
    q_pos = n.integers(-1, 39, items, 1, 40)
    bias = n.normal(items, 1, 40)

    def call(q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        extras = Extras(q_pos=q_pos, key_bias=bias, window=9)
        return block_sparse_attention_with_lse(q, k, v, layout, extras=extras, impl=impl)

    args: list[Tensor] = []
    for x, dim in zip((p.q, p.k, p.v, q_pos, bias), dims, strict=True):
        args.append(x if dim is None else torch.stack([x, x.flip(-2 if x is not q_pos else 2), x], dim))
    looped = [call(*(x if d is None else x.select(d, i) for x, d in zip(args, dims, strict=True))) for i in range(3)]
    for mapped, single in zip(torch.vmap(call, dims)(*args), zip(*looped, strict=True), strict=True):
        torch.testing.assert_close(mapped, torch.stack(single), rtol=1e-12, atol=1e-12)


@both
def test_gradients_flow_through_vmap(impl: str) -> None:
    p = problem(dtype=torch.float64)
    layout = layout_of(p)
    qs, k, v = torch.stack([p.q, -p.q]).requires_grad_(), p.k.clone().requires_grad_(), p.v.clone().requires_grad_()

    def call(q: Tensor) -> Tensor:
        out, lse = block_sparse_attention_with_lse(q, k, v, layout, impl=impl)
        return out.square().sum((-1, -2)) + lse.exp().sum(-1)

    mapped = torch.autograd.grad(torch.vmap(call)(qs).sum(), (qs, k, v))
    looped = torch.autograd.grad(sum(call(q).sum() for q in qs), (qs, k, v))
    for mine, true in zip(mapped, looped, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-10)


def test_vmap_over_items_of_a_layout_with_items_is_a_loop() -> None:
    p = problem(dtype=torch.float64)
    p = p.change(keep=Numbers.of(5).chance(0.5, 2, 4, 5, 3))
    layout = layout_of(p)
    qs = torch.stack([p.q, 2 * p.q, -p.q])
    mapped = torch.vmap(lambda q: block_sparse_attention(q, p.k, p.v, layout))(qs)
    for one, q in zip(mapped, qs, strict=True):
        torch.testing.assert_close(one, block_sparse_attention(q, p.k, p.v, layout), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@both
def test_meta_tensors_get_shapes_and_dtypes(dtype: torch.dtype, impl: str) -> None:
    p = problem(dtype=dtype)
    layout = layout_of(p)
    real = block_sparse_attention_with_lse(p.q, p.k, p.v, layout, impl=impl)
    meta = [x.to("meta").requires_grad_() for x in (p.q, p.k, p.v)]
    got = block_sparse_attention_with_lse(*meta, layout.to("meta"), impl=impl)
    for mine, true in zip(got, real, strict=True):
        assert (mine.shape, mine.dtype, mine.device.type) == (true.shape, true.dtype, "meta")
    grads = torch.autograd.grad(got[0].sum() + got[1].sum(), meta)
    assert [g.shape for g in grads] == [x.shape for x in meta]


@both
def test_fake_tensors_run_and_tell_why_not(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        q = torch.empty(2, 4, 40, 8)
        layout = BlockLayout.window(8, 16, 40, 40, window=20)
        out, lse = block_sparse_attention_with_lse(q, q, q, layout, extras=Extras(window=20), impl=impl)
        assert why_not(impl, q, q, q, layout) == ()
        monkeypatch.delenv("TRITON_INTERPRET")
        assert why_not("triton", q, q, q, layout)
    assert out.shape == (2, 4, 40, 8)
    assert lse.shape == (2, 4, 40)


@both
def test_a_checkpoint_gives_the_same_gradients(impl: str) -> None:
    p = problem(window=9)
    layout = layout_of(p)

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return block_sparse_attention_with_lse(q, k, v, layout, extras=Extras(window=9), impl=impl)

    def checkpointed(*args: Tensor) -> Any:
        return checkpoint(call, *args, use_reentrant=False)

    for mine, plain in zip(gradients(checkpointed, p), gradients(call, p), strict=True):
        assert torch.equal(mine, plain)


def small(**rule: Any) -> tuple[list[Tensor], BlockLayout, Extras]:
    n = Numbers.of(2)
    leaves = [n.normal(1, 2, 5, 3), n.normal(1, 1, 6, 3), n.normal(1, 1, 6, 2)]
    layout = BlockLayout.from_mask(torch.tensor([[True, False], [False, False], [True, True]])[None, None], 2, 4, 5, 6)
    return [x.requires_grad_() for x in leaves], layout, Extras(**rule)


@pytest.mark.parametrize("wanted", [0, 1, 2])
@pytest.mark.parametrize("how", ["backward", "grad"])
def test_a_second_derivative_of_the_blocked_one_is_refused(wanted: int, how: str) -> None:
    leaves, layout, _ = small()
    out = block_sparse_attention(*leaves, layout, impl="blocked")
    grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    penalty = grads[wanted].square().sum()
    with pytest.raises(UnsupportedError, match=r"second derivatives.*impl='reference'"):
        if how == "backward":
            penalty.backward()
        else:
            torch.autograd.grad(penalty, leaves[1])


@pytest.mark.parametrize("rule", [{}, {"window": 3, "sink": 1}], ids=["plain", "window"])
def test_the_reference_has_right_first_and_second_derivatives(rule: dict[str, Any]) -> None:
    leaves, layout, extras = small(**rule)
    bias = torch.tensor([0.1, -torch.inf, 0.3, 0.0, -0.2, 0.1], dtype=torch.float64).view(1, 1, 6)

    def call(*args: Tensor) -> tuple[Tensor, Tensor]:
        some = Extras(window=extras.window, sink=extras.sink, key_bias=bias)
        out, lse = block_sparse_attention_with_lse(*args, layout, extras=some, impl="reference")
        return out, lse[lse > -torch.inf]

    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_the_blocked_one_has_right_first_derivatives() -> None:
    leaves, layout, extras = small(window=4)

    def call(*args: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = block_sparse_attention_with_lse(*args, layout, extras=extras, impl="blocked")
        return out, lse[lse > -torch.inf]

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_forward_mode_tangent_is_refused_by_name_where_it_would_get_lost(which: int) -> None:
    leaves, layout, _ = small()
    args = [x.detach() for x in leaves]
    with forward_ad.dual_level():
        args[which] = forward_ad.make_dual(args[which], torch.ones_like(args[which]))
        with pytest.raises(UnsupportedError, match=r"forward-mode.*impl='reference'"):
            block_sparse_attention(*args, layout, impl="blocked")
        out = block_sparse_attention(*args, layout, impl="reference")
        assert forward_ad.unpack_dual(out).tangent is not None


def test_func_grad_is_refused_by_name_and_works_on_the_reference() -> None:
    leaves, layout, _ = small()
    q, k, v = (x.detach() for x in leaves)
    with pytest.raises(UnsupportedError, match="impl='reference'"):
        torch.func.grad(lambda q: block_sparse_attention(q, k, v, layout, impl="blocked").sum())(q)
    per_item = torch.vmap(torch.func.grad(lambda q: block_sparse_attention(q, k, v, layout, impl="reference").sum()))
    both_ways = per_item(torch.stack([q, 2 * q]))
    out = block_sparse_attention(*leaves, layout, impl="reference")
    torch.testing.assert_close(both_ways[0], torch.autograd.grad(out.sum(), leaves[0])[0])
