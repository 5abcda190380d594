r"""S2 attention: every KV head reads the near blocks and its own shard of the far ones.

Source: Lin et al. 2024, *S2-Attention: Hardware-Aware Context Sharding Among Attention Heads* (arXiv:2407.17678); code:
linxihui/dkernel. KV head n reads key block J from query block I, with L local blocks and stride v, if

.. math:: J \le I \wedge ( I - J < L \vee n \ge G - n_{dense} \vee J < sink
          \vee (J + n \cdot step + offset) \bmod v = 0 )

Without causality the strided blocks are relative to the local ones, the same for all heads.

Departures: ``step`` spreads the KV heads that are not dense evenly over the stride; ``"dkernel"`` is the rule as
published, v // H, which leaves blocks that no head reads as soon as heads are grouped. ``sink_blocks`` is an addition.
Chunks and decoding follow the sequence's own block grid, so that any split gives the same result. A block that a head
has dropped is never read by it again, so that ``new_cache(evict=True)`` may free it.

Letters: M/N query/key blocks, I a query block, J a key block, H query heads, G KV heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from attnzoo.base.config import AttentionConfig, check_bool, check_int
from attnzoo.base.decoding.compiled import HiddenRow, hidden_from_compilers
from attnzoo.base.evicting.layer import EvictingLayer
from attnzoo.base.layer import AttentionInputs, Heads, Plan, Step
from attnzoo.base.projections import slice_index
from attnzoo.base.rope import RotaryConfig as RotaryConfig
from attnzoo.base.shared_layouts import dense_layout, may_share
from attnzoo.cache.kv_cache import KVCache
from attnzoo.cache.lengths import Lengths
from attnzoo.cache.retention import Retention
from attnzoo.variants.s2.blocks_of_row import ending_at, slots_of_blocks
from attnzoo_kernels import BlockLayout, Extras, Slots, attend_slots, remembers
from attnzoo_kernels.errors import ConfigError, UnsupportedError


@dataclass(frozen=True, kw_only=True)
class S2Config(AttentionConfig):
    """S2 attention.

    Attributes:
        block_size: Tokens in a block.
        local_blocks: Nearest blocks that every head reads, the own one included; a pair (back, ahead) where the layer
            is not causal, else as many ahead as back.
        vert_stride: Every how many blocks a head reads one further away.
        head_offset: Shift of all heads' strided blocks.
        step: Shift from one KV head to the next; ``None`` spreads them evenly, "dkernel" is the published rule.
        num_dense_heads: Last KV heads, which read everything.
        sink_blocks: First blocks, which every head reads.
        homogeneous: Whether all heads read what head 0 reads.
    """

    block_size: int = 64
    local_blocks: int | tuple[int, int] = 16
    vert_stride: int = 8
    head_offset: int = 0
    step: int | Literal["dkernel"] | None = None
    num_dense_heads: int = 0
    sink_blocks: int = 0
    homogeneous: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.local_blocks, list | tuple):
            object.__setattr__(self, "local_blocks", tuple(self.local_blocks))
            if self.causal or len(self.local_blocks) != 2:
                raise ConfigError(f"local_blocks: expected an int, a pair if not causal, got {self.local_blocks}")
        local = self.local_blocks if isinstance(self.local_blocks, tuple) else (self.local_blocks,)
        for value in local:
            check_int("local_blocks", value, 1)
        for name, least in (("block_size", 1), ("vert_stride", 1), ("head_offset", 0), ("sink_blocks", 0)):
            check_int(name, getattr(self, name), least)
        check_int("num_dense_heads", self.num_dense_heads, 0)
        check_bool("homogeneous", self.homogeneous)
        if self.num_dense_heads > self.kv_heads:
            raise ConfigError(f"num_dense_heads: expected at most {self.kv_heads} KV heads, got {self.num_dense_heads}")
        if self.step is not None:
            check_int("step", self.step, 0, "dkernel")

    @property
    def head_step(self) -> int:
        """The shift from one KV head to the next."""
        if isinstance(self.step, int):
            return self.step
        heads = self.num_heads if self.step == "dkernel" else self.kv_heads - self.num_dense_heads
        return max(1, self.vert_stride // max(1, heads))

    @property
    def coverage(self) -> float:
        """The share of far blocks that at least one KV head reads."""
        if self.num_dense_heads or not self.causal:
            return 1.0 if self.num_dense_heads else 1 / self.vert_stride
        heads = 1 if self.homogeneous else self.kv_heads
        return len({n * self.head_step % self.vert_stride for n in range(heads)}) / self.vert_stride

    @property
    def cautions(self) -> tuple[str, ...]:
        """That blocks are read by no head, or all by all."""
        if self.vert_stride == 1 or self.num_dense_heads == self.kv_heads:
            return (
                f"s2: with vert_stride {self.vert_stride} and {self.num_dense_heads} of {self.kv_heads} KV heads dense "
                "every head reads everything: this is plain attention, which 'mha' computes",
            )
        if self.causal and self.coverage < 1:
            return (
                f"s2: with {self.kv_heads} KV heads and vert_stride {self.vert_stride}, {1 - self.coverage:.0%} of the "
                "far blocks are read by no head",
            )
        return ()

    @classmethod
    def small(cls) -> Self:
        """Four heads of 8 over blocks of 8."""
        return cls(dim=32, num_heads=4, block_size=8, local_blocks=2, vert_stride=4)

    @classmethod
    def phi3_small(cls) -> Self:
        """The sparse layers of Phi-3-small: 32 heads on 8 KV heads of 128, strided from block 7 of head 0."""
        return cls(dim=4096, num_heads=32, num_kv_heads=8, bias=True, head_offset=1)


class S2Attention(EvictingLayer, name="s2"):
    """Attention over a static shard of the context for each KV head.

    Attributes:
        first_kv_head: Under tensor parallelism, the index of this slice's first KV head among all; ``None`` where all
            are here, or where the weight of ``k_proj`` is a distributed tensor, which says it.
    """

    config_class = S2Config
    config: S2Config
    causal_promise = "bidirectional-capable"
    compiles_rows = True
    dense_limit: ClassVar[dict[str, Any]] = {"vert_stride": 1}
    first_kv_head: int | None

    def __init__(self, config: S2Config | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.first_kv_head = None

    def check_context(self, cache: KVCache | None, positions: Tensor | None) -> None:
        """Refuses: the shards are blocks of the layer's own sequence."""
        raise UnsupportedError("context: s2 shards the blocks of its own sequence, it cannot read another")

    def plan(self, step: Step, heads: Heads, inputs: AttentionInputs) -> Plan:
        """The shards of each item's own blocks."""
        config = self.config
        tokens = inputs.q.shape[2]
        slots = inputs.slots
        offset = step.offset if config.causal else 0
        groups = self._groups(inputs.k.shape[1])
        held = Lengths(offset).shared
        block_q = config.block_size if held == 0 or tokens >= config.block_size else 1
        # Query blocks lie on the sequence's own grid.
        front = offset % block_q
        rows = tokens + Lengths(front).most(block_q - 1)
        local = config.local_blocks
        all_near = isinstance(local, int) and slots <= local * config.block_size
        if config.causal and all_near and block_q == config.block_size and held is not None:
            # Nothing is far: every head reads everything, as the layout of all blocks says at less cost.
            return Plan(dense_layout(block_q, rows, slots, inputs.q), Extras(), True, front=front)
        extent = _Extent(offset - front, block_q, rows, slots, *groups)
        build = _shared_layout if held is not None and may_share(inputs.q) else _layout
        return Plan(build(config, extent, inputs.q.device), Extras(), config.causal, front=front)

    def row_slots(self, held: int, device: torch.device) -> Slots:
        """The blocks of each head, of which the row's own is filled up to the row."""
        return _slots_of_row(self.config, self._groups(self.config.kv_heads), held, device)

    def may_compile_row(self, x: Tensor, cache: KVCache) -> bool:
        """As every layer."""
        return super().may_compile_row(x, cache) and self.may_hide_row(cache)

    def compiled_row(self, step: Step, heads: Heads) -> Tensor:
        """As every layer; lists of blocks are looked up."""
        inputs = self.remember(step, heads)
        first, groups = self._groups(inputs.k.shape[1])
        tensors = (inputs.q, inputs.k, inputs.v)
        return self.hidden_row("s2", tensors, inputs.k.shape[2], float(first), float(groups), self.row_scale)

    def why_no_policy(self) -> str | None:
        """The shards are a rule of its own."""
        return "its shards are a rule of its own, which evict=True follows"

    def retention(self, heads: int) -> Retention:
        """What rows can read: near blocks, sinks and a head's strided blocks; everything for dense heads."""
        config = self.config
        first, count = self._groups(heads)
        stride = config.vert_stride
        step = 0 if config.homogeneous else config.head_step
        here = range(first, first + count)
        local = config.local_blocks
        return Retention(
            block=config.block_size,
            local=local if isinstance(local, int) else local[0],
            full=tuple(stride == 1 or n >= config.kv_heads - config.num_dense_heads for n in here),
            sink=config.sink_blocks,
            stride=stride,
            phases=tuple(-(n * step + config.head_offset) % stride for n in here),
        )

    def _groups(self, held: int) -> tuple[int, int]:
        """Index of the first KV head held here, and their number."""
        first = self.first_kv_head
        if held != self.config.kv_heads and first is None:
            slice_here = slice_index(self.k_proj)
            if slice_here is None and not self.config.homogeneous:
                raise UnsupportedError(
                    f"first_kv_head: expected to be set on a layer that holds {held} of {self.config.kv_heads} KV heads"
                )
            first = (slice_here or 0) * held
        return first or 0, held


