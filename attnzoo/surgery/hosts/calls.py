"""How hosts call an attention block: what they hand over besides hidden states, by the names of every version.

Every module that takes a block's place reads its call here, and the attention function what the host's own blocks pass
on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from attnzoo.base.editing.reads import ReadEdit
from attnzoo_kernels.errors import UnsupportedError

CACHE_NAMES = ("past_key_values", "cache", "layer_past")
"""What hosts call their cache: transformers up to 5.23, from 5.24, and the blocks of GPT-NeoX and GPT-J."""

_IGNORED = frozenset({"use_cache", "cache_position", "is_causal", "num_items_in_batch", "output_hidden_states"})

Reply = Literal["pair", "triple", "tensor"]
"""What a block's parent unpacks: the output and weights, these and the cache, or the output alone."""

AROUND = "attnzoo_around"
"""The attribute of a block that holds who is asked in its attention's place, with an :class:`AttentionCall`."""


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """A call of a block's attention, for who looks at it or answers otherwise.

    Attributes:
        q: Rotated queries ``[B, H, T, D]``.
        k: Rotated keys ``[B, G, S, D]`` of all slots that the host's cache hands over; of the call's own tokens alone
            where the block reads what a cache that evicts has kept.
        v: Their values ``[B, G, S, Dv]``.
        geometry: Where they lie: ``first``, the slot of the first query, and ``real``, which slots hold tokens.
        scale: The factor on scores.
        answer: What the block's own attention gives ``[B, H, T, Dv]`` for such a call: for its q, k, v and edits.
        unrotated: The same tokens' q and k before rotation ``[B, H, T, D]`` and ``[B, G, T, D]``, where that was asked
            for.
        held: Whether the block reads what a cache that evicts has kept, besides ``k`` and ``v``.
        edits: What is edited of what heads read, in order; who was asked before has put it there.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    geometry: Any
    scale: float
    answer: Callable[[AttentionCall], Tensor]
    unrotated: tuple[Tensor, Tensor] | None = None
    held: bool = False
    edits: tuple[ReadEdit, ...] = ()

    def answered(self) -> Tensor:
        """What the block's own attention gives ``[B, H, T, Dv]``."""
        return self.answer(self)


@dataclass(frozen=True, eq=False)
class HostCall:
    """What a host's call says besides hidden states, rotation and mask.

    Attributes:
        cache: The host's cache, or ``None``.
        position_ids: ``[B|1, T]``, or ``None``.
    """

    cache: Any
    position_ids: Tensor | None


def read_call(arguments: Mapping[str, Any], cache: Any = None, *, causal: bool = True) -> HostCall:
    """Reads the arguments of a host's call.

    Args:
        arguments: Those that came by name.
        cache: The cache, where it came by place.
        causal: Whether the block reads what came before alone.

    Raises:
        UnsupportedError: Naming the argument, if one is not known here, or if the cache came twice.
    """
    rest = dict(arguments)
    cache = take_cache(rest, cache)
    position_ids = rest.pop("position_ids", None)
    for name, given in rest.items():
        if name not in _IGNORED and given is not None and given is not False:
            raise UnsupportedError(f"{name}: expected None, got {given!r}, which attnzoo cannot honour")
    if rest.get("is_causal") not in (None, causal):
        reads = "what came before alone" if causal else "what comes behind too"
        raise UnsupportedError(f"is_causal: expected {causal}, got {not causal}; the block reads {reads}")
    return HostCall(cache, position_ids)


def named_arguments(names: Sequence[str], given: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names, whether they came by place or by name.

    Raises:
        TypeError: If there are too many, or one came twice.
    """
    if len(given) > len(names):
        raise TypeError(f"forward: expected at most {len(names)} arguments by place, got {len(given)}")
    by_place = dict(zip(names, given, strict=False))
    twice = sorted(by_place.keys() & named.keys())
    if twice:
        raise TypeError(f"{twice[0]}: expected it once, got it by place and by name")
    return {**by_place, **named}


def as_reply(reply: Reply, out: Tensor, cache: Any = None) -> Any:
    """What a host's parent unpacks: the output, with nothing in the places of weights, and its cache."""
    if reply == "tensor":
        return out
    return (out, None) if reply == "pair" else (out, None, cache)


def take_cache(arguments: dict[str, Any], cache: Any = None) -> Any:
    """Takes the host's cache out of a call's arguments, whichever of its names it has.

    Raises:
        UnsupportedError: If it came twice.
    """
    for name in CACHE_NAMES:
        given = arguments.pop(name, None)
        if given is not None and cache is not None:
            raise UnsupportedError(f"{name}: expected the cache by one name, got it by two of {', '.join(CACHE_NAMES)}")
        cache = given if cache is None else cache
    return cache


def cache_name(forward: Callable[..., Any]) -> str:
    """What a host's function calls its cache.

    Raises:
        UnsupportedError: If it takes none.
    """
    parameters = inspect.signature(forward).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    raise UnsupportedError(f"forward: expected an argument {' or '.join(CACHE_NAMES)}, got {', '.join(parameters)}")
