"""What the steps of a mixture of heads hand to each other, beside what every layer's do.

Names that inherited fields are annotated with are imported as themselves: who evaluates annotations looks here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any as Any

from torch import Tensor as Tensor

from attnzoo.base.editing.reads import CallEdits as CallEdits
from attnzoo.base.shared_layouts import dense_layout
from attnzoo.base.steps import AttentionInputs, Heads, Plan
from attnzoo.variants.moh.forms import EVERY_ROW, Form
from attnzoo.variants.moh.router import Routing
from attnzoo_kernels import BlockLayout as BlockLayout
from attnzoo_kernels import Extras, visible_pairs


@dataclass(frozen=True, eq=False)
class MoHHeads(Heads):
    """Queries, keys and values with what the router decided about their tokens."""

    routing: Routing


@dataclass(frozen=True, eq=False)
class MoHInputs(AttentionInputs):
    """What the operation sees, and in which form heads are computed; q holds the rows that the form says."""

    form: Form = EVERY_ROW


@dataclass(frozen=True, eq=False)
class MoHPlan(Plan):
    """A plan for the rows that heads compute, in the form that was chosen for the call."""

    form: Form = EVERY_ROW

    @cached_property
    def density(self) -> float:
        """Visible (query, key) pairs over those of the dense call of all heads; 1 where there are none."""
        if not self.form.leaves_out:
            return super().density
        size = {"batch": self.batch, "heads": self.heads}
        visible, _ = visible_pairs(self.layout, causal=self.causal, extras=self.extras, **size)
        tokens = self.layout.seq_q if self.form.rows is None else self.form.rows.tokens
        layout = dense_layout(self.layout.block_k, tokens, self.layout.seq_k, self.layout.col)
        extras = Extras(q_pos=self.form.dense_pos, key_bias=self.extras.key_bias)
        _, dense = visible_pairs(layout, causal=self.causal, extras=extras, **size)
        return visible / dense if dense else 1.0
