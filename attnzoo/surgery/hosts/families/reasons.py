"""Why a block cannot be converted, as far as it is the same in every family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from attnzoo.base.evicting.policy import PolicyAttention
from attnzoo.surgery.hosts import attention_function
from attnzoo.surgery.hosts.block import Need


def reasons_for(
    module: nn.Module,
    *,
    always: Sequence[str] = (),
    reading: Sequence[str] = (),
    weights: Sequence[str] = (),
    replacing: Sequence[str] = (),
) -> Mapping[Need, tuple[str, ...]]:
    """The reasons against each kind of conversion: what a block follows already, and what its family says of it.

    Args:
        module: The block.
        always: Reasons against all kinds.
        reading: Further ones against changing what is read.
        weights: Further ones against other weights.
        replacing: Further ones against a replacement.
    """
    pattern = attention_function.pattern_of(module)
    by_policy: list[str] = []
    by_pattern: list[str] = []
    if pattern is not None:
        by_pattern.append("it follows a read pattern, which a replacement would not; undo that conversion first")
        if isinstance(pattern.layer, PolicyAttention):
            by_policy.append(f"it follows {pattern.layer.policy}; undo that conversion first")
    return {
        Need.READING: (*by_policy, *always, *reading),
        Need.WEIGHTS: (*always, *weights),
        Need.REPLACING: (*by_pattern, *always, *replacing),
    }
