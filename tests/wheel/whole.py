"""Run where the wheel is installed with its extras `cli` and `hf`: every module imports, and a tiny model is written.

Copied out of the source and run by the command of this folder; it is no test of pytest's.
"""

import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path


def check_modules() -> int:
    """Imports every module of both packages; those of kernels for GPUs need triton, another extra."""
    import attnzoo
    import attnzoo_kernels

    without_triton = importlib.util.find_spec("triton") is None
    count = 0
    for package in (attnzoo, attnzoo_kernels):
        assert Path(package.__file__).is_relative_to(sys.prefix), f"{package.__file__} is not of {sys.prefix}"
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name == "attnzoo.__main__":
                continue
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                in_triton = module.name.startswith("attnzoo_kernels._triton.")
                assert without_triton and in_triton and error.name == "triton", module.name
            count += 1
    return count


def write_model(folder: Path) -> None:
    """A Llama of two layers with random weights, and a tokenizer of the words of a text that ships."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from attnzoo import data

    words = sorted(set(data.text("botchan").split()))[:500]
    tokenizer = Tokenizer(models.WordLevel({"?": 0, **{word: i + 1 for i, word in enumerate(words)}}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words) + 1,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


if __name__ == "__main__":
    print(f"{check_modules()} modules import")
    write_model(Path(sys.argv[1]))
