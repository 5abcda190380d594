"""Tensors of other layouts: refused by name, whichever they are given for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attnzoo_kernels import BlockLayout, block_sparse_attention

ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "jagged": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
    "sparse": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.to_mkldnn(),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_tensor_of_another_layout_is_refused_by_name(name: str, kind: str) -> None:
    given = {other: torch.randn(2, 4, 16, 8) for other in ("q", "k", "v")}
    given[name] = ODD[kind](given[name])
    with pytest.raises(TypeError, match=rf"^{name}: expected a plain \(strided\) Tensor, got "):
        block_sparse_attention(*given.values(), BlockLayout.dense(16, 16, 16, 16))
