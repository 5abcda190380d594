"""LoFiT: what is learned is what the loss asks for, by heads alone, and the model is left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attnzoo import heads
from attnzoo.heads import lofit
from attnzoo_kernels.errors import ConfigError, UnsupportedError
from tests.attnzoo.heads.planted import COPYING, planted
from tests.attnzoo.surgery.tiny import WIDTH, assert_untouched, ids, snapshot, tiny

FEW = lofit.LofitTraining(steps=3, rate=0.05)


def task(count: int = 2, label: int = 7) -> list[dict[str, Tensor]]:
    """Whatever was read, the last two tokens shall be one and the same."""
    found = []
    for seed in range(count):
        tokens = ids(3, 8, seed=seed)
        labels = torch.full_like(tokens, lofit.IGNORED)
        labels[:, 6:] = label
        found.append({"input_ids": tokens, "labels": labels})
    return found


def loss(model: Any, batch: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return float(lofit.answer_loss(model, batch))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny(dtype=torch.float32)


def test_labels_are_foretold_by_the_row_before(model: Any) -> None:
    batch = task(1)[0]
    with torch.no_grad():
        said = model(batch["input_ids"]).logits
    expected = cross_entropy(said[:, 5:7].flatten(0, 1), torch.full((6,), 7))
    assert loss(model, batch) == pytest.approx(float(expected), rel=1e-6)


def test_offsets_lower_the_loss_and_the_model_is_left_as_it_was(model: Any) -> None:
    before = snapshot(model)
    told: list[tuple[str, int, int]] = []
    training = lofit.LofitTraining(steps=20, rate=0.2)
    state = torch.random.get_rng_state()
    found = lofit.train(
        model, task(), heads=[(1, 5), (0, 2), (1, 0)], training=training, progress=lambda *said: told.append(said)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert_untouched(model, before)
    assert told[-1] == ("offsets", 20, 20)
    assert [(edit.layer, edit.head, edit.scale) for edit in found] == [(0, (2,), 1.0), (1, (0, 5), 1.0)]
    for edit in found:
        assert edit.offset is not None
        assert edit.offset.shape == (len(edit.head), WIDTH)  # type: ignore[arg-type]
        assert edit.offset.dtype == torch.float32
        assert not edit.offset.requires_grad
    other = task(3)[2]
    intact = loss(model, other)
    with heads.edited(model, found):
        assert loss(model, other) < 0.7 * intact
    again = lofit.train(model, task(), heads=[(1, 0), (0, 2), (1, 5)], training=training)
    assert all(torch.equal(a.offset, b.offset) for a, b in zip(found, again, strict=True))  # type: ignore[arg-type]


def test_a_step_moves_scales_and_offsets_against_their_gradients(model: Any) -> None:
    batch = task(1)[0]
    training = lofit.LofitTraining(steps=1, rate=1e-2)
    (found,) = lofit.train(model, [batch], heads=[(0, 4)], scales=True, training=training)
    scale = torch.ones(WIDTH, requires_grad=True)
    offset = torch.zeros(WIDTH, requires_grad=True)

    def by_hand(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        z = args[0].unflatten(-1, (6, WIDTH))
        own = (z[:, :, 4] * scale + offset).unsqueeze(2)
        return (torch.cat([z[:, :, :4], own, z[:, :, 5:]], 2).flatten(-2),)

    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(by_hand)
    gradients = torch.autograd.grad(lofit.answer_loss(model, batch), [scale, offset])
    hook.remove()
    for learned, start, gradient in zip((found.scale, found.offset), (1, 0), gradients, strict=True):
        assert isinstance(learned, Tensor)
        # Adam's first step is its rate against each gradient's sign; first values are a tenth of that.
        moved = (learned - start)[0]
        clear = gradient.abs() > 1e-3 * gradient.abs().max()
        assert clear.sum() > WIDTH // 2
        assert torch.equal(moved.sign()[clear], -gradient.sign()[clear])
        assert (moved.abs() - 1e-2).abs().max() < 6e-3


def test_nothing_but_heads_gets_a_gradient() -> None:
    model = tiny(dtype=torch.float32).train()
    model.lm_head.weight.requires_grad_(False)
    before = snapshot(model)
    wanted: list[int] = []

    def own(model: Any, batch: Any) -> Tensor:
        wanted.append(sum(parameter.requires_grad for parameter in model.parameters()))
        return lofit.answer_loss(model, batch)

    lofit.train(model, task(), heads=[(0, 0)], training=FEW, loss=own)
    assert wanted == [0, 0, 0]
    assert_untouched(model, before)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lofit.select(model, task(), training=FEW, progress=stop)
    assert_untouched(model, before)


def test_heads_are_ranked_by_how_far_their_scales_went(model: Any) -> None:
    found = lofit.select(model, task(), training=FEW)
    assert found[lofit.LOFIT].shape == (2, 6)
    assert found.kv_heads == 2
    assert len(found.about["losses"]) == 3
    everything = [(layer, head) for layer in range(2) for head in range(6)]
    edits = lofit.train(model, task(), heads=everything, scales=True, training=FEW)
    norms = torch.stack([(edit.scale - 1).norm(dim=1) for edit in edits])  # type: ignore[union-attr]
    assert norms.shape == (2, 6)
    quiet = lofit.select(model, task(), training=lofit.LofitTraining(steps=3, rate=0.05, penalty=1e4))
    # A penalty that outweighs the loss keeps scales near 1, where they swing about it.
    assert quiet[lofit.LOFIT].mean() < 0.7 * found[lofit.LOFIT].mean()
    again = heads.HeadScores.from_json(found.to_json())
    assert again.top(lofit.LOFIT, 2) == found.top(lofit.LOFIT, 2)


def test_the_heads_that_do_the_task_are_selected() -> None:
    model = planted()
    layer, head = COPYING
    with torch.no_grad():
        # It copies too faintly, so that a larger scale is of use.
        model.model.layers[layer].self_attn.o_proj.weight[:, head * 64 : (head + 1) * 64] *= 0.3
    text = torch.randperm(30, generator=torch.Generator().manual_seed(1))[:20] + 1
    tokens = torch.cat([text.new_zeros(1), text, text])[None]
    labels = torch.full_like(tokens, lofit.IGNORED)
    labels[:, 24:] = tokens[:, 24:]
    training = lofit.LofitTraining(steps=10, rate=0.02, penalty=1e-2)
    found = lofit.select(model, [{"input_ids": tokens, "labels": labels}], training=training)
    # Besides the one that copies, the one that tells it what stood before each token.
    best = found.top(lofit.LOFIT, 3)
    assert {(one.layer, one.head) for one in best[:2]} == {COPYING, (0, 0)}
    assert best[1].score > 1.2 * best[2].score


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_are_edited_when_they_are_computed_again(reentrant: bool) -> None:
    model = tiny(dtype=torch.float32).train()
    (plain,) = lofit.train(model, task(), heads=[(0, 1)], training=FEW)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    (checkpointed,) = lofit.train(model, task(), heads=[(0, 1)], training=FEW)
    assert plain.offset is not None
    assert checkpointed.offset is not None
    torch.testing.assert_close(checkpointed.offset, plain.offset, rtol=1e-4, atol=1e-6)


def test_a_loss_that_no_head_changes_is_refused(model: Any) -> None:
    with pytest.raises(UnsupportedError, match="no gradient comes back"):
        lofit.train(model, task(), heads=[(0, 1)], training=FEW, loss=lambda model, batch: torch.tensor(1.0))


def test_what_is_learned_in_bf16_is_fp32() -> None:
    model = tiny(dtype=torch.float32).to(torch.bfloat16)
    with torch.inference_mode():
        (edit,) = lofit.train(model, task(), heads=[(1, 1)], scales=True, training=FEW)
    assert isinstance(edit.scale, Tensor)
    assert edit.offset is not None
    assert (edit.scale.dtype, edit.offset.dtype) == (torch.float32, torch.float32)
    assert (edit.scale - 1).abs().max() > 1e-2


GOOD = task(1)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": []}, "heads: expected at least one"),
        ({"heads": [(2, 0)]}, r"heads: expected \(layer, query head\)"),
        ({"heads": [(0, 6)]}, r"heads: expected \(layer, query head\)"),
        ({"heads": [(0, 1), (0, 1)]}, "twice"),
        ({"batches": []}, "batches: expected at least one"),
        ({"batches": [GOOD["input_ids"]]}, "expected mappings with input_ids and labels"),
        ({"batches": [{**GOOD, "labels": GOOD["labels"][:, :3]}]}, "expected labels int64"),
        ({"batches": [{**GOOD, "labels": torch.full((3, 8), -100)}]}, "that counts"),
        ({"batches": [{**GOOD, "input_ids": torch.ones(3, 8)}]}, "expected input_ids int64"),
        ({"loss": lambda model, batch: torch.tensor(float("nan"))}, "finite scalar"),
        ({"loss": lambda model, batch: torch.ones(2)}, "finite scalar"),
    ],
)
def test_what_does_not_fit_is_named(model: Any, options: dict[str, Any], message: str) -> None:
    before = snapshot(model)
    given = {"batches": [GOOD], "heads": [(0, 0)], "training": FEW, **options}
    with pytest.raises(ConfigError, match=message):
        lofit.train(model, given.pop("batches"), **given)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("options", "message"), [({"steps": 0}, "steps"), ({"rate": 0.0}, "rate"), ({"penalty": -1.0}, "penalty")]
)
def test_training_that_is_none_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"{message}: expected"):
        lofit.LofitTraining(**options)
