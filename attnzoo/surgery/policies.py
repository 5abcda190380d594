"""Policies on models for a while: what is applied, the caches that follow it, and what they hold.

Letters: B batch, G KV heads.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

from torch import nn

from attnzoo.base.config import check_flag
from attnzoo.cache.policies.known import Policy
from attnzoo.reporting.tables import Grid, lines
from attnzoo.surgery.convert import convert, new_cache
from attnzoo.surgery.hosts.attention_function import pattern_of
from attnzoo.surgery.hosts.caches.evicting_calls import begin_layer, follows
from attnzoo.surgery.report import WIDTH, ConversionReport
from attnzoo.surgery.sites import find
from attnzoo_kernels.errors import ConfigError, UnsupportedError


@dataclass(frozen=True)
class LayerHeld:
    """What the cache of one layer holds.

    Attributes:
        layer: Which layer of the cache.
        tokens: Tokens that were seen, of all items together.
        rows: Keys that are held, each with its value, of all items and KV heads together.
        dense_rows: The same if everything were held.
        held_bytes: Bytes of these keys and values.
        dense_bytes: The same if everything were held.
        pool_bytes: Bytes of the buffers, with room for more.
        offloaded_bytes: Those of them that are kept in CPU memory.
    """

    layer: int
    tokens: int
    rows: int
    dense_rows: int
    held_bytes: int
    dense_bytes: int
    pool_bytes: int
    offloaded_bytes: int = 0


@dataclass(frozen=True)
class PolicyReport:
    """What a cache holds, beside one that holds everything; ``print`` it for a table.

    Attributes:
        policy: In words.
        layers: Of each layer that has seen something.
    """

    policy: str
    layers: tuple[LayerHeld, ...]

    @property
    def tokens(self) -> int:
        """Tokens that were seen, of all items together."""
        return max((layer.tokens for layer in self.layers), default=0)

    @property
    def held_bytes(self) -> int:
        """Bytes of what is held."""
        return sum(layer.held_bytes for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Bytes if everything were held."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def pool_bytes(self) -> int:
        """Bytes of the buffers, with room for more."""
        return sum(layer.pool_bytes for layer in self.layers)

    @property
    def share(self) -> float:
        """Bytes held over bytes if everything were held; 1 where nothing was seen."""
        return self.held_bytes / self.dense_bytes if self.dense_bytes else 1.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes held for each token seen."""
        return self.held_bytes / self.tokens if self.tokens else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        own = {name: getattr(self, name) for name in ("tokens", "held_bytes", "dense_bytes", "pool_bytes", "share")}
        return {"policy": self.policy, **own, "layers": [asdict(layer) for layer in self.layers]}

    def grid(self) -> Grid:
        """The report as a table."""
        rows = [_cells(str(layer.layer), layer) for layer in self.layers]
        title = f"{self.policy}: {self.share:.1%} of a dense cache's bytes, {self.bytes_per_token:,.0f} per token"
        caption = f"{self.held_bytes:,} of {self.dense_bytes:,} bytes held, in buffers of {self.pool_bytes:,}"
        offloaded = sum(layer.offloaded_bytes for layer in self.layers)
        if offloaded:
            caption += f", {offloaded:,} of these in CPU memory"
        heads = ("layer", "rows held", "dense", "bytes held", "dense", "buffers")
        return Grid(heads, rows, title=title, caption=caption, numbers=frozenset(range(6)))

    def __str__(self) -> str:
        return "\n".join(line for line, _ in lines(self.grid(), WIDTH))


def _cells(name: str, held: LayerHeld) -> tuple[str, ...]:
    counts = (held.rows, held.dense_rows, held.held_bytes, held.dense_bytes, held.pool_bytes)
    return (name, *(f"{count:,}" for count in counts))


