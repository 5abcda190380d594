"""Conversions that are refused: one line that names the argument, and a model that is as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnzoo
from attnzoo import surgery
from attnzoo.surgery.lowrank import factor
from tests.attnzoo.surgery.tiny import (
    assert_close,
    assert_untouched,
    calibration,
    convert,
    converted,
    ids,
    logits,
    snapshot,
    tiny,
)

LOW: dict[str, Any] = {"variant": "lowrank_gqa", "calibration": "text"}

# What is asked for; the argument that the message must begin with.
REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"variant": "mha", "windw": 9}, "windw"),
    ({"variant": "s2", "block": 4}, "block"),
    ({"variant": "mha", "window": 0}, "window"),
    ({"variant": "mha", "window": -3, "sink": 1}, "window"),
    ({"variant": "mha", "sink": 4}, "sink"),
    ({"variant": "mha", "window": 2.5, "sink": 1}, "window"),
    ({"variant": "s2", "vert_stride": 0}, "vert_stride"),
    ({"variant": "s2", "num_dense_heads": 3}, "num_dense_heads"),
    ({"variant": "mha", "num_heads": 3}, "num_heads"),
    ({"variant": "mha", "calibration": "text"}, "calibration"),
    ({**LOW}, "method"),
    ({**LOW, "method": "svd", "num_kv_heads": 1}, "method"),
    ({**LOW, "method": "commuting"}, "num_kv_heads"),
    ({**LOW, "method": "latent"}, "latent_dim"),
    ({**LOW, "method": "commuting", "num_kv_heads": 1, "rank": 3}, "rank"),
    ({**LOW, "method": "commuting", "num_kv_heads": 0}, "num_kv_heads"),
    ({**LOW, "method": "commuting", "num_kv_heads": 3}, "num_kv_heads"),
    ({**LOW, "method": "commuting", "num_kv_heads": True}, "num_kv_heads"),
    ({**LOW, "method": "commuting", "num_kv_heads": 1.0}, "num_kv_heads"),
    ({**LOW, "method": "latent", "latent_dim": 65}, "latent_dim"),
    ({**LOW, "method": "latent", "latent_dim": -1}, "latent_dim"),
    ({**LOW, "method": "latent", "latent_dim": 16, "num_kv_heads": 1}, "num_kv_heads"),
    ({**LOW, "method": "commuting", "num_kv_heads": 1, "latent_dim": 16}, "latent_dim"),
    ({**LOW, "calibration": None, "method": "commuting", "num_kv_heads": 1}, "calibration"),
    ({**LOW, "calibration": None, "method": "latent", "latent_dim": 16}, "calibration"),
    ({**LOW, "calibration": [], "method": "latent", "latent_dim": 16}, "calibration"),
    ({**LOW, "calibration": ["words"], "method": "latent", "latent_dim": 16}, "calibration"),
    ({**LOW, "calibration": [torch.rand(2, 8)], "method": "latent", "latent_dim": 16}, "calibration"),
    ({**LOW, "calibration": None, "method": "expand", "num_kv_heads": 5}, "num_kv_heads"),
    ({**LOW, "calibration": None, "method": "expand", "num_kv_heads": 1}, "num_kv_heads"),
    ({"variant": "mha", "where": lambda site: False}, "where"),
)


@pytest.mark.parametrize(("asked", "argument"), REFUSED, ids=[f"{i}-{name}" for i, (_, name) in enumerate(REFUSED)])
def test_a_bad_request_is_refused_by_the_name_of_its_argument_and_changes_nothing(
    asked: dict[str, Any], argument: str
) -> None:
    model, tokens = tiny(), ids(2, 20)
    before, said = snapshot(model), logits(model, tokens)
    asked = {**asked, "calibration": calibration()} if asked.get("calibration") == "text" else asked
    with pytest.raises(attnzoo.ConfigError) as caught:
        convert(model, asked["variant"], **{name: value for name, value in asked.items() if name != "variant"})
    message = str(caught.value)
    assert message.startswith(f"{argument}: ")
    assert "\n" not in message
    assert_untouched(model, before)
    assert torch.equal(logits(model, tokens), said)


@pytest.mark.parametrize("option", ["progress", "refit", "gradients"])
def test_an_option_that_a_reading_variant_does_not_have_is_not_swallowed(option: str) -> None:
    # "progress" is an argument of every conversion; the two others belong to low rank alone.
    model = tiny()
    if option == "progress":
        convert(model, "mha", progress=lambda what, done, of: None)
        return
    with pytest.raises(attnzoo.ConfigError, match=f"^{option}: "):
        convert(model, "mha", **{option: True})


def test_an_unknown_variant_is_refused_by_name() -> None:
    model = tiny()
    before = snapshot(model)
    with pytest.raises(attnzoo.AttnzooError, match="nosuch") as caught:
        surgery.convert(model, "nosuch")
    assert "\n" not in str(caught.value)
    assert_untouched(model, before)


def test_a_latent_replacement_is_not_converted_a_second_time() -> None:
    model = tiny()
    convert(model, "lowrank_gqa", method="latent", latent_dim=20, calibration=calibration())
    before = snapshot(model)
    with pytest.raises(attnzoo.UnsupportedError, match="latent"):
        convert(model, "lowrank_gqa", method="latent", latent_dim=16, calibration=calibration())
    assert_untouched(model, before)


def test_replacements_that_have_no_window_leave_a_block_with_one_alone() -> None:
    model = tiny()
    model.model.layers[1].self_attn.sliding_window = 8
    before = snapshot(model)
    with pytest.raises(attnzoo.UnsupportedError, match=r"sliding window of its own \(8 tokens\).*site.window is None"):
        convert(model, "longheads", chunk_size=4, attention_length=16)
    assert_untouched(model, before)


def test_keys_that_are_normalised_after_projection_are_not_merged() -> None:
    # A norm over each head's keys does not commute with a mix of heads.
    model = tiny()
    model.model.layers[0].self_attn.k_norm = torch.nn.LayerNorm(16)
    before = snapshot(model)
    with pytest.raises(attnzoo.UnsupportedError, match="normalises"):
        convert(model, "lowrank_gqa", method="mean", num_kv_heads=1)
    assert_untouched(model, before)


@pytest.mark.parametrize("method", ["commuting", "latent"])
def test_a_conversion_that_fails_in_the_middle_changes_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The first site is solved and the second fails: nothing may have been put into the model by then.
    model, tokens = tiny(layers=3), ids(2, 20)
    before, said = snapshot(model), logits(model, tokens)
    name = "merge_site" if method == "commuting" else "latent_site"
    real, calls = getattr(factor.merge_heads, name), []

    def fail_later(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise torch.linalg.LinAlgError("no convergence")
        return real(*args)

    monkeypatch.setattr(factor.merge_heads, name, fail_later)
    size = {"num_kv_heads": 1} if method == "commuting" else {"latent_dim": 16}
    with pytest.raises(torch.linalg.LinAlgError):
        convert(model, "lowrank_gqa", method=method, calibration=calibration(), **size)
    assert len(calls) == 2
    assert_untouched(model, before)
    assert torch.equal(logits(model, tokens), said)


def test_a_calibration_text_that_the_model_cannot_read_leaves_no_hooks_and_no_modes_behind() -> None:
    model = tiny().train()
    before = snapshot(model)
    text = [*calibration(1), torch.full((1, 8), 10_000)]
    with pytest.raises(IndexError):
        convert(model, "lowrank_gqa", method="latent", latent_dim=16, calibration=text)
    assert_untouched(model, before)


def test_an_interrupted_calibration_changes_nothing() -> None:
    model = tiny().train()
    before = snapshot(model)

    def interrupt(what: str, done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(model, "lowrank_gqa", method="commuting", num_kv_heads=1, calibration=calibration(), progress=interrupt)
    assert_untouched(model, before)


def test_attention_dropout_is_refused_by_name_in_training() -> None:
    model = tiny(attention_dropout=0.1)
    convert(model, "mha")
    logits(model, ids(1, 8))
    with pytest.raises(attnzoo.UnsupportedError, match=r"^dropout: "):
        logits(model.train(), ids(1, 8))


def test_a_dense_mask_of_the_callers_own_is_refused_and_not_dropped() -> None:
    # A mask that vanished without a word would be the worst of all.
    model = tiny()
    convert(model, "mha")
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.float64).masked_fill(torch.ones(8, 8).triu(1).bool(), -1e9)
    with pytest.raises(attnzoo.AttnzooError, match=r"^attention_mask: "):
        logits(model, ids(1, 8), attention_mask=mask)


@pytest.mark.parametrize("kind", ["mha", "latent"])
def test_asking_for_attention_weights_is_refused_and_not_answered_with_none(kind: str) -> None:
    model = converted(kind)
    with pytest.raises(attnzoo.UnsupportedError, match=r"^output_attentions: "), torch.no_grad():
        model(ids(1, 8), output_attentions=True)


@pytest.mark.parametrize("use_cache", [True, False])
def test_packed_sequences_are_read_as_the_host_reads_them_or_refused(use_cache: bool) -> None:
    # Without a cache, positions that start anew tell the host that sequences are packed, and it keeps them apart.
    model, tokens = tiny(), ids(1, 8)
    asked = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]), "use_cache": use_cache}
    expected = logits(model, tokens, **asked)
    convert(model, "mha")
    if use_cache:
        assert_close(logits(model, tokens, **asked), expected, 1e-11)
        return
    with pytest.raises(attnzoo.UnsupportedError, match=r"^attention_mask: "):
        logits(model, tokens, **asked)


@pytest.mark.parametrize("use_cache", [True, False])
def test_positions_that_jump_are_refused_by_a_latent_replacement(use_cache: bool) -> None:
    # It rotates by slot, which would be wrong in silence.
    model = converted("latent")
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with pytest.raises(attnzoo.UnsupportedError, match=r"^(position_ids|attention_mask): "):
        logits(model, ids(1, 8), position_ids=packed, use_cache=use_cache)
