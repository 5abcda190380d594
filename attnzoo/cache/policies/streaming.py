r"""Streaming: every KV head holds the sequence's first blocks and its nearest ones.

Source: Xiao et al. 2023, *Efficient Streaming Language Models with Attention Sinks* (arXiv:2309.17453); code:
mit-han-lab/streaming-llm.

A row of block I reads the blocks J with

.. math:: J \le I \wedge ( I - J < L \vee J < s ),

s sink blocks and L near ones, the row's own among them. A window of W tokens in blocks of w is L = W / w + 1, so that
every row reads the W tokens before it at least, and at most w - 1 more.

Departures: the rule is by block, and the same for prompts and for decoding, so that any split of a sequence into calls
gives the same result. Rows keep the positions that they have; the paper's code renumbers what is in the cache.

Letters: G KV heads, I and J blocks, L near blocks, W tokens of the window, s sink blocks, w tokens in a block.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from attnzoo.cache.policies.protocol import Policy
from attnzoo.cache.retention import Retention
from attnzoo_kernels.errors import ConfigError


@dataclass(frozen=True, eq=False, kw_only=True)
class Streaming(Policy, name="streaming"):
    """Sinks and a window for every KV head; what leaves the window is gone.

    Attributes:
        sink: First tokens that stay, a multiple of ``block``.
        window: Tokens before its own that every row reads at least, a multiple of ``block``.
        block: Tokens in a block.

    Raises:
        ConfigError: If a number is none, or no multiple.
    """

    sink: int = 64
    window: int = 256
    block: int = 64
    page: int = field(default=64, init=False)

    def __post_init__(self) -> None:
        _check_count("block", self.block, 1)
        _check_count("slack", self.slack, 0)
        for name in ("sink", "window"):
            _check_blocks(name, getattr(self, name), self.block)
        # A page of a pool is a block.
        object.__setattr__(self, "page", self.block)

    @classmethod
    def of_blocks(cls, sink: int, near: int, block: int = 64, **settings: Any) -> Self:
        """The policy of so many sink blocks, and of so many near blocks, the own one included."""
        _check_count("near", near, 1)
        _check_count("sink", sink, 0)
        _check_count("block", block, 1)
        return cls(sink=sink * block, window=(near - 1) * block, block=block, **settings)

    @property
    def sink_blocks(self) -> int:
        """Blocks of the sink, s."""
        return self.sink // self.block

    @property
    def near_blocks(self) -> int:
        """Near blocks L, the own one included."""
        return self.window // self.block + 1

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._said())})"

    def _said(self) -> list[str]:
        """What is told of the settings: tokens, and the blocks that they come to."""
        slack = [f"slack={self.slack}"] if self.slack else []
        blocks = f"block={self.block}: {self.sink_blocks} sink and {self.near_blocks} near blocks"
        return [*slack, f"sink={self.sink}", f"window={self.window}", blocks]

    def retention(self, kv_heads: int) -> Retention:
        """The sink's blocks and the near ones, for every KV head."""
        return self._retention((False,) * kv_heads)

    def _retention(self, full: tuple[bool, ...]) -> Retention:
        return Retention(block=self.block, local=self.near_blocks, full=full, sink=self.sink_blocks)


def _check_count(name: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:
        raise ConfigError(f"{name}: expected an int >= {least}, got {value!r}")


def _check_blocks(name: str, value: int, block: int) -> None:
    """Raises unless a number of tokens is one of whole blocks.

    Raises:
        ConfigError: Naming the setting, and the multiples beside it.
    """
    _check_count(name, value, 0)
    if value % block:
        below = value - value % block
        raise ConfigError(
            f"{name}: expected a multiple of block {block}, such as {below} or {below + block}, got {value}"
        )
