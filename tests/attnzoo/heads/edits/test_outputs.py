"""Edits of heads' outputs: what they compute, in which rows, and that nothing stays behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo import heads
from attnzoo.heads import HeadEdit
from attnzoo_kernels.errors import AttnzooError, ConfigError, ShapeError, UnsupportedError
from tests.attnzoo.surgery.tiny import assert_close, assert_untouched, ids, logits, snapshot, tiny

WIDTH = 16


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


def outputs(model: Any, tokens: Tensor, edits: list[HeadEdit], **options: Any) -> dict[int, Tensor]:
    """The outputs of all layers' heads with edits, as their projections are given them."""
    with heads.edited(model, edits), heads.capture(model) as seen, torch.no_grad():
        model(tokens, **options)
    return dict(seen["z"])


def hooks(model: Any) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def test_an_edit_multiplies_and_adds_to_its_heads_alone(model: Any) -> None:
    plain = outputs(model, ids(2, 7), [])
    scale = torch.randn(2, WIDTH, dtype=torch.float64)
    offset = torch.randn(WIDTH, dtype=torch.float64)
    found = outputs(model, ids(2, 7), [HeadEdit(0, [4, 1], scale=scale, offset=offset)])[0]
    expected = plain[0].clone()
    expected[:, :, 4] = expected[:, :, 4] * scale[0] + offset
    expected[:, :, 1] = expected[:, :, 1] * scale[1] + offset
    assert torch.equal(found, expected)


def test_a_kv_head_stands_for_its_group(model: Any) -> None:
    scale = torch.randn(2, WIDTH, dtype=torch.float64)
    found = outputs(model, ids(2, 7), [HeadEdit(0, [1, 0], scale=scale, kv=True)])
    each = torch.stack([scale[0]] * 3 + [scale[1]] * 3)
    expected = outputs(model, ids(2, 7), [HeadEdit(0, [3, 4, 5, 0, 1, 2], scale=each)])
    assert all(torch.equal(found[layer], expected[layer]) for layer in expected)


def test_edits_of_one_head_come_in_order_and_of_contexts_the_inner_one_last(model: Any) -> None:
    first = HeadEdit(0, 2, offset=torch.ones(WIDTH, dtype=torch.float64))
    second = HeadEdit(0, 2, scale=-3.0)
    found = outputs(model, ids(1, 5), [first, second])[0]
    plain = outputs(model, ids(1, 5), [])[0][:, :, 2]
    assert torch.equal(found[:, :, 2], (plain + 1) * -3)
    with heads.edited(model, first):
        assert torch.equal(outputs(model, ids(1, 5), [second])[0], found)


def test_ablations_put_nothing_or_a_value_there_before_scale_and_offset(model: Any) -> None:
    value = torch.randn(1, 5, 2, WIDTH, dtype=torch.float64)
    one = torch.ones(WIDTH, dtype=torch.float64)
    edits = [
        HeadEdit(0, 0, ablate="zero", offset=one),
        HeadEdit(0, [1, 5], ablate="resample", value=value, scale=2.0),
    ]
    found = outputs(model, ids(1, 5), edits)[0]
    assert bool((found[:, :, 0] == 1).all())
    assert torch.equal(found[:, :, [1, 5]], value * 2)
    with pytest.raises(ShapeError, match=r"value: expected \[1, 4, 2, 16\]"):
        outputs(model, ids(1, 4), edits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_chosen_by_call_by_mask_and_by_the_last_token(model: Any, side: str) -> None:
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0, slice(0, 2) if side == "left" else slice(4, 6)] = 0
    rows: dict[Any, Any] = {"all": range(6), "prefill": range(6), "decode": [], "last": [5 if side == "left" else 3]}
    plain = outputs(model, ids(2, 6), [], attention_mask=mask)[0]
    one = torch.ones(WIDTH, dtype=torch.float64)
    for where, expected in rows.items():
        found = outputs(model, ids(2, 6), [HeadEdit(0, 3, offset=one, where=where)], attention_mask=mask)[0]
        changed = (found != plain).any(-1)[:, :, 3]
        assert changed[0].nonzero().flatten().tolist() == list(expected)
    own = torch.rand(2, 6) < 0.5
    found = outputs(model, ids(2, 6), [HeadEdit(0, 3, offset=one, where=own)], attention_mask=mask)[0]
    assert torch.equal((found != plain).any(-1)[:, :, 3], own)
    with pytest.raises(ShapeError, match=r"where: expected a mask \[2, 5\]"):
        outputs(model, ids(2, 5), [HeadEdit(0, 3, offset=one, where=own)])


def test_the_last_token_is_not_guessed(model: Any) -> None:
    edit = HeadEdit(0, 3, ablate="zero", where="last")
    with heads.edited(model, edit):
        logits(model, ids(1, 4))
        with pytest.raises(UnsupportedError, match="call of a part"):
            model.model(ids(1, 4))


def test_edits_that_change_nothing_leave_no_hook_and_the_rest_leaves_none_behind(model: Any) -> None:
    before = snapshot(model)
    expected = logits(model, ids(2, 9))
    nothing = [HeadEdit(0, 1), HeadEdit(1, [0, 1], scale=torch.ones(WIDTH), offset=torch.zeros(WIDTH))]
    for edits in ([], nothing):
        with heads.edited(model, edits):
            assert hooks(model) == 0
    with pytest.raises(KeyboardInterrupt), heads.edited(model, HeadEdit(0, 1, scale=2.0, where="last")):
        assert hooks(model) == 3
        raise KeyboardInterrupt
    assert hooks(model) == 0
    assert torch.equal(logits(model, ids(2, 9)), expected)
    assert_untouched(model, before)


