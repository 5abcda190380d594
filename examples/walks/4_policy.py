"""A KV-cache policy in generate(): a sink and a window are remembered, and the rest is freed."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attnzoo import policies

torch.manual_seed(0)
sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
prompt = torch.randint(1, 128, (1, 400))
settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
dense = model.generate(prompt, **settings)

with policies.applied(model, policies.Streaming(sink=16, window=64, block=16)) as run:
    cache = run.new_cache()
    out = model.generate(prompt, cache=cache, **settings)
    report = run.report(cache)
print(report)
assert out.shape == (1, 408)
assert report.share < 0.3
assert torch.equal(model.generate(prompt, **settings), dense)

# A policy that keeps everything says what the dense model says.
with policies.applied(model, policies.Streaming(sink=16, window=512, block=16)):
    assert torch.equal(model.generate(prompt, **settings), dense)
