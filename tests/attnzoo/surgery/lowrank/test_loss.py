"""The loss of a calibration text: which tokens it is of."""

from __future__ import annotations

import pytest
import torch

from attnzoo.surgery.lowrank.calibration import first_tokens, summed_loss

MASKS = {
    "none": [1, 1, 1, 1, 1, 1],
    "left": [0, 0, 1, 1, 1, 1],
    "right": [1, 1, 1, 1, 0, 0],
    "between": [1, 1, 0, 0, 1, 1],
    "one token": [0, 0, 1, 0, 0, 0],
}


@pytest.mark.parametrize("name", MASKS)
def test_a_token_counts_where_it_and_the_one_before_are_real(name: str) -> None:
    logits = torch.randn(2, 6, 7, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(0, 7, (2, 6), generator=torch.Generator().manual_seed(2))
    real = torch.tensor([MASKS[name], MASKS["none"]]).bool()
    logs, expected = logits.log_softmax(-1), 0.0
    for item in range(2):
        for t in range(1, 6):
            # What follows padding is not predicted by it, and padding is not learnt.
            if real[item, t - 1] and real[item, t]:
                expected -= float(logs[item, t - 1, ids[item, t]])
    assert float(summed_loss(logits, ids, real)) == pytest.approx(expected, rel=1e-5)


def test_what_padding_says_and_what_it_is_play_no_part() -> None:
    real = torch.tensor(list(MASKS.values())).bool()
    ids = torch.randint(1, 7, (5, 6), generator=torch.Generator().manual_seed(2))
    logits = torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (grad,) = torch.autograd.grad(summed_loss(logits, ids, real), logits)
    assert not bool(grad[~real].any())
    changed = ids.masked_fill(~real, 0)
    assert torch.equal(summed_loss(logits, changed, real), summed_loss(logits, ids, real))


def test_the_first_token_is_the_first_real_one() -> None:
    real = torch.tensor(list(MASKS.values())).bool()
    assert [row.nonzero().flatten().tolist() for row in first_tokens(real)] == [[0], [2], [0], [0], [2]]
