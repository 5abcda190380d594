"""The forms of one computation: all give the same, and which is quickest depends on the call. Chosen here alone.

Letters: B batch, T tokens, H heads, S key tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from attnzoo.base.steps import AttentionInputs
from attnzoo.variants.moh.routed_rows import Rows
from attnzoo_kernels.runtime.plain import is_open, is_readable

Kind = Literal["every_row", "routed_rows", "two_calls", "needed_heads", "heads_in_place"]

CROSSINGS = ((4096, 0.75, 0.75), (2048, 0.55, 0.65), (1024, 0.3, 0.5))
"""From so many tokens on, the largest share of heads at which gathering pays, and the same in training."""
TALL_ROWS = 1024
LEAST_SLOTS = 2048
"""Slots from which a decoding step on a CPU does better to leave KV heads out."""


@dataclass(frozen=True, eq=False)
class Form:
    """In which form a call is computed, and why.

    Attributes:
        kind: "every_row": all rows of all heads, times gates of which some are 0. "routed_rows": of each head the rows
            that are routed to it, gathered. "two_calls": every row of the shared heads, and the gathered rows of the
            routed ones. Of one token, "needed_heads": KV heads that nobody needs are hidden; "heads_in_place": runs of
            needed KV heads are read where they lie.
        why: The reason, in words.
        rows: The gathered rows: of all heads, or with "two_calls" of the routed ones.
        dense_pos: What ``q_pos`` would be with all rows.
        packed: Whether the rows of "two_calls" are handed on as they are, to be projected apart.
    """

    kind: Kind
    why: str
    rows: Rows | None = None
    dense_pos: Tensor | None = None
    packed: bool = False

    @property
    def leaves_out(self) -> bool:
        """Whether some rows of heads are not computed."""
        return self.kind != "every_row"


EVERY_ROW = Form("every_row", "nobody has routed these heads")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a choice of form goes by, beside the call's sizes.

    Attributes:
        compute: What the configuration asks for: "auto", "routed" or "dense".
        density: The share of (token, head) pairs that are routed.
        training: Whether the gates need a gradient.
        needs_all: Whether every head's output is needed.
        divides: Whether several calls may stand for one.
        splits: Whether shared and routed heads have KV heads of their own.
        causal: Whether a row reads no later slot.
    """

    compute: str
    density: float
    training: bool
    needs_all: bool
    divides: bool
    splits: bool
    causal: bool


def choose_form(inputs: AttentionInputs, setting: Setting) -> Form:
    """The form of a call whose rows are all there."""
    q = inputs.q
    tokens = q.shape[2]
    if setting.needs_all:
        return Form("every_row", "the router's gradient needs the heads that are not chosen too")
    if is_open(tokens):
        return Form("every_row", "an export leaves the length open, and rows cannot be counted")
    if setting.compute == "dense":
        return Form("every_row", "compute='dense' asks for it")
    divides = setting.divides and is_readable(q) and q.numel() > 0
    if tokens == 1:
        if setting.compute == "auto" and not _skipping_pays(inputs):
            return Form("every_row", "few slots are read sooner than KV heads are picked")
        if divides and setting.causal:
            return Form("heads_in_place", "one token on a CPU reads needed KV heads where they lie")
        return Form("needed_heads", "one token reads the KV heads that it needs")
    if setting.compute == "auto" and not gathering_pays(tokens, setting.density, training=setting.training):
        return Form("every_row", "gathering rows would take longer than it saves")
    # On a CPU a dense call is quicker than one with positions.
    if setting.splits and divides and inputs.q_pos is None and inputs.key_bias is None:
        return Form("two_calls", "shared heads compute every row")
    return Form("routed_rows", "each head computes the rows that are routed to it")


def _skipping_pays(inputs: AttentionInputs) -> bool:
    """Whether one token does better to leave KV heads out."""
    return inputs.q.device.type == "cuda" or (inputs.k.shape[2] >= LEAST_SLOTS and is_readable(inputs.q))


def query_block(block: int, rows: int) -> int:
    """Rows in a query block: many rows are quicker in taller blocks, although these reach further."""
    return 2 * block if rows >= TALL_ROWS else block


def gathering_pays(tokens: int, density: float, *, training: bool) -> bool:
    """Whether computing the routed rows alone is quicker than all rows: the crossings of ``python -m bench.moh``."""
    for least, most, most_training in CROSSINGS:
        if tokens >= least:
            return density <= (most_training if training else most)
    return False
