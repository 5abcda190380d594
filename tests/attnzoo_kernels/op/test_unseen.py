"""Rows that see nothing, and rows whose positions differ from item to item, beside every way of scoring."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo_kernels import BlockLayout, Extras, block_sparse_attention_with_lse
from attnzoo_kernels.cpu import schedule
from tests.strategies import Numbers

B, H, G, T, S, D = 3, 4, 2, 20, 24, 4
SIZES = (8, 8, T, S)


def positions(kind: str) -> Tensor:
    base = torch.arange(T, dtype=torch.int32)
    if kind == "by item":
        return torch.stack([base, base + 3, base - 6]).view(B, 1, T)
    if kind == "by head":
        return (base + torch.arange(H, dtype=torch.int32).view(H, 1) - 2).view(1, H, T)
    return (base + torch.arange(B * H, dtype=torch.int32).view(B, H, 1) - 6).view(B, H, T)


def scoring(kind: str) -> dict[str, Any]:
    n = Numbers.of(4)
    return {
        "plain": {},
        "window": {"window": 6},
        "aux": {"aux": (n.normal(B, H, T, 3), n.normal(B, 1, S, 3))},
        "landmarks": {"gate": "last", "gate_mix": 0.6},
        "gates": {"gate": n.normal(B, G, 3, D), "gate_mix": 0.6},
        "bias": {"key_bias": n.normal(B, G, S)},
        "bias of all items": {"key_bias": n.normal(1, G, S)},
    }[kind]


def results(impl: str, layout: BlockLayout, extras: Extras, seed: tuple[Tensor, Tensor], causal: bool) -> list[Tensor]:
    """Out, lse and gradients of q, k and v; empty rows' log-sum-exp as 0."""
    n = Numbers.of(5)
    leaves = [n.normal(B, h, t, D).requires_grad_() for h, t in ((H, T), (G, S), (G, S))]
    out, lse = block_sparse_attention_with_lse(*leaves, layout, causal=causal, extras=extras, impl=impl)
    grads = torch.autograd.grad((out, lse), leaves, seed)
    return [out.detach(), lse.detach().nan_to_num(neginf=0.0), *grads]


@pytest.mark.parametrize("score", ["plain", "window", "aux", "landmarks", "gates", "bias", "bias of all items"])
@pytest.mark.parametrize("kind", ["by item", "by head", "by both"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_positions_of_items_and_heads_are_their_own(kind: str, score: str, causal: bool) -> None:
    n = Numbers.of(6)
    layout = BlockLayout.from_mask(n.chance(0.7, B, G, 3, 3), *SIZES)
    extras = Extras(q_pos=positions(kind), **scoring(score))
    # Seeds at rows that see nothing too: what they receive must reach nobody.
    seed = (n.normal(B, H, T, D), n.normal(B, H, T))
    found, wanted = (results(impl, layout, extras, seed, causal) for impl in ("blocked", "reference"))
    for mine, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("score", ["plain", "window", "landmarks", "gates", "bias"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_a_row_that_sees_nothing_is_told_reaches_nobody(bad: float, score: str) -> None:
    """The square of a log-sum-exp of -inf sends an infinite gradient back."""
    extras = Extras(q_pos=positions("by both"), **scoring(score))
    n, layout = Numbers.of(6), BlockLayout.dense(*SIZES)
    seed = (n.normal(B, H, T, D), n.normal(B, H, T))
    dead = positions("by both") < 0
    assert bool(dead.any())
    spoilt = (seed[0].masked_fill(dead.unsqueeze(-1), bad), seed[1].masked_fill(dead, bad))
    found, wanted = results("blocked", layout, extras, spoilt, True), results("reference", layout, extras, seed, True)
    for mine, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-9)


def test_rows_that_fill_a_block_see_nothing() -> None:
    """A key that no row sees may be no number, at the first slot too; query blocks of 8 do not divide 20 rows."""
    n, layout = Numbers.of(7), BlockLayout.dense(*SIZES)
    extras = Extras(q_pos=(torch.arange(T) + 8).clamp(max=S - 1).int().view(1, 1, T), window=6)
    q, k, v = n.normal(B, H, T, D), n.normal(B, G, S, D), n.normal(B, G, S, D)
    seed = n.normal(B, H, T, D)
    grads = []
    for unseen in (0.0, float("nan")):
        leaves = [q.clone(), k.clone(), v.clone()]
        leaves[1][:, :, :3] = unseen
        leaves = [x.requires_grad_() for x in leaves]
        out = block_sparse_attention_with_lse(*leaves, layout, extras=extras, impl="blocked")[0]
        grads.append((out.detach(), *torch.autograd.grad(out, leaves, seed)))
    for spoilt, clean in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(spoilt, clean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("score", ["plain", "window", "aux", "landmarks", "gates", "bias", "origins"])
def test_chunks_of_one_row_each_are_the_call(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    n = Numbers.of(8)
    keep = n.chance(0.8, B, G, 3, 3)
    layout, extras = BlockLayout.from_mask(keep, *SIZES), None
    if score == "origins":
        index = torch.where(keep, torch.arange(3), -1)
        layout = BlockLayout.from_indices(index, *SIZES, origin=n.integers(0, 15, *index.shape))
        angle = n.normal(16, D // 2)
        extras = Extras(rope=(angle.cos(), angle.sin()))
    extras = extras or Extras(**scoring(score))
    seed = (n.normal(B, H, T, D), n.normal(B, H, T))
    monkeypatch.setattr(schedule, "CHUNK_SCORES", 1)
    found, wanted = (results(impl, layout, extras, seed, True) for impl in ("blocked", "reference"))
    for mine, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", [{}, {"window": 6}, {"window": 6, "sink": 3}, {"window": "heads", "sink": "heads"}])
@pytest.mark.parametrize("kind", ["by item", "by head", "by both", "none"])
@pytest.mark.parametrize("listed", [(B, G), (1, 1)], ids=["lists of each", "lists of all"])
def test_limits_made_chunk_by_chunk_are_those_made_beforehand(
    listed: tuple[int, int], kind: str, rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls of about a million partial pairs and more make them as they need them."""
    n = Numbers.of(9)
    by_head = {name: n.integers(1, 9, H) if x == "heads" else x for name, x in rule.items()}
    keep, extras = n.chance(0.8, *listed, 3, 3), Extras(q_pos=None if kind == "none" else positions(kind), **by_head)
    seed = (n.normal(B, H, T, D), n.normal(B, H, T))
    made, limits_of = [], schedule.limits_of

    def noting(*args: Any) -> schedule.Limits:
        made.append(args)
        return limits_of(*args)

    def attend(impl: str) -> list[Tensor]:
        made.clear()
        # A layout of its own: what is remembered belongs to one.
        return results(impl, BlockLayout.from_mask(keep, *SIZES), extras, seed, True)

    monkeypatch.setattr(schedule, "CHUNK_SCORES", 64 * 8 * 4)
    monkeypatch.setattr(schedule, "limits_of", noting)
    wanted, beforehand = attend("reference"), attend("blocked")
    at_once = len(made)
    monkeypatch.setattr(schedule, "MOST_LIMITS", 0)
    found = attend("blocked")
    # What serves later calls too is made at once, whatever it takes.
    is_kept = kind == "none" and not any(isinstance(x, Tensor) for x in by_head.values())
    assert (at_once, len(made)) == (1, 1) if is_kept else at_once == 2 < len(made)
    for mine, other, true in zip(found, beforehand, wanted, strict=True):
        assert torch.equal(mine, other)
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-9)
