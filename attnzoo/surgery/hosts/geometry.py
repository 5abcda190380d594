"""Where the queries and keys of a host's call lie: what stands for its mask.

Letters: B batch, S slots of the host's cache.
"""

from __future__ import annotations

from collections.abc import Callable
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
        window: How many slots a token reads at most, its own the last; ``None`` where all.
        ndim: What hosts ask of a mask that is ready.
    """

    first: int | Tensor
    real: Tensor | None
    causal: bool = field(default=True, kw_only=True)
    window: int | None = field(default=None, kw_only=True)
    ndim: int = field(default=4, init=False)

    def contiguous(self) -> Geometry:
        """Itself; static caches ask for it."""
        return self


def rule_of(mask_function: Callable[..., Any] | None) -> tuple[bool, int | None]:
    """Whether a host's rule is causal, and its sliding window.

    Raises:
        UnsupportedError: If it is another rule than causality, a window beside it, or none.
    """
    name = "causal_mask_function" if mask_function is None else getattr(mask_function, "__name__", "")
    if name in ("causal_mask_function", "bidirectional_mask_function"):
        return name == "causal_mask_function", None
    # A window and causality are joined in a function that holds both.
    parts = next((x for x in _held_by(mask_function) if isinstance(x, tuple)), ())
    names = {getattr(part, "__qualname__", "").partition(".")[0]: part for part in parts}
    if set(names) == {"causal_mask_function", "sliding_window_overlay"} and len(parts) == 2:
        window = [x for x in _held_by(names["sliding_window_overlay"]) if type(x) is int]
        if len(window) == 1:
            return True, window[0]
    raise UnsupportedError(
        "attention_mask: expected causality, a sliding window and padding alone, got a further rule of the host's"
    )


def _held_by(function: Any) -> list[Any]:
    """What a function has of the one that made it."""
    return [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]


def geometry_of(
    attention_mask: Any, tokens: int, slots: int, *, causal: bool = True, window: int | None = None
) -> Geometry:
    """What a mask says about the last ``tokens`` of ``slots`` to a block that is causal or not.

    Args:
        attention_mask: What the registered mask function has made, or ``None``.
        tokens: Of the call.
        slots: Whose keys the block has.
        causal: Whether the block is.
        window: The block's sliding window, where there is no mask that says it.

    Raises:
        UnsupportedError: If it is no mask that the registered mask function has made, or one of another causality, or a
            block that is not causal would read another sequence.
    """
    if not causal and slots != tokens:
        raise UnsupportedError(f"key: expected the {tokens} tokens of the queries, got {slots} of another sequence")
    if attention_mask is None:
        return Geometry(slots - tokens, None, causal=causal, window=window)
    if not isinstance(attention_mask, Geometry):
        raise UnsupportedError(
            f"attention_mask: expected the host's 2-D padding mask or None, got {type(attention_mask).__name__}"
        )
    if attention_mask.causal != causal:
        raise UnsupportedError(f"is_causal: expected {attention_mask.causal}, as the host's mask has it, got {causal}")
    return attention_mask
