"""A small byte model learns with every variant: the whole of a layer's training path, on real text."""

from __future__ import annotations

import math
from importlib import resources
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import attnzoo

OPTIONS: dict[str, dict[str, Any]] = {
    "mha": {"num_kv_heads": 2},
    "s2": {"block_size": 8, "local_blocks": 2, "vert_stride": 4},
    "lowrank_gqa": {"latent_dim": 24},
    "rcmha": {"num_kv_heads": 2},
    "landmark": {"block_size": 8, "top_k": 2},
    "longheads": {"chunk_size": 8, "attention_length": 32, "select": "block"},
    "moh": {"shared_heads": 1, "active_heads": 2, "compute": "routed"},
}
"""Where something is left out within the length, or shared; a variant that is not named learns at its defaults."""
LENGTH, BATCH, STEPS = 96, 8, 150


class Block(nn.Module):
    """Attention and a feed-forward part, each on normed input and added."""

    def __init__(self, attention: nn.Module, dim: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)])
        self.attention = attention
        self.feed = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        out: Tensor = x + self.feed(self.norms[1](x))
        return out


def passage() -> Tensor:
    """Bytes of the text that the package carries."""
    texts = [f for f in resources.files("attnzoo").joinpath("data").iterdir() if f.name.startswith("botchan")]
    return torch.tensor(list(sorted(texts, key=lambda f: f.name)[0].read_bytes()[:100_000]))


def unigram_entropy(text: Tensor) -> float:
    """What a model that only counts bytes reaches, in nats a byte."""
    share = torch.bincount(text).double() / len(text)
    share = share[share > 0]
    return float(-(share * share.log()).sum())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "s2" else pytest.mark.slow) for name in attnzoo.list_variants()]
)
def test_a_byte_model_learns(name: str) -> None:
    text = passage()
    split = len(text) * 9 // 10
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [Block(attnzoo.create(name, dim=64, num_heads=4, **OPTIONS.get(name, {})), 64) for _ in range(4)]
        model = nn.Sequential(nn.Embedding(256, 64), *blocks, nn.LayerNorm(64), nn.Linear(64, 256))

    def loss(part: Tensor, batch: int) -> Tensor:
        starts = torch.randint(len(part) - LENGTH - 1, (batch,), generator=generator)
        window = torch.stack([part[s : s + LENGTH + 1] for s in starts.tolist()])
        return cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 10) * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        optimizer.zero_grad()
        loss(text[:split], BATCH).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        held_out = float(loss(text[split:], 32))
        assert held_out <= unigram_entropy(text) - 0.5
        # Knowing one byte would reach that: what is further back must help too, which only attention brings.
        windows = text[split:].unfold(0, LENGTH + 1, 16)
        inputs, last = windows[:, :-1], windows[:, -1]
        foreign = torch.cat([inputs.roll(1, 0)[:, :-1], inputs[:, -1:]], 1)
        near, far = (float(cross_entropy(model(x)[:, -1], last)) for x in (inputs, foreign))
        assert near <= far - 0.1
