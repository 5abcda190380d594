"""A layer in one's own model, trained, then decoded token by token with a cache."""

import torch
from torch import nn

import attnzoo


class Copier(nn.Module):
    """An embedding, attention, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, 32)
        self.attention = attnzoo.create("mha", dim=32, num_heads=4, window=16, sink=1)
        self.head = nn.Linear(32, 17)

    def forward(self, ids, cache=None):
        """Ids [B, T] to logits [B, T, 17]."""
        x = self.embedding(ids)
        return self.head(x + self.attention(x, cache=cache))


torch.manual_seed(0)
model = Copier()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(60):
    letters = torch.randint(17, (16, 8)).repeat(1, 3)
    logits = model(letters[:, :-1])
    loss = nn.functional.cross_entropy(logits.mT, letters[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
assert losses[-1] < losses[0]

model.eval()
with torch.no_grad():
    whole = model(letters)
    cache = model.attention.new_cache(batch=16, max_length=24)
    tokens = [model(letters[:, t : t + 1], cache) for t in range(24)]
assert torch.allclose(torch.cat(tokens, 1), whole, atol=1e-5)
