"""What every table needs to name a contestant: what it is, why it takes no part, and that it is wrong."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of q, k and v."""


class Missing(Exception):  # noqa: N818  (no error: a reason)
    """Why a peer takes no part."""


class Wrong(Exception):  # noqa: N818  (no error of ours: the finding)
    """A contestant's output differs from what the definition gives."""
