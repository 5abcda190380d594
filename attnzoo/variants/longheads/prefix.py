"""The tokens of a sequence before the threshold, which read everything: plain attention, by the quickest path for it.

Letters: T query tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from attnzoo.base.layer import DENSE_BLOCK, AttentionInputs, Plan
from attnzoo.base.rope import apply_rotary
from attnzoo.base.shared_layouts import dense_layout
from attnzoo.variants.longheads.config import LongHeadsConfig
from attnzoo_kernels import Extras
from attnzoo_kernels.runtime.plain import is_readable, is_tracing


def begins_plain(inputs: AttentionInputs, plan: Plan) -> bool:
    """Whether it is known that a call's first rows read everything, and its others do not."""
    q = inputs.q
    whole = inputs.q_pos is None and q.shape[2] == inputs.k.shape[2]
    # A compiler knows lengths as symbols, and looks into nothing that asks for modes.
    known = is_readable(q) or (not torch.compiler.is_compiling() and is_tracing())
    return known and not inputs.offloaded and "chunks" in plan.info and whole


def apart(
    config: LongHeadsConfig, inputs: AttentionInputs, plan: Plan
) -> tuple[tuple[AttentionInputs, Plan], tuple[AttentionInputs, Plan]]:
    """The rows before the threshold with a plan of their own, and those from there on with what is theirs of the plan.

    Args:
        config: The layer's options.
        inputs: All rows of a sequence, in order, more than the threshold.
        plan: What they read.
    """
    first = config.first
    slot = torch.arange(first, device=inputs.k.device)
    k = inputs.k[:, :, :first]
    if plan.extras.rope is not None:
        # Keys are rotated to their place in their chunk; from there to their own.
        cos, sin = (x[slot - slot % config.chunk_size] for x in plan.extras.rope)
        k = apply_rotary(k, cos, sin)
    before = replace(inputs, q=inputs.q[:, :, :first], k=k, v=inputs.v[:, :, :first])
    behind = replace(inputs, q=inputs.q[:, :, first:])
    chosen = replace(plan, layout=plan.layout.rows_from(first // plan.layout.block_q))
    return (before, Plan(dense_layout(DENSE_BLOCK, first, first, k), Extras(), True)), (behind, chosen)
