"""The kernels on a device, against fp64 on the CPU: ``pytest -m gpu``. Needs torch, triton and pytest alone.

``-m "gpu and not slow"`` leaves out the product of everything with everything, most of which is compiling;
``-n 8`` compiles side by side. ``ATTNZOO_TEST_DEVICE=cpu TRITON_INTERPRET=1`` tries the tests themselves.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnzoo_kernels import (
    BlockLayout,
    Extras,
    block_sparse_attention,
    block_sparse_attention_with_lse,
    selftest,
    why_not,
)
from attnzoo_kernels.selftest import CaseInputs, CaseSizes
from tests.attnzoo_kernels.gpu.gpu_support import DTYPES, assert_within, find_device, run, short

pytestmark = pytest.mark.gpu

WIDTHS = (16, 32, 64, 128, 256)
ODD_WIDTHS = ((24, 24), (80, 80), (96, 96), (100, 100), (192, 128), (64, 128), (128, 40), (1, 8))
BLOCKS = (16, 32, 64, 128)
ODD_BLOCKS = ((1, 16), (1, 64), (1, 128), (8, 8), (16, 128), (128, 16), (64, 32), (24, 51), (200, 1), (256, 256))
SWITCHES = tuple(case for case in selftest.CASES if case != "plain")


@pytest.fixture
def device() -> torch.device:
    return find_device()


def sizes_of(width: int, block: int, **more: int) -> CaseSizes:
    """Three rows of blocks, the last one ragged."""
    return replace(CaseSizes(1, 4, 2, 2 * block + block // 2 + 3, width, width, block, block), **more)


def check(case: str, sizes: CaseSizes, dtype: torch.dtype, device: torch.device) -> None:
    assert_within(case, sizes, dtype, run(case, sizes, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_dtype_and_block_forward_and_backward(
    width: int, block: int, dtype: torch.dtype, device: torch.device
) -> None:
    check("plain", sizes_of(width, block), dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("width", (64, 128))
@pytest.mark.parametrize("case", SWITCHES, ids=short)
def test_every_switch(case: str, width: int, dtype: torch.dtype, device: torch.device) -> None:
    check(case, sizes_of(width, 64), dtype, device)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", SWITCHES, ids=short)
def test_every_switch_at_every_width_dtype_and_block(
    case: str, width: int, block: int, dtype: torch.dtype, device: torch.device
) -> None:
    check(case, sizes_of(width, block), dtype, device)


@pytest.mark.parametrize("widths", ODD_WIDTHS, ids=str)
def test_odd_widths(widths: tuple[int, int], device: torch.device) -> None:
    check("plain", sizes_of(widths[0], 32, value_width=widths[1]), torch.bfloat16, device)


@pytest.mark.parametrize("blocks", ODD_BLOCKS, ids=str)
def test_odd_blocks(blocks: tuple[int, int], device: torch.device) -> None:
    sizes = CaseSizes(2, 6, 2, 2 * max(blocks) + 7, 64, 64, *blocks)
    check("plain", sizes, torch.float16, device)


@pytest.mark.parametrize("heads", [(6, 2), (8, 1), (5, 5), (12, 4), (14, 2)], ids=str)
def test_groups_of_any_size(heads: tuple[int, int], device: torch.device) -> None:
    for case in ("plain", "decoding"):
        check(case, sizes_of(64, 32, heads=heads[0], groups=heads[1]), torch.float32, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("density", [0.1, 0.4, 1.0])
def test_gradients_of_sparse_layouts_at_width_64_and_192(
    density: float, dtype: torch.dtype, device: torch.device
) -> None:
    """Where FlashAttention's block-sparse backward was silently wrong."""
    for width in (64, 192):
        generator = torch.Generator().manual_seed(round(10 * density))
        keep = (torch.rand(1, 4, 5, 5, generator=generator) < density) | torch.eye(5, dtype=torch.bool)
        keep[:, 2, 3] = False
        layout = BlockLayout.from_mask(keep, 128, 128, 600, 600)
        q, k, v = (torch.randn(1, 4, 600, width, generator=generator, dtype=torch.float64) for _ in range(3))
        given = CaseInputs(q, k, v, layout, True, Extras()).to(dtype, torch.device("cpu"))
        truth = selftest.solve(given.to(torch.float64, torch.device("cpu")), "reference", dtype)
        found = selftest.solve(given.to(dtype, device), "triton", dtype)
        fields = selftest.compare(found, truth, dtype, given.score)
        assert "problem" not in fields, fields
        assert fields["error"] <= fields["limit"], fields


