"""What autocast does to torch's own attention, done alike here."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def no_autocast(device: str) -> AbstractContextManager[Any]:
    """Switches autocast off: the inputs are cast already, and inside it would round scores and accumulators."""
    if not autocasts(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def as_autocast(tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in the dtype that autocast gives to torch's attention; fp64 stays as it is."""
    device = tensors[0].device.type
    if not autocasts(device):
        return tensors
    low = torch.get_autocast_dtype(device)
    q, k, v = (x if x.dtype == torch.float64 else x.to(low) for x in tensors)
    return q, k, v