class PolicyRun:
    """A policy on a model, from ``with`` to its end; see :func:`applied`.

    Attributes:
        model: The model.
        policy: The policy.
    """

    def __init__(self, model: nn.Module, policy: Policy) -> None:
        self.model = model
        self.policy = policy
        self._conversion: ConversionReport | None = None

    def __enter__(self) -> Self:
        if self._conversion is not None:
            raise ConfigError("applied: expected a policy that is not on the model yet, got one that is entered twice")
        self._conversion = convert(self.model, "policy", policy=self.policy)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        conversion = self._conversion
        self._conversion = None
        if conversion is not None:
            conversion.undo()

    def new_cache(self, *, offload: bool = False) -> Any:
        """An empty cache that follows the policy, for ``generate`` or calls of the model; see :func:`cache`.

        Raises:
            TypeError: If ``offload`` is no bool.
            UnsupportedError: Outside of the ``with`` statement.
        """
        self._check_entered()
        return cache(self.model, self.policy, offload=offload)

    def compact(self, cache: Any) -> None:
        """Lets a cache go over what it holds now, where the policy chooses by what was seen.

        Raises:
            ConfigError: If the cache does not follow a policy.
        """
        for _, layer in _held_layers(cache):
            layer.compact()

    def report(self, cache: Any) -> PolicyReport:
        """What a cache holds, beside one that holds everything.

        Raises:
            ConfigError: If the cache does not follow a policy.
        """
        return PolicyReport(
            str(self.policy), tuple(_held(n, layer) for n, layer in _held_layers(cache) if layer.memory)
        )

    def _check_entered(self) -> None:
        if self._conversion is None:
            raise UnsupportedError("applied: expected a policy that is on the model, inside of its with statement")


def applied(model: nn.Module, policy: Policy) -> PolicyRun:
    """Puts a policy on a model of transformers for the time of a ``with`` statement.

    Nothing of the model is changed but the attention function that it is called by, which is put back behind the
    statement, after an exception too. Caches that ``generate`` makes meanwhile follow the policy by themselves.

    Args:
        model: A model of a family that :func:`attnzoo.surgery.find` knows, without sliding windows of its own.
        policy: Of :mod:`attnzoo.policies`.

    Returns:
        For ``with``: it makes caches, and says what they hold.

    Raises:
        ConfigError: When it is entered, if the policy does not fit the model, or is on it already.
        UnsupportedError: When it is entered, if a block reads by a rule of its own, or follows another policy.
    """
    return PolicyRun(model, policy)


def cache(model: nn.Module, policy: Policy, *, offload: bool = False) -> Any:
    """An empty cache for a model that a policy is on, by :func:`applied` or :func:`attnzoo.surgery.convert`.

    It is a ``DynamicCache``, for ``generate(past_key_values=...)`` (``cache=...`` from transformers 5.24 on).

    Args:
        model: The model.
        policy: The policy that is on it.
        offload: Whether keys and values stay in CPU memory. What the policy chooses by lies on the device; a decoding
            row fetches the pages that the policy reads, every other call all that is held.

    Raises:
        TypeError: If ``offload`` is no bool.
        UnsupportedError: If another policy is on the model, or none.
    """
    check_flag("offload", offload)
    made = new_cache(model)
    is_on = False
    for site in find(model):
        module: Any = model.get_submodule(site.path)
        pattern = pattern_of(module)
        if pattern is not None and follows(pattern.layer, policy.of_layer(site.layer)):
            begin_layer(module, pattern.layer, made, offload=offload)
            is_on = True
    if not is_on:
        raise UnsupportedError(
            f"policy: expected {policy} to be on the model: use policies.applied, or surgery.convert"
        )
    return made


def _held_layers(cache: Any) -> list[tuple[int, Any]]:
    """The layers of a host's cache that follow a policy, each with its number."""
    layers = getattr(cache, "layers", None)
    found = [(n, layer) for n, layer in enumerate(layers or []) if getattr(layer, "follows_policy", False)]
    if not found:
        raise ConfigError(f"cache: expected one that follows a policy, got {type(cache).__name__} without such layers")
    return found


def _held(number: int, layer: Any) -> LayerHeld:
    memory = layer.memory
    tokens = int(memory.lengths.sum())
    dense = tokens * memory.kv_heads
    dense_bytes = dense * memory.row_bytes
    return LayerHeld(
        layer=number,
        tokens=tokens,
        rows=memory.held_rows,
        dense_rows=dense,
        held_bytes=memory.held_bytes,
        dense_bytes=dense_bytes,
        pool_bytes=memory.nbytes,
        offloaded_bytes=memory.offloaded_nbytes,
    )