def test_gradients_reach_offsets_and_scales_and_nothing_else(model: Any) -> None:
    offset = torch.zeros(2, WIDTH, requires_grad=True)
    scale = torch.ones(WIDTH, requires_grad=True)
    wanted = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    with heads.edited(model, HeadEdit(0, [0, 3], scale=scale, offset=offset)):
        model(ids(1, 5)).logits.square().mean().backward()
    assert offset.grad is not None and scale.grad is not None
    assert float(offset.grad.abs().min()) > 0 and float(scale.grad.abs().min()) > 0
    assert all(p.grad is None for p in model.parameters())
    for parameter, before in zip(model.parameters(), wanted, strict=True):
        parameter.requires_grad_(before)


def test_edits_in_single_precision_are_rounded_once_to_the_models() -> None:
    model = tiny().bfloat16()
    scale = torch.randn(WIDTH)
    plain = outputs(model, ids(1, 5), [])[0]
    found = outputs(model, ids(1, 5), [HeadEdit(0, 2, scale=scale, offset=scale)])[0]
    assert torch.equal(found[:, :, 2], (plain[:, :, 2].float() * scale + scale).bfloat16())


def test_generate_is_the_loop_by_hand(model: Any) -> None:
    edits = [HeadEdit(0, [1, 2], scale=-2.0), HeadEdit(1, 4, ablate="zero", where="last"), HeadEdit(1, 0, scale=3.0)]
    tokens = ids(1, 6)
    with torch.no_grad():
        plain = model.generate(tokens, max_new_tokens=5, do_sample=False)
        with heads.edited(model, edits):
            found = model.generate(tokens, max_new_tokens=5, do_sample=False)
            out = model(tokens)
            for _ in range(5):
                more = out.logits[:, -1:].argmax(-1)
                tokens = torch.cat([tokens, more], 1)
                out = model(more, past_key_values=out.past_key_values)
    assert torch.equal(found, tokens)
    assert not torch.equal(found, plain)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda: HeadEdit(2, 0), ConfigError, "layer: expected one of 0, 1, got 2"),
        (lambda: HeadEdit(0, 6), ConfigError, "head: expected query heads from 0 to 5"),
        (lambda: HeadEdit(0, 2, kv=True), ConfigError, "head: expected KV heads from 0 to 1"),
        (lambda: HeadEdit(0, [1, 1]), ConfigError, "each once"),
        (lambda: HeadEdit(0, 0, scale=torch.ones(3)), ShapeError, r"scale: expected \[16\]"),
        (lambda: HeadEdit(0, [0, 1], offset=torch.ones(3, 16)), ShapeError, r"offset: expected .*\[2, 16\]"),
        (lambda: HeadEdit(0, 0, offset=torch.full((16,), torch.inf)), ConfigError, "offset: expected finite"),
        (lambda: HeadEdit(0, 0, scale=float("nan")), ConfigError, "scale: expected a finite"),
        (lambda: HeadEdit(0, 0, ablate="mean"), ConfigError, "value: expected a tensor"),
        (
            lambda: HeadEdit(0, 0, ablate="zeros"),  # type: ignore[arg-type]
            ConfigError,
            "did you mean 'zero'",
        ),
        (lambda: HeadEdit(0, 0, where=torch.ones(3)), ShapeError, "where: expected a bool mask"),
        (lambda: HeadEdit(-1, 0), ConfigError, "layer"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_happens(
    model: Any, edit: Any, error: type[AttnzooError], message: str
) -> None:
    with pytest.raises(error, match=message), heads.edited(model, edit()):
        pass
    assert hooks(model) == 0


def test_a_compiled_model_is_refused(model: Any) -> None:
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(UnsupportedError, match="is compiled"), heads.edited(compiled, HeadEdit(0, 0, scale=2.0)):
        pass


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_what_is_captured_is_what_attention_has(implementation: str) -> None:
    model = tiny()
    model.set_attn_implementation(implementation)
    with heads.capture(model, ("z", "q", "k", "v", "lse", "pattern")) as seen:
        found = model(ids(2, 8)).logits
    for layer, z in seen["z"].items():
        pattern = seen["pattern"][layer]
        group = z.shape[2] // seen["v"][layer].shape[2]
        k, v = (seen[name][layer].repeat_interleave(group, 2) for name in ("k", "v"))
        assert_close(pattern.sum(-1), torch.ones(2, 8, 6, dtype=torch.float64), 1e-12)
        assert_close(torch.einsum("bths,bshd->bthd", pattern, v), z, 1e-12)
        scores = torch.einsum("bthd,bshd->bths", seen["q"][layer], k) * WIDTH**-0.5
        scores = scores.masked_fill(torch.ones(8, 8).triu(1).bool()[:, None], -torch.inf)
        assert_close(seen["lse"][layer], scores.logsumexp(-1), 1e-12)
        assert torch.autograd.grad(found.sum(), z, retain_graph=True)[0].abs().max() > 0


def test_rows_of_calls_lie_behind_each_other(model: Any) -> None:
    with heads.capture(model, ("z", "k"), layers=[1], rows="last") as seen:
        model.generate(ids(2, 5), max_new_tokens=3, do_sample=False)
    assert list(seen["z"]) == [1]
    assert seen["z"][1].shape == (2, 3, 6, WIDTH)
    assert seen["k"][1].shape == (2, 7, 2, WIDTH)
    with heads.capture(model, rows=torch.tensor([[1], [4]])) as seen:
        model(ids(2, 5))
    with heads.capture(model) as whole:
        model(ids(2, 5))
    assert torch.equal(seen["z"][0][1, 0], whole["z"][0][1, 4])
