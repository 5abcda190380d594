"""Calls that remember are made once, for one layer: what makes them again, or for many at once, is told so."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attnzoo_kernels.errors import UnsupportedError


def current_backward() -> int:
    """The number of the backward that this code runs inside, -1 outside of any."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def is_replay() -> bool:
    """Whether this call runs inside a backward, as one that activation checkpointing recomputes does."""
    return current_backward() != -1


def refuse_replay(name: str, born: int = -1) -> None:
    """Raises where a call that writes a cache runs inside a backward that did not make the cache too.

    The first call has written its tokens: made once more it would read them as earlier ones, and append them again.

    Args:
        name: The argument that is the cache.
        born: The backward in which the cache was made.

    Raises:
        UnsupportedError: If it does.
    """
    if current_backward() not in (-1, born):
        raise UnsupportedError(
            f"{name}: expected None in a call that a backward makes once more (activation checkpointing), got a cache, "
            "which holds the call's tokens already; checkpoint calls without a cache, or keep those with one outside "
            "the checkpointed part, or make the cache inside it"
        )


def refuse_transforms(values: Mapping[str, Tensor]) -> None:
    """Raises where values to be remembered belong to a transform of torch.func: they would outlive it, or not fit.

    Raises:
        UnsupportedError: If one does.
    """
    if torch.compiler.is_compiling():
        return
    if any(torch._C._functorch.is_functorch_wrapped_tensor(value) for value in values.values()):
        raise UnsupportedError(
            "cache: expected None inside torch.func's transforms (vmap, grad, jvp), got one, which would be written by "
            "all of their calls; call the layers one after the other, each with a cache of its own"
        )