def _kept(config: S2Config, groups: tuple[int, int], blocks: int) -> Tensor:
    """Which of the first blocks each KV head reads however far away they are, bool ``[G, N]``.

    Args:
        config: The layer's.
        groups: Index of the first KV head, and their number.
        blocks: Blocks N.
    """
    head = torch.arange(groups[0], sum(groups), device="cpu").unsqueeze(1)
    block = torch.arange(blocks, device="cpu")
    shift = (0 if config.homogeneous else config.head_step) * head + config.head_offset
    kept = ((block + shift) % config.vert_stride == 0) | (block < config.sink_blocks)
    return kept | (head >= config.kv_heads - config.num_dense_heads)


def _slots_of_row(config: S2Config, groups: tuple[int, int], held: int, device: torch.device) -> Slots:
    """What the last of ``held`` tokens reads, by KV heads: the index of the first, and their number."""
    return ending_at(_shared_slots(config, groups, (held - 1) // config.block_size, device), held)


@hidden_from_compilers("s2")
def _attend_row(row: HiddenRow) -> Tensor:
    """Attention of a row to its blocks; beside q, k and v the first KV head, their number, and the scale."""
    q, k, v = row.tensors
    first, groups, scale = row.numbers
    slots = _slots_of_row(row.config, (int(first), int(groups)), row.held, q.device)
    return attend_slots(q, k, v, slots, scale=scale)


@remembers(16)
def _shared_slots(config: S2Config, groups: tuple[int, int], own: int, device: torch.device) -> Slots:
    """What a row in block ``own`` reads up to the block's end: lists change at the borders of blocks alone."""
    local = config.local_blocks
    near = max(0, own + 1 - (local if isinstance(local, int) else local[0]))
    with torch.inference_mode(False):
        kept = _kept(config, groups, own + 1) | (torch.arange(own + 1, device="cpu") >= near)
        return slots_of_blocks(kept, near, config.block_size, device)


@dataclass(frozen=True)
class _Extent:
    """Where the rows of one layout lie.

    Attributes:
        first: Position of the first row, an int or int64 ``[B]``.
        block_q: Rows in a query block.
        rows: Rows.
        slots: Keys.
        first_head: Index of the first KV head among all.
        heads: KV heads.
    """

    first: int | Tensor
    block_q: int
    rows: int
    slots: int
    first_head: int
    heads: int


def _layout(config: S2Config, extent: _Extent, device: torch.device) -> BlockLayout:
    sizes = (extent.block_q, config.block_size, extent.rows, extent.slots)
    heads = range(extent.first_head, extent.first_head + extent.heads)
    dense = [n >= config.kv_heads - config.num_dense_heads for n in heads]
    if not isinstance(config.local_blocks, int) or not config.causal:
        return BlockLayout.from_mask(_relative(config, sizes, dense, device), *sizes)
    step = 0 if config.homogeneous else config.head_step
    uniform = step == 0 and not any(dense)
    return BlockLayout.strided(
        *sizes,
        local_blocks=config.local_blocks,
        vert_stride=config.vert_stride,
        shift=[n * step + config.head_offset for n in (heads[:1] if uniform else heads)],
        sink_blocks=config.sink_blocks,
        dense_heads=dense if any(dense) else None,
        q_start=extent.first,
        device=device,
    )


def _relative(config: S2Config, sizes: tuple[int, int, int, int], dense: list[bool], device: torch.device) -> Tensor:
    """The rule without causality, bool ``[1, h, M, N]``: strides count from the edges of the local blocks."""
    local = config.local_blocks
    back, ahead = local if isinstance(local, tuple) else (local, local)
    block_q, block_k = (
        torch.arange(-(-length // block), device=device)
        for block, length in ((sizes[0], sizes[2]), (sizes[1], sizes[3]))
    )
    distance = block_q.unsqueeze(1) - block_k
    beyond = (distance - back + 1).clamp(min=0) + (1 - ahead - distance).clamp(min=0)
    keep = ((beyond % config.vert_stride == 0) | (block_k < config.sink_blocks)).expand(1, 1, -1, -1)
    return keep | torch.tensor(dense, device=device).view(1, -1, 1, 1) if any(dense) else keep


@remembers(32)
def _shared_layout(config: S2Config, extent: _Extent, device: torch.device) -> BlockLayout:
    """One layout, and thereby one schedule, for all layers of a model."""
    with torch.inference_mode(False):
        return _layout(config, extent, device)
