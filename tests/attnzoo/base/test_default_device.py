"""What belongs to a call lies where the call's tensors lie, whatever device the process makes tensors on by default."""

from __future__ import annotations

import ast
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo_kernels import selftest
from tests.attnzoo.cache.cache_kinds import CACHE_KINDS, CacheKind
from tests.attnzoo.cases import CASES, Case, tokens
from tests.test_architecture import CODE, ROOT, relative

FACTORIES = {
    "arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand", "randint",
    "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
# Oracles take the tests' own lists and numbers, and are no part of a call.
CHECKED = [path for path in CODE if "oracles" not in path.parts]


def factories_without_device(source: str) -> list[str]:
    """The calls of torch's factories that leave the device to the process."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        of = node.func.value
        makes = isinstance(of, ast.Name) and of.id == "torch" and node.func.attr in FACTORIES
        # A call that passes ** on may have it there.
        if makes and not {keyword.arg for keyword in node.keywords} & {"device", None}:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def test_no_tensor_is_made_on_the_default_device() -> None:
    assert len(factories_without_device("torch.arange(3) + torch.zeros(2, device=x.device) + torch.tensor(1)")) == 2
    assert {"attnzoo", "kernels"} == {path.relative_to(ROOT).parts[0] for path in CHECKED}
    found = {relative(path): factories_without_device(path.read_text(encoding="utf-8")) for path in CHECKED}
    assert not {path: calls for path, calls in found.items() if calls}


def padded(batch: int, length: int) -> Tensor:
    """Another number of real tokens in each item."""
    return torch.arange(length) < torch.tensor([[13 * i] for i in range(batch)])


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layers_compute_where_their_input_lies(case: Case, ragged: bool) -> None:
    layer = case.layer()
    x = tokens(layer, 2, 70).requires_grad_()
    padding = padded(2, 70) if ragged else None

    def solve() -> tuple[Tensor, ...]:
        out = layer.attend(x, key_padding=padding).out
        return out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()], allow_unused=True)

    with torch.device("meta"):
        found = solve()
    for mine, theirs in zip(found, solve(), strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize("kind", CACHE_KINDS, ids=str)
def test_caches_lie_and_compute_where_the_layer_does(kind: CacheKind, ragged: bool) -> None:
    layer = kind.case.layer()
    x = tokens(layer, 2, 45)
    padding = padded(2, 45) if ragged else None

    def decode() -> Tensor:
        cache = kind.cache(layer, 2, 45)
        parts = []
        for part in torch.arange(45, device="cpu").split([24, 19, 1, 1]):
            here = None if padding is None else padding[:, part]
            parts.append(layer.attend(x[:, part], key_padding=here, cache=cache).out)
            cache.reorder(torch.tensor([0, 1], device="cpu"))
        assert all(stream.device.type == "cpu" for stream in cache.streams.values())
        return torch.cat(parts, 1)

    with torch.no_grad():
        with torch.device("meta"):
            found = decode()
        assert torch.equal(found, decode())


@pytest.mark.parametrize(
    ("impl", "dtype"), [("reference", torch.float32), ("blocked", torch.float32), ("blocked", torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("name", selftest.CASES)
def test_the_operation_computes_where_its_inputs_lie(name: str, impl: str, dtype: torch.dtype) -> None:
    given: Any = selftest.make(name).to(dtype, torch.device("cpu"))
    with torch.device("meta"):
        found = selftest.solve(given, impl, dtype)
    expected = selftest.solve(given, impl, dtype)
    assert all(torch.equal(found[quantity], expected[quantity]) for quantity in expected)
