"""Products: right at every scale whatever memory holds, and without a trace in the process that computes them."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo_kernels import BlockLayout, Extras, block_sparse_attention
from attnzoo_kernels.runtime.processor import CLASSES, cpu_class, multiplies_bf16
from attnzoo_kernels.runtime.products import product, rounds_to_zero
from tests.attnzoo_kernels.cpu.cpu_classes import PROCESSORS, answering
from tests.bounds import UNIT
from tests.strategies import Numbers

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = {"tiny": (2, 3, 4, 5), "blocks": (2, 64, 16, 64), "one block": (1, 40, 64, 33)}
setting: Any = torch.backends.mkldnn  # type: ignore[attr-defined]


@pytest.fixture
def other_library() -> Iterator[None]:
    """As where a user has sent all products of the process to oneDNN; without AMX it computes true fp32."""
    if cpu_class() == "amx":
        pytest.skip("with AMX this would round to bf16")
    found = setting.matmul.fp32_precision
    before = "none" if found == setting.fp32_precision else found
    setting.matmul.fp32_precision = "bf16"
    yield
    setting.matmul.fp32_precision = before


def assert_right_at_every_scale(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    n, (count, rows, inner, width) = Numbers.of(1), shape
    a, b = n.normal(count, rows, inner).to(dtype), n.normal(count, inner, width).to(dtype)
    before = n.normal(count, rows, width).to(dtype)
    size = a.double().abs() @ b.double().abs()
    # The least numbers of the dtype are as far apart as they are large.
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for scale in (0.0, -0.0, 1e-46, -1e-46, 2.0**-150, 1e-40, -0.5, 1.0):
        for add in (False, True):
            out = before.clone() if add else torch.full_like(before, math.nan)
            found = product("test", a, b, out=out, scale=scale, add=add)
            assert found is out
            wanted = scale * (a.double() @ b.double()) + (before.double() if add else 0)
            room = (inner + 2) * UNIT[dtype] * (abs(scale) * size + wanted.abs()) + (inner + 2) * least
            assert bool(((found.double() - wanted).abs() <= room).all()), (scale, add)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_what_memory_held_plays_no_part_at_any_scale(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    assert_right_at_every_scale(dtype, shape)


@pytest.mark.usefixtures("other_library")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_nor_where_another_library_multiplies(shape: tuple[int, int, int, int]) -> None:
    assert_right_at_every_scale(torch.float32, shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_rounds_to_zero_where_multiplying_by_it_gives_zero(dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for scale in (0.0, -0.0, 1e-46, -1e-46, 2.0**-150, 2.0**-149.9, 1e-45, 1e-30, 1.0):
        assert rounds_to_zero(scale, dtype) == (float(torch.tensor(scale, dtype=wide)) == 0)


@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_is_none_at_any_scale(dtype: torch.dtype, scale: float) -> None:
    a, b = torch.ones(1, 20, 16, dtype=dtype), torch.ones(1, 16, 20, dtype=dtype)
    a[0, 3, 0] = math.nan
    found = product("test", a, b, scale=scale)
    assert torch.equal(found.isnan().any(-1), (torch.arange(20) == 3).view(1, 20))


def test_this_cpu_has_a_class_and_a_test_can_answer_for_another() -> None:
    here = (cpu_class(), multiplies_bf16())
    assert here[0] in CLASSES
    for name, other in PROCESSORS.items():
        with answering(name):
            assert (cpu_class(), multiplies_bf16()) == (other.name, other.multiplies_bf16)
    assert (cpu_class(), multiplies_bf16()) == here


def settings() -> list[Any]:
    """What one process has of each, whichever thread looks."""
    backends: Any = torch.backends
    return [
        setting.fp32_precision,
        setting.matmul.fp32_precision,
        setting.enabled,
        backends.cuda.matmul.fp32_precision,
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        backends.cuda.flash_sdp_enabled(),
        backends.cuda.math_sdp_enabled(),
    ]


def call(dtype: torch.dtype = torch.float32, tokens: int = 80, **more: Any) -> Tensor:
    q, k, v = (Numbers.of(i).normal(1, 2, tokens, 16).to(dtype) for i in range(3))
    layout = BlockLayout.window(16, 16, tokens, tokens, window=40)
    return block_sparse_attention(q.requires_grad_(), k, v, layout, extras=Extras(window=40, **more), impl="blocked")


@pytest.mark.parametrize("cpu", ["avx2", "avx512", "amx"])
def test_another_thread_keeps_its_bits_and_every_setting_beside_the_operation(cpu: str) -> None:
    """A plain layer of somebody else's, a thousand times, while the operation computes."""
    layer, x = torch.nn.Linear(96, 96), Numbers.of(7).normal(96, 96).float()
    wanted, before, done = layer(x), settings(), threading.Event()
    wrong: list[Any] = []
    began = threading.Event()

    def watch() -> None:
        began.set()
        for _ in range(1000):
            if not torch.equal(layer(x), wanted):
                wrong.append("the layer's bits")
            if settings() != before:
                wrong.append(settings())
        done.set()

    with answering(cpu):
        watcher = threading.Thread(target=watch)
        watcher.start()
        began.wait()
        tokens, calls = 80, 0
        while not done.is_set():
            # Other shapes, that a library may have to learn; and bf16, which has paths of its own.
            call(torch.bfloat16 if calls % 4 == 3 else torch.float32, tokens=tokens).sum().backward()
            tokens, calls = 60 + (tokens + 7) % 120, calls + 1
        watcher.join()
    assert calls > 0
    assert wrong == []
    assert settings() == before


@pytest.mark.parametrize("precision", ["precise", "fast"])
def test_bf16_values_are_multiplied_in_bf16_where_the_cpu_can(precision: str) -> None:
    with answering("avx512 with bf16"):
        found = call(torch.bfloat16, precision=precision)
    with answering("avx512"):
        wide = call(torch.bfloat16, precision=precision)
    # Weights and values of size 1, rounded once more to 8 bits each.
    assert (found.float() - wide.float()).abs().max() <= 3 * 2**-8 * wide.float().abs().max()
