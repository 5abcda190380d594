r"""Relative convolutional multi-head attention: short convolutions over tokens, and distances in the score.

Source: Sugiharto, Aradea and Mubarok 2023, *Relative Convolutional Multi-Head Attention* (arXiv:2308.03429), of which
the abstract alone was at hand; what it joins: So et al. 2021, *Primer* (depth-wise convolutions of queries, keys and
values, MDHA; arXiv:2109.08668), and Dai et al. 2019, *Transformer-XL*, section 3.3 (RMHA; arXiv:1901.02860).

.. math:: q'_t = \sum_{r=0}^{n-1} \omega_r \odot q_{t-r} + \beta \quad \text{(k, v alike)}, \qquad
          A_{ij} = \sigma \left[ (q'_i + u) \cdot k'_j + (q'_i + v) \cdot W_R r_{i-j} \right]

Departures: there is no published code. A kernel belongs to one head and channel; one kernel for all heads, as common
code of Primer's attention has it, is ``conv_share="across_heads"``. The distance's vector has the width of a head, not
of the model. Learned vectors of distances are clipped at ``max_distance`` and have no scalar of their own beside them.
The convolution of keys has no bias unless keys are rotated: it would move all scores of a row alike. Rotary positions,
off by default, turn the content's part of the score alone.

Letters: B batch, T query tokens, C model width, H query heads, G KV heads, D head width, n tokens that a kernel sees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnzoo.base.decoding.step import TokenRow
from attnzoo.base.editing.reads import CallEdits as CallEdits
from attnzoo.base.layer import DENSE_BLOCK, AttentionInputs, AttentionLayer, Heads, Plan, Step
from attnzoo.base.projections import is_unwatched
from attnzoo.base.rope import RotaryConfig
from attnzoo.base.shared_layouts import dense_layout
from attnzoo.base.steps import is_training
from attnzoo.cache.kv_cache import KVCache, Stream
from attnzoo.cache.lengths import Lengths
from attnzoo.variants.rcmha.config import CONVOLVED, RCMHAConfig
from attnzoo.variants.rcmha.convolution import DepthwiseConvolution, convolve_row
from attnzoo.variants.rcmha.relative import (
    Clipped,
    attend_clipped,
    channels_by_position,
    channels_by_slot,
    clipped_bias,
    sinusoid_bias,
)
from attnzoo_kernels import BlockLayout as BlockLayout  # ClippedPlan inherits fields that are annotated with it
from attnzoo_kernels import Extras, Slots, attend_slots
from attnzoo_kernels.errors import UnsupportedError


@dataclass(frozen=True, eq=False, kw_only=True)
class PlacedStep(Step):
    """A call, and whether the caller gave positions."""

    given: bool = False


@dataclass(frozen=True, eq=False)
class ConvolvedHeads(Heads):
    """Convolved heads, and by stream what the convolutions of later calls need: this call's values before them."""

    before: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class PlacedInputs(AttentionInputs):
    """What the operation sees, and the keys' positions ``[B|1, S]`` where the caller gave some."""

    key_positions: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ClippedPlan(Plan):
    """A plan; with learned distances, the part of the score that each row has for each, and where the rows begin."""

    tau: Tensor | None = None
    first: int | Tensor = 0


