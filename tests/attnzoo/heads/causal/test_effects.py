"""What metrics lose by heads: against one run for each head, and what is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnzoo import heads
from attnzoo.heads.causal import each_head
from attnzoo.heads.causal.layer_memory import layer_paths
from attnzoo_kernels.errors import ConfigError, ShapeError, UnsupportedError
from tests.attnzoo.surgery.families.hosts import HOSTS
from tests.attnzoo.surgery.tiny import assert_untouched, snapshot, tiny

CLEAN = torch.tensor([[5, 9, 14, 3, 22, 40], [7, 8, 30, 2, 11, 13]])
CORRUPT = torch.tensor([[5, 9, 17, 3, 22, 40], [7, 8, 31, 2, 11, 13]])
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny(4, 2, layers=3)


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 7] - logits[:, -1, 20]).mean()


def lost(model: Any, batch: Any, edit: Callable[[int, int], heads.HeadEdit]) -> Tensor:
    """The metric less that with one head edited, a whole run for each head."""
    call = model if isinstance(batch, Tensor) else lambda given: model(**given)
    rows = []
    with torch.no_grad():
        intact = metric(call(batch).logits)
        for layer in range(len(heads.sites(model))):
            row = []
            for head in range(4):
                with heads.edited(model, edit(layer, head)):
                    row.append(intact - metric(call(batch).logits))
            rows.append(torch.stack(row))
    return torch.stack(rows)


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.double(), atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("name", ["Mistral with a window", "GPT-2", "OLMo 2", "OPT"])
@pytest.mark.parametrize("batch", [CLEAN, {"input_ids": CLEAN, "attention_mask": LEFT}], ids=["whole", "padded"])
def test_ablation_scores_are_those_of_one_run_for_each_head(name: str, batch: Any) -> None:
    host = HOSTS[name].make()
    before = snapshot(host)
    found = heads.ablation_scores(host, batch, metric)
    near(found, lost(host, batch, lambda layer, head: heads.HeadEdit(layer, head, ablate="zero")))
    assert found.abs().min() > 1e-6
    assert_untouched(host, before)


def test_means_and_other_items_take_a_heads_place(model: Any) -> None:
    with torch.no_grad(), heads.capture(model) as seen:
        model(CLEAN)
    z = dict(seen["z"])
    expected = lost(model, CLEAN, lambda i, h: heads.HeadEdit(i, h, ablate="mean", value=z[i][:, :, h].mean((0, 1))))
    near(heads.ablation_scores(model, CLEAN, metric, "mean"), expected)
    padded = {"input_ids": CLEAN, "attention_mask": LEFT}
    with torch.no_grad(), heads.capture(model) as seen:
        model(**padded)
    rows = LEFT.bool()
    means = {layer: x[rows].mean(0) for layer, x in seen["z"].items()}
    expected = lost(model, padded, lambda i, h: heads.HeadEdit(i, h, ablate="mean", value=means[i][h]))
    near(heads.ablation_scores(model, padded, metric, "mean"), expected)
    expected = lost(model, padded, lambda i, h: heads.HeadEdit(i, h, ablate="uniform"))
    near(heads.ablation_scores(model, padded, metric, "uniform"), expected)
    other = {layer: x[[1, 0]] for layer, x in z.items()}
    expected = lost(model, CLEAN, lambda i, h: heads.HeadEdit(i, h, ablate="resample", value=other[i][:, :, h : h + 1]))
    near(heads.ablation_scores(model, CLEAN, metric, "resample"), expected)


def test_layers_before_the_edited_one_do_not_run_again(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    hooks = [
        layer.mlp.register_forward_hook(lambda *_, number=number: calls.append(number))
        for number, layer in enumerate(model.model.layers)
    ]
    whole = heads.ablation_scores(model, CLEAN, metric)
    assert sorted(calls) == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    # One head at a time, since no more logits are to be held at once.
    monkeypatch.setattr(each_head, "CHUNK_VALUES", 1)
    calls.clear()
    some = heads.ablation_scores(model, CLEAN, metric, heads=[(1, 3), (2, 0), (1, 3)])
    assert sorted(calls) == [0, 1, 1, 2, 2, 2]
    assert torch.equal(some.isnan(), torch.tensor([[1] * 4, [1] * 3 + [0], [0] + [1] * 3]).bool())
    near(some[~some.isnan()], torch.stack([whole[1, 3], whole[2, 0]]))
    for hook in hooks:
        hook.remove()


class Turned(nn.Module):
    """A model whose layers are called last first, and one of them twice."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.inner.model.embed_tokens(input_ids)
        place = self.inner.model.rotary_emb(x, torch.arange(input_ids.shape[1])[None])
        for layer in (2, 1, 0, 1):
            x = self.inner.model.layers[layer](x, position_embeddings=place)
        out: Tensor = self.inner.lm_head(x)
        return out


