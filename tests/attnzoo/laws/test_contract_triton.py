"""Every variant computed by the Triton kernels, interpreted, is the one computed by the other implementations."""

from __future__ import annotations

import os

import pytest
import torch

from tests.attnzoo.cases import CASES, Case, assert_same, gradients, tokens

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
SMALL = [case for case in CASES if case.size == "small"]
LIST_A_QUERY = {"landmark": 25, "longheads": 33}
"""Variants with a list of blocks for each query and head, which are dear to interpret: two heads, and the least tokens
that have such lists."""


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_triton_is_blocked_is_the_reference(case: Case) -> None:
    length = LIST_A_QUERY.get(case.name, 37)
    layer = case.layer(dtype=torch.float64, **({"num_heads": 2} if case.name in LIST_A_QUERY else {}))
    x = tokens(layer, 1, length).requires_grad_()
    cotangent = tokens(layer, 1, length, seed=1)
    if case.name in LIST_A_QUERY:
        plan = layer.attend(x.detach()).plan
        assert plan.density < 1
        assert plan.layout.start.shape[1:] == (2, length)
    found = {}
    for impl in ("reference", "blocked", "triton"):
        layer.impl = impl
        out = layer(x)
        found[impl] = (out.detach(), gradients(layer, x, out, cotangent))
    out, grads = found["reference"]
    for impl in ("blocked", "triton"):
        mine, mine_grads = found[impl]
        assert_same(mine, out)
        for name, grad in grads.items():
            assert_same(mine_grads[name], grad)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case.name in ("s2", "rcmha", "landmark") else pytest.mark.slow) for case in SMALL],
    ids=str,
)
def test_padding_and_positions_reach_the_kernels(case: Case) -> None:
    layer = case.layer(dtype=torch.float64)
    x = tokens(layer, 2, 21)
    padding = torch.arange(21) < torch.tensor([0, 9])[:, None]
    results = []
    for impl in ("blocked", "triton"):
        layer.impl = impl
        results.append(layer.attend(x, key_padding=padding).out)
    assert_same(results[1], results[0])
