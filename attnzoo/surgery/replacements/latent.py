"""An attention block that caches a latent, from which the keys and values of all heads are expanded.

Letters: B batch, T query tokens, S slots, C model width, H query heads, G KV heads, D head width, r latent width.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.base.decoding.latent import LatentHeads, attend_absorbed, may_absorb
from attnzoo.base.decoding.rotation import shared_rotary_tables
from attnzoo.base.decoding.step import is_watched
from attnzoo.base.rope import apply_rotary
from attnzoo.cache.replay import is_replay, refuse_replay
from attnzoo.surgery.hosts import attention_function
from attnzoo.surgery.hosts.block import AttentionBlock, Need, ReplacementModule
from attnzoo.surgery.hosts.calls import as_reply, named_arguments, read_call
from attnzoo.surgery.hosts.families.known import block_of, family_of
from attnzoo.surgery.hosts.positions import check_consecutive
from attnzoo.surgery.hosts.projections import LatentProjections, Projections, set_weights, size_of
from attnzoo.surgery.replacements.host_projector import keep_others
from attnzoo_kernels import Slots
from attnzoo_kernels.errors import ConversionError, UnsupportedError

_REASON = "it is a latent replacement already; undo that conversion first"


class LatentReplacement(ReplacementModule):
    """An attention block that caches a latent, in the place of one of its host.

    The host's cache holds the latent as keys ``[B, 1, S, r]`` beside values of width 0: crop, reorder and static
    buffers work as ever. Keys are expanded and rotated at use. Rotation goes by slot: scores depend on differences of
    positions alone, so that padding on the left shifts nothing.

    Attributes:
        query_factor: What the host's block multiplies its queries by beside the factor on scores.
        drops: Share of attention weights that the host's block drops in training, which is refused here.
        output_drops: Share of outputs that it drops.
    """

    # Of one that an earlier version has pickled.
    query_factor = 1.0
    drops = 0.0
    output_drops = 0.0
    window: int | None = None
    output_path: str | None = "o_proj"
    output_outside = False

    def __init__(self, module: nn.Module, projections: LatentProjections) -> None:
        super().__init__(module, family_of(module).name)
        p = projections
        block = block_of(module)
        theirs = block.projections
        old = theirs["q_proj"]
        self.arguments = tuple(inspect.signature(type(module).forward).parameters)[1:]
        self.reply = block.reply
        self.is_causal = block.causal
        self.finish = block.finish
        self.drops = block.dropout
        keep_others(self, module, theirs.values())
        self.num_heads = p.num_heads
        self.num_kv_heads = p.num_kv_heads
        self.head_dim = p.head_dim
        self.rotary = p.rotary
        self.scaling = block.asked_scale
        self.query_factor = p.scale / self.scaling
        self.output_drops = block.output_dropout
        self.window = block.window
        self.output_outside = block.output_outside
        self.output_path = block.output_path if block.output_outside else "o_proj"
        with torch.device("meta"):
            self.q_proj = nn.Linear(p.q.shape[1], p.q.shape[0], bias=p.q_bias is not None)
            self.kv_down = nn.Linear(p.down.shape[1], p.down.shape[0], bias=p.down_bias is not None)
            self.kv_up = nn.Linear(p.up.shape[1], p.up.shape[0], bias=False)
            self.o_proj: nn.Module = nn.Linear(p.o.shape[1], p.o.shape[0], bias=p.o_bias is not None)
        set_weights(self.q_proj, p.q, p.q_bias, like=old)
        set_weights(self.kv_down, p.down, p.down_bias, like=old)
        set_weights(self.kv_up, p.up, None, like=old)
        if "o_proj" in theirs:
            set_weights(self.o_proj, p.o, p.o_bias, like=theirs["o_proj"])
        else:
            # The output's projection stands outside the block.
            self.o_proj = nn.Identity()
        attention_function.take_over(self, module, p.num_kv_heads)

    def block(self) -> AttentionBlock:
        """What a family says about its blocks, of this module."""
        return AttentionBlock(
            heads=self.num_heads,
            kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            value_dim=self.head_dim,
            width=size_of(self, "q_proj", "in_features"),
            cached_values=lambda: self.kv_down.out_features if self.is_causal else 0,
            project=self._project,
            output=self._output,
            projections={},
            weights=self._weights,
            rotary=lambda: self.rotary,
            rope_type=None,
            scale=self.scaling,
            causal=self.is_causal,
            window=self.window,
            reply=self.reply,
            finish=self.finish,
            reasons=dict.fromkeys(Need, (_REASON,)),
            output_path=self.output_path,
            output_outside=self.output_outside,
        )

    def forward(self, *given: Any, **named: Any) -> Any:
        """As the host calls it: ``[B, T, C]`` to ``[B, T, C]``, in what the host's own block answers with.

        Raises:
            UnsupportedError: If positions are not those of the slots, an argument cannot be honoured, or a backward
                makes a call with a cache once more.
        """
        arguments = named_arguments(self.arguments, given, named)
        hidden_states: Tensor = arguments.pop(self.arguments[0])
        arguments.pop("position_embeddings", None)
        attention_mask = arguments.pop("attention_mask", None)
        call = read_call(arguments, causal=self.is_causal)
        if self.needs_interface:
            attention_function.check_implementation(self.config)
        if self.training and self.drops:
            raise UnsupportedError(f"dropout: expected 0, got {self.drops}; attention dropout is not offered")
        # One that is empty was made inside the checkpointed part.
        if call.cache is not None and is_replay() and call.cache.get_seq_length(self.layer_idx):
            refuse_replay("past_key_values")
        q = self._queries(hidden_states)
        latent = self.kv_down(hidden_states).unsqueeze(1)  # [B, 1, T, r]
        first = attention_function.first_slot(attention_mask, call.cache, self.layer_idx)
        real = getattr(attention_mask, "real", None)
        check_consecutive(call.position_ids, first, real, "a latent replacement", padding_counts=True)
        # The KV cache: latents of earlier tokens before those of this call.
        if call.cache is not None:
            attention_function.let_grow(call.cache, self.layer_idx)
            latent, _ = call.cache.update(latent, latent[..., :0], self.layer_idx)
        whole = getattr(attention_mask, "window", None) is None and real is None
        if whole and isinstance(first, int) and self.is_causal and may_absorb(q, latent, self.kv_up):
            slots = self._slots(first + 1)
            if slots is not None and slots.runs is not None:
                out = attend_absorbed(q, latent[:, 0, : first + 1], self.kv_up.weight, self._heads, slots)
                return as_reply(self.reply, self._output(out.flatten(1).unsqueeze(1)), call.cache)
        k, v = self._expand(latent.squeeze(1))  # [B, G, S, D] each
        # Rotation by slot, of queries and of all keys; a sliding cache has the last ones.
        q = self._rotate(q, first)
        k = self._rotate(k, _begin(first, q.shape[2], k.shape[2]))
        out, _ = attention_function.attend(self, q, k, v, attention_mask, scaling=self.scaling)
        y = self._output(out.flatten(-2))
        return as_reply(self.reply, y if self.finish is None else self.finish(self, hidden_states, y), call.cache)

    @property
    def _heads(self) -> LatentHeads:
        return LatentHeads(self.num_kv_heads, self.head_dim, self.rotary, self.scaling)

    def _slots(self, held: int) -> Slots | None:
        """What a decoding step reads of so many slots: all, or what the block's read pattern says."""
        pattern = attention_function.pattern_of(self)
        if pattern is None:
            return None if is_watched() else Slots(((0, held),))
        return pattern.layer.known_slots(held, self.q_proj.weight.device)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._queries(x), *self._expand(self.kv_down(x))

    def _queries(self, x: Tensor) -> Tensor:
        """Queries of ``x [B, T, C]``, not rotated: ``[B, H, T, D]``."""
        q: Tensor = self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return q if self.query_factor == 1 else q * self.query_factor

    def _output(self, y: Tensor) -> Tensor:
        out: Tensor = self.o_proj(y)
        return nn.functional.dropout(out, self.output_drops, self.training) if self.output_drops else out

    def _expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all heads from latents ``[B, S, r]``."""
        heads = self.kv_up(latent).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, 2 G, S, D]
        k, v = heads.chunk(2, dim=1)
        return k, v

    def _weights(self) -> Projections:
        raise ConversionError("kv_down: expected projections of keys and values, got a latent that stands for both")

    def _rotate(self, x: Tensor, first: int | Tensor) -> Tensor:
        """Rotates ``[B, h, n, D]`` by slots from ``first`` on."""
        if self.rotary is None:
            return x
        slots: Tensor | range
        if isinstance(first, int):
            slots = range(first, first + x.shape[2])
        else:
            slots = (torch.arange(x.shape[2], device=x.device) + first).unsqueeze(0)
        cos, sin = shared_rotary_tables(self.rotary, self.head_dim, slots, x)
        return apply_rotary(x, cos, sin, self.rotary.interleaved)


def _begin(first: int | Tensor, tokens: int, slots: int) -> int | Tensor:
    """The slot of the first of the last ``slots`` keys, where a call's tokens begin at ``first``."""
    gone = first + tokens - slots
    return gone.clamp(min=0) if isinstance(gone, Tensor) else max(gone, 0)
