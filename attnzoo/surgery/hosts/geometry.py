"""Where the queries and keys of a host's call lie: what stands for its mask.

Letters: B batch, S slots of the host's cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from attnzoo_kernels.errors import UnsupportedError


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where the queries and keys of a call lie: what the mask function hands to the attention function.

    Attributes:
        first: The slot of the first query: an int, or a 0-d tensor that the host would advance, copied.
        real: Which slots hold tokens rather than padding, bool ``[B, S]``; ``None`` where all do.
        causal: Whether a token reads itself and what came before alone.
        ndim: What hosts ask of a mask that is ready.
    """

    first: int | Tensor
    real: Tensor | None
    causal: bool = field(default=True, kw_only=True)
    ndim: int = field(default=4, init=False)

    def contiguous(self) -> Geometry:
        """Itself; static caches ask for it."""
        return self


def geometry_of(attention_mask: Any, tokens: int, slots: int, *, causal: bool = True) -> Geometry:
    """What a mask says about the last ``tokens`` of ``slots`` to a block that is causal or not.

    Raises:
        UnsupportedError: If it is no mask that the registered mask function has made, or one of another causality, or a
            block that is not causal would read another sequence.
    """
    if not causal and slots != tokens:
        raise UnsupportedError(f"key: expected the {tokens} tokens of the queries, got {slots} of another sequence")
    if attention_mask is None:
        return Geometry(slots - tokens, None, causal=causal)
    if not isinstance(attention_mask, Geometry):
        raise UnsupportedError(
            f"attention_mask: expected the host's 2-D padding mask or None, got {type(attention_mask).__name__}"
        )
    if attention_mask.causal != causal:
        raise UnsupportedError(f"is_causal: expected {attention_mask.causal}, as the host's mask has it, got {causal}")
    return attention_mask
