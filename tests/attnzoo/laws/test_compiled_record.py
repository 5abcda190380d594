"""A compiled call that is recorded has a backward, though nobody differentiates what is recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import attnzoo
from tests.attnzoo.cases import Case, assert_same, tokens


def eager(graph: Any, _: Any) -> Callable[..., Any]:
    made: Callable[..., Any] = make_boxed_func(graph.forward)
    return made


def demanding(graph: Any, _: Any) -> Callable[..., Any]:
    """A backward that takes nothing for a gradient, as inductor's does not."""

    def run(*inputs: Any) -> Any:
        assert all(x is not None for x in inputs)
        return graph(*inputs)

    made: Callable[..., Any] = make_boxed_func(run)
    return made


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "moh" else [pytest.mark.slow]) for name in attnzoo.list_variants()]
)
def test_what_is_recorded_is_no_gradient_that_a_backward_waits_for(name: str) -> None:
    layer = Case(name, "small").layer().train()
    x = tokens(layer, 2, 40).requires_grad_()
    expected = torch.autograd.grad(layer(x).square().sum(), x)[0]
    torch.compiler.reset()
    compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=eager, bw_compiler=demanding))
    with attnzoo.record(layer) as rec:
        y = compiled(x)
    assert_same(torch.autograd.grad(y.square().sum(), x)[0], expected)
    (plan,) = rec.plans[""]
    assert 0 < plan.density <= 1