def test_a_model_whose_layers_are_not_called_in_order_runs_whole(model: Any) -> None:
    turned = Turned(model)
    found = heads.ablation_scores(turned, CLEAN, metric, heads=[(2, 1), (1, 0)])
    with torch.no_grad():
        for layer, head in ((2, 1), (1, 0)):
            with heads.edited(turned, heads.HeadEdit(layer, head, ablate="zero")):
                changed = metric(turned(CLEAN))
            near(found[layer, head], metric(turned(CLEAN)) - changed)
    assert layer_paths(["a.0.attn.self", "a.1.attn.self", "b"]) == ["a.0", "a.1", "b"]


def test_patching_takes_outputs_of_the_other_text(model: Any) -> None:
    with torch.no_grad(), heads.capture(model) as seen:
        model(CLEAN)
        model(CORRUPT)
    (own, other) = zip(*(seen["z"].calls(layer) for layer in range(3)), strict=True)

    def edit(layer: int, head: int) -> heads.HeadEdit:
        return heads.HeadEdit(layer, head, ablate="resample", value=other[layer][:, :, head : head + 1])

    found = heads.patch(model, CLEAN, CORRUPT, metric)
    near(found, lost(model, CLEAN, edit))
    near(heads.patch(model, CLEAN, CLEAN, metric), torch.zeros(3, 4))
    frozen = heads.patch(model, CLEAN, CORRUPT, metric, freeze="attention")
    with torch.no_grad():
        intact = metric(model(CLEAN).logits)
        later = [heads.HeadEdit(i, slice(None), ablate="resample", value=own[i]) for i in (1, 2)]
        with heads.edited(model, [edit(0, 2), *later]):
            near(frozen[0, 2], intact - metric(model(CLEAN).logits))
    # Behind the last layer there are no heads to follow.
    near(frozen[2], found[2])
    assert float((frozen[0] - found[0]).abs().min()) > 1e-6


def test_a_path_past_all_heads_is_a_frozen_patch_and_one_through_all_of_the_next_layer_the_rest() -> None:
    model = tiny(4, 2, layers=2)
    frozen = heads.patch(model, CLEAN, CORRUPT, metric, freeze="attention")
    assert heads.path(model, CLEAN, CORRUPT, [(0, 1)], None, metric) == pytest.approx(float(frozen[0, 1]), abs=1e-11)
    assert heads.path(model, CLEAN, CORRUPT, [(1, 1)], [(0, 0), (1, 2)], metric) == pytest.approx(0, abs=1e-12)
    # Where the metric sees the second layer's heads alone, what comes through them is all.
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(0.05)
        model.model.layers[1].mlp.down_proj.weight.zero_()
    every = [(1, head) for head in range(4)]
    through = heads.path(model, CLEAN, CORRUPT, [(0, 1)], every, metric)
    whole = float(heads.patch(model, CLEAN, CORRUPT, metric, heads=[(0, 1)])[0, 1])
    past = heads.path(model, CLEAN, CORRUPT, [(0, 1)], None, metric)
    assert through + past == pytest.approx(whole, rel=0.05)
    assert abs(through) > 10 * abs(through + past - whole)


def test_attribution_is_the_slope_of_patching_and_needs_no_weight_that_learns(model: Any) -> None:
    before = snapshot(model)
    embedded = model.get_input_embeddings()(CLEAN).detach()
    moved = embedded.clone()
    moved[:, 2] += 1e-6 * torch.randn(96 - 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    clean = {"inputs_embeds": embedded}
    corrupt = {"inputs_embeds": moved}
    found = heads.attribution(model, clean, corrupt, metric)
    expected = heads.patch(model, clean, corrupt, metric)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-3)
    assert found.abs().max() > 1e-7
    with torch.inference_mode():
        assert torch.equal(heads.attribution(model, clean, corrupt, metric), found)
    without = heads.attribution(model, CLEAN, None, metric)
    z = heads.attribution(model, CLEAN, CORRUPT, metric) + heads.attribution(model, CORRUPT, None, metric)
    assert without.shape == z.shape == (3, 4)
    assert_untouched(model, before)


