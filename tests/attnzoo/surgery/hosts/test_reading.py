"""Windows and S2 at drawn sizes: whole texts, padded ones and chunks against the host with a dense mask."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.attnzoo.surgery.hosts.masks import for_host, groups_of, padding_mask, s2_mask, window_mask
from tests.attnzoo.surgery.tiny import assert_close, convert, ids, logits, tiny

DRAWN = settings(max_examples=30, deadline=None, derandomize=True)
EXACT = 1e-11
HEADS = st.sampled_from([(4, 4), (6, 2), (6, 3), (3, 1)])
LENGTHS = st.integers(1, 26)

_hosts: dict[tuple[int, int], Any] = {}


def host_of(heads: tuple[int, int]) -> Any:
    """A host of one layer; each conversion of it is undone."""
    if heads not in _hosts:
        _hosts[heads] = tiny(*heads, layers=1)
    return _hosts[heads]


def check(model: Any, mask: Tensor, left: int, split: int, variant: str, options: dict[str, Any]) -> None:
    """A converted host equals the dense one with a mask, at once and in two chunks, beside an item without padding."""
    length = mask.shape[-1]
    padding, tokens = [min(left, length - 1), 0], ids(2, length, seed=length)
    seen = padding_mask(padding, length)
    real = seen.bool()
    expected = logits(model, tokens, attention_mask=for_host(mask, padding, torch.float64))[real]
    report = convert(model, variant, **options)
    assert_close(logits(model, tokens, attention_mask=seen)[real], expected, EXACT)
    split = min(split, length)
    with torch.no_grad():
        early = model(tokens[:, :split], attention_mask=seen[:, :split], use_cache=True)
        found = [early.logits]
        if split < length:
            late = model(tokens[:, split:], attention_mask=seen, past_key_values=early.past_key_values)
            found.append(late.logits)
    assert_close(torch.cat(found, 1)[real], expected, EXACT)
    report.undo()


@DRAWN
@given(HEADS, LENGTHS, st.integers(1, 12), st.integers(0, 6), st.sampled_from([1, 4, 5, 64]), st.data())
def test_windows_and_sinks_of_any_size_equal_a_dense_mask(
    heads: tuple[int, int], length: int, window: int, sink: int, block: int, data: st.DataObject
) -> None:
    left, split = data.draw(st.sampled_from([0, 0, 1, 7])), data.draw(st.integers(1, 26))
    options = {"window": window, "sink": max(sink, 1), "block_size": block}
    check(host_of(heads), window_mask(length, window, max(sink, 1)), left, split, "mha", options)


@DRAWN
@given(HEADS, LENGTHS, st.sampled_from([1, 2, 4, 5]), st.integers(1, 3), st.integers(1, 4), st.data())
def test_s2_of_any_size_equals_a_dense_mask(
    heads: tuple[int, int], length: int, block: int, local: int, stride: int, data: st.DataObject
) -> None:
    left, split = data.draw(st.sampled_from([0, 0, 1, 7])), data.draw(st.integers(1, 26))
    sink, dense = data.draw(st.integers(1, 2)), data.draw(st.integers(0, heads[1]))
    offset, step = data.draw(st.integers(0, 5)), data.draw(st.sampled_from([None, 0, 1, 3]))
    mask = s2_mask(
        length,
        groups_of(*heads),
        block=block,
        local=local,
        stride=stride,
        sink=sink,
        dense=dense,
        offset=offset,
        step=step,
    )
    options = {
        "block_size": block,
        "local_blocks": local,
        "vert_stride": stride,
        "sink_blocks": sink,
        "num_dense_heads": dense,
        "head_offset": offset,
        "step": step,
    }
    check(host_of(heads), mask, left, split, "s2", options)
