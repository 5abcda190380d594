"""FlexAttention's masks as calls of the operation: the layout and the token rule together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attnzoo_kernels.layouts.layout import BlockLayout
from attnzoo_kernels.spec.extras import Extras


@dataclass(frozen=True, eq=False)
class MaskedCall:
    """What a mask says, as arguments of the operation: ``block_sparse_attention(q, k, v, **call.arguments)``.

    Attributes:
        layout: The blocks that the mask lists.
        causal: Whether rows see only slots up to their positions.
        extras: Positions, window and sink.
        separate_full: Whether the mask lists blocks that are seen whole apart.
    """

    layout: BlockLayout
    causal: bool
    extras: Extras
    separate_full: bool = True

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments ``layout``, ``causal`` and ``extras``."""
        return {"layout": self.layout, "causal": self.causal, "extras": self.extras}

    def to_block_mask(self) -> Any:
        """The mask again, its blocks listed as they were."""
        return self.layout.to_block_mask(causal=self.causal, extras=self.extras, separate_full=self.separate_full)


def read_block_mask(block_mask: Any) -> MaskedCall:
    """The layout of a FlexAttention ``BlockMask``, with the token rule of its partial blocks.

    The rule is found from what the mask shows, pair by pair, and leaves exactly that: causality aligned at the last or
    at the first key or at the last slot that each row sees, or none; a sliding window, and a sink beside it, which
    heads may have each their own.

    Args:
        block_mask: A mask of any block sizes and lengths, made by ``create_block_mask`` or from lists. One that was
            made with ``B=None`` or ``H=None`` is read at item or head 0, as FlexAttention makes it.

    Raises:
        UnsupportedError: If a partial block follows another rule; names the block.

    Example:
        >>> from torch.nn.attention.flex_attention import create_block_mask
        >>> def sliding(b, h, q, k):
        ...     return (q >= k) & (q - k < 20)
        >>> call = read_block_mask(create_block_mask(sliding, 1, 1, 64, 64, device="cpu", BLOCK_SIZE=16))
        >>> call.causal, call.extras.window
        (True, 20)
    """
    # What reads such masks waits for the first one.
    from attnzoo_kernels.layouts import flex

    keep, sizes, rule = flex.read_block_mask(block_mask)
    extras = Extras(q_pos=rule.q_pos, window=rule.window, sink=rule.sink)
    separate_full = block_mask.full_kv_num_blocks is not None
    return MaskedCall(BlockLayout.from_mask(keep, *sizes), rule.causal, extras, separate_full)
