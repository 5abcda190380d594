"""A head taken away with PEFT: a scale on the output projection's inputs, tried, then merged into the weights."""

import torch
from peft import IA3Config, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
ids = torch.randint(128, (2, 32))
layer, head, width = 1, 2, 16

with torch.no_grad():
    before = model(ids).logits
    scaled = get_peft_model(model, IA3Config(target_modules=["o_proj"], feedforward_modules=["o_proj"])).eval()
    projection = scaled.base_model.model.model.layers[layer].self_attn.o_proj
    projection.ia3_l["default"][..., head * width : (head + 1) * width] = 0
    edited = scaled(ids).logits
    with scaled.disable_adapter():
        after = scaled(ids).logits
    folded = scaled.merge_and_unload()(ids).logits
print(f"without head {(layer, head)} logits differ by {(edited - before).abs().max():.3f}")
assert not torch.allclose(edited, before, atol=1e-4)
assert torch.equal(after, before)
assert torch.allclose(folded, edited, atol=1e-5)
