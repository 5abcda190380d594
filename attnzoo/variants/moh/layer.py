r"""Mixture-of-head attention: each token uses some of the heads, weighted, and the others are not computed.

Source: Jin et al. 2024, *MoH: Multi-Head Attention as Mixture-of-Head Attention* (arXiv:2410.11842), equations 4 to 9;
code: SkyworkAI/MoH. The first h_s heads are shared, K of the E others are routed to:

.. math:: y_t = \sum_i g_{t,i} W_O^i o_{t,i}, \quad g_t = [\alpha_1 s_t \| \alpha_2 r_t]

with the gates of :mod:`attnzoo.variants.moh.router`.

Departures: ``gate_norm="code"``, the default, is the published code's form, in which gates are 1 on average; "paper" is
the equations'. The published code computes all heads and multiplies by 0: here what is not routed is not computed.
Padding does not count in the balance loss. Equal lengths of queries give no NaN. The router starts small and random,
since zeros would send all tokens to the same heads, but at zero where all heads are active. ``route_unit="kv_group"``
and the window are additions.

Letters: B batch, T query tokens, S key tokens, C model width, H query heads, G KV heads, D head width, R rows of the
longest head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from attnzoo.base.decoding.compiled import HiddenRow, hidden_from_compilers
from attnzoo.base.decoding.step import TokenRow, sink_window_slots
from attnzoo.base.layer import AttentionInputs, AttentionLayer, Plan, Step, finalise
from attnzoo.base.projections import is_plain, is_untouched
from attnzoo.base.rope import RotaryConfig as RotaryConfig
from attnzoo.base.shared_layouts import Cover, dense_layout, sink_window_layout
from attnzoo.cache.kv_cache import KVCache
from attnzoo.cache.lengths import Lengths
from attnzoo.variants.moh import divided
from attnzoo.variants.moh.config import MoHConfig
from attnzoo.variants.moh.forms import LEAST_SLOTS, Form, Setting, choose_form, query_block
from attnzoo.variants.moh.records import MoHHeads, MoHInputs, MoHPlan
from attnzoo.variants.moh.routed_rows import Rows, windowed_layout
from attnzoo.variants.moh.router import Routing, balance_loss, by_norm, learned
from attnzoo_kernels import BlockLayout, Extras, Slots, attend_slots, no_autocast
from attnzoo_kernels.errors import UnsupportedError

ROUTER_STD = 0.02
"""Standard deviation of a new router's weights."""


