"""A model that reads under a policy, for two-phase scores, and what a step of it reads.

Letters: G KV heads, P pages of a head, D key width.
"""

from __future__ import annotations

from typing import Any

import torch

from attnzoo.cache.policies.protocol import PageBounds, Policy
from attnzoo.evaluation.two_phase.scores import Held
from attnzoo.policies import LayerHeld, PolicyRun


class PolicyReader:
    """A model under a policy.

    Args:
        run: What ``policies.applied`` gives.

    Attributes:
        model: The model.
        policy: The policy.
    """

    def __init__(self, run: PolicyRun) -> None:
        self.model: Any = run.model
        self.policy = run.policy
        self._run = run

    def new_cache(self) -> Any:
        """An empty cache that follows the policy."""
        return self._run.new_cache()

    def compact(self, cache: Any) -> None:
        """Lets go of what the policy does not keep."""
        self._run.compact(cache)

    def held(self, cache: Any) -> Held:
        """What the buffers say."""
        report = self._run.report(cache)
        read = report.held_bytes
        if self.policy.reads_pages:
            read = sum(bytes_read(self.policy.of_layer(layer.layer), layer) for layer in report.layers)
        return Held(report.held_bytes, report.pool_bytes, report.dense_bytes, read)


def bytes_read(policy: Policy, held: LayerHeld) -> int:
    """Bytes that a decoding step of one layer reads, where it chooses pages by their bounds, which it reads as well.

    How many pages it chooses does not depend on which they are.

    Args:
        policy: Of the layer.
        held: What the layer holds for one item.
    """
    kv_heads = held.dense_rows // held.tokens
    retention = policy.retention(kv_heads)
    full = torch.tensor([True] * kv_heads if retention is None else retention.full, device="cpu")
    # Heads that do not hold everything hold equally much.
    others = max(1, int((~full).sum()))
    rest = (held.rows - int(full.sum()) * held.tokens) / others
    rows = torch.where(full, float(held.tokens), rest)
    pages = -(-held.tokens // policy.page)
    bounds = torch.zeros(1, kv_heads, pages, 1, device="cpu")
    count = torch.full((1, kv_heads), pages, device="cpu")
    chosen = policy.read(torch.zeros(1, kv_heads, 1, 1, device="cpu"), PageBounds(bounds, bounds, count, policy.page))
    if chosen is None:
        return held.held_bytes
    read = torch.minimum(rows, (chosen[0] >= 0).sum(1) * policy.page)
    row = held.dense_bytes / held.dense_rows
    return round(held.held_bytes + (float(read.sum()) - held.rows) * row)
