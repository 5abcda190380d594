"""A byte-level language model of any attention variant, trained on a text that ships, which then writes on.

python examples/02_byte_model.py                                # s2, a few minutes
python examples/02_byte_model.py --variant moh --steps 150
python examples/02_byte_model.py --toy                          # a few seconds
"""

from __future__ import annotations

import argparse
import math
import time

import torch

import attnzoo
from attnzoo import data
from attnzoo.models import CausalLM


def main() -> None:
    """Trains and samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="s2", choices=attnzoo.list_variants())
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--prompt", default="I was ")
    parser.add_argument("--toy", action="store_true", help="three steps of a tiny model, to see that it runs")
    given = parser.parse_args()
    steps = 3 if given.toy else given.steps
    dim, layers, length = (32, 1, 64) if given.toy else (96, 4, 256)

    torch.manual_seed(0)
    text = torch.tensor(list(data.text("botchan").encode()))
    often = text.bincount().double() / len(text)
    print(f"{len(text):,} bytes; a model that knows how often each comes has a loss of", end=" ")
    print(f"{-torch.special.xlogy(often, often).sum():.2f}")

    model = CausalLM(vocab_size=256, dim=dim, num_layers=layers, num_heads=8, variant=given.variant)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} weights, attention: {given.variant}")
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    begin = time.perf_counter()
    for step in range(steps):
        starts = torch.randint(len(text) - length, (8, 1))
        loss = model.loss(text[starts + torch.arange(length)])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimiser.param_groups:  # up over 20 steps, then down as a cosine
            group["lr"] = 3e-3 * min((step + 1) / 20, 0.55 + 0.45 * math.cos(math.pi * step / steps))
        optimiser.step()
        if (step + 1) % 25 == 0 or step + 1 == steps:
            print(f"step {step + 1:4}: loss {loss.item():.3f}, {time.perf_counter() - begin:.0f} s", flush=True)

    model.eval()
    prompt = torch.tensor([list(given.prompt.encode())])
    written = model.generate(prompt, 20 if given.toy else 300, temperature=0.7, top_p=0.9)
    print("\n" + bytes(written[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
