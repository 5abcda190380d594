"""Rotary tables that are kept: the numbers of computed ones to the bit, few, shared, and never where none may be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnzoo
from attnzoo import RotaryConfig, RotaryScaling
from attnzoo.base.decoding import rotation
from attnzoo.base.decoding.rotation import rotate_row, row_rotation, shared_rotary_tables
from attnzoo.base.rope import apply_rotary, rotary_tables
from attnzoo_kernels import clear_memory, memory_held, memory_limit, set_memory_limit
from tests.attnzoo.cases import tokens

HEAD_DIM = 12
FORMS: dict[str, RotaryConfig] = {
    "plain": RotaryConfig(),
    "part of the head": RotaryConfig(dim=6),
    "neighbours": RotaryConfig(interleaved=True),
    "part, neighbours": RotaryConfig(dim=6, interleaved=True),
    "yarn": RotaryConfig(scaling=RotaryScaling(kind="yarn", factor=4.0, original_max_position_embeddings=64)),
    "dynamic": RotaryConfig(scaling=RotaryScaling(kind="dynamic", factor=2.0, original_max_position_embeddings=64)),
    "longrope": RotaryConfig(
        scaling=RotaryScaling(
            kind="longrope",
            factor=4.0,
            original_max_position_embeddings=64,
            short_factor=(1.0, 1.1, 1.2, 1.3, 1.4, 1.5),
            long_factor=(2.0, 3.0, 4.0, 5.0, 6.0, 7.0),
        )
    ),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def computed(config: RotaryConfig, positions: Tensor, like: Tensor, length: int | None = None) -> tuple[Tensor, Tensor]:
    return rotary_tables(config, HEAD_DIM, positions, torch.promote_types(like.dtype, torch.float32), length=length)


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(sorted(FORMS)),
    dtype=st.sampled_from(DTYPES),
    first=st.integers(0, 3000),
    count=st.integers(0, 70),
    length=st.sampled_from([None, 64, 200, 1000]),
)
@example(form="longrope", dtype=torch.float32, first=0, count=64, length=64)
@example(form="longrope", dtype=torch.float32, first=0, count=64, length=65)
@example(form="dynamic", dtype=torch.float64, first=63, count=2, length=1000)
def test_what_is_read_is_what_is_computed(
    form: str, dtype: torch.dtype, first: int, count: int, length: int | None
) -> None:
    config = FORMS[form]
    like = torch.zeros(1, dtype=dtype)
    positions = torch.arange(first, first + count)
    expected = computed(config, positions, like, length)
    shuffled = positions.flip(0).expand(2, -1)
    for found, wanted in (
        (shared_rotary_tables(config, HEAD_DIM, range(first, first + count), like, length=length), expected),
        (
            shared_rotary_tables(config, HEAD_DIM, shuffled, like, length=length),
            computed(config, shuffled, like, length),
        ),
    ):
        for table, other in zip(found, wanted, strict=True):
            assert table.dtype == other.dtype
            assert torch.equal(table, other)


@settings(max_examples=40, deadline=None)
@given(
    form=st.sampled_from(sorted(FORMS)),
    dtype=st.sampled_from(DTYPES),
    position=st.integers(0, 5000),
    seed=st.integers(0, 99),
)
def test_a_row_is_rotated_to_the_bit_as_many_are(form: str, dtype: torch.dtype, position: int, seed: int) -> None:
    config = FORMS[form]
    x = torch.randn(2, 3, 1, HEAD_DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[0, 0, 0, -1] = torch.inf if config.dim is not None else 1.0
    found = rotate_row(x, row_rotation(config, HEAD_DIM, position, x), config.interleaved)
    expected = apply_rotary(x, *computed(config, torch.tensor([position]), x), config.interleaved)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def test_negative_positions_are_computed() -> None:
    positions = torch.tensor([[-3, 0, 5]])
    like = torch.zeros(1)
    for table, other in zip(
        shared_rotary_tables(RotaryConfig(), HEAD_DIM, positions, like),
        computed(RotaryConfig(), positions, like),
        strict=True,
    ):
        assert torch.equal(table, other)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions each table that is computed from here on has."""
    seen: list[int] = []
    plain = rotary_tables

    def note(config: RotaryConfig, head_dim: int, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(positions.numel())
        return plain(config, head_dim, positions, *args, **kwargs)

    monkeypatch.setattr(rotation, "rotary_tables", note)
    return seen


def test_steps_of_all_layers_compute_a_table_once_for_twice_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_memory()
    layers = [attnzoo.create("mha", dim=16, num_heads=2) for _ in range(2)]
    seen = counted(monkeypatch)
    x = torch.randn(1, 300, 16)
    with torch.no_grad():
        for layer in layers:
            cache = layer.new_cache(1, 300)
            layer(x[:, :100], cache=cache)
            for t in range(100, 300):
                layer(x[:, t : t + 1], cache=cache)
    assert seen == [128, 256, 512]


def test_tables_beyond_their_share_of_memory_are_computed_for_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_memory()
    before = memory_limit()
    seen = counted(monkeypatch)
    like = torch.zeros(1)
    try:
        set_memory_limit(1 << 20)
        # 128 KiB are its share: 2,730 positions of 12 numbers, and tables have powers of two.
        for positions in (range(2047, 2048), torch.tensor([[2047]]), range(2048, 2049), torch.tensor([[2048, 9]])):
            shared_rotary_tables(RotaryConfig(), HEAD_DIM, positions, like)
        assert seen == [2048, 1, 2]
        assert memory_held() <= 1 << 20
        set_memory_limit(0)
        seen.clear()
        shared_rotary_tables(RotaryConfig(), HEAD_DIM, range(5, 6), like)
        assert seen == [1]
    finally:
        set_memory_limit(before)


@pytest.mark.parametrize("mode", ["inference", "no grad", "grad"])
def test_a_table_first_used_in_one_mode_serves_the_others(mode: str) -> None:
    clear_memory()
    layer = attnzoo.create("mha", dim=16, num_heads=2)
    x = torch.randn(1, 9, 16)
    with torch.inference_mode() if mode == "inference" else torch.set_grad_enabled(mode == "grad"):
        layer(x)
    layer(x).sum().backward()
    assert layer.q_proj.weight.grad is not None and bool(layer.q_proj.weight.grad.isfinite().all())


def test_tables_of_traced_calls_are_not_kept() -> None:
    clear_memory()
    held = memory_held()
    like = torch.zeros(1)

    def tables(x: Tensor) -> Tensor:
        return shared_rotary_tables(RotaryConfig(), HEAD_DIM, range(3, 9), x)[0] + x

    traced = torch.fx.experimental.proxy_tensor.make_fx(tables)(like)
    assert torch.equal(traced(like), tables(like))
    clear_memory()
    torch.fx.experimental.proxy_tensor.make_fx(tables)(like)
    assert memory_held() == held


@pytest.mark.parametrize("cached", [False, True])
def test_a_rotation_of_ones_own_is_the_one_that_runs(cached: bool) -> None:
    layer_class: Any = type(attnzoo.create("mha", dim=16, num_heads=2))

    class Later(layer_class):  # type: ignore[misc]
        def rotate(self, positions: Tensor, *heads: Tensor) -> tuple[Tensor, ...]:
            rotated: tuple[Tensor, ...] = super().rotate(positions * 2, *heads)
            return rotated

    plain = attnzoo.create("mha", dim=16, num_heads=2, dtype=torch.float64)
    later = Later(plain.config, dtype=torch.float64)
    later.load_state_dict(plain.state_dict())
    x = tokens(plain, 1, 9)
    with torch.no_grad():
        cache = later.new_cache(1, 9) if cached else None
        assert torch.equal(later(x, cache=cache), plain(x, positions=torch.arange(9) * 2))
