"""What has no derivative here is refused by name: tangents, gradients of tables; and so are origins off the tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnzoo_kernels import (
    BlockLayout,
    Extras,
    UnsupportedError,
    block_sparse_attention,
    block_sparse_attention_with_lse,
    why_not,
)
from tests.strategies import Numbers

B, H, G, T, D, PLACES = 2, 4, 2, 10, 4, 6
SIZES = (4, 4, T, T)
IMPLEMENTATIONS = ["auto", "reference", "blocked"]
N = Numbers.of(0)
QKV = {"q": N.normal(B, H, T, D), "k": N.normal(B, G, T, D), "v": N.normal(B, G, T, D)}
MORE = {
    "key_bias": N.normal(B, G, T),
    "q_aux": N.normal(B, H, T, 3),
    "k_aux": N.normal(B, 1, T, 3),
    "gate": N.normal(B, G, 3, D),
    "gate_mix": N.normal(H),
    "rope cos": N.normal(PLACES, D // 2),
    "rope sin": N.normal(PLACES, D // 2),
}
CONSTANTS = ("gate_mix", "rope cos", "rope sin")


def layout(origin: Tensor | None = None) -> BlockLayout:
    index = torch.tensor([[0, -1, -1], [-1, 1, 0], [0, 2, 1]]).view(1, 1, 3, 3)
    origin = torch.zeros_like(index) if origin is None else origin
    return BlockLayout.from_indices(index, *SIZES, origin=origin)


def arguments(x: dict[str, Tensor], own: BlockLayout | None = None) -> dict[str, Any]:
    extras = Extras(
        key_bias=x["key_bias"], aux=(x["q_aux"], x["k_aux"]), gate=x["gate"], gate_mix=x["gate_mix"],
        rope=(x["rope cos"], x["rope sin"]),
    )  # fmt: skip
    return {**{name: x[name] for name in "qkv"}, "layout": own or layout(), "extras": extras}


@pytest.mark.parametrize("attend", [block_sparse_attention, block_sparse_attention_with_lse])
@pytest.mark.parametrize("name", [*QKV, *MORE])
def test_a_tangent_of_any_input_is_refused_by_name_or_comes_out(name: str, attend: Any) -> None:
    inputs = {**QKV, **MORE}
    with forward_ad.dual_level():
        inputs[name] = forward_ad.make_dual(inputs[name], torch.ones_like(inputs[name]))
        if name in CONSTANTS:
            for impl in IMPLEMENTATIONS:
                with pytest.raises(ValueError, match=f"{name}: expected a t.* without a forward-mode tangent"):
                    attend(**arguments(inputs), impl=impl)
            return
        for impl in ("auto", "blocked"):
            with pytest.raises(UnsupportedError, match=r"forward-mode.*impl='reference'"):
                attend(**arguments(inputs), impl=impl)
        found = attend(**arguments(inputs), impl="reference")
        out = found if isinstance(found, Tensor) else found[0]
        assert forward_ad.unpack_dual(out).tangent is not None


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CONSTANTS)
def test_a_gradient_that_nobody_makes_is_refused_by_name(name: str, impl: str) -> None:
    inputs = {**QKV, **MORE}
    inputs[name] = inputs[name].clone().requires_grad_()
    with pytest.raises(ValueError, match=f"{name}: expected a t.* without gradient, .*detach it"):
        block_sparse_attention(**arguments(inputs), impl=impl)
    inputs[name] = inputs[name].detach()
    assert bool(block_sparse_attention(**arguments(inputs), impl=impl).isfinite().all())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("place", [-1, PLACES, PLACES + 7])
def test_an_origin_off_the_table_is_refused_where_it_is_listed(place: int, impl: str) -> None:
    origin = torch.full((1, 1, 3, 3), PLACES - 1)
    inputs = {**QKV, **MORE}
    block_sparse_attention(**arguments(inputs, layout(origin)), impl=impl)
    listed, nobodys = origin.clone(), layout(origin)
    listed[0, 0, 2, 1] = place
    for ask in (lambda **call: block_sparse_attention(**call, impl=impl), lambda **call: why_not(impl, **call)):
        with pytest.raises(ValueError, match=rf"origin: expected positions from 0 to {PLACES - 1}.*got .*{place}"):
            ask(**arguments(inputs, layout(listed)))
    # What stands behind the lists is nobody's origin.
    assert nobodys.origin is not None
    padded = replace(
        nobodys,
        col=torch.cat([nobodys.col, nobodys.col[:1]]),
        origin=torch.cat([nobodys.origin, torch.full_like(nobodys.origin[:1], place)]),
    )
    expected = block_sparse_attention(**arguments(inputs, nobodys), impl=impl)
    assert torch.equal(block_sparse_attention(**arguments(inputs, padded), impl=impl), expected)
