"""torch's multi-head attention with a variant of attnzoo inside: :class:`attnzoo.MultiheadAttention`."""

from __future__ import annotations

from attnzoo.torch_mha.module import MultiheadAttention as MultiheadAttention
