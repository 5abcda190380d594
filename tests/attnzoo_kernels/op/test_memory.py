"""No switch materialises T x S: at 16k tokens that would be a gigabyte in fp32, and a quarter of it as a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnzoo_kernels import BlockLayout, Extras
from attnzoo_kernels.cpu import blocked
from attnzoo_kernels.op import make_call
from attnzoo_kernels.runtime.workspace import clear_scratch
from tests.strategies import Numbers

TOKENS, WIDTH, BLOCK = 16384, 8, 64
BLOCKS = TOKENS // BLOCK
MIB = 1 << 20


def normal(*shape: int) -> Tensor:
    return Numbers.of(sum(shape)).normal(*shape).float()


def tables() -> tuple[Tensor, Tensor]:
    angle = torch.arange(BLOCKS).unsqueeze(1) * torch.linspace(0.1, 1.0, WIDTH // 2)
    return angle.cos(), angle.sin()


SWITCHES: dict[str, Callable[[], dict[str, Any]]] = {
    "none": dict,
    "positions": lambda: {"q_pos": torch.arange(TOKENS, dtype=torch.int32).view(1, 1, -1)},
    "bias": lambda: {"key_bias": normal(1, 1, TOKENS)},
    "windows and sinks of heads": lambda: {
        "window": torch.tensor([300, 400], dtype=torch.int32),
        "sink": torch.tensor([3, 70], dtype=torch.int32),
    },
    "auxiliary channels": lambda: {"aux": (normal(1, 2, TOKENS, 4), normal(1, 1, TOKENS, 4))},
    "landmarks": lambda: {"gate": "last"},
    "gate keys": lambda: {"gate": normal(1, 1, BLOCKS, WIDTH)},
    "origins": lambda: {"rope": tables()},
}


def layout_for(name: str) -> BlockLayout:
    layout = BlockLayout.sink_window(BLOCK, BLOCK, TOKENS, TOKENS, window=400, sink=70)
    if name != "origins":
        return layout
    return BlockLayout(BLOCK, BLOCK, TOKENS, TOKENS, layout.start, layout.count, layout.col, layout.col.clone())


class Largest(TorchDispatchMode):
    """Remembers the largest memory that any tensor which an operator returned lies in."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("name", SWITCHES)
def test_a_training_step_at_sixteen_thousand_tokens_stays_small(name: str) -> None:
    layout, extras = layout_for(name), Extras(**SWITCHES[name]())
    q, k, v = (normal(1, heads, TOKENS, WIDTH) for heads in (2, 1, 1))
    call = make_call((q, k, v), layout, causal=True, scale=0.3, extras=extras)
    # Scratch memory that an earlier test has left would hide what is asked for.
    clear_scratch()
    # The ops' insides, which a mode around the ops would not see.
    with Largest() as seen:
        out, lse = blocked.forward(call, need_lse=True)
        blocked.backward(call, torch.ones_like(out), torch.ones_like(lse), [True] * 7)
    assert seen.bytes < 16 * MIB


def test_the_measure_sees_what_it_is_there_to_see() -> None:
    with Largest() as seen:
        torch.zeros(TOKENS // 4, TOKENS // 4, dtype=torch.bool)
    assert seen.bytes >= 16 * MIB
