r"""Landmark attention: every block ends in a token that stands for it, through which the block is reached.

Source: Mohtashami and Jaggi 2023, *Landmark Attention: Random-Access Infinite Context Length for Transformers*
(arXiv:2305.16300), section 3; code: epfml/landmark-attention. Blocks have w tokens, the last of which is the landmark
:math:`\ell_b`. With scores :math:`s_j = \sigma q \cdot k_j` of a query in block c, own tokens have the logit
:math:`s_j`, tokens of an earlier block b

.. math:: e_j = s_j - \lambda_b + s_{\ell_b}, \quad \lambda_b = \log \sum_{i \in b, i \ne \ell_b} \exp s_i,
          \quad o = \sum_j softmax_j(e) v_j

No landmark has a weight of its own. "soft" reads all earlier blocks, as training does; "topk" the own block and the k
whose landmarks score best, with stingy positions: see :mod:`attnzoo.variants.landmark.retrieval`. As published, an
older landmark is scored in the first packed place, whichever place its block then gets.

Departures: "topk" chooses for every query alone, among the blocks complete before its own, in prefill as in decoding.
In the published code all blocks of one call see each other softly, so that what comes out depends on how the input was
cut, and with offloading one choice serves all tokens of a call, which lets later tokens decide for earlier ones:
``official_quirks`` reproduces both. There is no limit on the number of blocks. Landmarks that take no position
(``landmark_positions=False``) and the mix of gates are additions.

Letters: B batch, T query tokens, S key tokens, H query heads, G KV heads, D head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnzoo.base.decoding.rotation import rotate_row, row_rotation
from attnzoo.base.decoding.step import TokenRow
from attnzoo.base.editing.reads import CallEdits as CallEdits
from attnzoo.base.layer import (
    DENSE_BLOCK,
    LONG_CALL,
    AttentionInputs,
    AttentionOutput,
    Heads,
    Plan,
    Step,
)
from attnzoo.base.padding import Alignment
from attnzoo.base.rope import RotaryConfig as RotaryConfig
from attnzoo.base.rope import apply_rotary, rotary_tables
from attnzoo.base.shared_layouts import dense_layout
from attnzoo.cache.kv_cache import KVCache, Stream
from attnzoo.cache.lengths import Lengths
from attnzoo.selection.offloading import OffloadingLayer
from attnzoo.variants.landmark.config import LandmarkConfig, Mode, check_mix, check_mode
from attnzoo.variants.landmark.decoding import PRECISE, Reads, attend_row
from attnzoo.variants.landmark.retrieval import BlockRotations, retrieve
from attnzoo.variants.landmark.tokens import LandmarkGrid, check_landmarks
from attnzoo_kernels import BlockLayout, Extras
from attnzoo_kernels.errors import UnsupportedError
from attnzoo_kernels.runtime.plain import is_open

_SLOW = (
    "landmark: in mode 'topk', which evaluation uses unless mode is set, every token chooses blocks for itself: at 1k "
    "tokens about twice the time of plain attention, less than that from 4k tokens on; mode='soft' reads all blocks "
    "through their landmarks, as training does"
)


@dataclass(frozen=True, eq=False, kw_only=True)
class LandmarkStep(Step):
    """A call and its blocks.

    Attributes:
        grid: The blocks where their lengths are unequal; ``None`` where every ``block_size``-th slot is a landmark.
    """

    grid: LandmarkGrid | None = None


@dataclass(frozen=True, eq=False)
class LandmarkInputs(AttentionInputs):
    """What the operation sees, and where landmarks are.

    Attributes:
        landmarks: The keys of complete blocks' landmarks, ``[B, G, N, D]``, where k does not lie on the device.
    """

    landmarks: Tensor | None = None

    def landmark_keys(self, size: int) -> Tensor:
        """The keys of complete blocks' landmarks, ``[B, G, N, D]``, on the device; a view."""
        return self.k[:, :, size - 1 :: size] if self.landmarks is None else self.landmarks