class PlacedCache(KVCache):
    """A cache that holds positions once some are given; until then a token's position is its slot."""

    @property
    def placed(self) -> bool:
        """Whether positions are held."""
        return "position" in self._buffers

    def hold_positions(self) -> None:
        """Holds positions from now on; those of the tokens held so far are their slots."""
        if not self.placed:
            self._buffers["position"] = self._slots()

    def _slots(self) -> Tensor:
        with torch.inference_mode(False):
            slot = torch.arange(self.max_length + 1, dtype=torch.int32, device=self.device)
            return slot.view(1, 1, -1, 1).repeat(self.batch, 1, 1, 1)

    def _buffers_for(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """With positions where the state has some."""
        buffers = {name: x for name, x in self._buffers.items() if name != "position"}
        return {**buffers, "position": self._slots()} if "stream.position" in state else buffers


class RCMHAAttention(AttentionLayer, name="rcmha"):
    """Convolved queries, keys and values; scores of content and distance.

    Attributes:
        conv: The convolutions by what they convolve.
        rel_u: Added to queries for the content's part, ``[H, D]``; these are there where they are used.
        rel_v: Added to queries for the distance's part, ``[H, D]``.
        rel_proj: From a distance's sinusoids to a head, ``[H, D, Da]``.
        rel_table: A vector for each clipped distance, ``[H, R + 1, D]``; not causal, from -R to R.
    """

    config_class = RCMHAConfig
    config: RCMHAConfig
    rel_u: nn.Parameter
    rel_v: nn.Parameter
    rel_proj: nn.Parameter
    rel_table: nn.Parameter
    cache_class = PlacedCache
    splits_heads = False
    compiles_rows = True
    causal_promise = "bidirectional-capable"
    dense_limit: ClassVar[dict[str, Any]] = {"conv_on": (), "rel": None, "rotary": RotaryConfig()}

    def build_projections(self, *, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Projections, convolutions and distances."""
        super().build_projections(device=device, dtype=dtype)
        config = self.config
        heads = config.num_heads
        width = config.head_width
        self.conv = nn.ModuleDict()
        for name in config.conv_on:
            own = heads if name == "q" else config.kv_heads
            shared = config.conv_pos == "pre_proj" or config.conv_share == "across_heads"
            self.conv[name] = DepthwiseConvolution(
                1 if shared else own,
                config.dim if config.conv_pos == "pre_proj" else width,
                config.conv_size,
                # Without rotation a bias of keys moves all scores of a row alike, and would never learn.
                bias=config.conv_bias and (name != "k" or config.rotary is not None),
                causal=config.causal,
                delta=config.conv_init == "delta",
                device=device,
                dtype=dtype,
            )
        for name, shape in self._relative_shapes().items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self._start_relative()

    def _relative_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.config
        heads = config.num_heads
        width = config.head_width
        reach = config.max_distance
        if config.rel is None:
            return {}
        biases = {"rel_u": (heads, width), "rel_v": (heads, width)}
        if config.rel == "sinusoidal":
            return {**biases, "rel_proj": (heads, width, config.rel_width)}
        return {**biases, "rel_table": (heads, reach + 1 if config.causal else 2 * reach + 1, width)}

    def _start_relative(self) -> None:
        config = self.config
        if config.rel is None:
            return
        nn.init.zeros_(self.rel_u)
        nn.init.zeros_(self.rel_v)
        vectors = self.rel_table if config.rel == "learned" else self.rel_proj
        if config.rel_init == "zero":
            nn.init.zeros_(vectors)
        elif config.rel == "learned":
            nn.init.normal_(vectors, std=0.02)
        else:
            # Xavier for a linear map of Da values to those of all heads.
            bound = math.sqrt(6 / (config.rel_width + config.num_heads * config.head_width))
            nn.init.uniform_(vectors, -bound, bound)

    def reset_parameters(self) -> None:
        """As the base; then distances."""
        super().reset_parameters()
        self._start_relative()

    def check_context(self, cache: KVCache | None, positions: Tensor | None) -> None:
        """Refuses: distances and convolutions are those of one sequence."""
        raise UnsupportedError("context: rcmha knows distances within its own sequence, it cannot read another")

    def begin(
        self,
        x: Tensor,
        positions: Tensor | None,
        key_padding: Tensor | None,
        cache: KVCache | None,
        context: Tensor | None,
    ) -> PlacedStep:
        """Notes whether positions were given: without, they are slots, and one table serves all items."""
        step = super().begin(x, positions, key_padding, cache, context)
        if positions is not None and self.config.rel == "learned":
            raise UnsupportedError("positions: learned distances are those of tokens; expected None, got a Tensor")
        return PlacedStep(**vars(step), given=positions is not None)

    def project(self, step: Step) -> ConvolvedHeads:
        """Projections with the convolutions behind or before them."""
        config = self.config
        if config.conv_pos == "post_proj":
            plain = super().project(step)
            given = {"q": plain.q, "k": plain.k, "v": plain.v}
            made = {name: self._convolve(name, x, f"conv_{name}", step) for name, x in given.items()}
            return ConvolvedHeads(**made, before={f"conv_{name}": given[name] for name in self._convolved()})
        x = step.x.unsqueeze(1)  # [B, 1, T, C]
        made = {}
        for name in CONVOLVED:
            source = self._convolve(name, x, "conv_x", step).squeeze(1)
            made[name] = self.some_heads_of(f"{name}_proj", source)  # [B, h, T, D]
        self.check_slice(**made)
        return ConvolvedHeads(**made, before={"conv_x": x} if self._convolved() else {})

    def _convolved(self) -> tuple[str, ...]:
        """What a convolution that sees more than its own token changes."""
        return self.config.conv_on if self.config.conv_size > 1 else ()

    def _convolve(self, name: str, x: Tensor, stream: str, step: Step) -> Tensor:
        """Convolves ``x [B, h, T, D]`` behind what the cache remembers of earlier calls."""
        if name not in self.config.conv_on:
            return x
        history = None
        if step.cache is not None and self._convolved():
            history = step.cache.history(stream, self.config.conv_size - 1)
        lengths = Lengths(step.lengths)
        if not self.config.causal and lengths.differ:
            absent = ~lengths.holds(torch.arange(x.shape[2], device=x.device))
            x = x.masked_fill(absent[:, None, :, None], 0)
        convolved: Tensor = self.conv[name](x, history)
        return convolved

    # The steps from here on are given the records of this layer's own steps.

    def remember(self, step: PlacedStep, heads: ConvolvedHeads) -> PlacedInputs:  # type: ignore[override]
        """Caches convolved keys and values, and the last values before the convolutions."""
        q = heads.q
        k = heads.k
        v = heads.v
        if self.config.rel is not None:
            q = q + self.rel_u.unsqueeze(1).to(q.dtype)  # [H, 1, D]
        if self.config.rotary is not None:
            q, k = self.rotate_rows(step, q, k)
        given = step.given and self.config.rel == "sinusoidal"
        key_positions = step.positions if given else None
        cache = step.cache
        if cache is not None:
            values = {"k": k, "v": v, **heads.before}
            if isinstance(cache, PlacedCache) and given:
                cache.hold_positions()
            placed = isinstance(cache, PlacedCache) and cache.placed
            if placed:
                values["position"] = step.positions.to(torch.int32).expand(step.x.shape[0], -1)[:, None, :, None]
            # Distances may be all that is trained.
            training = is_training(q, k, v, *self.parameters(recurse=False))
            seen = cache.append(values, step.lengths, differentiable=training)
            k = seen["k"]
            v = seen["v"]
            key_positions = seen["position"].flatten(1) if placed else None  # [B, S]
        return PlacedInputs(**vars(self.attention_inputs(step, q, k, v)), key_positions=key_positions)

    def plan(self, step: Step, heads: Heads, inputs: PlacedInputs) -> ClippedPlan:  # type: ignore[override]
        """Everything is read; distances come as auxiliary channels, or as a learned part."""
        config = self.config
        tokens = inputs.q.shape[2]
        slots = inputs.k.shape[2]
        layout = dense_layout(DENSE_BLOCK, tokens, slots, inputs.q)
        if config.rel is None:
            return ClippedPlan(layout, Extras(), config.causal)
        q = heads.q + self.rel_v.unsqueeze(1).to(heads.q.dtype)  # [B, H, T, D]
        if config.rel == "learned":
            tau = q @ self.rel_table.transpose(1, 2)  # [B, H, T, distances]
            return ClippedPlan(layout, Extras(), config.causal, tau=tau, first=step.offset)
        gamma = q @ self.rel_proj  # [B, H, T, Da]
        key_positions = inputs.key_positions
        if key_positions is None:
            q_aux, k_aux = channels_by_slot(gamma, inputs.q_pos, slots)
        else:
            present = None if inputs.q_pos is None else inputs.q_pos.squeeze(1) >= 0
            q_aux, k_aux = channels_by_position(gamma, step.positions, key_positions, present)
        dtype = inputs.q.dtype
        return ClippedPlan(layout, Extras(aux=(q_aux.to(dtype), k_aux.to(dtype))), config.causal)

    def plan_for(self, inputs: AttentionInputs, *, offset: int | Tensor, lengths: int | Tensor | None = None) -> Plan:
        """Refuses: what rcmha reads depends on its weights.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError("rcmha: a plan needs the layer's weights, it cannot be made for another's queries")

    def operate(self, inputs: AttentionInputs, plan: ClippedPlan) -> Tensor:  # type: ignore[override]
        """The operation; with learned distances, joined parts of it."""
        if plan.tau is None:
            return super().operate(inputs, plan)
        scale = self.config.head_width**-0.5 if self.config.scale is None else float(self.config.scale)
        call = Clipped(
            q=inputs.q, k=inputs.k, v=inputs.v, extras=plan.extras, first=plan.first, scale=scale, impl=self.impl
        )
        return attend_clipped(call, plan.tau.to(inputs.q.dtype), causal=plan.causal, block=DENSE_BLOCK)

    def why_no_read_edits(self) -> str | None:
        """Distances that are learned join two parts of the operation."""
        return "its learned distances join parts of the operation" if self.config.rel == "learned" else None

    def attend_row(self, row: TokenRow) -> Tensor | None:
        """As the base, with the convolutions of the row behind what the rings hold, and a bias of distances."""
        cache = row.cache
        convolutions: dict[str, Any] = {name: self.conv[name] for name in self.config.conv_on}
        known = all(type(one) is DepthwiseConvolution and is_unwatched(one) for one in convolutions.values())
        if self.config.conv_pos == "pre_proj" or not known or not isinstance(cache, PlacedCache) or cache.placed:
            return None
        heads = self.config.num_heads
        both, v = self.heads_of_row(row)
        given = dict(zip(CONVOLVED, (*both.tensor_split((heads,), 1), v), strict=True))
        reach = self.config.conv_size - 1
        before = {f"conv_{name}": given[name] for name in self._convolved()}
        history = {name: cache.recent(f"conv_{name}", reach) for name in self._convolved()}
        made = given | convolve_row(convolutions, {name: given[name] for name in convolutions}, history)
        q = made["q"]
        if self.config.rel is not None:
            q = q + self.rel_u.unsqueeze(1)
        if self.config.rotary is not None:
            q, made["k"] = self.rotate_row(row, torch.cat((q, made["k"]), 1)).tensor_split((heads,), 1)
        seen = cache.write_row({"k": made["k"], "v": made["v"], **before})
        bias = self._row_bias(made["q"], row.position + 1)
        slots = Slots(((0, row.position + 1),))
        return attend_slots(q, seen["k"], seen["v"], slots, scale=self.row_scale, bias=bias)

    def may_compile_row(self, x: Tensor, cache: KVCache) -> bool:
        """As every layer, where tokens' positions are their slots."""
        placed = not isinstance(cache, PlacedCache) or cache.placed
        return not placed and super().may_compile_row(x, cache) and self.may_hide_row(cache)

    def compiled_row(self, step: Step, heads: Heads) -> Tensor:
        """As every layer, with a bias of distances."""
        inputs = self.remember(step, heads)  # type: ignore[arg-type]
        held = inputs.k.shape[2]
        bias = self._row_bias(heads.q, held)
        return attend_slots(inputs.q, inputs.k, inputs.v, Slots(((0, held),)), scale=self.row_scale, bias=bias)

    def _row_bias(self, q: Tensor, held: int) -> Tensor | None:
        """The part of the scores that is about distances, ``[B, H, 1, S]``, of convolved queries ``[B, H, 1, D]``."""
        if self.config.rel is None:
            return None
        q = q + self.rel_v.unsqueeze(1)
        if self.config.rel == "learned":
            return clipped_bias(q @ self.rel_table.transpose(1, 2), held) * self.row_scale
        return sinusoid_bias(q @ self.rel_proj, held) * self.row_scale

    def streams(self) -> dict[str, Stream]:
        """Keys and values, and rings of what the convolutions still need."""
        config = self.config
        streams = super().streams()
        history = config.conv_size - 1
        if self._convolved() and config.conv_pos == "pre_proj":
            streams["conv_x"] = Stream(1, config.dim, ring=history)
        elif self._convolved():
            for name in config.conv_on:
                held = streams["v" if name == "v" else "k"]
                heads = config.num_heads if name == "q" else held.heads
                streams[f"conv_{name}"] = Stream(heads, held.width, ring=history)
        return streams
