"""torch.jit.trace and the counters built on it: sizes are numbers here, and a trace knows the lengths it was made for.

While torch traces, ``x.shape`` holds tensors, which are no lengths of layouts. Inside, sizes are the sample's numbers;
what a trace is given later is checked against them, by an operator of its own in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from attnzoo_kernels.errors import ShapeError

P = ParamSpec("P")
Value = TypeVar("Value")

# Neither says what it has to type checkers.
_c: Any = torch._C
_jit: Any = torch.jit

_SIZES = frozenset({
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.size,
    Tensor.numel,
    Tensor.nelement,
    Tensor.__len__,
    torch.tensor,
})  # fmt: skip


class _SizesAreNumbers(TorchFunctionMode):
    """Reads sizes with the tracer looking away."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = func if func not in _SIZES else lambda *args, **kwargs: unseen(func, *args, **kwargs)
        return call(*args, **(kwargs or {}))


def _is_inside() -> bool:
    return any(isinstance(mode, _SizesAreNumbers) for mode in _get_current_function_mode_stack())


def unseen(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function that the tracer does not see."""
    state = _c._get_tracing_state()
    _c._set_tracing_state(None)
    try:
        return function(*args, **kwargs)
    finally:
        _c._set_tracing_state(state)


def number_of(size: Any) -> Any:
    """A size that was read while tracing, as a number; anything else as it is."""
    if isinstance(size, Tensor) and _jit.is_tracing() and size.dim() == 0 and not size.is_floating_point():
        return unseen(size.item)
    return size


def traceable(name: str) -> Callable[[Callable[P, Value]], Callable[P, Value]]:
    """Lets torch trace a function whose tensors' sizes decide what it computes; the trace refuses other sizes.

    Args:
        name: What the function is called in messages.
    """

    def decorate(function: Callable[P, Value]) -> Callable[P, Value]:
        @wraps(function)
        def traced(*args: P.args, **kwargs: P.kwargs) -> Value:
            if not _jit.is_tracing() or _is_inside():
                return function(*args, **kwargs)
            with _SizesAreNumbers():
                held = [_held_to_size(name, x) for x in args]
                named = {key: _held_to_size(name, x) for key, x in kwargs.items()}
                return function(*held, **named)

        return traced

    return decorate


def _held_to_size(name: str, x: Any) -> Any:
    """A tensor that a trace takes at this size alone."""
    return torch.ops.attnzoo.fixed_size(x, list(x.shape), name) if isinstance(x, Tensor) else x


def _fixed_size(x: Tensor, size: Sequence[int], name: str) -> Tensor:
    if list(x.shape) != list(size):
        raise ShapeError(
            f"{name}: expected a tensor of {list(size)}, for which this program was traced, got {list(x.shape)}; "
            "trace it for each size, or use torch.export with dynamic shapes"
        )
    return x.view_as(x)


_library = torch.library.Library("attnzoo", "FRAGMENT")
_library.define("fixed_size(Tensor(a) x, int[] size, str name) -> Tensor(a)")
_library.impl("fixed_size", _fixed_size, "CompositeImplicitAutograd")
