"""A layer of attnzoo in a model of your own: plain torch round it, trained, then decoded with a cache.

It learns to copy: it reads 32 random letters and a mark, and says the letters again, each by looking back 32 tokens.

    python examples/01_layer_in_your_model.py            # under a minute
    python examples/01_layer_in_your_model.py --toy      # a few seconds
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import attnzoo

LETTERS = 16
COUNT = 32


class YourModel(nn.Module):
    """Your own layers; the line with attnzoo is the one that is new."""

    def __init__(self, variant: str, dim: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(LETTERS + 1, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        self.attention = nn.ModuleList(attnzoo.create(variant, dim=dim, num_heads=4) for _ in range(depth))
        self.head = nn.Linear(dim, LETTERS + 1)

    def forward(self, ids: Tensor, caches: list[attnzoo.KVCache] | None = None) -> Tensor:
        """Ids [B, T] to logits [B, T, V]; with caches, ids are the tokens behind those of earlier calls."""
        x = self.embedding(ids)
        for number, (norm, attention) in enumerate(zip(self.norms, self.attention, strict=True)):
            x = x + attention(norm(x), cache=caches[number] if caches else None)
        return self.head(x)


def batch(size: int) -> Tensor:
    """Letters, the mark (number LETTERS), and the letters again."""
    letters = torch.randint(LETTERS, (size, COUNT))
    return torch.cat((letters, torch.full((size, 1), LETTERS), letters), 1)


def main() -> None:
    """Trains, then copies letter by letter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="mha", choices=attnzoo.list_variants())
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--toy", action="store_true", help="five steps, to see that it runs")
    given = parser.parse_args()
    steps = 5 if given.toy else given.steps
    torch.manual_seed(0)
    model = YourModel(given.variant)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, steps + 1):
        ids = batch(32)
        logits = model(ids[:, :-1])[:, COUNT:]  # only what comes behind the mark can be known
        loss = cross_entropy(logits.mT, ids[:, COUNT + 1 :])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 50 == 0 or step == steps:
            print(f"step {step:4}: loss {loss.item():.3f}", flush=True)
    model.eval()
    with torch.no_grad():
        ids = batch(1)
        # The caches remember what was read, so that each further letter costs one token's work.
        caches = [layer.new_cache(batch=1, max_length=2 * COUNT + 1) for layer in model.attention]
        said = [model(ids[:, : COUNT + 1], caches)[:, -1:].argmax(-1)]
        while len(said) < COUNT:
            said.append(model(said[-1], caches)[:, -1:].argmax(-1))
    print(f"{(torch.cat(said, 1) == ids[:, COUNT + 1 :]).sum()} of {COUNT} letters copied")


if __name__ == "__main__":
    main()