def test_divergence_is_the_distance_of_rows_that_stand_for_each_other(model: Any) -> None:
    assert not heads.divergence(model, CLEAN, CLEAN).any()
    found = heads.divergence(model, CLEAN, CLEAN[:, 2:])
    outputs = []
    for given in (CLEAN, CLEAN[:, 2:]):
        with torch.no_grad(), heads.capture(model) as seen:
            model(given)
        outputs.append(torch.stack([seen["z"][layer][:, -4:] for layer in range(3)]))
    near(found, (outputs[0] - outputs[1]).norm(dim=-1).mean((1, 2)))
    # Rows are counted from the last token: padding on either side changes nothing.
    for order in (slice(None), [2, 3, 4, 5, 0, 1]):
        alone = torch.cat([torch.zeros(2, 2, dtype=torch.int64), CLEAN[:, 2:]], 1)[:, order]
        mask = torch.tensor([[0, 0, 1, 1, 1, 1]] * 2)[:, order]
        padded = {"input_ids": alone, "attention_mask": mask}
        torch.testing.assert_close(heads.divergence(model, CLEAN, padded), found, atol=1e-10, rtol=1e-8)
    near(heads.divergence(model, CLEAN, CLEAN[:, 2:], rows=1), (outputs[0] - outputs[1])[:, :, -1].norm(dim=-1).mean(1))


def test_an_exception_leaves_nothing_behind(model: Any) -> None:
    before = snapshot(model)
    told: list[int] = []

    def failing(logits: Tensor) -> Tensor:
        told.append(len(logits))
        if len(told) > 3:
            raise RuntimeError("enough")
        return metric(logits)

    for run in (heads.ablation_scores, lambda *given: heads.patch(given[0], given[1], CORRUPT, given[2])):
        told.clear()
        with pytest.raises(RuntimeError, match="enough"):
            run(model, CLEAN, failing)
        assert all("forward" not in module.__dict__ for module in model.modules())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert_untouched(model, before)


def test_progress_is_told_of_each_layer(model: Any) -> None:
    told: list[tuple[str, int, int]] = []
    heads.ablation_scores(model, CLEAN, metric, heads=[(0, 0)], progress=lambda *given: told.append(given))
    assert told == [("heads", 1, 3), ("heads", 2, 3), ("heads", 3, 3)]


REFUSED: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "no batch": (lambda m: heads.ablation_scores(m, [1, 2], metric), ConfigError, "batch: expected int64"),
    "an ablation": (lambda m: heads.ablation_scores(m, CLEAN, metric, "none"), ConfigError, "ablate: expected one of"),
    "one item": (
        lambda m: heads.ablation_scores(m, CLEAN[:1], metric, "resample"),
        UnsupportedError,
        "batch: expected several",
    ),
    "a head": (
        lambda m: heads.ablation_scores(m, CLEAN, metric, heads=[(0, 4)]),
        ConfigError,
        r"heads: .*got \(0, 4\)",
    ),
    "no pair": (lambda m: heads.ablation_scores(m, CLEAN, metric, heads=[3]), ConfigError, "heads: expected pairs"),
    "several numbers": (
        lambda m: heads.ablation_scores(m, CLEAN, lambda y: y[:, 0, 0]),
        ShapeError,
        "metric: expected one number",
    ),
    "no number": (
        lambda m: heads.ablation_scores(m, CLEAN, lambda y: "x"),
        ConfigError,
        "metric: expected a number, got str",
    ),
    "a cache": (
        lambda m: heads.patch(m, {"input_ids": CLEAN, "past_key_values": 1}, CLEAN, metric),
        UnsupportedError,
        "clean: expected no past_key_values",
    ),
    "other sizes": (lambda m: heads.patch(m, CLEAN, CLEAN[:, 1:], metric), ShapeError, "corrupt: expected"),
    "other padding": (
        lambda m: heads.attribution(m, CLEAN, {"input_ids": CLEAN, "attention_mask": LEFT}, metric),
        UnsupportedError,
        "corrupt: expected padding",
    ),
    "what": (lambda m: heads.patch(m, CLEAN, CLEAN, metric, "q"), ConfigError, "what: expected one of z"),
    "freeze": (
        lambda m: heads.patch(m, CLEAN, CLEAN, metric, freeze="mlp"),
        ConfigError,
        "freeze: expected one of attention",
    ),
    "no gradient": (
        lambda m: heads.attribution(m, CLEAN, None, lambda y: float(y.detach().sum())),
        ConfigError,
        "metric: expected a number that follows",
    ),
    "no senders": (
        lambda m: heads.path(m, CLEAN, CLEAN, [], [(1, 0)], metric),
        ConfigError,
        "senders: expected at least one",
    ),
    "another end": (
        lambda m: heads.divergence(m, CLEAN, CLEAN[:, :-1]),
        ConfigError,
        "without: expected texts that end",
    ),
    "too many rows": (
        lambda m: heads.divergence(m, CLEAN, CLEAN[:, :3], rows=4),
        ConfigError,
        "rows: expected at most 3",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(model: Any, name: str) -> None:
    run, error, message = REFUSED[name]
    before = snapshot(model)
    with pytest.raises(error, match=message):
        run(model)
    assert_untouched(model, before)
