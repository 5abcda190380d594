"""What a model is called with again and again, and what is read from its answer.

Letters: B batch, T tokens, V what a model says of each token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.surgery.hosts.calls import CACHE_NAMES
from attnzoo_kernels.errors import ConfigError, ShapeError, UnsupportedError

Metric = Callable[[Tensor], Tensor | float]
"""From what a model says ``[B, T, V]`` to one number, of which more is better."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

_TOKENS = ("input_ids", "inputs_embeds")
_MASK = "attention_mask"
_OF_ALL = ("logits_to_keep", "cache_position")
"""What says something of all items at once."""


@dataclass(frozen=True, eq=False)
class HeadBatch:
    """A batch, as the model is called with it.

    Attributes:
        args: By place.
        kwargs: By name.
        size: B.
        tokens: T.
        real: Which rows are tokens, bool ``[B, T]``; ``None`` where all are.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    size: int
    tokens: int
    real: Tensor | None

    @classmethod
    def of(cls, name: str, given: Any, model: Any) -> HeadBatch:
        """A batch that a caller has given.

        Args:
            name: What the caller's function calls it.
            given: int64 ``[B, T]``, or a mapping for ``model(**batch)``; for a model that takes no ids a tensor
                ``[B, T, C]``.
            model: Whose it is. No cache is kept where it can be told so.

        Raises:
            ConfigError: If it is something else.
            UnsupportedError: If it brings a cache, or a mask of another form than ``[B, T]``.
        """
        if isinstance(given, Tensor):
            args: tuple[Any, ...] = (given,)
            kwargs: dict[str, Any] = {}
            first: Any = given
        elif isinstance(given, Mapping):
            args = ()
            kwargs = dict(given)
            first = next((kwargs[key] for key in _TOKENS if kwargs.get(key) is not None), None)
            if first is None:
                first = next((x for x in kwargs.values() if isinstance(x, Tensor)), None)
        else:
            raise ConfigError(f"{name}: expected int64 [B, T] or a mapping, got {type(given).__name__}")
        if not isinstance(first, Tensor) or first.dim() not in (2, 3) or first.numel() == 0:
            got = list(first.shape) if isinstance(first, Tensor) else "no tensor"
            raise ConfigError(f"{name}: expected tokens [B, T], got {got}")
        for key in CACHE_NAMES:
            if kwargs.get(key) is not None:
                raise UnsupportedError(f"{name}: expected no {key}, which every call would change; give whole texts")
        if "use_cache" in inspect.signature(type(model).forward).parameters:
            kwargs["use_cache"] = False
        size, tokens = first.shape[:2]
        return cls(args, kwargs, size, tokens, _real(name, kwargs.get(_MASK), size, tokens))

    def call(self, model: Any, times: int = 1) -> Tensor:
        """What a model says ``[times * B, T, V]``, of all items, again and again.

        Raises:
            UnsupportedError: If it says nothing that is known.
        """
        device = _device_of(model)
        args = tuple(self._moved(x, device, times) for x in self.args)
        kwargs = {key: self._moved(x, device, 1 if key in _OF_ALL else times) for key, x in self.kwargs.items()}
        return said(model(*args, **kwargs))

    def _moved(self, x: Any, device: torch.device | None, times: int) -> Any:
        if not isinstance(x, Tensor):
            return x
        moved = x if device is None else x.to(device)
        return repeated(moved, self.size, times)

    @property
    def padded(self) -> bool:
        """Whether some row is no token."""
        return self.real is not None

    def rows(self) -> Tensor:
        """Which rows are tokens, bool ``[B, T]`` on the CPU."""
        if self.real is None:
            return torch.ones(self.size, self.tokens, dtype=torch.bool, device="cpu")
        return self.real.cpu()


def repeated(x: Any, size: int, times: int) -> Any:
    """A batch several times over, item by item in the same order; what has no such batch stays.

    Args:
        x: ``[B, ...]``, alone or in tuples and lists.
        size: B.
        times: How often.
    """
    if isinstance(x, Tensor):
        own = x.dim() > 0 and x.shape[0] == size and times > 1
        return x.repeat(times, *[1] * (x.dim() - 1)) if own else x
    if isinstance(x, tuple | list):
        return type(x)(repeated(part, size, times) for part in x)
    return x


def said(output: Any) -> Tensor:
    """What a model says: logits, or the last hidden states where it has no head.

    Raises:
        UnsupportedError: If it gives neither.
    """
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    raise UnsupportedError(f"model: expected logits or hidden states, got {type(output).__name__}")


def measured(metric: Metric, logits: Tensor) -> Tensor:
    """A metric's number, with its graph where it has one.

    Raises:
        ConfigError: If it is none.
        ShapeError: If it is several.
    """
    found = metric(logits)
    if isinstance(found, Tensor):
        if found.numel() != 1:
            raise ShapeError(f"metric: expected one number, got {list(found.shape)}")
        return found.reshape(())
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ConfigError(f"metric: expected a number, got {type(found).__name__}")
    return torch.tensor(found, dtype=torch.float64, device="cpu")


def check_alike(clean: HeadBatch, corrupt: HeadBatch) -> None:
    """Raises unless the rows of two batches stand for each other.

    Raises:
        ShapeError: If they have other sizes.
        UnsupportedError: If they are padded in other places.
    """
    if (clean.size, clean.tokens) != (corrupt.size, corrupt.tokens):
        raise ShapeError(
            f"corrupt: expected {[clean.size, clean.tokens]} tokens as in clean, got {[corrupt.size, corrupt.tokens]}"
        )
    if not torch.equal(clean.rows(), corrupt.rows()):
        raise UnsupportedError("corrupt: expected padding in the same places as in clean, got it in others")


def _real(name: str, mask: Any, size: int, tokens: int) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or list(mask.shape) != [size, tokens]:
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedError(f"{name}: expected an attention_mask [{size}, {tokens}], got {got}")
    real = mask.bool()
    return None if bool(real.all()) else real


def _device_of(model: Any) -> torch.device | None:
    first = next(iter(model.parameters()), None)
    return None if first is None else first.device
