"""Measures one cell of ``bench.gpu``: imports what that takes, and then waits to be told which.

So the next process starts while this one measures. The line on standard input is a JSON object: ``arguments`` of
``bench.gpu``, and in a rehearsal ``plant``, what goes wrong instead.
"""

from __future__ import annotations

import json
import os
import sys
import time

import triton

import bench.gpu.run
from attnzoo_kernels._triton import launch
from bench.gpu import __main__ as table

READY = (triton, bench.gpu.run, launch)
"""What takes seconds to import."""


def main() -> int:
    """Waits, and measures."""
    line = sys.stdin.readline()
    if not line.strip():
        return 0
    told = json.loads(line)
    if told["plant"] == "hang":
        time.sleep(3600)
    if told["plant"] == "crash":
        os.abort()
    return table.main(told["arguments"])


if __name__ == "__main__":
    sys.exit(main())
