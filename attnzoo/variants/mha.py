r"""Multi-head attention with grouped keys, and optionally a window and a sink: the anchor of the zoo.

Source: Vaswani et al. 2017, *Attention Is All You Need*, equation 1 (arXiv:1706.03762); grouped heads: Ainslie et al.
2023, *GQA* (arXiv:2305.13245); window and sink: Xiao et al. 2023, *Efficient Streaming Language Models with Attention
Sinks* (arXiv:2309.17453).

.. math:: o_t = \sum_{s \in S(t)} softmax_s(\sigma q_t \cdot k_s) v_s,
          \quad S(t) = \{ s \le t : t - s < window \text{ or } s < sink \}

Departures: the sink's tokens keep their own positions beside the window; the paper's code renumbers the cache.

Letters: T query tokens, S key tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from attnzoo.base.config import AttentionConfig, check_int
from attnzoo.base.decoding.step import sink_window_slots
from attnzoo.base.evicting.layer import EvictingLayer
from attnzoo.base.layer import AttentionInputs, Heads, Plan, Step
from attnzoo.base.rope import RotaryConfig as RotaryConfig
from attnzoo.base.shared_layouts import Cover, dense_layout, sink_window_layout
from attnzoo.cache.retention import Retention
from attnzoo_kernels import Extras, Slots
from attnzoo_kernels.errors import ConfigError, UnsupportedError


@dataclass(frozen=True, kw_only=True)
class MHAConfig(AttentionConfig):
    """Multi-head attention.

    Attributes:
        window: Tokens seen, the own one included; not causal, as far ahead as back. ``None`` sees all.
        sink: First tokens of the sequence that stay visible beside the window.
        block_size: Tokens in a block of the layout; changes no result.
    """

    window: int | None = None
    sink: int = 0
    block_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None:
            check_int("window", self.window, 1)
        check_int("sink", self.sink, 0)
        check_int("block_size", self.block_size, 1)
        if self.sink and self.window is None:
            raise ConfigError(f"sink: expected 0 without a window, which sees everything, got {self.sink}")

    @classmethod
    def small(cls) -> Self:
        """Four heads of 8 and small blocks."""
        return cls(dim=32, num_heads=4, num_kv_heads=2, block_size=16)


class MHAAttention(EvictingLayer, name="mha"):
    """Plain attention: the whole grid of blocks, or the cover of a window and a sink."""

    config_class = MHAConfig
    config: MHAConfig
    causal_promise = "bidirectional-capable"
    compiles_rows = True
    dense_limit: ClassVar[dict[str, Any]] = {"window": None, "sink": 0}

    def plan(self, step: Step, heads: Heads, inputs: AttentionInputs) -> Plan:
        """Everything, or the window's blocks; the token rule does the rest."""
        config = self.config
        q = inputs.q
        tokens = inputs.q.shape[2]
        slots = inputs.slots
        if config.window is None:
            layout = dense_layout(config.block_size, tokens, slots, q)
            return Plan(layout, Extras(), config.causal and step.context is None)
        if step.context is not None:
            raise UnsupportedError("context: expected None with a window, which counts tokens of one sequence")
        extras = Extras(window=config.window, sink=config.sink)
        cover = Cover(config.window, config.sink, config.causal, step.offset)
        return Plan(sink_window_layout(config.block_size, tokens, slots, cover, q), extras, config.causal)

    def row_slots(self, held: int, device: torch.device) -> Slots:
        """Everything, or the sink and the window."""
        return sink_window_slots(held, self.config.window, self.config.sink, device)

    def why_no_policy(self) -> str | None:
        """A window is a rule of its own."""
        if self.config.window is not None:
            return "its window is a rule of its own; use window=None, and the policy's"
        return super().why_no_policy()

    def retention(self, heads: int) -> Retention:
        """What rows can read: the window and the sink, or everything."""
        window = self.config.window
        return Retention(block=1, local=window or 1, full=(window is None,) * heads, sink=self.config.sink)
