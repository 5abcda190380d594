"""A tiny model and tiny texts for the command line, and a call of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from attnzoo.cli import main

WORDS = ("the", "a", "cat", "dog", "sat", "ran", "on", "mat", "and", "slept")


def write_model(path: Path) -> Path:
    """A model of 6 query and 2 KV heads, with a tokenizer of ten words."""
    config = LlamaConfig(
        vocab_size=len(WORDS) + 1,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({"?": 0, **{word: i + 1 for i, word in enumerate(WORDS)}}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(path)
    return path


def write_text(path: Path, seed: int) -> str:
    """A text of these words."""
    order = torch.randint(0, len(WORDS), (4000,), generator=torch.Generator().manual_seed(seed))
    path.write_text(" ".join(WORDS[i] for i in order.tolist()), encoding="utf-8")
    return str(path)


def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Calls the command line: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["attnzoo", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    code = end.value.code
    return (code if isinstance(code, int) else int(code is not None)), out, err
