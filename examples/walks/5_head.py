"""A head edit: tried with a hook, then folded into the weights, and taken back."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attnzoo import heads

torch.manual_seed(0)
sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
ids = torch.randint(128, (2, 32))
best = heads.score_heads(model, "induction", length=20).top("induction", 1)[0]
edits = [heads.HeadEdit(best.layer, best.head, ablate="zero")]

with torch.no_grad():
    before = model(ids).logits
    with heads.edited(model, edits):
        edited = model(ids).logits
    report = heads.fold(model, edits)
    folded = model(ids).logits
    report.undo()
    after = model(ids).logits
print(f"without head {(best.layer, best.head)} logits differ by {(edited - before).abs().max():.3f}")
assert not torch.allclose(edited, before, atol=1e-4)
assert torch.allclose(folded, edited, atol=1e-5)
assert torch.equal(after, before)
