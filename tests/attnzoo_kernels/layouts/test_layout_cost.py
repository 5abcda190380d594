"""What it takes to look at a layout, counted in tensors and operators: about what its lists hold, at any length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnzoo_kernels import BlockLayout, Extras, block_sparse_attention, visible_pairs
from tests.strategies import Numbers

LENGTH, BLOCK = 16384, 16
SIZES = (BLOCK, BLOCK, LENGTH, LENGTH)
MOST_OPERATORS = 400


class Work(TorchDispatchMode):
    """Notes the size of the largest tensor that is made, and how many operators run."""

    largest = operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators += 1
        # A view of one value shown often takes no memory.
        sizes = [x.untyped_storage().nbytes() // x.itemsize for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


LAYOUTS: dict[str, Callable[[], BlockLayout]] = {
    "dense": lambda: BlockLayout.dense(*SIZES),
    "window": lambda: BlockLayout.sink_window(*SIZES, window=600, sink=32),
    "heads": lambda: BlockLayout.from_indices(
        Numbers.of(0).integers(0, 127, 1, 4, 1024, 8) + 128 * torch.arange(8), *SIZES
    ),
}


def _pairs(**extras: Any) -> Callable[[BlockLayout], object]:
    return lambda layout: visible_pairs(layout, causal=True, extras=Extras(**extras), batch=2, heads=4)


def _hidden() -> Tensor:
    bias = torch.zeros(1, 1, LENGTH)
    bias[..., 5::7] = -torch.inf
    return bias


LOOKS: dict[str, Callable[[BlockLayout], object]] = {
    "print": str,
    "density": BlockLayout.density,
    "density of all": lambda layout: layout.density(causal=False),
    "validate": BlockLayout.validate,
    "pairs": _pairs(),
    "pairs in a window": _pairs(window=500, sink=20),
    "pairs in windows": _pairs(window=torch.tensor([9, 600, 70, 5000], dtype=torch.int32)),
    "pairs at positions": _pairs(q_pos=torch.arange(-9, LENGTH - 9, dtype=torch.int32).view(1, 1, -1), window=500),
    "pairs beside hidden keys": _pairs(key_bias=_hidden()),
    "pairs beside landmarks": _pairs(gate="last", key_bias=_hidden(), window=500, sink=20),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS.keys())
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_looking_at_a_layout_takes_about_what_its_lists_hold(
    make: Callable[[], BlockLayout], look: Callable[[BlockLayout], object]
) -> None:
    layout = make()
    held = layout.start.numel() + layout.col.numel()
    with Work() as work:
        look(layout)
    # Rows of four heads, or the lists, 32 times over where a picture counts by rows of cells: a mask of all blocks of
    # a head would be 2^20, one of tokens 2^28.
    assert work.largest <= max(4 * LENGTH + 8, 32 * held if look is str and held < LENGTH else held + 1)
    assert work.operators <= MOST_OPERATORS


@pytest.mark.parametrize("seed", range(40))
def test_pairs_beside_landmarks_are_those_that_get_a_weight(seed: int) -> None:
    n = Numbers.of(seed)
    queries, keys, block_q, block_k = 5 + seed % 17, 4 + seed % 23, 1 + seed % 4, 2 + seed % 5
    layout = BlockLayout.from_mask(
        n.chance(0.7, 2, 2, -(-queries // block_q), -(-keys // block_k)), block_q, block_k, queries, keys
    )
    bias = torch.zeros(2, 1, keys, dtype=torch.float64).masked_fill(n.chance(0.2, 2, 1, keys), -torch.inf)
    extras = Extras(
        gate="last",
        window=n.integers(1, 12, 4).int() if seed % 3 else None,
        sink=n.integers(0, 6, 4).int() if seed % 2 else seed % 7,
        q_pos=n.integers(-1, keys - 1, 2, 4, queries).int() if seed % 5 else None,
        key_bias=bias if seed % 4 else None,
    )
    q, k = n.normal(2, 4, queries, 3), n.normal(2, 2, keys, 3)
    v = torch.eye(keys, dtype=q.dtype).expand(2, 2, -1, -1)
    causal = seed % 6 > 1
    out = block_sparse_attention(q, k, v, layout, causal=causal, extras=extras, impl="reference")
    seen, _ = visible_pairs(layout, causal=causal, extras=extras, batch=2, heads=4)
    assert seen == int((out > 0).sum())
