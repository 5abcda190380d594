"""Values and sets by token: what a tensor says of the tokens of each item's sequence, wherever these lie.

Letters: B batch, N tokens that something is said of, h heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, eq=False)
class ByToken:
    """A value for each token of an item's sequence, counted from its first real one.

    Attributes:
        values: ``[B|1, N]``; of dtype bool it is a set.
        behind: The value of tokens from N on.
    """

    values: Tensor
    behind: float = 0

    @property
    def is_empty(self) -> bool:
        """Whether no token has a value other than 0, or is in the set."""
        return not self.behind and not bool(self.values.any())

    def at(self, token: Tensor) -> Tensor:
        """The values of tokens, int64 ``[B|1, ...]``; 0 where -1 says that there is none."""
        known = self.values.shape[1]
        # The value of later tokens, and that of no token, stand behind those of tokens.
        table = pad(pad(self.values, (0, 1), value=self.behind), (0, 1)).to(token.device)
        index = torch.where(token < 0, known + 1, token.clamp(max=known))
        if table.shape[0] == 1:
            return table[0][index]
        index = index.expand(table.shape[0], *index.shape[1:])
        return table.gather(1, index.flatten(1)).view(index.shape)

    def joined(self, other: ByToken, operation: Callable[[Tensor, Tensor], Tensor]) -> ByToken:
        """What an operation makes of the values of both."""
        count = max(self.values.shape[1], other.values.shape[1])
        device = other.values.device if self.values.device.type == "cpu" else self.values.device
        ends = [torch.full((1, 1), x.behind, dtype=x.values.dtype, device="cpu") for x in (self, other)]
        mine, theirs = (pad(x.values.to(device), (0, count - x.values.shape[1]), value=x.behind) for x in (self, other))
        return ByToken(operation(mine, theirs), operation(*ends).item())

    def __and__(self, other: ByToken) -> ByToken:
        """The tokens of both sets."""
        return self.joined(other, torch.logical_and)

    def without(self, other: ByToken) -> ByToken:
        """The tokens of this set that are not in another."""
        return self.joined(other, lambda mine, theirs: mine & ~theirs)

    def __add__(self, other: ByToken) -> ByToken:
        """The sums of values."""
        return self.joined(other, torch.add)


def all_tokens() -> ByToken:
    """The set of all tokens."""
    return ByToken(torch.zeros(1, 0, dtype=torch.bool, device="cpu"), True)
