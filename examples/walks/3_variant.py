"""A variant added as docs/adding-a-variant.md says, then used by its name in a model, trained and decoded."""

from dataclasses import dataclass

import torch

import attnzoo
from attnzoo.base.layer import AttentionInputs, AttentionLayer, Heads, Plan, Step
from attnzoo.models import CausalLM
from attnzoo_kernels import BlockLayout, Extras


@dataclass(frozen=True, kw_only=True)
class TwoBlocksConfig(attnzoo.AttentionConfig):
    """The own block and the one before.

    Attributes:
        block_size: Tokens in a block.
    """

    block_size: int = 16


class TwoBlocksAttention(AttentionLayer, name="two_blocks"):
    """Reads the own block and the one before it."""

    config_class = TwoBlocksConfig
    config: TwoBlocksConfig

    def plan(self, step: Step, heads: Heads, inputs: AttentionInputs) -> Plan:
        """Blocks are counted from the start of the sequence, also for a chunk or a single token."""
        size = self.config.block_size
        tokens = inputs.q.shape[2]
        slots = inputs.k.shape[2]
        # A list for each token is the simplest; variants with lists for blocks of tokens set Plan.front too.
        start = step.offset.unsqueeze(1) if isinstance(step.offset, torch.Tensor) else step.offset
        slot = start + torch.arange(tokens, device=inputs.q.device).unsqueeze(0)  # [B|1, T]
        own = (slot // size).clamp(max=(slots - 1) // size)
        index = torch.stack([own, own - 1], dim=-1).unsqueeze(1)  # [B|1, 1, T, 2]; -1 is no block
        layout = BlockLayout.from_indices(index, 1, size, tokens, slots)
        return Plan(layout, Extras(), self.config.causal)


layer = attnzoo.create("two_blocks", dim=32, num_heads=2)
x = torch.randn(2, 100, 32)
whole = layer.attend(x)
print(f"{whole.plan.density:.2f} of the pairs are read")

cache = layer.new_cache(batch=2, max_length=100)
tokens = [layer(x[:, t : t + 1], cache=cache) for t in range(100)]
assert torch.allclose(torch.cat(tokens, dim=1), whole.out, atol=1e-5)

assert "two_blocks" in attnzoo.list_variants()
torch.manual_seed(0)
model = CausalLM(vocab_size=64, dim=32, num_layers=2, num_heads=2, variant="two_blocks")
ids = torch.arange(48).repeat(4, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(20):
    loss = model.loss(ids)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
assert losses[-1] < losses[0] / 2
out = model.eval().generate(ids[:1, :20], 5)
with torch.no_grad():
    assert torch.equal(model(out[:, :-1])[:, 19:].argmax(-1), out[:, 20:])
