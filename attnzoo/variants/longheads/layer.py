r"""LongHeads: beyond a threshold, every head reads a few chunks of the past, moved together; nothing is trained.

Source: Lu et al. 2024, *LongHeads: Multi-Head Attention is Secretly a Long Context Processor* (arXiv:2402.10685); code:
LuLuLuyi/LongHeads. With chunks of w tokens, K slots and R(p) the rotation to position p:

.. math:: \bar q_c = mean_u\, softmax(\sigma R q_u (R k)^T) v, \quad
          \bar c = softmax(\sigma \bar q_c (R k)^T) R k \quad \text{within chunk } c \text{, positions } 0..w-1

Query t of the own chunk :math:`cur = \lfloor t / w \rfloor` reads, from ``begin`` on, chunk 0, chunk cur - 1, its own
one up to itself, and the K - 3 chunks between them with the highest :math:`q_t \cdot \bar c`, q not rotated. The chosen
chunks, ascending, lie in slots r = 0 .. K - 1 at positions :math:`r w + u`, the query at :math:`(K - 1) w + t \bmod w`:
no position is larger than the attention length. Queries before ``begin`` are plain attention.

Keys are kept rotated to their place in their chunk, whoever reads them; the slot is a rotation of the query, which the
operation makes for each entry of the layout (its rotary origin).

Departures: prefill follows the rule above in every row, as the published decoding steps do, so that any split of a
sequence gives the same result. Under ``official_quirks`` a prefill row that selects does not read itself, and a
decoding step whose token completes a chunk has a slot less and takes this chunk for the last complete one, as
published. Grouped heads, ``group_select``, ``select="block"`` and ``chunk_rep="mean_key"`` are additions. A chunk's key
goes by its tokens' places in the chunk; other positions that a caller gives rotate queries and keys alone.

Letters: B batch, T query tokens, S key tokens, H query heads, G KV heads, D head width, M query blocks, N chunks,
K slots, w tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnzoo.base.decoding.step import TokenRow
from attnzoo.base.editing.reads import CallEdits as CallEdits
from attnzoo.base.layer import LONG_CALL, AttentionInputs, Heads, Plan, Step
from attnzoo.base.padding import attend_in_chunks, for_heads, in_chunks, leading_rows
from attnzoo.base.rope import RotaryConfig as RotaryConfig
from attnzoo.base.rope import apply_rotary, rotary_tables, rotation_tables, shared_rotation_tables
from attnzoo.base.shared_layouts import may_share
from attnzoo.base.steps import is_training
from attnzoo.cache.kv_cache import KVCache, Stream
from attnzoo.cache.lengths import Lengths
from attnzoo.selection.offloading import OffloadingLayer
from attnzoo.variants.longheads.chunks import (
    Asking,
    Candidates,
    blocks_of,
    choose_chunks,
    is_step,
    plain_layout,
    slots_of_rows,
    take,
)
from attnzoo.variants.longheads.config import LongHeadsConfig
from attnzoo.variants.longheads.decoding import (
    MOST_CHUNKS,
    attend_all,
    attend_to_chunks,
    chosen_chunks,
    chunks_read,
    rotated_to_slots,
)
from attnzoo.variants.longheads.prefix import apart, begins_plain
from attnzoo_kernels import BlockLayout, Extras
from attnzoo_kernels.errors import UnsupportedError
from attnzoo_kernels.runtime.plain import is_open, is_plain

_SLOW = (
    "longheads: with select='token' every token chooses chunks for itself: at 1k tokens up to twice the time of plain "
    "attention; select='block', without official_quirks, takes about half as long again as that: the first token of "
    "each query_block chooses for all of it"
)

PRECISE = (torch.float32, torch.float64)
"""What a decoding step is computed in without the operation."""


@dataclass(frozen=True, eq=False)
class ChunkInputs(AttentionInputs):
    """Keys rotated to their place in their chunk, and what chunks are chosen by.

    Attributes:
        candidates: The chunks, and the queries that choose; ``None`` where every row reads everything, as ever.
    """

    candidates: Candidates | None = field(default=None, kw_only=True)


class LongHeadsAttention(OffloadingLayer, name="longheads"):
    """Attention over a few chosen chunks of the past, at positions that the model was trained at."""

    config_class = LongHeadsConfig
    config: LongHeadsConfig
    causal_promise = "strict"
    compiles_rows = True
    # The tokens before the threshold are plain attention, and this one is never reached.
    dense_limit: ClassVar[dict[str, Any]] = {"attention_length": 1 << 20}

    def check_context(self, cache: KVCache | None, positions: Tensor | None) -> None:
        """Refuses: chunks are those of the layer's own sequence."""
        raise UnsupportedError("context: longheads chooses chunks of its own sequence, it cannot read another")

    def project(self, step: Step) -> Heads:
        """Queries, keys and values, not rotated; halves of a head are a plane's two values from here on."""
        heads = super().project(step)
        return Heads(self._in_halves(heads.q), self._in_halves(heads.k), heads.v)

    def _in_halves(self, x: Tensor) -> Tensor:
        """Heads ``[.., D]`` with the values of a plane half a rotated width apart, as the operation rotates them."""
        rotary = self.config.rotary
        if rotary is None or not rotary.interleaved:
            return x
        width = rotary.width(self.config.head_width)
        return torch.cat((x[..., :width:2], x[..., 1:width:2], x[..., width:]), -1)

    def rotate(self, positions: Tensor, *heads: Tensor) -> tuple[Tensor, ...]:
        """Rotates tensors ``[B, h, T, D]`` in halves by positions ``[B|1, T]``; in fp32 at least."""
        rotary = self.config.rotary
        if rotary is None:
            return heads
        dtype = torch.promote_types(heads[0].dtype, torch.float32)
        cos, sin = rotary_tables(rotary, self.config.head_width, positions, dtype)
        return tuple(apply_rotary(x, cos, sin) for x in heads)

    def remember(self, step: Step, heads: Heads) -> ChunkInputs:
        """Rotates keys to their place in their chunk, and keeps what later choices need."""
        config = self.config
        cache = step.cache
        tokens = heads.q.shape[2]
        if cache is None and not is_open(tokens) and tokens <= config.first:
            return ChunkInputs(**vars(super().remember(step, heads)))
        size = config.chunk_size
        slot = slots_of_rows(step, tokens, heads.q.device)  # [B|1, T]
        q = self.rotate(step.positions - self._moved(step, slot), heads.q)[0]
        k = self.rotate(step.positions - (slot - slot % size), heads.k)[0]
        if cache is None:
            whole = tokens // size * size
            keys = self.chunk_keys(*(leading_rows(x.detach(), whole) for x in (heads.q, heads.k, heads.v)))
            return self._chunk_inputs(step, (q, k, heads.v), keys, heads.q)
        return self._remember_in(cache, step, heads, (q, k))

    def _remember_in(self, cache: KVCache, step: Step, heads: Heads, rotated: tuple[Tensor, Tensor]) -> ChunkInputs:
        config = self.config
        q, k = rotated
        grows = self._may_complete(cache, step, q.shape[2])
        now = {name: {"key": heads.k, "query": heads.q}[name] for name in self._rings}
        back = {"key": config.chunk_size - 1 if grows else 0}
        back["query"] = max(back["key"], config.block_q - 1)
        # What lies before this call has to be read before the call is written.
        recent = {
            name: torch.cat((cache.history(name, back[name]).to(x.dtype), x.detach()), 2) for name, x in now.items()
        }
        training = is_training(q, k, heads.v)
        seen = cache.append({"k": k, "v": heads.v, **now}, step.lengths, differentiable=training)
        if grows:
            self._complete(cache, step, recent, seen["v"])
        keys = cache.groups("chunk_key").to(q.dtype)
        inputs = self._chunk_inputs(step, (q, seen["k"], seen["v"]), keys, recent.get("query", heads.q))
        return replace(inputs, offloaded=cache.offloaded_nbytes > 0)

    @property
    def needs_length(self) -> bool:
        """By the reference."""
        return self.impl == "reference"

    @property
    def whole_block(self) -> int:
        """A chunk."""
        return self.config.chunk_size

    @property
    def _rings(self) -> tuple[str, ...]:
        """Streams of the last tokens as they were before rotation."""
        config = self.config
        return ("key", "query") if config.chunk_rep == "attention" or config.block_q > 1 else ("key",)

    def _chunk_inputs(
        self, step: Step, heads: tuple[Tensor, Tensor, Tensor], chunk_keys: Tensor, queries: Tensor
    ) -> ChunkInputs:
        seen = self.attention_inputs(step, *heads)
        q_pos = seen.q_pos
        if self.config.official_quirks and not is_step(step, heads[0].shape[2]):
            slot = slots_of_rows(step, heads[0].shape[2], heads[0].device).unsqueeze(1)
            q_pos = (slot if q_pos is None else q_pos) - (slot >= self.config.first).long()
            q_pos = q_pos.clamp(min=-1).to(torch.int32)
        candidates = Candidates(chunk_keys, queries.detach())
        return ChunkInputs(q=seen.q, k=seen.k, v=seen.v, q_pos=q_pos, key_bias=seen.key_bias, candidates=candidates)

    def _moved(self, step: Step, slot: Tensor) -> Tensor:
        """By how much the queries at slots ``[B|1, T]`` are nearer to the start than they were."""
        config = self.config
        own = slot // config.chunk_size
        moved = own - (config.slots - 1)
        if config.official_quirks and is_step(step, slot.shape[1]):
            # The step that completes a chunk has a slot less.
            moved = moved + (slot % config.chunk_size == config.chunk_size - 1).long()
        return torch.where(slot < config.first, 0, moved * config.chunk_size)

    def _may_complete(self, cache: KVCache, step: Step, tokens: int) -> bool:
        """Whether this call may complete a chunk; it never says no where one is completed."""
        size = self.config.chunk_size
        held = Lengths(step.offset).shared
        if held is not None and not Lengths(step.lengths).differ:
            return (held + tokens) // size > held // size
        if cache.device.type != "cpu" or not is_plain(step.x):
            return True
        before = torch.as_tensor(step.offset, device=cache.device)
        return bool(((before + step.lengths) // size > before // size).any())

    def _complete(self, cache: KVCache, step: Step, recent: dict[str, Tensor], values: Tensor) -> None:
        """Writes the keys of the chunks that this call completes.

        Args:
            cache: Holds this call's tokens already.
            step: The call.
            recent: Queries and keys of the ``w - 1`` tokens before the call and of the call, not rotated.
            values: All values ``[B, G, S, D]``.
        """
        size = self.config.chunk_size
        tokens = step.x.shape[1]
        before = size - 1
        token = torch.arange((before + tokens) // size * size, device=step.x.device)
        offset = Lengths(step.offset).column()
        slot = token.unsqueeze(0) + (offset - offset % size)  # [B|1, P * w]
        # Rows behind the call's last token are of chunks that are not complete.
        row = (slot - offset + before).clamp(max=before + tokens - 1)
        k = take(recent["key"], row)
        q = take(recent["query"], row) if "query" in recent else k
        v = take(values, slot.clamp(max=values.shape[2] - 1).to(values.device)).to(k.device)
        made = self.chunk_keys(q, k, v)
        cache.complete({"chunk_key": made}, step.offset)

    @torch.no_grad()
    def chunk_keys(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What stands for whole chunks, ``[B, H, N, D]`` in k's dtype, without gradient.

        Args:
            q: Queries of N chunks ``[B, H, N * w, D]``, not rotated; without a meaning for "mean_key".
            k: Keys ``[B, G, N * w, D]``, not rotated.
            v: Values ``[B, G, N * w, D]``.
        """
        size = self.config.chunk_size
        dtype = torch.promote_types(k.dtype, torch.float32)
        index = torch.arange(size, device=k.device)
        keys = self.rotate(index, in_chunks(k.to(dtype), size))[0]  # [B, G, N, w, D]
        if self.config.chunk_rep == "mean_key":
            return for_heads(keys.mean(3), self._local_heads).to(k.dtype)  # [B, H, N, D]
        queries = self.rotate(index, in_chunks(q.to(dtype), size))[0]
        values = in_chunks(v.to(dtype), size)
        scale = self.config.head_width**-0.5 if self.config.scale is None else self.config.scale
        out = attend_in_chunks(queries, keys, values, scale)
        keys = for_heads(keys, self._local_heads)
        # A mean of values is used as a query: it has to be ordered as keys are.
        query = self._in_halves(out.mean(3)).unsqueeze(-1)  # [B, H, N, D, 1]
        weights = torch.softmax(scale * torch.matmul(keys, query), 3)
        return (weights * keys).sum(3).to(k.dtype)

    def plan(self, step: Step, heads: Heads, inputs: ChunkInputs) -> Plan:  # type: ignore[override]
        """The chosen chunks of each query block at their slots; everything where no row selects."""
        config = self.config
        tokens = inputs.q.shape[2]
        slots = inputs.k.shape[2]
        if inputs.candidates is None:
            return super().plan(step, heads, inputs)
        if not is_open(slots) and slots <= config.first:
            return Plan(plain_layout(config.grid, tokens, slots, inputs.q), self._extras(inputs.q, slots), True)
        if config.select == "token" and not is_open(tokens) and tokens >= LONG_CALL:
            self.caution(_SLOW)
        # Query blocks lie on the sequence's own grid.
        offset = step.offset
        block_q = config.block_q if tokens >= config.block_q else 1
        front = offset % block_q if block_q > 1 else 0
        rows = tokens + Lengths(front).most(block_q - 1)
        begin = torch.arange(-(-rows // block_q), device=inputs.q.device).unsqueeze(0) * block_q
        first = begin + Lengths(offset - front).column()  # [B|1, M]
        # Each block's chunks, and the slots that they are moved to.
        asking = Asking(
            inputs.candidates,
            tokens=tokens,
            groups=inputs.k.shape[1] if config.group_select else None,
            offset=offset,
            published_step=config.official_quirks and is_step(step, tokens),
        )
        chunks, origin = choose_chunks(config.grid, asking, first)
        index, origin = blocks_of(config.grid, chunks, origin, slots)
        origins = None if config.rotary is None else origin
        layout = BlockLayout.from_indices(index, block_q, config.block_k, rows, slots, origins)
        extras = self._extras(inputs.q, config.first)
        return Plan(layout, extras, True, front=front, info={"chunks": chunks})

    def operate(self, inputs: AttentionInputs, plan: Plan) -> Tensor:
        """As ever; where the first rows of a sequence read everything, they are plain attention by themselves."""
        if self.impl == "auto" and begins_plain(inputs, plan):
            parts = apart(self.config, inputs, plan)
            return torch.cat([super(LongHeadsAttention, self).operate(*part) for part in parts], 2)
        return super().operate(inputs, plan)

    def attend_row(self, row: TokenRow) -> Tensor | None:
        """A decoding step, unless it does as the published code does, or is in half precision."""
        config = self.config
        grid = config.grid
        if not self._may_leave_plan(row.x, row.position):
            return None
        own, within = divmod(row.position, grid.size)
        count = chunks_read(grid, row.position)
        q, k, v = self._project_row_unrotated(row)
        asks = self._asking_query(row, q) if row.position >= grid.first else None
        in_slots, rotated_k = rotated_to_slots(config, q, k, within, count)
        now = {name: {"key": k, "query": q}[name] for name in self._rings}
        recent = {}
        if within == grid.size - 1:
            # What lies before the token has to be read before the token is written.
            recent = {name: torch.cat((row.cache.history(name, within), x), 2) for name, x in now.items()}
        keys = row.cache.groups("chunk_key")
        seen = row.cache.write_row({"k": rotated_k, "v": v, **now})
        buffers = (seen["k"], seen["v"])
        held = row.position + 1
        if recent:
            values = seen["v"][:, :, held - grid.size : held]
            made = self.chunk_keys(recent.get("query", recent["key"]), recent["key"], values)
            row.cache.complete({"chunk_key": made}, row.position)
        if asks is None:
            return attend_all(in_slots, buffers, grid.size, held, self.row_scale)
        chunks = chosen_chunks(grid, asks, keys, own, k.shape[1] if config.group_select else None)
        return attend_to_chunks(grid, in_slots, buffers, chunks, held, self.row_scale)

    def _may_leave_plan(self, x: Tensor, position: int) -> bool:
        """Whether the row at a position makes no plan: everything in many chunks is left to one product."""
        grid = self.config.grid
        least = MOST_CHUNKS * grid.size
        # A compiled step asks for the position where the answer depends on it alone.
        reads_many = least < grid.first and least <= position < grid.first
        return not self.config.official_quirks and not reads_many and x.dtype in PRECISE

    def may_compile_row(self, x: Tensor, cache: KVCache) -> bool:
        """As every layer, where a step without a compiler makes no plan."""
        if not super().may_compile_row(x, cache) or not self.may_hide_row(cache) or cache.length is None:
            return False
        return self._may_leave_plan(x, cache.length)

    def compiled_row(self, step: Step, heads: Heads) -> Tensor:
        """As every layer; chunks are chosen, and read where the cache holds them."""
        inputs = self.remember(step, heads)
        found = inputs.candidates
        if found is None:
            raise AssertionError("a call with a cache keeps what chunks are chosen by")
        # That q is rotated to its place is of no use here, and left out by the compiler.
        tensors = (heads.q, *step.row_buffers(heads.q.dtype), found.keys, found.queries)
        return self.hidden_row("longheads", tensors, inputs.k.shape[2], self.row_scale)

    def _project_row_unrotated(self, row: TokenRow) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a row ``[B, h, 1, D]``, in halves."""
        both, v = self.heads_of_row(row)
        q, k = self._in_halves(both).tensor_split((self.config.num_heads,), 1)
        return q, k, v

    def _asking_query(self, row: TokenRow, q: Tensor) -> Tensor:
        """The query that chooses for a row ``[B, H, 1, D]``: its own, or that of its block's first token."""
        back = row.position % self.config.block_q
        return q if back == 0 else row.cache.history("query", back)[:, :, :1]

    def plan_for(self, inputs: AttentionInputs, *, offset: int | Tensor, lengths: int | Tensor | None = None) -> Plan:
        """As the base, as far as no row selects.

        Raises:
            UnsupportedError: If one would: chunks are chosen by queries that are not rotated.
        """
        if inputs.k.shape[2] > self.config.first:
            raise UnsupportedError("plan_for: longheads chooses by queries that are not rotated, got rotated ones")
        return super().plan_for(ChunkInputs(**vars(inputs)), offset=offset, lengths=lengths)

    def _extras(self, q: Tensor, positions: int) -> Extras:
        config = self.config
        rotary = config.rotary
        if rotary is None:
            return Extras()
        dtype = torch.promote_types(q.dtype, torch.float32)
        make = shared_rotation_tables if may_share(q) else rotation_tables
        length = config.chunk_size
        while length < positions:
            length *= 2
        return Extras(rope=make(rotary, config.head_width, length, dtype, q.device))

    @property
    def _local_heads(self) -> int:
        return self.heads_held("q_proj", self.config.num_heads)

    def streams(self) -> dict[str, Stream]:
        """Keys and values of each token, a key of each chunk, and the last tokens as they were before rotation."""
        config = self.config
        streams = super().streams()
        groups = streams["k"].heads
        width = config.head_width
        streams["chunk_key"] = Stream(self._local_heads, width, every=config.chunk_size)
        for name in self._rings:
            heads = groups if name == "key" else self._local_heads
            streams[name] = Stream(heads, width, ring=max(1, config.chunk_size - 1))
        return streams
