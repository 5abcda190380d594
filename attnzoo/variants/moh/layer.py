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

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from attnzoo.base.config import AttentionConfig, check_bool, check_int
from attnzoo.base.layer import AttentionInputs, AttentionLayer, Heads, Plan, Step
from attnzoo.base.projections import is_plain, is_untouched
from attnzoo.base.rope import RotaryConfig as RotaryConfig
from attnzoo.base.shared_layouts import Cover, dense_layout, sink_window_layout
from attnzoo.reporting.choices import check_choice
from attnzoo.variants.moh.routed_rows import Rows, windowed_layout
from attnzoo.variants.moh.router import Counts, Routing, balance_loss, by_norm, learned
from attnzoo_kernels import BlockLayout, Extras, block_sparse_attention, no_autocast, visible_pairs
from attnzoo_kernels.errors import ConfigError, UnsupportedError
from attnzoo_kernels.runtime.plain import is_open, is_readable

ROUTER_STD = 0.02
"""Standard deviation of a new router's weights."""


@dataclass(frozen=True, kw_only=True)
class MoHConfig(AttentionConfig):
    """Mixture-of-head attention.

    Attributes:
        shared_heads: First heads, which every token uses; ``None`` means half of them, whole units.
        active_heads: Of the other heads, how many each token uses; ``None`` means a quarter of all heads, but at least
            two units (the gate of one alone is always 1 in the form "code", so that only the balance loss trains its
            router); "all" uses all.
        router: "learned" has weights; "norm" takes the heads with the longest queries, for pretrained models.
        gate_norm: "code": routed gates add up to K, shared ones to h_s, the two kinds to 2; "paper": plain softmaxes.
        route_unit: "head", or "kv_group": the query heads of a KV head together, so that KV heads are left unread.
        rescale: Whether gates are multiplied by H / (h_s + K).
        aux_scale: "code" multiplies the balance loss by E.
        ste_scope: Of "norm": whether the "selected" heads pass a gradient to the router or "all", which computes all.
        ste_coefficient: Of "norm": factor on that gradient.
        eps: Of "norm": added to the standard deviation of the lengths.
        window: Tokens seen, the own one included; not causal, as far ahead as back. ``None`` sees all.
        sink: First tokens of the sequence that stay visible beside the window.
        block_size: Tokens in a block of the layout; changes no result.
        compute: "routed" computes the routed rows of each head alone, "dense" all and multiplies, "auto" what is
            quicker; changes no result.
    """

    shared_heads: int | None = None
    active_heads: int | Literal["all"] | None = None
    router: Literal["learned", "norm"] = "learned"
    gate_norm: Literal["code", "paper"] = "code"
    route_unit: Literal["head", "kv_group"] = "head"
    rescale: bool = False
    aux_scale: Literal["code", "paper"] = "code"
    ste_scope: Literal["selected", "all"] = "selected"
    ste_coefficient: float = 1.0
    eps: float = 1e-6
    window: int | None = None
    sink: int = 0
    block_size: int = 64
    compute: Literal["auto", "routed", "dense"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        self._check_counts()
        check_bool("rescale", self.rescale)
        for name, least in (("ste_coefficient", 0.0), ("eps", 0.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least < value < float("inf"):
                raise ConfigError(f"{name}: expected a number > {least:g}, got {value!r}")
        if self.window is not None:
            check_int("window", self.window, 1)
        check_int("sink", self.sink, 0)
        check_int("block_size", self.block_size, 1)
        if self.sink and self.window is None:
            raise ConfigError(f"sink: expected 0 without a window, which sees everything, got {self.sink}")

    def _check_counts(self) -> None:
        unit = self.unit
        if self.shared_heads is not None:
            check_int("shared_heads", self.shared_heads, 0)
            if self.shared_heads > self.num_heads or self.shared_heads % unit:
                raise ConfigError(
                    f"shared_heads: expected at most num_heads {self.num_heads}, whole units of {unit}, "
                    f"got {self.shared_heads}"
                )
        routed = self.num_heads - self.counts.shared
        if self.active_heads in (None, "all"):
            return
        check_int("active_heads", self.active_heads, 1 if routed else 0, "all")
        if self.counts.active > routed or self.counts.active % unit:
            raise ConfigError(
                f"active_heads: expected at most the {routed} heads that are not shared, whole units of {unit}, "
                f"got {self.active_heads}"
            )

    @property
    def unit(self) -> int:
        """Heads that are routed together."""
        return self.num_heads // self.kv_heads if self.route_unit == "kv_group" else 1

    @property
    def counts(self) -> Counts:
        """How many heads of each kind there are."""
        units = self.num_heads // self.unit
        shared = units // 2 * self.unit if self.shared_heads is None else self.shared_heads
        routed = self.num_heads - shared
        if self.active_heads == "all":
            active = routed
        elif self.active_heads is None:
            active = min(routed, max(2, units // 4) * self.unit)
        else:
            active = self.active_heads
        return Counts(shared=shared, routed=routed, active=active, unit=self.unit)

    @property
    def head_density(self) -> float:
        """The share of (token, head) pairs that are computed."""
        return (self.counts.shared + self.counts.active) / self.num_heads

    @property
    def cautions(self) -> tuple[str, ...]:
        """That no head is ever left out, unless "all" asks for it."""
        counts = self.counts
        if counts.active < counts.routed or self.active_heads == "all":
            return ()
        return (
            f"moh: all {self.num_heads} heads are active (shared_heads={counts.shared}, active_heads={counts.active}), "
            "so that no head is left out and the balance loss has no gradient; choose fewer active_heads, or more "
            'num_heads (active_heads="all" says that it is wanted)',
        )

    @classmethod
    def small(cls) -> Self:
        """Four heads of 8, two of them active, computed alone."""
        return cls(dim=32, num_heads=4, shared_heads=0, active_heads=2, block_size=16, compute="routed")


_CHOICES = {
    "router": ("learned", "norm"),
    "gate_norm": ("code", "paper"),
    "route_unit": ("head", "kv_group"),
    "aux_scale": ("code", "paper"),
    "ste_scope": ("selected", "all"),
    "compute": ("auto", "routed", "dense"),
}


@dataclass(frozen=True, eq=False)
class MoHHeads(Heads):
    """Queries, keys and values with what the router decided about their tokens."""

    routing: Routing


@dataclass(frozen=True, eq=False)
class Kept:
    """Which rows are computed where some are left out.

    Attributes:
        rows: The rows that q holds; ``None`` where it holds all of them, absent ones at position -1.
        dense_pos: What ``q_pos`` would be with all rows.
        routed: The routed heads' rows that are not absent, where the shared heads compute every row.
    """

    rows: Rows | None
    dense_pos: Tensor | None
    routed: Rows | None = None


@dataclass(frozen=True, eq=False)
class MoHInputs(AttentionInputs):
    """What the operation sees; ``kept`` where some rows of heads are left out."""

    kept: Kept | None = None


@dataclass(frozen=True, eq=False)
class MoHPlan(Plan):
    """A plan for the rows that heads compute; ``kept`` where some are left out."""

    kept: Kept | None = None

    @cached_property
    def density(self) -> float:
        """Visible (query, key) pairs over those of the dense call of all heads; 1 where there are none."""
        if self.kept is None:
            return super().density
        size = {"batch": self.batch, "heads": self.heads}
        visible, _ = visible_pairs(self.layout, causal=self.causal, extras=self.extras, **size)
        tokens = self.layout.seq_q if self.kept.rows is None else self.kept.rows.tokens
        layout = dense_layout(self.layout.block_k, tokens, self.layout.seq_k, self.layout.col)
        extras = Extras(q_pos=self.kept.dense_pos, key_bias=self.extras.key_bias)
        _, dense = visible_pairs(layout, causal=self.causal, extras=extras, **size)
        return visible / dense if dense else 1.0


class MoHAttention(AttentionLayer, name="moh"):
    """Attention in which each token uses the shared heads and some of the routed ones."""

    config_class = MoHConfig
    config: MoHConfig
    causal_promise = "bidirectional-capable"
    trainable_selection = True
    splits_heads = False
    dense_limit: ClassVar[dict[str, Any]] = {"active_heads": "all"}

    router: nn.Linear | None
    shared_router: nn.Linear | None
    type_router: nn.Linear | None

    def build_projections(self, *, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """As the base; with a learned router ``router``, ``shared_router`` and ``type_router`` where they decide."""
        super().build_projections(device=device, dtype=dtype)
        counts, has = self.config.counts, self.config.router == "learned"

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

    def project(self, step: Step) -> Heads:
        """Queries, keys, values, and what the router says about each token."""
        heads = super().project(step)
        return MoHHeads(heads.q, heads.k, heads.v, self.route(step.x, heads.q))

    def route(self, x: Tensor, q: Tensor) -> Routing:
        """The router's decision about tokens ``[B, T, C]`` with queries ``[B, H, T, D]``, in fp32 at least."""
        config, counts = self.config, self.config.counts
        dtype = torch.promote_types(q.dtype, torch.float32)
        if config.router == "norm" and counts.routed:
            lengths = torch.linalg.vector_norm(q[:, counts.shared :], dim=-1, dtype=dtype).transpose(1, 2)
            every, c = config.ste_scope == "all", config.ste_coefficient
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

    def _leaves_out(self, routing: Routing, inputs: AttentionInputs) -> bool:
        """Whether rows that are not routed are left out; either way computes the same."""
        config = self.config
        training = torch.is_grad_enabled() and routing.gates.requires_grad
        if config.router == "norm" and config.ste_scope == "all" and training:
            return False
        if is_open(inputs.q.shape[2]):
            # How many rows a head computes would be asked.
            return False
        if config.compute != "auto":
            return config.compute == "routed"
        if inputs.q.shape[2] == 1:
            return inputs.q.device.type == "cuda" or (inputs.k.shape[2] >= LEAST_SLOTS and is_readable(inputs.q))
        return gathering_pays(inputs.q.shape[2], config.head_density, training=training)

    def remember(self, step: Step, heads: Heads) -> AttentionInputs:
        """As the base; of the queries only the rows that heads compute."""
        inputs = super().remember(step, heads)
        if not isinstance(heads, MoHHeads) or not self._leaves_out(heads.routing, inputs):
            return inputs
        q, k, v, q_pos = inputs.q, inputs.k, inputs.v, inputs.q_pos
        active = heads.routing.active & _real(step, heads.routing.active)
        first = k.shape[2] - q.shape[2] if step.context is None else 0
        if q.shape[2] == 1:
            # A KV head is read or not: all of its query heads come along.
            each = q.shape[1] // k.shape[1]
            groups = active.view(q.shape[0], k.shape[1], each).any(2).repeat_interleave(each, 1)
            place = torch.where(groups.unsqueeze(2), first if q_pos is None else q_pos.expand(*q.shape[:3]), -1)
            return MoHInputs(q, k, v, place.to(torch.int32), inputs.key_bias, Kept(None, q_pos))
        active = active.transpose(1, 2)
        if self._goes_apart(inputs):
            place = torch.where(active, torch.arange(q.shape[2], device=q.device) + first, -1).to(torch.int32)
            return MoHInputs(q, k, v, place, kept=Kept(None, None, Rows.of(active[:, self.config.counts.shared :])))
        rows = Rows.of(active)
        return MoHInputs(rows.gather(q), k, v, rows.positions(q_pos, first), inputs.key_bias, Kept(rows, q_pos))

    def plan(self, step: Step, heads: Heads, inputs: AttentionInputs) -> Plan:
        """Everything or the window's blocks, for the rows that heads compute."""
        config, causal = self.config, self.config.causal and step.context is None
        if config.window is not None and step.context is not None:
            raise UnsupportedError("context: expected None with a window, which counts tokens of one sequence")
        extras = Extras() if config.window is None else Extras(window=config.window, sink=config.sink)
        if not isinstance(heads, MoHHeads):
            return Plan(self._dense_cover(step, inputs), extras, causal)
        routing, counts = heads.routing, config.counts
        weight = routing.gates.transpose(1, 2).unsqueeze(-1).to(inputs.q.dtype)  # [B, H, T, 1]
        loss = balance_loss(routing, counts, _real_or_none(step, routing.active), config.aux_scale)
        info = {"gates": routing.gates.detach(), "active": routing.active}
        kept = inputs.kept if isinstance(inputs, MoHInputs) else None
        if kept is None or kept.rows is None or inputs.q_pos is None:
            return MoHPlan(self._dense_cover(step, inputs), extras, causal, 0, weight, loss, info, kept=kept)
        slots, rows = inputs.k.shape[2], inputs.q.shape[2]
        blocks = (query_block(config.block_size, rows), config.block_size)
        if config.window is None or not causal:
            layout = BlockLayout.dense(*blocks, rows, slots, device=inputs.q.device)
        else:
            layout = windowed_layout(inputs.q_pos, blocks, slots, config.window, config.sink)
        return MoHPlan(layout, extras, causal, 0, weight, loss, info, kept=kept)

    def _dense_cover(self, step: Step, inputs: AttentionInputs) -> Any:
        config, tokens, slots = self.config, inputs.q.shape[2], inputs.k.shape[2]
        if config.window is None:
            return dense_layout(config.block_size, tokens, slots, inputs.q)
        cover = Cover(config.window, config.sink, config.causal, step.offset)
        return sink_window_layout(config.block_size, tokens, slots, cover, inputs.q)

    def operate(self, inputs: AttentionInputs, plan: Plan) -> Tensor:
        """As the base; one token reads the KV heads that it needs where they lie."""
        kept = inputs.kept if isinstance(inputs, MoHInputs) else None
        if kept is not None and kept.routed is not None:
            return _in_order(*self._apart(inputs, plan, kept.routed), kept.routed)
        single = kept is not None and kept.rows is None
        if single and plan.causal and self._may_divide(inputs.q):
            return self._read_in_place(inputs)
        return super().operate(inputs, plan)

    def _may_divide(self, q: Tensor) -> bool:
        """Whether several calls without positions may stand for one with them: it pays on CPUs, without a window."""
        return self.config.window is None and self.impl in ("auto", "blocked") and q.numel() > 0 and is_readable(q)

    def _goes_apart(self, inputs: AttentionInputs) -> bool:
        """Whether shared and routed heads are two calls: on a CPU a dense call is quicker than one with positions."""
        counts, heads = self.config.counts, inputs.q.shape[1]
        each = heads // inputs.k.shape[1]
        splits = 0 < counts.shared < heads and counts.shared % each == 0 and counts.active > 0
        return splits and inputs.q_pos is None and inputs.key_bias is None and self._may_divide(inputs.q)

    def _apart(self, inputs: AttentionInputs, plan: Plan, rows: Rows) -> tuple[Tensor, Tensor]:
        """The shared heads in one call, which computes every row, and the rows of the routed heads in another."""
        shared, block = self.config.counts.shared, self.config.block_size
        tokens, slots = inputs.q.shape[2], inputs.k.shape[2]
        heads = [shared, inputs.q.shape[1] - shared]
        groups = [n * inputs.k.shape[1] // inputs.q.shape[1] for n in heads]
        q, routed_q = inputs.q.split(heads, 1)
        k, routed_k = inputs.k.split(groups, 1)
        v, routed_v = inputs.v.split(groups, 1)
        rule: dict[str, Any] = {"causal": plan.causal, "scale": self.config.scale, "impl": self.impl}
        whole = block_sparse_attention(q, k, v, dense_layout(block, tokens, slots, q), **rule)
        routed_q = rows.gather(routed_q)
        longest = routed_q.shape[2]
        layout = BlockLayout.dense(query_block(block, longest), block, longest, slots, device=q.device)
        pos = rows.positions(None, slots - tokens if plan.causal else 0)
        routed = block_sparse_attention(routed_q, routed_k, routed_v, layout, extras=Extras(q_pos=pos), **rule)
        return whole, routed

    def conclude(self, step: Step, inputs: AttentionInputs, plan: Plan) -> Tensor:
        """As the base; heads computed apart are projected apart too, of the routed ones the routed rows alone."""
        rows = inputs.kept.routed if isinstance(inputs, MoHInputs) and inputs.kept is not None else None
        if rows is None or plan.head_weight is None or not is_plain(self.o_proj, inputs.v):
            return super().conclude(step, inputs, plan)
        if not (self.runs_own("operate", MoHAttention) and self.runs_own("combine", MoHAttention)):
            # Steps that somebody has replaced are run.
            return super().conclude(step, inputs, plan)
        return self._project_apart(*self._apart(inputs, plan, rows), plan.head_weight, rows)

    def _project_apart(self, whole: Tensor, routed: Tensor, gates: Tensor, rows: Rows) -> Tensor:
        batch, shared, tokens, width = whole.shape
        of_whole, of_routed = gates.split([shared, routed.shape[1]], 1)
        weights = self.o_proj.weight.unflatten(1, (-1, width)).unbind(1)  # of each head, [C, Dv]
        joined = (whole * of_whole).transpose(1, 2).reshape(batch * tokens, shared * width)
        y = linear(joined, torch.cat(weights[:shared], 1), self.o_proj.bias)
        rows.add_products(y, routed * rows.gather(of_routed), weights[shared:])
        return y.view(batch, tokens, -1)

    def _read_in_place(self, inputs: AttentionInputs) -> Tensor:
        """One call for each run of neighbouring KV heads that an item needs: keys and values are not copied."""
        q, k, v = inputs.q, inputs.k, inputs.v
        each = q.shape[1] // k.shape[1]
        outs = []
        for item, positions in enumerate(inputs.q_pos[:, ::each, 0].tolist() if inputs.q_pos is not None else []):
            parts, head = [], 0
            for position, run in groupby(positions):
                end = head + len(list(run))
                rows = q[item : item + 1, head * each : end * each]
                if position < 0:
                    parts.append(rows.new_zeros(*rows.shape[:3], v.shape[3]))
                else:
                    # One token reads every slot up to its own.
                    keys, values = (x[item : item + 1, head:end, : position + 1] for x in (k, v))
                    layout = dense_layout(self.config.block_size, 1, position + 1, q)
                    scale, impl = self.config.scale, self.impl
                    parts.append(block_sparse_attention(rows, keys, values, layout, scale=scale, impl=impl))
                head = end
            outs.append(torch.cat(parts, 1))
        return torch.cat(outs)

    def combine(self, step: Step, out: Tensor, plan: Plan) -> Tensor:
        """As the base; rows that were not computed are 0."""
        rows = plan.kept.rows if isinstance(plan, MoHPlan) and plan.kept is not None else None
        if rows is None or plan.head_weight is None:
            return super().combine(step, out, plan)
        weighted = out * rows.gather(plan.head_weight)
        return super().combine(step, rows.scatter(weighted), replace(plan, head_weight=None))


def _in_order(whole: Tensor, routed: Tensor, rows: Rows) -> Tensor:
    """Shared heads and the rows of routed ones as ``[B, H, T, D]``, laid out by tokens as the projection reads it."""
    return torch.cat([whole.transpose(1, 2), rows.scatter(routed).transpose(1, 2)], 2).transpose(1, 2)


def query_block(block: int, rows: int) -> int:
    """Rows in a query block: many rows are quicker in taller blocks, although these reach further."""
    return 2 * block if rows >= TALL_ROWS else block


def gathering_pays(tokens: int, density: float, *, training: bool) -> bool:
    """Whether computing the routed rows alone is quicker than all rows: the crossings of ``python -m bench.moh``."""
    for least, most, most_training in CROSSINGS:
        if tokens >= least:
            return density <= (most_training if training else most)
    return False


CROSSINGS = ((4096, 0.75, 0.75), (2048, 0.55, 0.65), (1024, 0.3, 0.5))
"""From so many tokens on, the largest share of heads at which gathering pays, and the same in training."""
TALL_ROWS = 1024
LEAST_SLOTS = 2048
"""Slots from which a decoding step on a CPU does better to leave KV heads out."""


def _real_or_none(step: Step, active: Tensor) -> Tensor | None:
    return _real(step, active).squeeze(-1) if isinstance(step.lengths, Tensor) else None


def _real(step: Step, active: Tensor) -> Tensor:
    """Which rows hold tokens, bool ``[B|1, T|1, 1]``."""
    if not isinstance(step.lengths, Tensor):
        return torch.ones(1, 1, 1, dtype=torch.bool, device=active.device)
    token = torch.arange(active.shape[1], device=active.device)
    return (token < step.lengths.unsqueeze(1)).unsqueeze(-1)
