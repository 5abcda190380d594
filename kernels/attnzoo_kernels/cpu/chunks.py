"""How many rows are computed together: chunks that fit the cache."""

from __future__ import annotations

import torch

from attnzoo_kernels.cpu.schedule import Bucket, Schedule
from attnzoo_kernels.spec.call import Call

CHUNK_SCORES = 1 << 18
"""Scores in one chunk and thread: what stays in a core's cache between the two products."""


def chunks_of(call: Call, schedule: Schedule, *, tiled: bool = False) -> list[Bucket]:
    """The call's rows in chunks; larger ones where scores are few beside the keys, or not kept: ``tiled``."""
    few = tiled or call.grid[0] == 1
    budget = CHUNK_SCORES * min(torch.get_num_threads(), 4) * (4 if few else 1)
    # Small query blocks gather as many keys as large ones: their chunks are bounded by the keys.
    return schedule.chunks(budget, max(call.block_q, 64), call.block_k)
