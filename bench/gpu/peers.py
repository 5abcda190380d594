"""Contestants of the GPU table, each with a reason where it cannot run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnzoo_kernels import BlockLayout, block_sparse_attention
from bench.contestants import Missing, Run
from bench.gpu.cells import Cell

DENSE = ("sdpa flash", "sdpa cudnn", "xformers", "flash-attn")
"""Those that read everything, whatever the layout."""


def ours(layout: BlockLayout) -> Run:
    """The Triton kernels."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attention(q, k, v, layout, impl="triton")

    return run


SPECIALISED: dict[str, Any] = {"rows": 128, "keys": 128, "warps": 4, "stages": 2, "form": "specialised"}
"""Tiles whose warps get different tasks: with the eight warps of the tables the compiler gives all of them one task."""


@contextmanager
def form(name: str) -> Iterator[None]:
    """Within, the forward loop has another form, and the tiles that this form needs."""
    from attnzoo_kernels._triton import specialize

    before = specialize.tiles_for

    def changed(architecture: str, of: Any, width: int, size: int) -> Any:
        tiles = before(architecture, of, width, size)
        if of != "forward":
            return tiles
        return tiles._replace(**(SPECIALISED if name == "specialised" else {"form": name}))

    specialize.tiles_for = changed
    try:
        yield
    finally:
        specialize.tiles_for = before


def flex(cell: Cell, layout: BlockLayout, *, tuned: bool) -> Run:
    """Compiled FlexAttention on the same blocks; its rule within blocks is causality alone, which is cheapest."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    block_q = max(128, cell.block_q) if cell.queries == 1 else cell.block_q
    keep = layout.to_mask()
    if keep.shape[1] not in (1, cell.heads):
        keep = keep.repeat_interleave(cell.heads // keep.shape[1], 1)
    whole = BlockLayout.from_mask(keep, block_q, cell.block, cell.queries, cell.tokens).to_block_mask()
    shift = cell.tokens - cell.queries

    def causal(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return s <= t + shift

    mask = BlockMask.from_kv_blocks(
        whole.kv_num_blocks, whole.kv_indices, whole.full_kv_num_blocks, whole.full_kv_indices,
        BLOCK_SIZE=(block_q, cell.block), mask_mod=causal, seq_lengths=(cell.queries, cell.tokens),
    )  # fmt: skip
    options: dict[str, Any] = {}
    if cell.block < 128 and not tuned:
        # Its own choice of tiles does not divide blocks of 64: it raises.
        options = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_M1": 32, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32}
        options = options if cell.queries > 1 else {}
    torch._dynamo.reset()
    mode = "max-autotune-no-cudagraphs" if tuned else None
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False, mode=mode)
    grouped = cell.heads != cell.groups

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = compiled(q, k, v, block_mask=mask, enable_gqa=grouped, kernel_options=options or None)
        return out

    return run


def sdpa(cell: Cell, backend: str, device: torch.device) -> Run:
    """Dense attention of torch by one backend."""
    _needs_gpu(device)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[backend]
    grouped = cell.heads != cell.groups
    causal = cell.queries > 1

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(chosen):
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return run


def _needs_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Missing("needs a CUDA device")


def _installed(name: str, device: torch.device) -> None:
    if importlib.util.find_spec(name) is None:
        raise Missing(f"{name} is not installed")
    _needs_gpu(device)


def xformers(cell: Cell, device: torch.device) -> Run:
    """Memory-efficient attention of xformers, dense."""
    _installed("xformers", device)
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    bias = LowerTriangularMask() if cell.queries > 1 else None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # [B, H, T, D] -> [B, T, H, D]
        group = q.shape[1] // k.shape[1]
        wide = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
        rows = [x.transpose(1, 2) for x in (q, *wide)]
        out: Tensor = memory_efficient_attention(*rows, attn_bias=bias)
        return out.transpose(1, 2)

    return run


def flash(cell: Cell, device: torch.device) -> Run:
    """FlashAttention of its own package, dense."""
    _installed("flash_attn", device)
    from flash_attn import flash_attn_func

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
        return out.transpose(1, 2)

    return run


def contestants(cell: Cell, layout: BlockLayout, *, tuned: bool) -> dict[str, Callable[[], Run]]:
    """What makes each contestant; making one may raise."""
    device = layout.col.device

    def compiled() -> Run:
        _needs_gpu(device)
        return flex(cell, layout, tuned=tuned)

    return {
        "flex tuned" if tuned else "flex": compiled,
        "sdpa flash": lambda: sdpa(cell, "flash", device),
        "sdpa cudnn": lambda: sdpa(cell, "cudnn", device),
        "xformers": lambda: xformers(cell, device),
        "flash-attn": lambda: flash(cell, device),
    }
