"""Layouts and token rules to and from FlexAttention's BlockMask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnzoo_kernels.errors import ShapeError, UnsupportedError
from attnzoo_kernels.layouts.build import LayoutLists, Sizes
from attnzoo_kernels.layouts.entries import classify, list_entries, spans_of
from attnzoo_kernels.layouts.flex_mask import PAIRS_AT_ONCE, Found, Listed, PairChunk, find_rule
from attnzoo_kernels.runtime.warn import warn_caller
from attnzoo_kernels.spec.call import Call
from attnzoo_kernels.spec.extras import Extras
from attnzoo_kernels.spec.token_rule import TokenRule, bounded


class Read(NamedTuple):
    """What a BlockMask says: listed blocks ``[B, H, M, N]``, sizes, and the token rule."""

    keep: Tensor
    sizes: Sizes
    rule: Found


def _blocks(count: Tensor, index: Tensor, blocks_k: int) -> Tensor:
    """Padded lists ``[B, h, M, K]`` as a mask ``[B, h, M, N]``."""
    listed = torch.arange(index.shape[-1], device=index.device) < count.unsqueeze(-1)
    target = torch.where(listed, index.long(), blocks_k)
    keep = torch.zeros(*index.shape[:3], blocks_k + 1, dtype=torch.int32, device=index.device)
    return keep.scatter_add(-1, target, torch.ones_like(target, dtype=torch.int32))[..., :blocks_k] > 0


def read_block_mask(block_mask: Any, causal: bool | None = None) -> Read:
    """The listed blocks, sizes and token rule of a BlockMask, by preference one of the causality given.

    Raises:
        UnsupportedError: If no causality, positions, window and sink leave exactly what the mask shows.
    """
    seq_q, seq_k = block_mask.seq_lengths
    block_q, block_k = block_mask.BLOCK_SIZE
    sizes = (block_q, block_k, seq_q, seq_k)
    blocks_k = -(-seq_k // block_k)
    partial = _blocks(block_mask.kv_num_blocks, block_mask.kv_indices, blocks_k)
    full = torch.zeros_like(partial)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        full = _blocks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, blocks_k)
    of_full, of_partial = (_places(mask) for mask in (full, partial & ~full))
    blank = torch.empty(0, block_q, block_k, dtype=torch.bool, device=partial.device)
    listed = Listed(sizes, (partial.shape[0], partial.shape[1]), of_full, of_partial, blank)
    listed = replace(listed, seen=_seen(block_mask, listed))
    rule = find_rule(listed, prefer_causal=causal is not False)
    if rule is None:
        raise UnsupportedError(_complaint(listed))
    return Read(partial | full, sizes, rule)


def read_bare(block_mask: Any, causal: bool | None) -> tuple[Tensor, int, int, int, int]:
    """Listed blocks and sizes of a BlockMask whose token rule is causality or none.

    Args:
        block_mask: The mask.
        causal: What the call will say, or ``None``.

    Raises:
        UnsupportedError: If the token rule is another.
        ValueError: If it is not the causality asked for.
    """
    if causal is not None and not isinstance(causal, bool):
        raise TypeError(f"causal: expected a bool or None, got {type(causal).__name__}")
    keep, sizes, rule = read_block_mask(block_mask, causal)
    if not rule.is_bare:
        raise UnsupportedError(
            "block_mask: it follows a token rule that a layout does not hold (positions or a window); "
            "attnzoo_kernels.read_block_mask gives the layout together with causal and extras"
        )
    if causal is not None and rule.causal != causal:
        raise ShapeError(f"causal: expected {rule.causal}, which the block mask is, got {causal}")
    if causal is None and not rule.causal:
        warn_caller(
            "from_block_mask: this mask shows slots behind a row's own, and a call with the layout alone would hide "
            "them; pass causal=False here and to the call, or use attnzoo_kernels.read_block_mask"
        )
    return keep, *sizes


def _places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows, flat in ``[B, H, M]``, and columns of the true entries."""
    row, col = mask.flatten(0, 2).nonzero().unbind(1)
    return row, col


