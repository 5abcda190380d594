"""The options of LongHeads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from attnzoo.base.config import AttentionConfig, check_bool, check_int
from attnzoo.base.rope import RotaryConfig as RotaryConfig
from attnzoo.reporting.choices import check_choice
from attnzoo.variants.longheads.chunks import ChunkGrid
from attnzoo_kernels.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LongHeadsConfig(AttentionConfig):
    """LongHeads.

    Attributes:
        chunk_size: Tokens in a chunk, w.
        attention_length: Tokens that a query reads at most, K chunks; half the pretrained length is a good choice.
        begin: The first token that selects, a multiple of ``chunk_size``, at least ``attention_length``; ``None`` means
            ``attention_length``. Tokens before it read everything.
        select: Who chooses the chunks: every "token", or the first token of each "block" for all of it, which is
            faster.
        query_block: Tokens of such a block, a divisor of ``chunk_size``; ``None`` means the largest up to 64.
        chunk_rep: What stands for a chunk: "attention" as published, or "mean_key", the mean of its rotated keys.
        group_select: Whether the query heads of a KV head choose together, by the sum of their scores.
        official_quirks: Whether to do as the published code does where it differs between prefill and decoding.
    """

    chunk_size: int = 256
    attention_length: int = 4096
    begin: int | None = None
    select: Literal["token", "block"] = "token"
    query_block: int | None = None
    chunk_rep: Literal["attention", "mean_key"] = "attention"
    group_select: bool = False
    official_quirks: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.causal:
            raise ConfigError("causal: expected True, since chunks of the past are chosen, got False")
        check_int("chunk_size", self.chunk_size, 1)
        check_int("attention_length", self.attention_length, 1)
        size = self.chunk_size
        length = self.attention_length
        if length % size or length // size < 4:
            raise ConfigError(f"attention_length: expected at least 4 whole chunks of {size}, got {length}")
        if self.begin is not None:
            check_int("begin", self.begin, 1)
        if self.first < length or self.first % size:
            raise ConfigError(f"begin: expected a multiple of {size} from {length} on, got {self.begin}")
        check_choice("select", self.select, ("token", "block"))
        check_choice("chunk_rep", self.chunk_rep, ("attention", "mean_key"))
        if self.query_block is not None:
            check_int("query_block", self.query_block, 1)
            if size % self.query_block:
                raise ConfigError(f"query_block: expected a divisor of chunk_size {size}, got {self.query_block}")
        check_bool("group_select", self.group_select)
        check_bool("official_quirks", self.official_quirks)
        if self.official_quirks and self.select == "block":
            raise ConfigError("select: expected 'token' with official_quirks, got 'block'")

    @property
    def slots(self) -> int:
        """Chunks that a query reads, K."""
        return self.attention_length // self.chunk_size

    @property
    def first(self) -> int:
        """The first token that selects."""
        return self.attention_length if self.begin is None else self.begin

    @property
    def block_q(self) -> int:
        """Tokens that share a choice."""
        if self.select == "token":
            return 1
        return _divisor(self.chunk_size) if self.query_block is None else self.query_block

    @property
    def block_k(self) -> int:
        """Tokens in a key block of the layout; changes no result."""
        return _divisor(self.chunk_size)

    @property
    def grid(self) -> ChunkGrid:
        """The chunks' sizes."""
        return ChunkGrid(
            size=self.chunk_size,
            slots=self.slots,
            first=self.first,
            block_q=self.block_q,
            block_k=self.block_k,
            rotated=self.rotary is not None,
        )

    @classmethod
    def small(cls) -> Self:
        """Four heads of 8 over chunks of 8, four of which are read."""
        return cls(dim=32, num_heads=4, chunk_size=8, attention_length=32)


def _divisor(size: int) -> int:
    """The largest divisor of a chunk's size up to 64."""
    return next(n for n in range(min(size, 64), 0, -1) if size % n == 0)
