"""What a bare import costs, in a process of its own."""

from __future__ import annotations

import json
import statistics

from tests.child import run

HEAVY = (
    "triton",
    "transformers",
    "xformers",
    "matplotlib",
    "hypothesis",
    "pytest",
    "rich",
    "typer",
    "safetensors",
    "gguf",
)

PROGRAM = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.process_time()
import attnzoo
seconds = time.process_time() - start
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps({"seconds": seconds, "new": sorted(new), "variants": attnzoo.list_variants()}))
"""

WITHOUT = """
import sys
for name in sys.argv[1:]:
    sys.modules[name] = None
import torch, attnzoo
layer = attnzoo.create("mha", dim=8, num_heads=2)
layer(torch.ones(1, 3, 8)).sum().backward()
print(layer.q_proj.weight.grad.shape)
"""


def test_import_is_quick_and_brings_nothing_heavy() -> None:
    runs = [json.loads(run(PROGRAM)) for _ in range(3)]
    for result in runs:
        assert not set(HEAVY) & set(result["new"])
        assert {"mha", "s2", "lowrank_gqa"} <= set(result["variants"])
    # CPU time, so that a busy machine does not count; the first run may compile the sources.
    assert statistics.median(result["seconds"] for result in runs) <= 0.3


def test_layers_work_where_nothing_optional_is_installed() -> None:
    assert "torch.Size([8, 8])" in run(WITHOUT, *HEAVY)
