"""What is measured: the model, what it reads, and the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnzoo.cli.models import encode, load_model, text_tokens
from attnzoo.evaluation.two_phase.presets import CONTROLS, SETTINGS
from attnzoo.evaluation.two_phase.specs import PolicySpec
from attnzoo.evaluation.two_phase.tasks import Case, Encode, keys, passkey_case, text_case

TEXTS = ("botchan", "devil")
KEY_DEPTHS = (0.2, 0.4, 0.6)

EXTRA: Mapping[str, tuple[str, bool]] = {
    "duo, other random heads: 40 %": ("duo:keep=0.25,sink=64,window=128,heads=random,seed=1", True),
    "pages of 64: 40 %": ("pages:page=64,budget=400", True),
    "everything": ("duo:keep=1.0,sink=64,window=128", False),
}
"""Rows beside those of the presets: controls, and a policy that holds everything."""

QUICK: Mapping[str, tuple[str, bool]] = {
    "duo: 40 %": ("duo:keep=0.5,sink=8,window=16,block=8", False),
    "duo, random heads: 40 %": ("duo:keep=0.5,sink=8,window=16,block=8,heads=random", True),
    "snapkv: 40 %": ("snapkv:share=0.4,window=8,page=8", False),
    "pages: 40 %": ("pages:page=8,budget=48", False),
    "everything": ("duo:keep=1.0,sink=8,window=16,block=8", False),
}
"""The rows of a tiny model with random weights."""


@dataclass(frozen=True, eq=False)
class Setting:
    """A model and what it reads.

    Attributes:
        model: A causal language model.
        name: What it is called.
        cases: Texts and passkeys.
        masks: Tokens of each text that a prompt of its own is made of, int64 ``[L]``.
        long: A text, int64 ``[1, any]``: longer than the longest length by some dozens.
        lengths: Tokens behind which a step is timed; behind the last one the process's memory is measured.
        quick: Whether the model is a tiny one.
    """

    model: Any
    name: str
    cases: Sequence[Case]
    masks: Sequence[Tensor]
    long: Tensor
    lengths: tuple[int, int]
    quick: bool


def rows(percents: Sequence[int], *, quick: bool) -> list[PolicySpec]:
    """All rows, the headline and its control first."""
    if quick:
        return [PolicySpec.parse(text, name, control=control) for name, (text, control) in QUICK.items()]
    found = [
        PolicySpec.parse(SETTINGS[name][percent], f"{name}: {percent} %", control=name in CONTROLS)
        for percent in percents
        for name in SETTINGS
    ]
    return found + [PolicySpec.parse(text, name, control=control) for name, (text, control) in EXTRA.items()]


def quick_setting() -> Setting:
    """Two layers with random weights that read bytes."""
    model = tiny_model()
    text = torch.randint(97, 123, (600,), generator=torch.Generator().manual_seed(0))
    cases = [
        text_case("letters", text, context=96, encode=_bytes, continuation=16, spans=2, span=16),
        passkey_case("key", _bytes, context=320, key="30417", depth=0.4),
    ]
    return Setting(model, "random weights", cases, [text[:64]], text.unsqueeze(0), (64, 128), True)


def full_setting() -> Setting:
    """SmolLM2 behind 1,024 tokens of both texts, passkeys in 640 tokens, and 8,192 tokens of a text."""
    model, tokenizer = load_model("smollm2", dtype="fp32")

    to_tokens = partial(encode, tokenizer)
    texts = {name: text_tokens(tokenizer, name) for name in TEXTS}
    cases = [text_case(name, tokens[1024:], context=1024, encode=to_tokens) for name, tokens in texts.items()]
    cases += _keys(to_tokens, texts["botchan"])
    masks = [tokens[1024 : 1024 + 512] for tokens in texts.values()]
    long = texts["botchan"][None, : 8192 + 256]
    return Setting(model, "SmolLM2-135M", cases, masks, long, (1024, 8192), False)


def _keys(encode: Encode, book: Tensor) -> list[Case]:
    """Two passkeys in grass, and one in a book."""
    haystacks: list[tuple[str, Tensor | None]] = [("grass", None), ("grass", None), ("book", book[4096:])]
    return [
        passkey_case(f"key in {name}, {depth:.0%} deep", encode, context=640, key=key, depth=depth, haystack=haystack)
        for (name, haystack), key, depth in zip(haystacks, keys(3), KEY_DEPTHS, strict=True)
    ]


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.int64, device="cpu")


def tiny_model() -> Any:
    """A Llama of two layers that reads bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()
