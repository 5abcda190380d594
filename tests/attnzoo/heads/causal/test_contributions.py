"""What heads add to what a model says, against the last stream's own parts."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo import heads
from attnzoo.heads.decoder import decoder_parts
from attnzoo.surgery.hosts.families.known import block_of
from attnzoo_kernels.errors import ConfigError, ShapeError, UnsupportedError
from tests.attnzoo.surgery.families.hosts import HOSTS
from tests.attnzoo.surgery.tiny import tiny

IDS = torch.tensor([[5, 9, 14, 3, 22, 40], [7, 8, 30, 2, 11, 13]])
FAMILIES = ("Llama", "GPT-2", "GPT-NeoX", "Granite", "Gemma 2", "OLMo 2", "OPT", "Phi")


def added_by_attention(model: Any, ids: Tensor) -> Tensor:
    """What attention adds to the last stream ``[B, T, C]``: the stream less a run in which what it adds is taken off.

    MLPs answer to the stream; so what a layer's attention adds is what its layer gives less what it gives with the
    block's output at 0 while everything that the MLP is called with is as it was.
    """
    total = torch.zeros(())
    for layer in decoder_parts(model).layers:
        module = model.get_submodule(layer.path)
        block = model.get_submodule(layer.block)
        seen: list[Any] = []
        hook = module.register_forward_pre_hook(partial(note, seen), with_kwargs=True)
        model(ids, use_cache=False)
        hook.remove()
        args, kwargs = seen[0]
        gave: dict[Any, Any] = {}
        with ExitStack() as stack:
            for name, child in module.named_children():
                if child is not block and any(word in name for word in ("mlp", "fc2", "feedforward")):
                    stack.callback(child.register_forward_hook(partial(keep, gave)).remove)
            whole = first(module(*args, **kwargs))
        with ExitStack() as stack:
            for child in gave:
                stack.callback(child.register_forward_hook(partial(give, gave)).remove)
            stack.callback(block.register_forward_hook(nothing).remove)
            total = total + whole - first(module(*args, **kwargs))
    return total


def note(seen: list[Any], module: Any, args: Any, kwargs: Any) -> None:
    seen.append((args, kwargs))


def keep(gave: dict[Any, Any], module: Any, args: Any, output: Any) -> None:
    gave[module] = output


def give(gave: dict[Any, Any], module: Any, args: Any, output: Any) -> Any:
    return gave[module]


def first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def nothing(module: Any, args: Any, output: Any) -> Any:
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


@pytest.mark.parametrize("name", FAMILIES)
def test_they_sum_to_what_attention_adds_to_the_last_stream(name: str) -> None:
    model = HOSTS[name].make()
    for layer in heads.sites(model):
        bias = getattr(model.get_submodule(layer.o_proj), "bias", None)
        if bias is not None:
            # A bias belongs to no head.
            bias.data.zero_()
    parts = decoder_parts(model)
    direction = parts.words[7].detach() - parts.words[20].detach()
    with torch.no_grad():
        with heads.capture(model) as seen:
            model(IDS)
        found = heads.contributions(model, seen, direction)
        added = added_by_attention(model, IDS)
    stream = seen.stream[2]
    last = model.get_submodule(parts.norm)
    norm = parts.last
    expected = (norm.less_mean(added) * norm.scale(stream) * norm.gain) @ direction
    assert found.shape == (2, 4, 2, 6)
    torch.testing.assert_close(found.sum((0, 1)), expected, atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(norm.apply(stream), last(stream), atol=1e-10, rtol=1e-9)


def test_one_head_is_its_columns_and_rows_are_those_that_were_seen() -> None:
    model = tiny(4, 2)
    direction = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), heads.capture(model) as seen, heads.capture(model, rows="last") as some:
        model(input_ids=IDS, attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]))
    found = heads.contributions(model, seen, direction)
    stream = seen.stream[2]
    rms = (stream.square().mean(-1) + model.model.norm.eps).sqrt()
    weight = block_of(model.model.layers[1].self_attn).weights().o[:, 32:48]
    expected = (seen["z"][1][:, :, 2] @ weight.T) / rms[..., None] * model.model.norm.weight @ direction
    torch.testing.assert_close(found[1, 2], expected.detach())
    last = heads.contributions(model, some, direction.expand(2, 1, 64))
    torch.testing.assert_close(last[..., 0], torch.stack([found[:, :, 0, 3], found[:, :, 1, 5]], -1))


def test_what_was_not_seen_is_refused() -> None:
    model = tiny(4, 2)
    direction = torch.ones(64, dtype=torch.float64)
    with torch.no_grad(), heads.capture(model, layers=[1]) as some, heads.capture(model) as seen:
        model(IDS)
    with pytest.raises(ConfigError, match=r"seen: expected outputs of heads .* in all of 2 layers"):
        heads.contributions(model, some, direction)
    with pytest.raises(ShapeError, match=r"direction: expected \[C\] or \[B, R, C\]"):
        heads.contributions(model, seen, direction[:3])
    with pytest.raises(ShapeError, match=r"direction: expected \[C\] or \[2, 6, 64\]"):
        heads.contributions(model, seen, direction.expand(2, 1, 64))
    with pytest.raises(UnsupportedError, match="expected a decoder with an unembedding"):
        heads.contributions(model.model, seen, direction)
