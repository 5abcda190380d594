"""The base of every layer: six steps from tokens to tokens, of which a variant overrides those where it differs.

Letters: B batch, T query tokens, S key tokens, C model width, H query heads, G KV heads, D head width, Dv value width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from attnzoo.base.config import AttentionConfig, build_config
from attnzoo.base.decoding.compiled import options_of
from attnzoo.base.decoding.rotation import shared_rotary_tables
from attnzoo.base.decoding.step import DecodingModule
from attnzoo.base.editing.operation import attend, check_honoured
from attnzoo.base.editing.reads import edits_of_call
from attnzoo.base.inputs import check_dtype, check_inputs, cross_step, is_all_padding, self_step
from attnzoo.base.padding import Filled, drop_front, take_rows
from attnzoo.base.projections import takes_its_own_dtype
from attnzoo.base.recording import Recording
from attnzoo.base.registry import register
from attnzoo.base.rope import apply_rotary
from attnzoo.base.shared_layouts import dense_layout
from attnzoo.base.steps import (
    AttentionInputs,
    AttentionOutput,
    Heads,
    Plan,
    Step,
    finalise,
    is_training,
    operation_of,
)
from attnzoo.cache.kv_cache import KVCache
from attnzoo.cache.lengths import Lengths
from attnzoo_kernels import Extras
from attnzoo_kernels.errors import ConfigError, UnsupportedError
from attnzoo_kernels.runtime.plain import is_open

__all__ = [
    "AttentionConfig",
    "AttentionInputs",
    "AttentionLayer",
    "AttentionOutput",
    "Heads",
    "Plan",
    "Step",
    "finalise",
]

DENSE_BLOCK = 64
LONG_CALL = 512
"""Tokens from which on a call says so where an option would make it much quicker."""


class AttentionLayer(DecodingModule):
    """An attention layer, ``[B, T, C]`` to ``[B, T, C]``, for training, prefill and decoding with a cache.

    A variant is a subclass ``class MyAttention(AttentionLayer, name="my")`` with a ``config_class`` of its own; the
    class statement registers it. There is no dropout on attention weights.

    Attributes:
        config: The configuration; frozen.
        impl: Which implementation of the operation runs: "auto", or one by name, which then never falls back.
        causal_promise: "strict": with ``config.causal``, no output depends on a later token; "bidirectional-capable":
            that, and ``causal=False`` works too; "selection-looks-ahead": only the values that are read are causal.
        trainable_selection: Whether what is read depends on parameters that training reaches.
        decode: Whether decoding token by token is the same function as one call: "exact", "approximate" or "none".
        dense_limit: Options at which the variant is plain attention, exactly.
    """

    config_class: ClassVar[type[AttentionConfig]] = AttentionConfig
    causal_promise: ClassVar[Literal["strict", "selection-looks-ahead", "bidirectional-capable"]] = "strict"
    trainable_selection: ClassVar[bool] = False
    decode: ClassVar[Literal["exact", "approximate", "none"]] = "exact"
    dense_limit: ClassVar[dict[str, Any]] = {}

    config: AttentionConfig

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is not None:
            register(name, cls)

    def __init__(
        self,
        config: AttentionConfig | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if config is None:
            config = build_config(self.config_class, options)
        elif options:
            raise ConfigError(f"config: expected no options beside a configuration, got {', '.join(options)}")
        if not isinstance(config, self.config_class):
            raise ConfigError(f"config: expected a {self.config_class.__name__}, got {type(config).__name__}")
        self.config = config
        self.row_options = options_of(config)
        self.impl = "auto"
        self.recordings: tuple[Recording, ...] = ()
        self.build_projections(device=device, dtype=dtype)
        for message in config.cautions:
            self.caution(message)

    def build_projections(self, *, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Makes the layer's weights."""
        config = self.config
        width = config.head_width
        heads = config.num_heads
        groups = config.kv_heads
        self.q_proj = nn.Linear(config.dim, heads * width, bias=config.bias, device=device, dtype=dtype)
        self.k_proj = nn.Linear(config.dim, groups * width, bias=config.bias, device=device, dtype=dtype)
        self.v_proj = nn.Linear(config.dim, groups * width, bias=config.bias, device=device, dtype=dtype)
        self.o_proj = nn.Linear(heads * width, config.dim, bias=config.bias, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        """The configuration, for ``print(layer)``."""
        return repr(self.config)

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        key_padding: Tensor | None = None,
        cache: KVCache | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """The output of :meth:`attend` alone; decoding steps that nobody watches make no plan."""
        if cache is not None and positions is None and key_padding is None and context is None:
            if self.may_compile_row(x, cache):
                return self._compiled_row(x, cache)
            row = self.decode_row(x, cache)
            if row is not None:
                return row
        return self.attend(x, positions, key_padding, cache, context).out

    def attend(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        key_padding: Tensor | None = None,
        cache: KVCache | None = None,
        context: Tensor | None = None,
    ) -> AttentionOutput:
        """Runs the layer.

        Args:
            x: Tokens ``[B, T, C]``. Padded rows may hold anything.
            positions: What the rotation uses, integers ``[T]`` or ``[B, T]``. By default a token's index among its
                item's real tokens, counted from the cache's length. Causality goes by that index in any case.
            key_padding: bool ``[B, T]``, true at padding, wherever it lies: padded tokens are read by nobody and come
                out as 0. With a context, ``[B, S]`` for the context's tokens.
            cache: What earlier calls remembered; this call's tokens are appended to it.
            context: Tokens ``[B, S, C]`` that keys and values come from instead of x. All of them are visible, and
                nothing is rotated: positions in two sequences cannot be compared.

        Returns:
            The output and the plan.

        Raises:
            TypeError: If an argument has the wrong type.
            ShapeError: If shapes, dtypes or devices disagree, or the cache is full.
            ConfigError: If the cache belongs to another layer.
            UnsupportedError: If this variant cannot do it, or a backward makes a call with a cache once more.
        """
        if cache is None and isinstance(x, Tensor) and not x.is_nested and x.dim() == 3 and is_open(x.shape[1]):
            return self._attend_whole_blocks(x, positions, key_padding, context)
        return self._attend(x, positions, key_padding, cache, context)

    def _attend(
        self,
        x: Tensor,
        positions: Tensor | None,
        key_padding: Tensor | None,
        cache: KVCache | None,
        context: Tensor | None,
    ) -> AttentionOutput:
        step = self.begin(x, positions, key_padding, cache, context)
        if cache is None or torch.compiler.is_compiling():
            result = self._run(step)
        else:
            with cache.all_or_nothing():
                result = self._run(step)
        for recording in self.recordings:
            recording.add(self, result.plan)
        return result

    @property
    def needs_length(self) -> bool:
        """Whether no export can leave the length open: torch cannot follow it."""
        return False

    @property
    def least_blocks(self) -> int:
        """How many blocks a call that is filled up has at least, the last of them never full: two or more."""
        return 2

    @property
    def whole_block(self) -> int:
        """Tokens to multiples of which a call is filled up where an export leaves the length open."""
        return int(getattr(self.config, "block_size", DENSE_BLOCK))

    def _attend_whole_blocks(
        self, x: Tensor, positions: Tensor | None, key_padding: Tensor | None, context: Tensor | None
    ) -> AttentionOutput:
        """The same for a length that is left open; the plan is that of the tokens with those that fill up."""
        if self.needs_length:
            raise UnsupportedError(
                f"x: expected a length that is known, since {self.config.kind} chooses blocks and impl='reference' "
                "cannot follow an open number of them, got one that the export leaves open; export one program for "
                "each length, or with impl='auto'"
            )
        check_inputs(x, self.config.dim, positions, key_padding, context)
        batch, tokens, _ = x.shape
        whole = Filled.of(tokens, self.whole_block, x.device, self.least_blocks)
        if context is not None:
            keys = Filled.of(context.shape[1], self.whole_block, x.device)
            context = keys.take(context)
            key_padding = keys.take_padding(key_padding, batch)
        elif key_padding is not None or not self.config.causal:
            # Causal rows see nothing that comes behind them.
            key_padding = whole.take_padding(key_padding, batch)
        result = self._attend(whole.take(x), whole.take_positions(positions), key_padding, None, context)
        return replace(result, out=result.out.index_select(1, torch.arange(tokens, device=x.device)))

    def begin(
        self,
        x: Tensor,
        positions: Tensor | None,
        key_padding: Tensor | None,
        cache: KVCache | None,
        context: Tensor | None,
    ) -> Step:
        """Checks the arguments and moves each item's real tokens to the left."""
        check_inputs(x, self.config.dim, positions, key_padding, context)
        if key_padding is not None and is_all_padding(key_padding):
            self.caution(
                "key_padding: all tokens are padding, so that all outputs are 0; it is true at padding, the inverse of "
                "a Hugging Face attention_mask: pass ~mask.bool()"
            )
        first = self.projection("q_proj")
        if first is not None and takes_its_own_dtype(first):
            for name, tokens in (("x", x), ("context", context)):
                if tokens is not None:
                    check_dtype(name, tokens, cast(Tensor, first.weight))
        if context is not None:
            self.check_context(cache, positions)
            return cross_step(x, context, key_padding)
        if cache is None:
            return self_step(x, positions, key_padding, None)
        if not isinstance(cache, KVCache):
            raise TypeError(f"cache: expected a KVCache or None, got {type(cache).__name__}")
        cache.check((self._identity, self.config), x.shape[0], x.device)
        step = self_step(x, positions, key_padding, cache)
        cache.check_room(x.shape[1], step.lengths)
        return step

    def _compiled_row(self, x: Tensor, cache: KVCache) -> Tensor:
        step = self.begin(x, None, None, cache, None)
        out = self.compiled_row(step, self.project(step))
        return self.output_of(out.transpose(1, 2).flatten(-2))

    def compiled_row(self, step: Step, heads: Heads) -> Tensor:
        """The heads' outputs ``[B, H, 1, Dv]`` of a compiled decoding step, which makes no plan."""
        inputs = self.remember(step, heads)
        return self.read_runs(inputs.q, inputs.k, inputs.v)

    def _run(self, step: Step) -> AttentionOutput:
        heads = self.project(step)
        inputs = self.remember(step, heads)
        if self.read_editors:
            inputs = replace(inputs, edits=edits_of_call(self.read_editors, step.call_rows(self.config.num_heads)))
        plan = self.plan_call(step, heads, inputs)
        out = self.operate(inputs, plan)
        check_honoured(inputs.edits, self.config.kind)
        return AttentionOutput(self.combine(step, out, plan), plan)

    def check_context(self, cache: KVCache | None, positions: Tensor | None) -> None:
        """Raises unless this variant can read another sequence.

        Raises:
            UnsupportedError: If it cannot, or if a cache or positions are given beside a context.
        """
        for name, value in (("cache", cache), ("positions", positions)):
            if value is not None:
                raise UnsupportedError(f"{name}: expected None beside a context, got {type(value).__name__}")

    def project(self, step: Step) -> Heads:
        """Queries, keys and values of this call, not rotated."""
        q, k, v = self.heads_of(step.x, step.context)
        self.check_slice(q, k, v)
        return Heads(q, k, v)

    def remember(self, step: Step, heads: Heads) -> AttentionInputs:
        """Rotates, writes the cache's streams, and gives what the operation sees."""
        q = heads.q
        k = heads.k
        v = heads.v
        if self.config.rotary is not None and step.context is None:
            q, k = self.rotate_rows(step, q, k)
        if step.cache is not None:
            seen = step.cache.append({"k": k, "v": v}, step.lengths, differentiable=is_training(q, k, v))
            k = seen["k"]
            v = seen["v"]
        return self.attention_inputs(step, q, k, v)

    def rotate_rows(self, step: Step, *heads: Tensor) -> tuple[Tensor, ...]:
        """Rotates this call's heads ``[B, h, T, D]`` by the positions of its tokens; see :meth:`rotate`."""
        if step.first is None or not self.runs_own("rotate", AttentionLayer):
            return self.rotate(step.positions, *heads)
        return self._rotate(range(step.first, step.first + step.x.shape[1]), *heads)

    def rotate(self, positions: Tensor, *heads: Tensor) -> tuple[Tensor, ...]:
        """Rotates tensors ``[B, h, T, D]`` by positions ``[B|1, T]``; in fp32 at least."""
        return self._rotate(positions, *heads)

    def _rotate(self, positions: Tensor | range, *heads: Tensor) -> tuple[Tensor, ...]:
        rotary = self.config.rotary
        if rotary is None:
            return heads
        cos, sin = shared_rotary_tables(rotary, self.config.head_width, positions, heads[0])
        return tuple(apply_rotary(x, cos, sin, rotary.interleaved) for x in heads)

    def attention_inputs(self, step: Step, q: Tensor, k: Tensor, v: Tensor) -> AttentionInputs:
        """Rotated q, k, v together with the slots that rows have and that nobody may read."""
        if step.context is not None:
            return AttentionInputs(q, k, v, key_bias=None if step.padding is None else _hide(step.padding, q.dtype))
        lengths = Lengths(step.lengths)
        offset = Lengths(step.offset)
        if not (lengths.differ or offset.differ):
            return AttentionInputs(q, k, v)
        token = torch.arange(q.shape[2], device=q.device)
        first = offset.column()
        q_pos = torch.where(lengths.holds(token), token + first, -1).to(torch.int32).unsqueeze(1)  # [B, 1, T]
        slot = torch.arange(k.shape[2], device=k.device)
        bias = None if self.config.causal else _hide(slot >= lengths.column() + first, q.dtype)
        return AttentionInputs(q, k, v, q_pos, bias)

    def plan(self, step: Step, heads: Heads, inputs: AttentionInputs) -> Plan:
        """What is read: here, everything."""
        layout = dense_layout(DENSE_BLOCK, inputs.q.shape[2], inputs.k.shape[2], inputs.q)
        return Plan(layout, Extras(), self.config.causal and step.context is None)

    def plan_call(self, step: Step, heads: Heads, inputs: AttentionInputs) -> Plan:
        """The plan of a call, with the rows and hidden keys that the call itself says."""
        return finalise(self.plan(step, heads, inputs), inputs)

    def plan_for(self, inputs: AttentionInputs, *, offset: int | Tensor, lengths: int | Tensor | None = None) -> Plan:
        """The plan for queries, keys and values that something else has made; weights are not touched.

        Args:
            inputs: Rotated q, k, v, with slot == position in each item.
            offset: The slot of each item's first row: an int where all share it, else int64 ``[B]``.
            lengths: Rows of each item that are tokens; ``None`` means all.
        """
        step, inputs = self.given_call(inputs, offset, lengths)
        return self.plan_call(step, Heads(inputs.q, inputs.k, inputs.v), inputs)

    def given_call(
        self, inputs: AttentionInputs, offset: int | Tensor, lengths: int | Tensor | None
    ) -> tuple[Step, AttentionInputs]:
        """The call that queries, keys and values of :meth:`plan_for` stand for, and these with their rows' slots."""
        rows = inputs.q.shape[2] if lengths is None else lengths
        nothing = inputs.q.new_empty(0)
        step = Step(x=nothing, positions=nothing, lengths=rows, offset=offset)
        if inputs.q_pos is None and (Lengths(rows).differ or Lengths(offset).differ):
            made = self.attention_inputs(step, inputs.q, inputs.k, inputs.v)
            inputs = replace(inputs, q_pos=made.q_pos, key_bias=made.key_bias)
        return step, inputs

    def operate(self, inputs: AttentionInputs, plan: Plan) -> Tensor:
        """The operation: ``[B, H, T, Dv]``."""
        out = attend(operation_of(inputs, plan, self.config.scale, self.impl), inputs.edits)
        return drop_front(out, plan.front, inputs.q.shape[2])

    def combine(self, step: Step, out: Tensor, plan: Plan) -> Tensor:
        """Joins the heads, and puts the tokens back where the caller had them."""
        if plan.head_weight is not None:
            out = out * plan.head_weight
        y = out.transpose(1, 2).flatten(-2)  # [B, T, H * Dv]
        if step.row_index is not None:
            y = take_rows(y, step.row_index)
        result = self.output_of(y)
        if step.row_index is None or step.padding is None:
            return result
        return result.masked_fill(step.padding.unsqueeze(-1), 0)


def _hide(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias ``[B, 1, S]`` that hides the slots where ``hidden [B, S]`` is true."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.zeros(hidden.shape, dtype=acc, device=hidden.device).masked_fill(hidden, -torch.inf).unsqueeze(1)
