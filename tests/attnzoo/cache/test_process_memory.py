"""What the process holds while an evicting window decodes, beside one that keeps everything."""

from __future__ import annotations

import pytest

from tests.child import run

DECODE = """
import sys
import torch
from attnzoo import create

layer = create("mha", dim=256, num_heads=4, window=32, sink=4)
evict = sys.argv[1] == "evict"
tokens = 4096
x = torch.randn(8, 1, 256)

def resident():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

def decode(count):
    cache = layer.new_cache(8, count, evict=evict)
    with torch.no_grad():
        for _ in range(count):
            layer(x, cache=cache)
    return cache

# What a first call brings along, scratch memory and the allocator's arenas, is there after these.
decode(64)
before = resident()
cache = decode(tokens)
print(resident() - before)
"""

BYTES = 2 * 8 * 4096 * 256 * 4
"""Keys and values of the tokens that are decoded."""


@pytest.mark.slow
def test_the_memory_of_a_process_that_evicts_stays_flat() -> None:
    grown = {kind: int(run(DECODE, kind)) * 1024 for kind in ("evict", "keep")}
    # The control shows that the measure sees keys and values at all.
    assert grown["keep"] > 0.8 * BYTES
    # Tables of rotations grow with the positions: a thirtieth of the keys and values of these eight items.
    assert grown["evict"] < BYTES / 8
