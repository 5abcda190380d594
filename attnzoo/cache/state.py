"""What a cache holds as tensors and plain numbers, to carry it to a twin of its layer or to disk.

Names: ``stream.<name>``, ``ring.<name>`` and ``group.<name>`` are values, the others numbers, words and the layer's
configuration, which JSON can hold.

Letters: B batch, n tokens held by the longest item, h heads of a stream, D its width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnzoo.cache.streams import Groups, Ring
from attnzoo_kernels.errors import ConfigError, ShapeError

FORMAT = 1


class CarriedCache:
    """The two ways of a cache's values: out, and into another."""

    max_length: int
    length: int | None
    bound: int
    _lengths: Tensor | None
    _config: Any
    _buffers: dict[str, Tensor]
    _rings: dict[str, Ring]
    _groups: dict[str, Groups]

    if TYPE_CHECKING:

        @property
        def batch(self) -> int:
            """Items B."""

        @property
        def device(self) -> torch.device:
            """Where they lie."""

    def state_dict(self) -> dict[str, Any]:
        """What is held, as tensors and plain numbers: copies of the tokens' values, where they lie.

        ``torch.save`` writes it and ``torch.load(weights_only=True)`` reads it. The tensors among it are contiguous and
        share nothing, as safetensors wants them; all else can be JSON.

        Example:
            >>> import attnzoo
            >>> layer = attnzoo.create("mha", dim=32, num_heads=4)
            >>> cache = layer.new_cache(batch=1, max_length=100)
            >>> y = layer(torch.randn(1, 10, 32), cache=cache)
            >>> other = layer.new_cache(batch=1, max_length=200)
            >>> other.load_state_dict(cache.state_dict())
            >>> other
            KVCache(10 of 200 tokens: k [1, 4, 200, 8], v [1, 4, 200, 8])
        """
        header = header_of(type(self).__name__, self._config, self.batch, self.max_length)
        counts = TokenCounts(self.length, self.bound, self._lengths)
        held = self._held(self._buffers, self.bound)
        values = _values_of(held, self._rings, self._groups, counts)
        return {**header, **counts_of(counts), **values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Holds what :meth:`state_dict` gave, instead of what is held; it may have had another ``max_length``.

        That the layer has the weights of the one that computed the state is the caller's affair.

        Raises:
            TypeError: If ``state`` is no mapping.
            ConfigError: If it is of another kind of cache, or of a layer of another configuration.
            ShapeError: If batch, room, names, shapes or dtypes do not fit. Nothing is changed then.
        """
        mine = header_of(type(self).__name__, self._config, self.batch, self.max_length)
        check_header(state, mine)
        counts = read_counts(state, self.batch, self.max_length, self.device)
        buffers = self._buffers_for(state)
        wanted = _like(self._held(buffers, counts.bound), self._rings, self._groups, counts.bound)
        ends = {name: _read_oldest(state, name, self.batch, self.device) for name in self._rings}
        _check_values(state, wanted, {*mine, "length", "bound", "lengths", *map(_oldest, self._rings)})
        with torch.inference_mode(False), torch.no_grad():
            self._buffers = buffers
            for name, x in buffers.items():
                x.zero_()
                self._held({name: x}, counts.bound)[name].copy_(state[f"stream.{name}"])
            for name, ring in self._rings.items():
                ring.load(state[f"ring.{name}"], counts.offset, ends[name])
            for name, groups in self._groups.items():
                groups.values.zero_()[:, :, : counts.bound // groups.every].copy_(state[f"group.{name}"])
        self.length = counts.length
        self.bound = counts.bound
        self._lengths = counts.lengths

    def _held(self, buffers: Mapping[str, Tensor], bound: int) -> dict[str, Tensor]:
        """The part of buffers that so many tokens fill."""
        return {name: x[:, :, :bound] for name, x in buffers.items()}

    def _buffers_for(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Buffers for the streams of a state; a cache that has some only at times makes them."""
        return self._buffers


@dataclass(frozen=True)
class TokenCounts:
    """How many tokens are held.

    Attributes:
        length: Of every item, where that is one number; else ``None``.
        bound: Of no item more than that.
        lengths: Of each item, int64 ``[B]``; ``None`` where they share one.
    """

    length: int | None
    bound: int
    lengths: Tensor | None

    @property
    def offset(self) -> int | Tensor:
        """An int where all items share it, else int64 ``[B]``."""
        return self.bound if self.lengths is None else self.lengths


def header_of(kind: str, config: Any, batch: int, max_length: int) -> dict[str, Any]:
    """The part of a state that says whose it is."""
    of_layer = None if config is None else config.to_dict()
    return {"format": FORMAT, "cache": kind, "config": of_layer, "batch": batch, "max_length": max_length}


def counts_of(counts: TokenCounts) -> dict[str, Any]:
    """The part of a state that says how many tokens there are."""
    lengths = {} if counts.lengths is None else {"lengths": counts.lengths.clone()}
    return {"length": counts.length, "bound": counts.bound, **lengths}


def _values_of(
    buffers: Mapping[str, Tensor], rings: Mapping[str, Ring], groups: Mapping[str, Groups], counts: TokenCounts
) -> dict[str, Any]:
    """The part of a state that holds values: copies, contiguous, of what is held and no more."""
    state: dict[str, Any] = {f"stream.{name}": _copy(x) for name, x in buffers.items()}
    for name, ring in rings.items():
        state[f"ring.{name}"] = _copy(ring.last(min(ring.rows, counts.bound), counts.offset))
        oldest = ring.oldest
        state[_oldest(name)] = _copy(oldest) if isinstance(oldest, Tensor) else oldest
    for name, held in groups.items():
        state[f"group.{name}"] = _copy(held.values[:, :, : counts.bound // held.every])
    return state


def _copy(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format)


def check_header(state: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raises unless a state is one of a cache of this kind, batch and configuration.

    Raises:
        TypeError: If it is no mapping.
        ConfigError: If kind, format or configuration differ.
        ShapeError: If the batch differs.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state: expected what state_dict() gives, got {type(state).__name__}")
    for name in ("format", "cache"):
        if state.get(name) != mine[name]:
            raise ConfigError(f"{name}: expected the state of {mine[name]!r}, got {state.get(name)!r}")
    if state.get("batch") != mine["batch"]:
        raise ShapeError(f"batch: expected the cache's {mine['batch']}, got {state.get('batch')}")
    own, given = (json.loads(json.dumps(x)) for x in (mine["config"] or {}, state.get("config") or {}))
    for name in own | given:
        if own.get(name) != given.get(name):
            raise ConfigError(
                f"config: expected a layer with {name}={own.get(name)!r}, got a state of one with {given.get(name)!r}"
            )


def read_counts(state: Mapping[str, Any], batch: int, max_length: int, device: torch.device) -> TokenCounts:
    """How many tokens a state says there are.

    Raises:
        ShapeError: If they do not fit each other, or the room.
    """
    length = state.get("length")
    bound = state.get("bound")
    lengths = state.get("lengths")
    if type(bound) is not int or bound < 0 or (lengths is None and length != bound):
        raise ShapeError(f"bound: expected an int >= 0, the length where all items share it, got {bound!r}")
    if bound > max_length:
        raise ShapeError(f"max_length: expected room for the {bound} tokens of the state, got {max_length}")
    if lengths is None:
        return TokenCounts(length, bound, None)
    fits = isinstance(lengths, Tensor) and lengths.dtype == torch.int64 and list(lengths.shape) == [batch]
    if not fits or (batch and not 0 <= int(lengths.min()) <= int(lengths.max()) <= bound):
        raise ShapeError(f"lengths: expected int64 [{batch}] from 0 to {bound}, got {lengths}")
    return TokenCounts(None, bound, lengths.to(device, copy=True))


def _check_values(state: Mapping[str, Any], wanted: Mapping[str, Tensor], beside: set[str]) -> None:
    """Raises unless a state has values of exactly these names, shapes and dtypes.

    Args:
        state: The state.
        wanted: Tensors as the values have to be, by name.
        beside: Names of everything else.

    Raises:
        ShapeError: If it has not.
    """
    known = {*wanted, *beside}
    if missing := sorted({*wanted} - set(state)):
        raise ShapeError(f"state: expected {', '.join(missing)}, got none")
    if unknown := sorted(set(state) - known):
        raise ShapeError(f"state: expected no {', '.join(unknown)}, which this cache does not have, got some")
    for name, like in wanted.items():
        value = state[name]
        if not isinstance(value, Tensor) or value.shape != like.shape or value.dtype != like.dtype:
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(f"{name}: expected {like.dtype} {list(like.shape)}, got {got}")


def _like(
    buffers: Mapping[str, Tensor], rings: Mapping[str, Ring], groups: Mapping[str, Groups], bound: int
) -> dict[str, Tensor]:
    """Tensors as a state of so many tokens has to have them, by name."""
    wanted = {f"stream.{name}": x for name, x in buffers.items()}
    wanted |= {f"ring.{name}": x.values[:, :, : min(x.rows, bound)] for name, x in rings.items()}
    return wanted | {f"group.{name}": x.values[:, :, : bound // x.every] for name, x in groups.items()}


def _read_oldest(state: Mapping[str, Any], name: str, batch: int, device: torch.device) -> int | Tensor:
    """From which token on a ring of a state holds values.

    Raises:
        ShapeError: If it is neither an int nor int64 ``[B]``.
    """
    oldest = state.get(_oldest(name))
    if isinstance(oldest, Tensor) and oldest.dtype == torch.int64 and list(oldest.shape) == [batch]:
        return oldest.to(device, copy=True)
    if type(oldest) is not int:
        raise ShapeError(f"{_oldest(name)}: expected an int or int64 [{batch}], got {oldest!r}")
    return oldest


def _oldest(name: str) -> str:
    return f"ring.{name}.oldest"
