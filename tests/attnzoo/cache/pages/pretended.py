"""A device that is not the CPU, pretended on it: whoever mixes what lies there with what does not is stopped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("xpu", 0)


class Near(torch.Tensor):
    """A tensor that says that it lies on the device."""


def near(x: Tensor) -> Tensor:
    """The same values on the device; nothing is copied."""
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Near)


def plain(x: Tensor) -> Tensor:
    """The same values on the CPU; nothing is copied."""
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(torch.Tensor)


class Pretended(TorchFunctionMode):
    """The device, while it is there.

    Attributes:
        fetched: Bytes that were brought to it from CPU memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fetched = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__self__", None) is torch.Tensor.device:
            return DEVICE if isinstance(args[0], Near) else func(*args)
        if func in (torch.Tensor.to, torch.Tensor.cpu):
            return self._moved(args[0], [*args[1:], *(["cpu"] if func is torch.Tensor.cpu else [])], kwargs)
        if kwargs.get("device") is not None:
            is_near = torch.device(kwargs.pop("device")).type == DEVICE.type
            made = func(*args, **kwargs, device="cpu")
            return near(made) if is_near else plain(made)
        tensors = list(_tensors([args, kwargs]))
        if func is torch.Tensor.copy_:
            if isinstance(args[0], Near) and not isinstance(args[1], Near):
                self.fetched += args[1].nbytes
        elif len({isinstance(x, Near) for x in tensors if x.dim()}) > 1:
            raise RuntimeError(f"{func.__name__}: expected all tensors on the same device")
        return func(*args, **kwargs)

    def _moved(self, x: Tensor, rest: list[Any], kwargs: dict[str, Any]) -> Tensor:
        where: Any = kwargs.pop("device", None)
        for number, value in enumerate(rest):
            if isinstance(value, torch.device | str):
                where = value
                rest[number] = "cpu"
            elif isinstance(value, Tensor):
                where = DEVICE if isinstance(value, Near) else "cpu"
                rest[number] = value.dtype
        was_near = isinstance(x, Near)
        is_near = was_near if where is None else torch.device(where).type == DEVICE.type
        found = plain(x)
        if rest or kwargs:
            found = found.to(*rest, **kwargs)
        if is_near != was_near:
            found = found.clone()
            self.fetched += found.nbytes if is_near else 0
        return near(found) if is_near else found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
