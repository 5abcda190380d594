"""A long sequence through layers that read part of it, beside plain attention: time, and what is read.

python examples/04_long_context.py            # 8,192 tokens, about a minute
python examples/04_long_context.py --toy      # 256 tokens, seconds
"""

from __future__ import annotations

import argparse
import time

import torch

import attnzoo

LAYERS = {
    "plain": ("mha", {}),
    "window and sink": ("mha", {"window": 512, "sink": 4}),
    "s2": ("s2", {"local_blocks": 4, "vert_stride": 8}),
    "longheads": ("longheads", {"attention_length": 512, "chunk_size": 64, "select": "block"}),
}


def main() -> None:
    """Reads a sequence, then decodes behind it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--toy", action="store_true", help="256 tokens, to see that it runs")
    given = parser.parse_args()
    tokens = 256 if given.toy else given.tokens
    steps = 2 if given.toy else 16
    torch.manual_seed(0)
    x = torch.randn(1, tokens + steps, 256)
    print(f"{tokens:,} tokens of width 256, 8 heads, {torch.get_num_threads()} threads")
    print(f"{'layer':>16} {'prompt':>10} {'a token':>10} {'pairs read':>11} {'cache':>10}")
    for name, (variant, options) in LAYERS.items():
        layer = attnzoo.create(variant, dim=256, num_heads=8, **options).eval()
        with torch.no_grad():
            cache = layer.new_cache(batch=1, max_length=tokens + steps)
            begin = time.perf_counter()
            read = layer.attend(x[:, :tokens], cache=cache)
            prompt = time.perf_counter() - begin
            begin = time.perf_counter()
            for t in range(tokens, tokens + steps):
                layer(x[:, t : t + 1], cache=cache)
            step = (time.perf_counter() - begin) / steps
        row = f"{name:>16} {prompt:8.2f} s {1000 * step:7.2f} ms {read.plan.density:11.1%}"
        print(f"{row} {cache.nbytes / 2**20:6.1f} MiB")


if __name__ == "__main__":
    main()
