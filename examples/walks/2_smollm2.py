"""SmolLM2 converted, compared with itself on a text, saved, loaded, and generating."""

import tempfile

import torch

from attnzoo import data, surgery
from attnzoo.evaluation.model_scores import cut_windows, score

model, tokenizer = surgery.load_checkpoint(surgery.locate_smollm2(), dtype=torch.float32)
ids = torch.tensor(tokenizer(data.text("botchan")[:4000]).input_ids)
windows = cut_windows(ids, length=384, offset=0, count=1)
dense = score(model, windows)

surgery.convert(model, "lowrank_gqa", method="expand", num_kv_heads=9)
expanded = score(model, windows)
surgery.convert(model, "mha", window=256, sink=4)
windowed = score(model, windows)
print(f"perplexity {dense.perplexity:.2f}, expanded {expanded.perplexity:.2f}, in a window {windowed.perplexity:.2f}")
assert abs(expanded.mean_nll - dense.mean_nll) < 1e-4
assert dense.perplexity < windowed.perplexity < 1.5 * dense.perplexity

with tempfile.TemporaryDirectory() as folder:
    surgery.save(model, f"{folder}/smollm2", tokenizer=tokenizer)
    again, tokenizer = surgery.load(f"{folder}/smollm2")
prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
out = again.generate(prompt, **settings)
print(tokenizer.decode(out[0]))
assert torch.equal(out, model.generate(prompt, **settings))
assert "Paris" in tokenizer.decode(out[0])
