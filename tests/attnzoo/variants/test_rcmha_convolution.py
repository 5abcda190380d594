"""Depth-wise convolutions beside torch's own."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from attnzoo.variants.rcmha.convolution import DepthwiseConvolution
from tests.attnzoo.variants.test_rcmha import convolved


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_convolution_is_torchs(data: st.DataObject) -> None:
    causal = data.draw(st.booleans())
    size = data.draw(st.integers(1, 6) if causal else st.sampled_from([1, 3, 5]))
    heads, width, length = (data.draw(st.integers(1, 4)) for _ in range(3))
    shared, bias = data.draw(st.booleans()), data.draw(st.booleans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    conv = DepthwiseConvolution(
        1 if shared else heads, width, size, bias=bias, causal=causal, delta=False, dtype=torch.float64
    )
    x = torch.randn(2, heads, 2 * length, width, generator=generator, dtype=torch.float64)
    whole = conv(x)
    torch.testing.assert_close(whole, convolved(x, conv, causal), rtol=0, atol=1e-13)
    if causal:
        history = pad(x, (0, 0, size - 1, 0))[:, :, length : length + size - 1]
        assert torch.equal(conv(x[:, :, length:], history), whole[:, :, length:])
    delta = DepthwiseConvolution(heads, width, size, bias=bias, causal=causal, delta=True, dtype=torch.float64)
    assert torch.equal(delta(x), x)
