"""Layouts to and from FlexAttention's BlockMask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnzoo_kernels.errors import UnsupportedError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from attnzoo_kernels.layout_build import Sizes


def _blocks(count: Tensor, index: Tensor, blocks_k: int) -> Tensor:
    """Padded lists ``[B, h, M, K]`` as a mask ``[B, h, M, N]``."""
    listed = torch.arange(index.shape[-1], device=index.device) < count.unsqueeze(-1)
    target = torch.where(listed, index.long(), blocks_k)
    keep = torch.zeros(*index.shape[:3], blocks_k + 1, dtype=torch.int32, device=index.device)
    return keep.scatter_add(-1, target, torch.ones_like(target, dtype=torch.int32))[..., :blocks_k] > 0


def read_block_mask(block_mask: BlockMask) -> tuple[Tensor, Sizes]:
    """The listed blocks ``[B, h, M, N]`` and sizes of a BlockMask whose token rule a call can repeat."""
    seq_q, seq_k = block_mask.seq_lengths
    block_q, block_k = block_mask.BLOCK_SIZE
    blocks_k = -(-seq_k // block_k)
    partial = _blocks(block_mask.kv_num_blocks, block_mask.kv_indices, blocks_k)
    full = torch.zeros_like(partial)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        full = _blocks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, blocks_k)
    device = partial.device
    shift = seq_k - seq_q
    any_rule = []
    for batch, head, row, col in partial.nonzero().tolist():
        t = torch.arange(row * block_q, min((row + 1) * block_q, seq_q), device=device).unsqueeze(1)
        s = torch.arange(col * block_k, min((col + 1) * block_k, seq_k), device=device)
        at = [torch.tensor(x, device=device) for x in (batch, head)]
        seen = torch.as_tensor(block_mask.mask_mod(at[0], at[1], t, s), device=device).expand(t.shape[0], s.shape[0])
        causal = s <= t + shift
        if bool((seen == causal).all()):
            any_rule.append(not bool(causal.all()))
        elif not bool(seen.all()):
            raise UnsupportedError(
                f"block_mask: block ({row}, {col}) of head {head} follows a token rule that is neither causal "
                "(aligned at the last key) nor full; a layout holds blocks only, the rule belongs in Extras"
            )
        else:
            full[batch, head, row, col] = True
    if any(any_rule):
        row = torch.arange(full.shape[2], device=device).unsqueeze(1) * block_q + shift
        ahead = torch.arange(blocks_k, device=device) * block_k + block_k - 1 > row
        if bool((full & ahead).any()):
            raise UnsupportedError(
                "block_mask: some partial blocks are causal and others see the future; a call has one causality"
            )
    return partial | full, (block_q, block_k, seq_q, seq_k)


def make_block_mask(keep: Tensor, sizes: Sizes, *, causal: bool) -> BlockMask:
    """A BlockMask that lists the kept blocks, with the causal rule or none inside them."""
    from torch.nn.attention.flex_attention import BlockMask

    block_q, block_k, seq_q, seq_k = sizes
    if 0 in keep.shape:
        raise UnsupportedError("layout: FlexAttention has no empty block masks")
    shift = seq_k - seq_q
    row = torch.arange(keep.shape[2], device=keep.device).unsqueeze(1) * block_q + shift
    first = torch.arange(keep.shape[3], device=keep.device) * block_k
    if causal:
        keep = keep & (first <= row + block_q - 1)
        full = keep & (first + block_k - 1 <= row) & (first + block_k <= seq_k)
    else:
        full = keep & (first + block_k <= seq_k)

    def lists(mask: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort((~mask).to(torch.uint8), dim=-1, stable=True)
        return mask.sum(-1, dtype=torch.int32), order.to(torch.int32)

    def rule(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        blocks = keep.shape[0] > 1, keep.shape[1] > 1
        listed = keep[b if blocks[0] else 0, h if blocks[1] else 0, t // block_q, s // block_k]
        return listed & (s <= t + shift) if causal else listed

    return BlockMask.from_kv_blocks(
        *lists(keep & ~full), *lists(full), BLOCK_SIZE=(block_q, block_k), mask_mod=rule, seq_lengths=(seq_q, seq_k)
    )
