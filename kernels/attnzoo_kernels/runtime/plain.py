"""Whether a tensor is what it seems: values that can be looked at, and that what is made of them may outlive the call.

Fake tensors and subclasses are of another type. The wrappers of torch.func (vmap, grad) are not: each stands for many
tensors, or for a level of differentiation, and ``type(x) is Tensor`` is true of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_jit: Any = torch.jit
PLAIN = (Tensor, torch.nn.Parameter)
"""The classes of tensors that are what they seem."""
_PROXY = torch._C._TorchDispatchModeKey.PROXY


def is_plain(x: Tensor) -> bool:
    """Whether a tensor is no one else's: not traced, not fake, no subclass, no wrapper of torch.func."""
    if torch.compiler.is_compiling() or type(x) not in PLAIN or is_tracing():
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def is_tracing() -> bool:
    """Whether torch.jit.trace or make_fx notes down what is done to real tensors."""
    return _jit.is_tracing() or torch._C._get_dispatch_mode(_PROXY) is not None


def is_watched() -> bool:
    """Whether somebody looks at what torch dispatches: a tracer, a compiler, a mode, a transform, a profiler."""
    if torch.compiler.is_compiling():
        return True
    c: Any = torch._C
    modes = c._len_torch_dispatch_stack() or c._len_torch_function_stack()
    transforms = c._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    return bool(modes or transforms or c._get_tracing_state() is not None or c._autograd._profiler_enabled())


NESTED = "nested"


def odd_layout(x: Tensor) -> str | None:
    """``NESTED``, or the layout of a tensor that has no value at every place (sparse, mkldnn); ``None`` for others."""
    if x.is_nested:
        return NESTED
    return None if x.layout is torch.strided else str(x.layout)


def advice(x: object) -> str:
    """What to do about something that is no tensor, where that is known."""
    if isinstance(x, torch.fx.Proxy):
        return "; torch.fx.symbolic_trace has no sizes: use torch.export, make_fx or torch.compile, or make it a leaf"
    return ""


def is_readable(x: Tensor) -> bool:
    """Whether values can be read without synchronising: a plain tensor in CPU memory."""
    return is_plain(x) and x.device.type == "cpu"


def is_open(size: int | torch.SymInt) -> bool:
    """Whether a program that is being exported leaves a size open: what is asked of it would hold for one answer."""
    if not torch.compiler.is_exporting():
        return False
    # Dynamo shows open sizes and known ones alike.
    return torch.compiler.is_dynamo_compiling() or isinstance(size, torch.SymInt)
