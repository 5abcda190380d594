"""attnzoo.MultiheadAttention is torch's module: all of its options, its weights, its gradients, what it draws."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnzoo

BATCH, ROWS, KEYS, WIDTH, HEADS = 2, 4, 5, 8, 2
BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-12}
MODULES = list(itertools.product([False, True], repeat=5))
"""batch_first, bias, add_bias_kv, add_zero_attn, and keys and values of widths of their own."""


def both(**options: Any) -> tuple[nn.MultiheadAttention, attnzoo.MultiheadAttention]:
    """Torch's module and ours, with the same weights, biases among them."""
    theirs = nn.MultiheadAttention(WIDTH, HEADS, **options)
    ours = attnzoo.MultiheadAttention(WIDTH, HEADS, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def options_of(module: tuple[bool, ...]) -> dict[str, Any]:
    """The constructor's options."""
    batch_first, bias, add_bias_kv, add_zero_attn, widths = module
    own = {"kdim": 6, "vdim": 4} if widths else {}
    return {
        "batch_first": batch_first,
        "bias": bias,
        "add_bias_kv": add_bias_kv,
        "add_zero_attn": add_zero_attn,
        **own,
    }


def tokens_for(theirs: nn.MultiheadAttention, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Other tokens where keys have a width of their own, else the same three times, which torch has a fast path for."""
    if theirs.kdim == WIDTH:
        x = torch.randn(BATCH, KEYS, WIDTH, dtype=dtype)
        x = x if theirs.batch_first else x.transpose(0, 1)
        return x, x, x
    made = (torch.randn(BATCH, n, c, dtype=dtype) for n, c in ((ROWS, WIDTH), (KEYS, 6), (KEYS, 4)))
    q, k, v = (x if theirs.batch_first else x.transpose(0, 1) for x in made)
    return q, k, v


def calls(rows: int, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Masks of the kinds that torch takes together, with weights and without; no row is hidden wholly."""
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[1, -2:] = True
    moved = torch.randn(BATCH, KEYS, dtype=dtype).masked_fill(padding, -torch.inf)
    pairs = torch.rand(rows, KEYS) > 0.6
    pairs[:, 0] = False
    scores = torch.randn(BATCH * HEADS, rows, KEYS, dtype=dtype)
    masks = ((None, None), (padding, None), (moved, None), (None, pairs), (None, scores), (padding, pairs))
    for key_padding_mask, attn_mask in (*masks, (moved, scores)):
        for need_weights in (True, False):
            yield {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask, "need_weights": need_weights}


def difference(theirs: Any, ours: Any) -> float:
    """The largest among outputs and weights, which have the same shapes and dtypes."""
    largest = 0.0
    for x, y in zip(theirs, ours, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            largest = max(largest, float((x - y).detach().abs().max()))
    return largest


@pytest.fixture
def fast_path() -> Iterator[None]:
    """Leaves torch's fast path as it was."""
    before = torch.backends.mha.get_fastpath_enabled()
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.usefixtures("fast_path")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_all_448_combinations_of_options_are_torchs(dtype: torch.dtype) -> None:
    worst = 0.0
    count = 0
    for module in MODULES:
        theirs, ours = both(**options_of(module), dtype=dtype)
        tokens = tokens_for(theirs, dtype)
        rows = tokens[0].shape[1 if theirs.batch_first else 0]
        for call in calls(rows, dtype):
            count += 1
            theirs.train()
            worst = max(worst, difference(theirs(*tokens, **call), ours.train()(*tokens, **call)))
            theirs.eval()
            ours.eval()
            with torch.no_grad():
                found = ours(*tokens, **call)
                # The fast path knows but self attention, batch first.
                for enabled in (True, False) if theirs.batch_first and theirs.kdim == WIDTH else (True,):
                    torch.backends.mha.set_fastpath_enabled(enabled)
                    worst = max(worst, difference(theirs(*tokens, **call), found))
    assert count == 448
    assert worst < BOUNDS[dtype]


@pytest.mark.parametrize("module", [(True, True, True, True, True), (False, True, False, False, False)])
def test_weights_begin_alike_and_go_both_ways(module: tuple[bool, ...]) -> None:
    options = options_of(module)
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(WIDTH, HEADS, **options)
    torch.manual_seed(3)
    ours = attnzoo.MultiheadAttention(WIDTH, HEADS, **options)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for x, y in zip(theirs.state_dict().values(), ours.state_dict().values(), strict=True):
        assert torch.equal(x, y)
    nn.init.normal_(ours.out_proj.weight)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.out_proj.weight, ours.out_proj.weight)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masked", ["nothing", "padding", "scores"])
def test_gradients_are_torchs(masked: str, need_weights: bool) -> None:
    theirs, ours = both(add_bias_kv=True, dtype=torch.float64)
    x = torch.randn(KEYS, BATCH, WIDTH, dtype=torch.float64)
    weight = torch.randn(KEYS, BATCH, WIDTH, dtype=torch.float64)
    found = []
    for module in (theirs, ours):
        tokens = x.clone().requires_grad_()
        scores = torch.linspace(-1, 1, KEYS * KEYS, dtype=torch.float64).view(KEYS, KEYS).requires_grad_()
        padding = torch.linspace(-1, 1, BATCH * KEYS, dtype=torch.float64).view(BATCH, KEYS).requires_grad_()
        call = {"scores": {"attn_mask": scores}, "padding": {"key_padding_mask": padding}}.get(masked, {})
        out, weights = module(tokens, tokens, tokens, need_weights=need_weights, **call)
        loss = (out * weight).sum() + (0.0 if weights is None else (weights**2).sum())
        wanted = [tokens, *module.parameters(), *call.values()]
        found.append(torch.autograd.grad(loss, wanted))
    for a, b in zip(*found, strict=True):
        assert float((a - b).abs().max()) < 1e-11


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_draws_what_torchs_does(need_weights: bool) -> None:
    theirs, ours = both(dropout=0.5)
    x = torch.randn(KEYS, BATCH, WIDTH)
    found = []
    for module in (theirs, ours):
        torch.manual_seed(5)
        found.append(module(x, x, x, need_weights=need_weights))
    assert difference(*found) < 1e-6
    assert difference(theirs.eval()(x, x, x), ours.eval()(x, x, x)) < 1e-6


@pytest.mark.parametrize("average", [False, True])
def test_tokens_without_a_batch_and_weights_of_heads(average: bool) -> None:
    theirs, ours = both(add_zero_attn=True)
    q = torch.randn(ROWS, WIDTH)
    k = torch.randn(KEYS, WIDTH)
    padding = torch.tensor([False] * (KEYS - 1) + [True])
    scores = torch.randn(HEADS, ROWS, KEYS).masked_fill(torch.rand(HEADS, ROWS, KEYS) > 0.8, -1e3)
    for call in ({}, {"key_padding_mask": padding.float()}, {"attn_mask": scores}):
        kwargs = {**call, "average_attn_weights": average}
        assert difference(theirs(q, k, k, **kwargs), ours(q, k, k, **kwargs)) < 1e-6


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_a_causal_call_is_torchs_with_its_mask_and_needs_none(padded: bool, need_weights: bool) -> None:
    theirs, ours = both(batch_first=True)
    x = torch.randn(BATCH, KEYS, WIDTH)
    mask = nn.Transformer.generate_square_subsequent_mask(KEYS)
    padding = torch.zeros(BATCH, KEYS).index_fill(1, torch.tensor([KEYS - 1]), -torch.inf) if padded else None
    call: dict[str, Any] = {"key_padding_mask": padding, "need_weights": need_weights}
    expected = theirs(x, x, x, attn_mask=mask, is_causal=True, **call)
    for given in ({"attn_mask": mask, "is_causal": True}, {"attn_mask": mask}, {"is_causal": True}):
        assert difference(expected, ours(x, x, x, **given, **call)) < 1e-6
    other = torch.randn(BATCH, KEYS + 1, WIDTH)
    with pytest.raises(attnzoo.ShapeError, match="is_causal: expected an attn_mask"):
        ours(x, other, other, is_causal=True)


@pytest.mark.parametrize("sizes", [(0, ROWS, KEYS), (BATCH, 0, KEYS), (0, 0, 0)])
@pytest.mark.parametrize("need_weights", [False, True])
def test_nothing_is_attended_to_by_nobody(sizes: tuple[int, int, int], need_weights: bool) -> None:
    theirs, ours = both(batch_first=True)
    batch, rows, keys = sizes
    q = torch.randn(batch, rows, WIDTH)
    k = torch.randn(batch, keys, WIDTH)
    a, b = theirs(q, k, k, need_weights=need_weights), ours(q, k, k, need_weights=need_weights)
    assert [None if x is None else x.shape for x in a] == [None if x is None else x.shape for x in b]


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_query_with_nothing_to_read_gives_the_outputs_bias(need_weights: bool) -> None:
    _, ours = both(batch_first=True)
    x = torch.randn(BATCH, KEYS, WIDTH, requires_grad=True)
    padding = torch.tensor([[True] * KEYS, [False] * KEYS])
    out, weights = ours(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    assert torch.equal(out[0], ours.out_proj.bias.expand(KEYS, -1))
    assert weights is None or not weights[0].any()
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_what_does_not_fit_is_refused_by_name() -> None:
    _, ours = both(batch_first=True)
    x = torch.randn(BATCH, KEYS, WIDTH)
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"attn_mask": torch.zeros(KEYS, KEYS, dtype=torch.int64)}, TypeError, "attn_mask: expected bool"),
        ({"attn_mask": torch.zeros(3, KEYS, KEYS)}, attnzoo.ShapeError, "attn_mask: expected"),
        ({"key_padding_mask": torch.zeros(KEYS, BATCH)}, attnzoo.ShapeError, "key_padding_mask: expected"),
    ]
    for call, error, message in wrong:
        with pytest.raises(error, match=message):
            ours(x, x, x, **call)
    with pytest.raises(attnzoo.ShapeError, match="key, value: expected as many"):
        ours(x, x, x[:, 1:])
    with pytest.raises(attnzoo.ShapeError, match="value: expected 3 dimensions as the query has, the last of 8"):
        ours(x, x, x[..., 1:])
    with pytest.raises(attnzoo.ConfigError, match="num_heads"):
        attnzoo.MultiheadAttention(8, 3)


def test_it_is_copied_as_it_is() -> None:
    _, ours = both(batch_first=True)
    twin = copy.deepcopy(ours)
    x = torch.randn(BATCH, KEYS, WIDTH)
    assert torch.equal(twin(x, x, x)[0], ours(x, x, x)[0])
    nn.init.zeros_(ours.in_proj_weight)
    # A copy projects by its own weights.
    assert not torch.equal(twin(x, x, x)[0], ours(x, x, x)[0])