class LandmarkAttention(OffloadingLayer, name="landmark"):
    """Attention through landmarks: every ``block_size``-th token of an item is one.

    Attributes:
        mode: "soft", "topk", or ``None`` for "soft" in training and "topk" in evaluation; may be set at any time.
        gate_mix: The share of landmark scores in the blocks' logits; may be set at any time, to be raised from 0 to 1
            while a converted model is trained on.
    """

    config_class = LandmarkConfig
    config: LandmarkConfig
    trainable_selection = True
    compiles_rows = True
    dense_limit: ClassVar[dict[str, Any]] = {"block_size": 1 << 20}

    def __init__(self, config: LandmarkConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.mode: Mode | None = self.config.mode
        self.gate_mix: float = self.config.gate_mix

    @property
    def current_config(self) -> LandmarkConfig:
        """The configuration with ``mode`` and ``gate_mix`` as they are set now."""
        return replace(self.config, mode=self.mode, gate_mix=self.gate_mix)

    @property
    def needs_length(self) -> bool:
        """By the reference, in mode "topk"."""
        return self.impl == "reference" and self.effective_mode == "topk"

    @property
    def least_blocks(self) -> int:
        """In mode "topk" more than a query reads, so that there is always a choice; "soft" reads all."""
        return self.config.top_k + 2 if self.effective_mode == "topk" else 2

    @property
    def effective_mode(self) -> Mode:
        """What a call reads now, by ``mode`` and whether the layer is training."""
        check_mode(self.mode)
        return self.mode or ("soft" if self.training else "topk")

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        key_padding: Tensor | None = None,
        cache: KVCache | None = None,
        context: Tensor | None = None,
        *,
        is_landmark: Tensor | None = None,
    ) -> Tensor:
        """The output of :meth:`attend` alone; decoding steps that nobody watches make no plan."""
        if is_landmark is None:
            return super().forward(x, positions, key_padding, cache, context)
        return self.attend(x, positions, key_padding, cache, context, is_landmark=is_landmark).out

    def attend(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        key_padding: Tensor | None = None,
        cache: KVCache | None = None,
        context: Tensor | None = None,
        *,
        is_landmark: Tensor | None = None,
    ) -> AttentionOutput:
        """Runs the layer, see :meth:`attnzoo.base.layer.AttentionLayer.attend`.

        Args:
            x: Tokens ``[B, T, C]``, landmarks among them.
            positions: As there.
            key_padding: As there; padding counts for no block.
            cache: As there.
            context: Refused.
            is_landmark: bool ``[B, T]``: which tokens are landmarks, in blocks of any lengths, instead of every
                ``block_size``-th. In mode "soft" and without a cache.

        Raises:
            TypeError: If an argument has the wrong type.
            ShapeError: If shapes, dtypes or devices disagree, or the cache is full.
            ConfigError: If the cache belongs to another layer.
            UnsupportedError: If this variant cannot do what is asked.
        """
        if is_landmark is None:
            return super().attend(x, positions, key_padding, cache, context)
        for name, value in (("cache", cache), ("context", context)):
            if value is not None:
                raise UnsupportedError(f"{name}: expected None beside is_landmark, got {type(value).__name__}")
        if self.effective_mode != "soft":
            raise UnsupportedError("is_landmark: expected mode 'soft', blocks of unequal lengths have no packed places")
        step = self.begin(x, positions, key_padding, None, None)
        check_landmarks(is_landmark, x)
        if key_padding is not None:
            is_landmark = is_landmark.gather(1, Alignment.of(key_padding).order)
        if positions is None and not self.config.landmark_positions:
            counted = torch.arange(x.shape[1], device=x.device) - is_landmark.long().cumsum(1)
            step = replace(step, positions=counted.clamp(min=0))
        result = self._run(replace(step, grid=LandmarkGrid.of(is_landmark, step.lengths)))
        for recording in self.recordings:
            recording.add(self, result.plan)
        return result

    def begin(
        self,
        x: Tensor,
        positions: Tensor | None,
        key_padding: Tensor | None,
        cache: KVCache | None,
        context: Tensor | None,
    ) -> LandmarkStep:
        """As ever; where landmarks take no position, default positions count ordinary tokens alone."""
        step = LandmarkStep(**vars(super().begin(x, positions, key_padding, cache, context)))
        if positions is not None or self.config.landmark_positions:
            return step
        return replace(step, positions=self.counted_positions(step.positions))

    @property
    def tokens_per_landmark(self) -> int | None:
        """The tokens of a block where landmarks take no position."""
        return None if self.config.landmark_positions else self.config.block_size

    def check_context(self, cache: KVCache | None, positions: Tensor | None) -> None:
        """Refuses: landmarks stand for blocks of the layer's own sequence."""
        raise UnsupportedError("context: landmark attention reads the blocks of its own sequence, not another")

    def rotate(self, positions: Tensor, *heads: Tensor) -> tuple[Tensor, ...]:
        """Rotates in halves: shifts by blocks are made so. Neighbours that pair are first laid apart, in q and k."""
        rotary = self.config.rotary
        if rotary is None or not rotary.interleaved:
            return super().rotate(positions, *heads)
        width = rotary.width(self.config.head_width)
        dtype = torch.promote_types(heads[0].dtype, torch.float32)
        cos, sin = rotary_tables(rotary, self.config.head_width, positions, dtype)
        return tuple(apply_rotary(_apart(x, width), cos, sin) for x in heads)

    def given_call(
        self, inputs: AttentionInputs, offset: int | Tensor, lengths: int | Tensor | None
    ) -> tuple[LandmarkStep, LandmarkInputs]:
        """As ever; blocks are of ``block_size``, and landmarks lie among the keys."""
        step, inputs = super().given_call(inputs, offset, lengths)
        return LandmarkStep(**vars(step)), LandmarkInputs(**vars(inputs))

    # The steps from here on are given the records of this layer's own steps.

    def remember(self, step: LandmarkStep, heads: Heads) -> LandmarkInputs:  # type: ignore[override]
        """As ever, or from CPU memory: the blocks that are read are known only once they are chosen."""
        if step.grid is not None:
            q, k = self.rotate(step.positions, heads.q, heads.k)
            return _on_grid(step.grid, q, k, heads.v)
        inputs = LandmarkInputs(**vars(super().remember(step, heads)))
        cache = step.cache
        if cache is None or not cache.offloaded_nbytes:
            return inputs
        _complete(cache, step, inputs.k, self.config.block_size)
        return replace(inputs, offloaded=True, landmarks=cache.groups("landmark"))

    def _reads_all(self, slots: int) -> bool:
        """Whether a call over so many slots reads all blocks: among few of them, top-k takes all, and moves none."""
        return self.effective_mode == "soft" or slots <= (self.config.top_k + 1) * self.config.block_size

    def plan(self, step: LandmarkStep, heads: Heads, inputs: LandmarkInputs) -> Plan:  # type: ignore[override]
        """All blocks through their landmarks, or the own one and those that each query chooses."""
        config = self.config
        tokens = inputs.q.shape[2]
        slots = inputs.k.shape[2]
        check_mix(self.gate_mix)
        extras = Extras(gate="last", gate_mix=self.gate_mix)
        if step.grid is not None:
            return Plan(dense_layout(step.grid.block, tokens, slots, inputs.q), extras, True)
        if slots < config.block_size:
            return Plan(dense_layout(DENSE_BLOCK, tokens, slots, inputs.q), Extras(), True)
        if self._reads_all(slots):
            return Plan(dense_layout(config.block_size, tokens, slots, inputs.q), extras, True)
        return self._choose(step, inputs, extras)

    def streams_beside_offloaded(self, keys: Stream) -> dict[str, Stream]:
        """The keys of landmarks."""
        return {"landmark": Stream(keys.heads, keys.width, every=self.config.block_size)}

    def _choose(self, step: Step, inputs: LandmarkInputs, extras: Extras) -> Plan:
        config = self.config
        q = inputs.q
        slots = inputs.k.shape[2]
        size = self.config.block_size
        if not is_open(q.shape[2]) and q.shape[2] >= LONG_CALL:
            self.caution(_SLOW)
        own = torch.div(_slots(step, inputs), size, rounding_mode="floor")  # [B|1, T]
        rotations = None
        if config.rotary is not None:
            rotations = BlockRotations.of(
                config.rotary, config.head_width, stride=config.stride, blocks=slots // size, like=q
            )
            extras = replace(extras, rope=(rotations.cos, rotations.sin))
        complete = own
        near = own.unsqueeze(-1)
        if config.official_quirks:
            complete, near = _whole_call(step, own, size, q.shape[2])
        found = retrieve(
            q,
            inputs.landmark_keys(size),
            complete,
            top_k=config.top_k,
            scale=1 / math.sqrt(config.head_width) if config.scale is None else config.scale,
            rotations=rotations,
            shared=config.official_quirks and inputs.offloaded,
        )
        # One list a query: the chosen blocks, moved, and the near ones, where they are.
        near = near.unsqueeze(1).expand(*found.blocks.shape[:2], -1, -1)
        index = torch.cat([found.blocks, near], -1)
        origin = None if rotations is None else torch.cat([found.shift, torch.zeros_like(near)], -1)
        layout = BlockLayout.from_indices(index, 1, size, q.shape[2], slots, origin)
        return Plan(layout, extras, True, info={"blocks": found.blocks})

    def why_no_read_edits(self) -> str | None:
        """Gates."""
        return "its gates weigh blocks of keys before keys are weighed"

    def attend_row(self, row: TokenRow) -> Tensor | None:
        """A decoding step, unless it does as the published code does, or is in half precision."""
        config = self.config
        if config.official_quirks or row.x.dtype not in PRECISE:
            return None
        check_mix(self.gate_mix)
        held = row.position + 1
        counted = row if config.landmark_positions else row._replace(position=row.position - held // config.block_size)
        q, k, v = self.project_row(counted)
        seen = row.cache.write_row({"k": k, "v": v})
        reads = Reads(scale=self.row_scale, mix=self.gate_mix, soft=self.effective_mode == "soft")
        return attend_row(config, (q, seen["k"], seen["v"]), held, reads)

    def may_compile_row(self, x: Tensor, cache: KVCache) -> bool:
        """As every layer, where a step without a compiler makes no plan."""
        precise = not self.config.official_quirks and x.dtype in PRECISE
        return precise and super().may_compile_row(x, cache) and self.may_hide_row(cache)

    def compiled_row(self, step: Step, heads: Heads) -> Tensor:
        """As every layer; blocks are chosen, and read where the cache holds them."""
        check_mix(self.gate_mix)
        inputs = self.remember(step, heads)  # type: ignore[arg-type]
        tensors = (inputs.q, *step.row_buffers(inputs.q.dtype))
        reads = (self.row_scale, self.gate_mix, float(self.effective_mode == "soft"))
        return self.hidden_row("landmark", tensors, inputs.k.shape[2], *reads)

    def rotate_row(self, row: TokenRow, x: Tensor) -> Tensor:
        """In halves, as :meth:`rotate` does."""
        rotary = self.config.rotary
        if rotary is None or not rotary.interleaved:
            return super().rotate_row(row, x)
        head_dim = self.config.head_width
        in_halves = row_rotation(replace(rotary, interleaved=False), head_dim, row.position, x)
        return rotate_row(_apart(x, rotary.width(head_dim)), in_halves)


def _on_grid(grid: LandmarkGrid, q: Tensor, k: Tensor, v: Tensor) -> LandmarkInputs:
    """Rotated q, and k and v on a grid of blocks of unequal lengths, whose holes nobody may read."""
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    holes = grid.holes.unsqueeze(1)  # [B, 1, S]
    bias = torch.zeros(holes.shape, dtype=acc, device=q.device).masked_fill(holes, -torch.inf)
    return LandmarkInputs(q, grid.spread(k), grid.spread(v), grid.q_pos, bias)


def _complete(cache: KVCache, step: Step, k: Tensor, size: int) -> None:
    """Writes the landmarks of the blocks that a call, stored already, has completed; ``k [B, G, S, D]`` is all keys."""
    blocks = (step.x.shape[1] + size - 1) // size
    held = Lengths(step.offset).shared
    if held is None:
        first = Lengths(step.offset // size).to(k.device).column()
        slot = (first + torch.arange(blocks, device=k.device)) * size + size - 1  # [B, P]
        index = slot.clamp(max=max(k.shape[2] - 1, 0))[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        landmarks = k.gather(2, index) if k.shape[2] else k
    else:
        landmarks = k[:, :, held // size * size + size - 1 :: size]
    cache.complete({"landmark": landmarks.to(cache.device)}, step.offset)


def _slots(step: Step, inputs: AttentionInputs) -> Tensor:
    """The slot of each row, int64 ``[B|1, T]``, -1 where there is no token."""
    if inputs.q_pos is not None:
        return inputs.q_pos[:, 0].long()
    return torch.arange(inputs.q.shape[2], device=inputs.q.device).unsqueeze(0) + step.offset


def _whole_call(step: Step, own: Tensor, size: int, tokens: int) -> tuple[Tensor, Tensor]:
    """As published: choose from what was complete before the call, and see every block since then.

    Returns:
        Blocks to choose from ``[B|1, T]``, -1 at absent rows, and blocks seen ``[B|1, T, n]``, -1 padded.
    """
    complete = torch.where(own >= 0, Lengths(step.offset // size).column(), -1)
    near = complete.unsqueeze(-1) + torch.arange((tokens + size - 2) // size + 1, device=own.device)
    return complete, torch.where((near <= own.unsqueeze(-1)) & (own >= 0).unsqueeze(-1), near, -1)


def _apart(x: Tensor, width: int) -> Tensor:
    """The leading ``width`` values of heads, the even ones before the odd ones."""
    turned = x[..., :width].unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), -1)
