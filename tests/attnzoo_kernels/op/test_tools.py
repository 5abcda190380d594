"""Torch's tools around the operation: the flop counter, selective checkpointing, the default compiler."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from attnzoo_kernels import BlockLayout, Extras, block_sparse_attention
from tests import child
from tests.strategies import Numbers

LAYOUT = (16, 16, 72, 72)
COMPILERS = shutil.which("g++") or shutil.which("c++")


def inputs(*, grad: bool = True) -> list[Tensor]:
    n = Numbers.of(4)
    return [n.normal(2, heads, 72, 16).requires_grad_(grad) for heads in (4, 2, 2)]


def layout() -> BlockLayout:
    return BlockLayout.sink_window(*LAYOUT, window=20, sink=2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return block_sparse_attention(q, k, v, layout(), extras=Extras(window=20, sink=2), impl="blocked")


def test_flops_are_those_of_the_listed_blocks() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        attend(*inputs()).sum().backward()
    # In four heads of two items; two products forward, five backward.
    pairs = int(layout().to_mask().sum()) * 16 * 16 * 4 * 2
    assert counter.get_total_flops() == 2 * 16 * pairs * (2 + 5)


def test_the_flop_counter_is_not_imported_for_nobody() -> None:
    program = (
        "import sys, torch; from attnzoo_kernels import *; x = torch.ones(1, 1, 4, 4);"
        "block_sparse_attention(x, x, x, BlockLayout.dense(2, 2, 4, 4));"
        "print('torch.utils.flop_counter' in sys.modules, 'torch.distributed.tensor' in sys.modules)"
    )
    assert child.run(program).split() == ["False", "False"]


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE])
def test_selective_checkpoints_give_the_same_gradients(policy: CheckpointPolicy) -> None:
    def choose(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        mine = op == torch.ops.attnzoo.bsa_fwd.default
        return policy if mine else CheckpointPolicy.PREFER_RECOMPUTE

    def block(*leaves: Tensor) -> Tensor:
        return attend(*(x.tanh() for x in leaves)).sin()

    leaves = inputs()
    expected = torch.autograd.grad(block(*leaves).sum(), leaves)
    out = checkpoint(
        block, *leaves, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(choose)
    )
    for found, wanted in zip(torch.autograd.grad(out.sum(), leaves), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.skipif(COMPILERS is None, reason="no C++ compiler")
def test_the_default_compiler_gives_the_eager_numbers() -> None:
    leaves = inputs()
    compiled = torch.compile(lambda *x: attend(*x).sin(), fullgraph=True)
    out, expected = compiled(*leaves), attend(*leaves).sin()
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    pairs = zip(torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True)
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