class MoHAttention(AttentionLayer, name="moh"):
    """Attention in which each token uses the shared heads and some of the routed ones."""

    config_class = MoHConfig
    config: MoHConfig
    causal_promise = "bidirectional-capable"
    trainable_selection = True
    splits_heads = False
    compiles_rows = True
    dense_limit: ClassVar[dict[str, Any]] = {"active_heads": "all"}

    router: nn.Linear | None
    shared_router: nn.Linear | None
    type_router: nn.Linear | None

    def build_projections(self, *, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """As the base; with a learned router ``router``, ``shared_router`` and ``type_router`` where they decide."""
        super().build_projections(device=device, dtype=dtype)
        counts = self.config.counts
        has = self.config.router == "learned"

        def build(needed: bool, outputs: int) -> nn.Linear | None:
            if not (has and needed):
                return None
            router = nn.Linear(self.config.dim, outputs, bias=False, device=device, dtype=dtype)
            self._start_router(router)
            return router

        self.router = build(counts.routed > 0, counts.routed)
        self.shared_router = build(counts.shared > 1, counts.shared)
        self.type_router = build(counts.shared > 0 and counts.active > 0, 2)

    def restart(self, child: nn.Module) -> None:
        """As the base; routers start small."""
        super().restart(child)
        if child in (self.router, self.shared_router, self.type_router):
            self._start_router(child)

    def _start_router(self, router: nn.Module) -> None:
        counts = self.config.counts
        for weight in router.parameters():
            nn.init.normal_(weight, std=ROUTER_STD if counts.active < counts.routed else 0.0)

    def project(self, step: Step) -> MoHHeads:
        """Queries, keys, values, and what the router says about each token."""
        heads = super().project(step)
        return MoHHeads(heads.q, heads.k, heads.v, self.route(step.x, heads.q))

    def route(self, x: Tensor, q: Tensor) -> Routing:
        """The router's decision about tokens ``[B, T, C]`` with queries ``[B, H, T, D]``, in fp32 at least."""
        config = self.config
        counts = self.config.counts
        dtype = torch.promote_types(q.dtype, torch.float32)
        if config.router == "norm" and counts.routed:
            lengths = torch.linalg.vector_norm(q[:, counts.shared :], dim=-1, dtype=dtype).transpose(1, 2)
            every = config.ste_scope == "all"
            c = config.ste_coefficient
            routing = by_norm(lengths, counts, eps=config.eps, coefficient=c, every=every)
        else:
            logits = self._router_logits(x, dtype)
            like = x.new_empty(0, dtype=dtype).expand(*x.shape[:2], 0)
            routing = learned((logits[0], logits[1], logits[2]), like, counts, config.gate_norm)
        if not config.rescale:
            return routing
        return replace(routing, gates=routing.gates * (config.num_heads / (counts.shared + counts.active)))

    def _router_logits(self, x: Tensor, dtype: torch.dtype) -> list[Tensor | None]:
        """What each of the three routers says about tokens ``[B, T, C]``; one product for all, being narrow."""
        routers = (self.router, self.shared_router, self.type_router)
        present = [one for one in routers if one is not None]
        if not present:
            return [None, None, None]
        # Rounded logits would send tokens to other heads.
        with no_autocast(x.device.type):
            if all(is_untouched(one, x) for one in present):
                weights = [one.weight.to(dtype) for one in present]
                every = linear(x.to(dtype), torch.cat(weights)).split([len(weight) for weight in weights], -1)
            else:
                every = tuple(one(x).to(dtype) for one in present)
        said = iter(every)
        return [None if one is None else next(said) for one in routers]

    # The steps from here on are given the records of this layer's own steps.

    def remember(self, step: Step, heads: MoHHeads) -> MoHInputs:  # type: ignore[override]
        """As the base; of the queries only the rows that heads compute."""
        inputs = super().remember(step, heads)
        return self._in_form(step, heads.routing, inputs, self._choose_form(step, heads.routing, inputs))

    def _choose_form(self, step: Step, routing: Routing, inputs: AttentionInputs) -> Form:
        """In which form a call is computed: the one place where that is decided."""
        config = self.config
        heads = inputs.q.shape[1]
        shared = config.counts.shared
        splits = 0 < shared < heads and shared % (heads // inputs.k.shape[1]) == 0 and config.counts.active > 0
        training = torch.is_grad_enabled() and routing.gates.requires_grad
        form = choose_form(
            inputs,
            Setting(
                compute=config.compute,
                density=config.head_density,
                training=training,
                # The gradient of the router needs every head's output.
                needs_all=training and config.router == "norm" and config.ste_scope == "all",
                # Several calls without positions stand for one with them, without a window.
                divides=config.window is None and self.impl in ("auto", "blocked"),
                splits=splits,
                causal=config.causal and step.context is None,
            ),
        )
        if form.kind != "two_calls":
            return form
        # Steps that somebody has replaced are handed whole heads; a projection that is more than a product is called.
        own_steps = self.runs_own("operate", MoHAttention) and self.runs_own("combine", MoHAttention)
        o_proj = self.product_module("o_proj")
        return replace(form, packed=own_steps and o_proj is not None and is_plain(o_proj, inputs.v))

    def _in_form(self, step: Step, routing: Routing, inputs: AttentionInputs, form: Form) -> MoHInputs:
        """The inputs of a form: which rows there are, and at which positions."""
        q = inputs.q
        if not form.leaves_out:
            return MoHInputs(**vars(inputs), form=form)
        active = routing.active & _real(step, routing.active)  # [B, T, H]
        first = inputs.k.shape[2] - q.shape[2] if step.context is None else 0
        if form.kind in ("needed_heads", "heads_in_place"):
            # A KV head is read or not: all of its query heads come along.
            each = q.shape[1] // inputs.k.shape[1]
            groups = active.view(q.shape[0], inputs.k.shape[1], each).any(2).repeat_interleave(each, 1)
            slot = first if inputs.q_pos is None else inputs.q_pos.expand(*q.shape[:3])
            q_pos = torch.where(groups.unsqueeze(2), slot, -1).to(torch.int32)
            form = replace(form, dense_pos=inputs.q_pos)
        elif form.kind == "two_calls":
            active = active.transpose(1, 2)
            q_pos = torch.where(active, torch.arange(q.shape[2], device=q.device) + first, -1).to(torch.int32)
            form = replace(form, rows=Rows.of(active[:, self.config.counts.shared :]))
        else:
            rows = Rows.of(active.transpose(1, 2))
            q = rows.gather(q)
            q_pos = rows.positions(inputs.q_pos, first)
            form = replace(form, rows=rows, dense_pos=inputs.q_pos)
        return MoHInputs(q=q, k=inputs.k, v=inputs.v, q_pos=q_pos, key_bias=inputs.key_bias, form=form)

    def plan(self, step: Step, heads: MoHHeads, inputs: MoHInputs) -> MoHPlan:  # type: ignore[override]
        """Everything or the window's blocks, for the rows that heads compute."""
        config = self.config
        routing = heads.routing
        causal = config.causal and step.context is None
        extras = self._rule(step)
        layout = self._rows_cover(inputs, causal) if inputs.form.kind == "routed_rows" else self._cover(step, inputs)
        return MoHPlan(
            layout,
            extras,
            causal,
            head_weight=routing.gates.transpose(1, 2).unsqueeze(-1).to(inputs.q.dtype),  # [B, H, T, 1]
            aux_loss=balance_loss(routing, config.counts, _real_or_none(step, routing.active), config.aux_scale),
            info={"gates": routing.gates.detach(), "active": routing.active},
            form=inputs.form,
        )

    def plan_for(self, inputs: AttentionInputs, *, offset: int | Tensor, lengths: int | Tensor | None = None) -> Plan:
        """As the base; nobody has routed these heads, so that all of them are computed."""
        step, inputs = self.given_call(inputs, offset, lengths)
        return finalise(Plan(self._cover(step, inputs), self._rule(step), self.config.causal), inputs)

    def _rule(self, step: Step) -> Extras:
        config = self.config
        if config.window is None:
            return Extras()
        if step.context is not None:
            raise UnsupportedError("context: expected None with a window, which counts tokens of one sequence")
        return Extras(window=config.window, sink=config.sink)

    def _rows_cover(self, inputs: MoHInputs, causal: bool) -> BlockLayout:
        """The blocks of gathered rows, which lie where their positions say."""
        config = self.config
        slots = inputs.k.shape[2]
        rows = inputs.q.shape[2]
        blocks = (query_block(config.block_size, rows), config.block_size)
        if config.window is None or not causal or inputs.q_pos is None:
            return BlockLayout.dense(*blocks, rows, slots, device=inputs.q.device)
        return windowed_layout(inputs.q_pos, blocks, slots, config.window, config.sink)

    def _cover(self, step: Step, inputs: AttentionInputs) -> BlockLayout:
        """The blocks of every row."""
        config = self.config
        tokens = inputs.q.shape[2]
        slots = inputs.k.shape[2]
        if config.window is None:
            return dense_layout(config.block_size, tokens, slots, inputs.q)
        cover = Cover(config.window, config.sink, config.causal, step.offset)
        return sink_window_layout(config.block_size, tokens, slots, cover, inputs.q)

    @property
    def _operation(self) -> divided.Operation:
        return divided.Operation(block=self.config.block_size, scale=self.config.scale, impl=self.impl)

    def row_slots(self, held: int, device: torch.device) -> Slots:
        """Everything, or the sink and the window."""
        return sink_window_slots(held, self.config.window, self.config.sink, device)

    def attend_row(self, row: TokenRow) -> Tensor:
        """As the base, with the weights of heads; KV heads that no active head needs are not read where that pays."""
        config = self.config
        heads = config.num_heads
        slots = self.row_slots(row.position + 1, row.x.device)
        both, v = self.heads_of_row(row)
        routing = self.route(row.x, both[:, :heads])
        q, k = self.rotate_row(row, both).tensor_split((heads,), 1)
        seen = row.cache.write_row({"k": k, "v": v})
        call = divided.RowCall(q, seen["k"], seen["v"], slots, self.row_scale)
        if self._skips_heads(row.position):
            out = divided.attend_needed(call, routing.active[:, 0])
        else:
            out = attend_slots(*call[:4], scale=call.scale)
        return out * routing.gates.transpose(1, 2).unsqueeze(-1).to(out.dtype)

    def _skips_heads(self, position: int) -> bool:
        """Whether KV heads that no active head needs are left out by the row at a position."""
        config = self.config
        skips = config.compute == "routed" or (config.compute == "auto" and position >= LEAST_SLOTS)
        return skips and config.counts.active < config.counts.routed

    def may_compile_row(self, x: Tensor, cache: KVCache) -> bool:
        """As every layer."""
        return super().may_compile_row(x, cache) and self.may_hide_row(cache)

    def compiled_row(self, step: Step, heads: MoHHeads) -> Tensor:  # type: ignore[override]
        """As :meth:`attend_row`: which heads are needed is read."""
        inputs = super().remember(step, heads)
        held = inputs.k.shape[2]
        if self._skips_heads(held - 1):
            tensors = (inputs.q, inputs.k, inputs.v, heads.routing.active[:, 0])
            out = self.hidden_row("moh", tensors, held, self.row_scale)
        else:
            out = self.read_runs(inputs.q, inputs.k, inputs.v)
        return out * heads.routing.gates.transpose(1, 2).unsqueeze(-1).to(out.dtype)

    def operate(self, inputs: MoHInputs, plan: MoHPlan) -> Tensor:  # type: ignore[override]
        """As the base, in the form that was chosen for the call.

        Returns:
            The heads' rows ``[B, H, T, Dv]``; where :attr:`Form.packed` says so, for :meth:`combine` alone, the rows
            of shared heads and the gathered ones of routed heads behind each other, ``[B, 1, rows, Dv]``.
        """
        form = plan.form
        if form.kind == "two_calls" and form.rows is not None:
            shared = self.config.counts.shared
            whole, routed = divided.two_calls(self._operation, inputs, form.rows, shared, causal=plan.causal)
            return divided.packed(whole, routed) if form.packed else divided.in_order(whole, routed, form.rows)
        if form.kind == "heads_in_place":
            return divided.read_in_place(self._operation, inputs)
        return super().operate(inputs, plan)

    def combine(self, step: Step, out: Tensor, plan: MoHPlan) -> Tensor:  # type: ignore[override]
        """As the base; rows that were not computed are 0."""
        form = plan.form
        if form.rows is None or plan.head_weight is None:
            return super().combine(step, out, plan)
        if form.packed:
            o_proj = cast(nn.Linear, self.projection("o_proj"))
            return divided.project_packed(out, o_proj, plan.head_weight, form.rows)
        if form.kind == "two_calls":
            return super().combine(step, out, plan)
        weighted = out * form.rows.gather(plan.head_weight)
        return super().combine(step, form.rows.scatter(weighted), replace(plan, head_weight=None))


@hidden_from_compilers("moh")
def _attend_needed(row: HiddenRow) -> Tensor:
    """Attention of a row whose needed heads are the last tensor, bool ``[B, H]``; the scale is the number."""
    q, k, v, active = row.tensors
    slots = sink_window_slots(row.held, row.config.window, row.config.sink, q.device)
    return divided.attend_needed(divided.RowCall(q, k, v, slots, row.numbers[0]), active)


def _real_or_none(step: Step, active: Tensor) -> Tensor | None:
    return _real(step, active).squeeze(-1) if Lengths(step.lengths).differ else None


def _real(step: Step, active: Tensor) -> Tensor:
    """Which rows hold tokens, bool ``[B|1, T|1, 1]``."""
    lengths = Lengths(step.lengths)
    if not lengths.differ:
        return torch.ones(1, 1, 1, dtype=torch.bool, device=active.device)
    return lengths.holds(torch.arange(active.shape[1], device=active.device)).unsqueeze(-1)