PROBED = (
    ("plain", {}), ("window and sink", {}), ("positions", {}), ("key bias", {}), ("plain", {"block_q": 1}),
    ("plain", {"block_q": 24, "block_k": 51}), ("decoding", {}),
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("case", PROBED, ids=short)
def test_exactly_the_visible_keys_are_read(
    case: tuple[str, dict[str, int]], dtype: torch.dtype, device: torch.device
) -> None:
    """With q = 0 and one-hot values the output shows the set of keys, and with one-hot gradients dV shows it again."""
    name, more = case
    sizes = sizes_of(64, 32, heads=2, groups=2, **more)
    given = selftest.make(name, sizes)
    bias = given.extras.key_bias
    extras = Extras(
        q_pos=given.extras.q_pos, window=given.extras.window, sink=given.extras.sink,
        key_bias=None if bias is None else torch.where(bias == -math.inf, bias, 0.0),
    )  # fmt: skip
    blank = CaseInputs(torch.zeros_like(given.q), given.k, given.v, given.layout, True, extras)
    seen = probe(blank.to(torch.float64, torch.device("cpu")), "reference")
    found = probe(blank.to(dtype, device), "triton")
    assert torch.equal(found[0], seen[0]), "the forward reads other keys"
    assert torch.equal(found[1], seen[0]), "dV reaches other keys"
    count = seen[0].sum(-1).double().log()
    torch.testing.assert_close(found[2], count, rtol=0, atol=2e-6 * (1 + float(count.max())))


def probe(given: CaseInputs, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """What each row reads, bool ``[B, H, T, S]``, by the forward and by dV; and lse, fp64. H must be G."""
    slots, rows, width = given.k.shape[2], given.q.shape[2], given.v.shape[3]
    forward, backward, lse = [], [], torch.empty(0)
    for begin in range(0, slots, width):
        values = torch.eye(slots, dtype=given.v.dtype, device=given.v.device)[:, begin : begin + width]
        v = values.expand(*given.v.shape[:2], -1, -1).contiguous()
        out, lse = block_sparse_attention_with_lse(given.q, given.k, v, given.layout, extras=given.extras, impl=impl)
        forward.append(out > 0)
    for begin in range(0, rows, width):
        v = given.v.clone().requires_grad_()
        pull = torch.eye(rows, dtype=v.dtype, device=v.device)[:, begin : begin + width]
        pull = torch.nn.functional.pad(pull, (0, width - pull.shape[1])).expand(*given.q.shape[:3], -1)
        out = block_sparse_attention(given.q, given.k, v, given.layout, extras=given.extras, impl=impl)
        (dv,) = torch.autograd.grad(out, v, pull)
        backward.append((dv > 0).transpose(-1, -2)[:, :, : rows - begin])  # [B, G, S, width] -> [B, H, rows, S]
    return torch.cat(forward, -1).cpu(), torch.cat(backward, 2).cpu(), lse.double().cpu()


def moved(case: str, device: torch.device, dtype: torch.dtype = torch.bfloat16, **more: int) -> CaseInputs:
    return selftest.make(case, sizes_of(64, 64, **{"heads": 4, **more})).to(dtype, device)


@pytest.mark.parametrize("case", ["plain", "window and sink", "gate keys"], ids=short)
def test_calls_repeat_bit_for_bit(case: str, device: torch.device) -> None:
    given = moved(case, device)
    first = selftest.solve(given, "triton", torch.bfloat16)
    for _ in range(20 if device.type == "cuda" else 1):
        again = selftest.solve(given, "triton", torch.bfloat16)
        assert all(torch.equal(again[name], x) for name, x in first.items())


def test_strides_change_nothing(device: torch.device) -> None:
    given = moved("plain", device)
    first = selftest.solve(given, "triton", torch.bfloat16)
    packed = torch.stack([given.k, given.v], 3).transpose(1, 2).contiguous()  # [B, S, G, 2, D]
    k, v = (packed[:, :, :, i].transpose(1, 2) for i in range(2))
    q = given.q.transpose(2, 3).contiguous().transpose(2, 3)
    odd = torch.empty(*v.shape[:3], v.shape[3] + 1, dtype=v.dtype, device=device)[..., 1:].copy_(v)
    for values in (v, odd):
        again = selftest.solve(CaseInputs(q, k, values, given.layout, True, Extras()), "triton", torch.bfloat16)
        assert all(torch.equal(again[name], x) for name, x in first.items())


def test_nan_in_what_nobody_reads_stays_there(device: torch.device) -> None:
    keep = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    keep[..., 1] = False
    given = moved("plain", device)
    layout = BlockLayout.from_mask(keep, 64, 64, given.q.shape[2], given.k.shape[2]).to(device)
    clean = selftest.solve(CaseInputs(given.q, given.k, given.v, layout, True, Extras()), "triton", torch.bfloat16)
    k, v = given.k.clone(), given.v.clone()
    k[:, :, 64:128] = v[:, :, 64:128] = math.nan
    spoilt = selftest.solve(CaseInputs(given.q, k, v, layout, True, Extras()), "triton", torch.bfloat16)
    assert all(torch.equal(spoilt[name], x) for name, x in clean.items())
    assert not clean["dk"][:, :, 64:128].any()
    assert not clean["dv"][:, :, 64:128].any()


def test_a_gpu_runs_the_kernels_unasked(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnzoo_kernels._triton import launch

    calls = []
    real = launch.run
    monkeypatch.setattr(launch, "run", lambda *a, **k: (calls.append(a[0]), real(*a, **k)))
    given = moved("plain", device)
    assert why_not("triton", given.q, given.k, given.v, given.layout) == ()
    block_sparse_attention(given.q, given.k, given.v, given.layout)
    assert bool(calls) is (device.type == "cuda")


def test_bad_input_is_refused_before_anything_runs(device: torch.device) -> None:
    given = moved("plain", device)
    with pytest.raises(ValueError, match="heads"):
        block_sparse_attention(given.q[:, :3], given.k, given.v, given.layout)
    with pytest.raises((TypeError, ValueError), match="k"):
        block_sparse_attention(given.q, given.k.float(), given.v, given.layout)
    small = BlockLayout.dense(64, 64, 64, 64, device=device)
    with pytest.raises(ValueError, match="layout"):
        block_sparse_attention(given.q, given.k, given.v, small)
