"""What a bare import costs, in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

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

MOST_RUNS = 9

# An installed package is compiled once, so the first run writes into a folder of the test's own: the
# environment may forbid Python to keep what it compiles, and then every run would count the compiler.
PROGRAM = """
import json, sys, time
start = time.process_time()
import torch
torch_seconds = time.process_time() - start
sys.pycache_prefix, sys.dont_write_bytecode = sys.argv[1], False
before = set(sys.modules)
start = time.process_time()
import attnzoo
seconds = time.process_time() - start
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps({"seconds": seconds, "torch": torch_seconds, "new": sorted(new), "variants": attnzoo.list_variants()}))
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


def test_import_is_quick_and_brings_nothing_heavy(tmp_path: Path) -> None:
    first = json.loads(run(PROGRAM, str(tmp_path)))
    assert any(tmp_path.rglob("registry.*.pyc"))
    assert not set(HEAVY) & set(first["new"])
    assert {"mha", "s2", "lowrank_gqa"} <= set(first["variants"])
    # CPU time, and the least of it: what a busy machine adds is not the import's. Where torch itself takes longer than
    # two seconds, the machine is a slow one.
    over = []
    while len(over) < MOST_RUNS and min(over, default=1.0) > 0:
        result = json.loads(run(PROGRAM, str(tmp_path)))
        over.append(result["seconds"] - max(0.3, result["torch"] * 0.15))
    assert min(over) <= 0, over


def test_layers_work_where_nothing_optional_is_installed() -> None:
    assert "torch.Size([8, 8])" in run(WITHOUT, *HEAVY)