def _seen(block_mask: Any, listed: Listed) -> Tensor:
    """What the mask's own rule shows of partial blocks, evaluated as flex does."""
    from torch.nn.attention.flex_attention import create_mask

    block_q, block_k, seq_q, _ = listed.sizes
    most = max(1, PAIRS_AT_ONCE // (block_q * block_k))
    found = [listed.seen]
    for row, col in zip(*(x.split(most) for x in listed.partial if len(x)), strict=True):
        part = PairChunk.of(listed, row, col, listed.seen)
        # Beyond rows and slots the rule may read outside of what it was made for.
        rows = part.rows.clamp(max=seq_q - 1).reshape(-1)
        first = part.slots[:, 0].repeat_interleave(block_q)
        item, head = (x.repeat_interleave(block_q) for x in (part.item, part.head))
        shown = create_mask(_of_blocks(block_mask, item, head, rows, first), 1, 1, len(rows), block_k, rows.device)
        found.append(shown.view(part.real.shape) & part.real)
    return torch.cat(found)


def _of_blocks(block_mask: Any, item: Tensor, head: Tensor, rows: Tensor, first: Tensor) -> Any:
    """A mask's rule of the rows of blocks laid one after the other, and the slots within them."""
    last = block_mask.seq_lengths[1] - 1

    def rule(_b: Tensor, _h: Tensor, index: Tensor, slot: Tensor) -> Tensor:
        found: Tensor = block_mask.mask_mod(
            item[index], head[index], rows[index], (first[index] + slot).clamp(max=last)
        )  # fmt: skip
        return found

    return rule


def _complaint(listed: Listed) -> str:
    """Names a block that is neither causal nor seen whole."""
    block_q, _, seq_q, seq_k = listed.sizes
    blocks_q = -(-seq_q // block_q)
    for row, col, seen in zip(*listed.partial, listed.seen, strict=True):
        part = PairChunk.of(listed, row.view(1), col.view(1), seen)
        causal = part.real & (part.slots.unsqueeze(1) <= part.rows.unsqueeze(2) + seq_k - seq_q)
        if not bool((seen == part.real).all()) and not bool((seen == causal).all()):
            where = f"block ({int(row) % blocks_q}, {int(col)}) of head {int(part.head)}"
            return (
                f"block_mask: {where} follows a token rule that causality, one position for each row, a window and a "
                "sink do not say; give such a mask as key_bias, or keep it in FlexAttention"
            )
    return "block_mask: some partial blocks are causal and others see the future; a call has one causality"


class Shown(NamedTuple):
    """What a mask is to show: the call's causality and extras, and whether blocks that are seen whole stand apart."""

    causal: bool = True
    extras: Extras | None = None
    separate_full: bool = True


def make_block_mask(lists: LayoutLists, sizes: Sizes, of_call: Shown) -> Any:
    """A BlockMask that lists the blocks that are read, with the token rule inside them."""
    from torch.nn.attention.flex_attention import BlockMask

    block_q, block_k, seq_q, seq_k = sizes
    if 0 in lists.start.shape or seq_k == 0:
        raise UnsupportedError("layout: FlexAttention has no empty block masks")
    causal, extras, separate_full = of_call
    keep, full, rule = _read_by(lists, sizes, causal=causal, extras=extras or Extras())
    pos = rule.positions(seq_q, seq_k, keep.device)

    def of_head(value: int | Tensor, h: Tensor) -> int | Tensor:
        return value.to(keep.device).long()[h] if isinstance(value, Tensor) else value

    def shown(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        at = keep.shape[0] > 1, keep.shape[1] > 1, pos.shape[0] > 1, pos.shape[1] > 1
        listed = keep[b if at[0] else 0, h if at[1] else 0, t // block_q, s // block_k]
        position = pos[b if at[2] else 0, h if at[3] else 0, t]
        if causal:
            listed = listed & (s <= position)
        if rule.q_pos is not None:
            listed = listed & (position >= 0)
        if rule.window is None:
            return listed
        return listed & (((position - s).abs() < of_head(rule.window, h)) | (s < of_head(rule.sink, h)))

    def listing(mask: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort((~mask).to(torch.uint8), dim=-1, stable=True)
        return mask.sum(-1, dtype=torch.int32), order.to(torch.int32)

    blocks = listing(keep & ~full if separate_full else keep)
    whole = listing(full) if separate_full else (None, None)
    return BlockMask.from_kv_blocks(
        blocks[0], blocks[1], whole[0], whole[1],
        BLOCK_SIZE=(block_q, block_k), mask_mod=shown, seq_lengths=(seq_q, seq_k),
    )  # fmt: skip


def _read_by(lists: LayoutLists, sizes: Sizes, *, causal: bool, extras: Extras) -> tuple[Tensor, Tensor, TokenRule]:
    """Which blocks the rule leaves to be read, and which of them whole: bool ``[B, H, M, N]`` each; and the rule."""
    block_q, block_k, seq_q, seq_k = sizes
    for name in ("key_bias", "aux", "gate", "rope"):
        if getattr(extras, name) is not None:
            raise UnsupportedError(f"{name}: a BlockMask says which keys are seen, and not how they are scored")
    rule = TokenRule(causal, extras.q_pos, bounded(extras.window), bounded(extras.sink))
    of_heads = [x.shape[0] for x in (rule.window, rule.sink) if isinstance(x, Tensor)]
    pos_sizes = (1, 1) if rule.q_pos is None else rule.q_pos.shape[:2]
    batch = max(lists.start.shape[0], pos_sizes[0])
    heads = max(lists.start.shape[1], pos_sizes[1], *of_heads, 1)
    q, k = (torch.empty(batch, heads, length, 0, device=lists.col.device) for length in (seq_q, seq_k))
    call = Call(q, k, k, lists.start, lists.count, lists.col, None, rule, block_q, block_k, 1.0)
    entries, _ = list_entries(call)
    read, full, _ = classify(call, entries, spans_of(call, entries))
    masks = torch.zeros(2, *entries.shape, -(-seq_k // block_k), dtype=torch.bool, device=q.device)
    for mask, chosen in zip(masks.flatten(1, 3), (read, read & full), strict=True):
        mask[entries.row[chosen], entries.col[chosen]] = True
    return masks[0], masks[1], rule
