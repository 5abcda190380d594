"""Calls that remember are made once, for one layer: what makes them again, or for many at once, is told so.

A compiled call is traced once and run at any time, so that it asks by operators of its own, whenever it is run.
"""

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


class Birth:
    """When a cache was made, to tell calls that a backward makes once more.

    Attributes:
        backward: The backward in which it was made; in a compiled call a CPU tensor, int64, which the call fills in.
        mark: What compiled calls say that they write, on the cache's device, so that no compiler leaves them out.
    """

    def __init__(self, device: torch.device) -> None:
        self.backward: int | Tensor
        with torch.inference_mode(False):
            self.mark = torch.zeros(1, device=device)
        self.backward = torch.ops.attnzoo.current_backward(self.mark) if _runs_later() else current_backward()

    def refuse_replay(self, name: str) -> None:
        """Raises where a call runs inside another backward, now or whenever a compiled call runs.

        Args:
            name: The argument that is the cache.

        Raises:
            UnsupportedError: If it does.
        """
        then, number = (self.backward, -1) if isinstance(self.backward, Tensor) else (None, self.backward)
        if _runs_later():
            torch.ops.attnzoo.refuse_replay(self.mark, then, number, name)
        elif is_replay():
            refuse_replay(name, number if then is None else int(then))


def _runs_later() -> bool:
    """Whether this code is being compiled. Exported programs have no caches from outside."""
    return torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()


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


def _current_backward(like: Tensor) -> Tensor:
    return torch.tensor(torch._C._current_graph_task_id(), device="cpu")


def _refuse_replay(mark: Tensor, then: Tensor | None, number: int, name: str) -> None:
    refuse_replay(name, number if then is None else int(then))


_library = torch.library.Library("attnzoo", "FRAGMENT")
# A number that is another one each time, whatever the input: no constant, and not to be computed once for two.
_library.define("current_backward(Tensor like) -> Tensor", tags=torch.Tag.nondeterministic_seeded)
_library.define("refuse_replay(Tensor(a!) mark, Tensor? then, SymInt number, str name) -> ()")
_library.impl("current_backward", _current_backward, "CompositeExplicitAutograd")
_library.impl("refuse_replay", _refuse_replay, "CompositeExplicitAutograd")
torch.library.register_fake(
    "attnzoo::current_backward", lambda like: torch.empty((), dtype=torch.int64, device="cpu"), lib=_library
)
torch.library.register_fake("attnzoo::refuse_replay", lambda mark, then, number, name: None, lib=_library)
