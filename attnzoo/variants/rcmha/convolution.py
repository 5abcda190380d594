r"""Depth-wise convolutions over a sequence's tokens.

Letters: B batch, T tokens, h heads, D width of a head, n tokens that a kernel sees.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


class DepthwiseConvolution(nn.Module):
    r"""A kernel for each channel: :math:`y_t = \sum_r \omega_r \odot x_{t + c - r} + \beta`, zeros outside.

    c is 0 where the convolution is causal, so that :math:`\omega_0` meets the own token, else ``(n - 1) / 2``. Written
    as n products, each token is computed from the same numbers in the same order, however a sequence is cut.

    Attributes:
        weight: :math:`\omega`, ``[h, D, n]``; h is 1 where heads share kernels.
        bias: :math:`\beta`, ``[h, D]``, or ``None``.
    """

    def __init__(
        self,
        heads: int,
        width: int,
        size: int,
        *,
        bias: bool,
        causal: bool,
        delta: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.centre = 0 if causal else (size - 1) // 2
        self.delta = delta
        self.weight = nn.Parameter(torch.empty(heads, width, size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(heads, width, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Starts kernels and biases anew."""
        bound = self.weight.shape[-1] ** -0.5
        if self.delta:
            self.weight.zero_()
            self.weight[..., self.centre] = 1.0
        else:
            self.weight.uniform_(-bound, bound)
        if self.bias is not None:
            self.bias.zero_() if self.delta else self.bias.uniform_(-bound, bound)

    def forward(self, x: Tensor, history: Tensor | None = None) -> Tensor:
        """Convolves.

        Args:
            x: ``[B, h', T, D]``, h' any multiple that broadcasts; zeros where there is no token.
            history: The n - 1 values before x, ``[B, h', n - 1, D]``; ``None`` means zeros. Causal only.
        """
        size = self.weight.shape[-1]
        tokens = x.shape[2]
        before = size - 1 - self.centre
        acc = torch.promote_types(x.dtype, torch.float32)
        wide = pad(x, (0, 0, before if history is None else 0, self.centre)).to(acc)
        if history is not None:
            wide = torch.cat((history.to(acc), wide), 2)
        taps = self.weight.to(acc).unsqueeze(1).unbind(-1)  # n of [h, 1, D]
        total = wide[:, :, size - 1 :][:, :, :tokens] * taps[0]
        for r in range(1, size):
            total = total + wide[:, :, size - 1 - r :][:, :, :tokens] * taps[r]
        if self.bias is not None:
            total = total + self.bias.to(acc).unsqueeze(1)
        return total.to(x.dtype)


def convolve_row(
    convolutions: Mapping[str, DepthwiseConvolution], x: Mapping[str, Tensor], history: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Causal convolutions of one token, several at once: the numbers of each one's forward, to the bit.

    Args:
        convolutions: By name; all see equally many tokens.
        x: The token of each, ``[B, h, 1, D]``.
        history: The n - 1 values before it, ``[B, h, n - 1, D]``; none where n is 1.

    Returns:
        For each name as x.
    """
    if not convolutions:
        return {}
    heads = [x[name].shape[1] for name in convolutions]
    given = torch.cat([x[name] for name in convolutions], 1)
    acc = torch.promote_types(given.dtype, torch.float32)
    weights = [
        one.weight.expand(count, -1, -1) if one.weight.shape[0] != count else one.weight
        for one, count in zip(convolutions.values(), heads, strict=True)
    ]
    taps = torch.cat(weights).to(acc).unsqueeze(1).unbind(-1)  # n of [h, 1, D]
    total = given.to(acc) * taps[0]
    if len(taps) > 1:
        past = torch.cat([history[name] for name in convolutions], 1).to(acc)
        for r in range(1, len(taps)):
            total = total + past.narrow(2, len(taps) - 1 - r, 1) * taps[r]
    parts = total.split(heads, 1)
    made = {}
    for (name, one), part in zip(convolutions.items(), parts, strict=True):
        biased = part if one.bias is None else part + one.bias.to(acc).unsqueeze(1)
        made[name] = biased.to(given.dtype)
    return made
