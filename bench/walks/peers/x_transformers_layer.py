"""A layer of x-transformers in one's own model, trained, then decoded token by token with a cache."""

import torch
from torch import nn
from x_transformers import Attention


class Copier(nn.Module):
    """An embedding, attention, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, 32)
        self.positions = nn.Embedding(24, 32)
        self.attention = Attention(dim=32, heads=4, dim_head=8, causal=True)
        self.head = nn.Linear(32, 17)

    def forward(self, ids, cache=None):
        """Ids [B, T] to logits [B, T, 17], and what the next call takes as its cache."""
        first = 0 if cache is None else cache.cached_kv[0].shape[-2]
        x = self.embedding(ids) + self.positions(torch.arange(first, first + ids.shape[1]))
        out, cache = self.attention(x, cache=cache, return_intermediates=True)
        return self.head(x + out), cache


torch.manual_seed(0)
model = Copier()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(60):
    letters = torch.randint(17, (16, 8)).repeat(1, 3)
    logits, _ = model(letters[:, :-1])
    loss = nn.functional.cross_entropy(logits.mT, letters[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
assert losses[-1] < losses[0]

model.eval()
with torch.no_grad():
    whole, _ = model(letters)
    cache = None
    tokens = []
    for t in range(24):
        token, cache = model(letters[:, t : t + 1], cache)
        tokens.append(token)
assert torch.allclose(torch.cat(tokens, 1), whole, atol=1e-5)
