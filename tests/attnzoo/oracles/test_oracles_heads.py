"""The oracle of head edits against transformers itself, and against facts that need no code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnzoo.oracles.heads import effects
from attnzoo.oracles.heads.decoder import Decoder, mlp, unembedded
from attnzoo.oracles.heads.edits import Edit, of_kv_head, run
from tests.attnzoo.oracles.published import near
from tests.attnzoo.surgery.tiny import logits, tiny

CLEAN = [3, 9, 14, 3, 22, 9, 40]
CORRUPT = [5, 11, 14, 7, 22, 9, 40]
VALUE = torch.linspace(-1, 1, 16, dtype=torch.float64)


def decoder_of(**more: object) -> Decoder:
    model = tiny(4, 2, **more)  # type: ignore[arg-type]
    config = model.config
    weights = {name: x.detach() for name, x in model.state_dict().items()}
    return Decoder(
        weights=weights, layers=2, heads=4, kv_heads=2, head_dim=16, eps=config.rms_norm_eps,
        base=config.rope_parameters["rope_theta"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return decoder_of()


def metric(scores: Tensor) -> Tensor:
    return scores[-1, 7] - scores[-1, 8]


def every(edit: Edit, decoder: Decoder) -> list[Edit]:
    return [replace(edit, layer=layer, head=head) for layer, head in effects.nodes(decoder)]


@pytest.mark.parametrize("bias", [False, True])
def test_without_edits_it_is_the_hosts_own_model_and_so_are_its_steps(bias: bool) -> None:
    decoder = decoder_of(attention_bias=bias)
    model = tiny(4, 2, attention_bias=bias)
    expected = logits(model, torch.tensor([CLEAN]))[0]
    near(run(CLEAN, decoder).logits, expected, 1e-11)
    past = run(CLEAN[:4], decoder)
    rows = [past.logits]
    for token in CLEAN[4:]:
        past = run([token], decoder, past=past)
        rows.append(past.logits)
    near(torch.cat(rows), expected, 1e-11)
    said = model.generate(torch.tensor([CLEAN]), max_new_tokens=4, do_sample=False)
    assert effects.generated(CLEAN, decoder, (), 4)[0] == said[0, len(CLEAN) :].tolist()


def test_patterns_reproduce_z_and_edits_come_in_their_order(decoder: Decoder) -> None:
    plain = run(CLEAN, decoder)
    for layer in range(2):
        near(plain.pattern[layer].sum(-1), torch.ones(7, 4))
        near(torch.einsum("ths,shd->thd", plain.pattern[layer], plain.v[layer]), plain.z[layer])
    edit = Edit(layer=0, head=1, scale=3.0, offset=VALUE)
    near(run(CLEAN, decoder, [edit]).z[0][:, 1], 3 * plain.z[0][:, 1] + VALUE)
    near(run(CLEAN, decoder, [edit, edit]).z[0][:, 1], 9 * plain.z[0][:, 1] + 4 * VALUE)
    near(run(CLEAN, decoder, [edit, Edit(layer=0, head=1, ablate="zero")]).z[0][:, 1], torch.zeros(7, 16))
    near(run(CLEAN, decoder, [replace(edit, where="last")]).z[0][:-1], plain.z[0][:-1])
    assert torch.equal(run(CLEAN, decoder, [replace(edit, where="decode")]).logits, plain.logits)


def test_an_edit_of_a_kv_head_is_one_of_its_values(decoder: Decoder) -> None:
    scaled = dict(decoder.weights)
    name = "model.layers.1.self_attn.v_proj.weight"
    scaled[name] = scaled[name].clone()
    scaled[name][16:] *= 2.5
    edits = of_kv_head(Edit(layer=1, head=1, scale=2.5), decoder)
    assert [edit.head for edit in edits] == [2, 3]
    near(run(CLEAN, decoder, edits).logits, run(CLEAN, replace(decoder, weights=scaled)).logits, 1e-11)


def test_biases_of_keys_multiply_weights_and_leave_keys_out(decoder: Decoder) -> None:
    plain = run(CLEAN, decoder).pattern[0][:, 2]
    bias = Edit(layer=0, head=2, key_bias=lambda t, s: math.log(3) if s == 1 else 0.0)
    weight = plain * torch.tensor([1.0, 3, 1, 1, 1, 1, 1])
    near(run(CLEAN, decoder, [bias]).pattern[0][:, 2], weight / weight.sum(-1, keepdim=True))
    gone = Edit(layer=0, head=2, key_bias=lambda t, s: -math.inf if s in (0, 2) and t >= 2 else 0.0)
    weight = plain.clone()
    weight[2:, [0, 2]] = 0
    near(run(CLEAN, decoder, [gone]).pattern[0][:, 2], weight / weight.sum(-1, keepdim=True))
    nothing = run(CLEAN, decoder, [Edit(layer=0, head=2, key_bias=lambda t, s: -math.inf)])
    assert not nothing.z[0][:, 2].any()
    assert bool((nothing.lse[0][:, 2] == -math.inf).all())


def test_uniform_is_attention_without_scores(decoder: Decoder) -> None:
    weights = dict(decoder.weights)
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name] = weights[name].clone()
    weights[name][:16] = 0
    edited = run(CLEAN, decoder, [Edit(layer=0, head=0, ablate="uniform")])
    near(edited.logits, run(CLEAN, replace(decoder, weights=weights)).logits, 1e-11)


def test_calibration_moves_weight_and_keeps_sums(decoder: Decoder) -> None:
    plain = run(CLEAN, decoder)
    act = Edit(layer=1, head=0, sinks=frozenset({2, 4}), beta=0.4)
    found = run(CLEAN, decoder, [act]).pattern[1][:, 0]
    was = plain.pattern[1][:, 0]
    near(found.sum(-1), torch.ones(7))
    near(found[:, [2, 4]], 0.4 * was[:, [2, 4]])
    near(found[:, 3] / found[:, 1].clamp_min(1e-30), was[:, 3] / was[:, 1].clamp_min(1e-30), 1e-11)
    assert torch.equal(run(CLEAN, decoder, [replace(act, beta=1.0)]).logits, plain.logits)
    spared = replace(act, sinks=frozenset({0}))
    near(run(CLEAN, decoder, [spared]).pattern[1][0, 0], was[0])


def test_contributions_are_the_last_streams_part(decoder: Decoder) -> None:
    found = run(CLEAN, decoder)
    direction = decoder.weights["lm_head.weight"][7]
    heads = effects.contributions(found, decoder, direction).sum((0, 1))
    rest = found.streams[-1] - found.embedded - sum(found.mlp)
    near(heads, effects.share(rest, found, decoder, direction))
    near(effects.share(found.streams[-1], found, decoder, direction), found.logits[:, 7])


def test_patching_all_heads_is_the_corrupt_run_where_tokens_agree(decoder: Decoder) -> None:
    everything = effects.nodes(decoder)
    corrupt = run(CORRUPT, decoder)
    found = effects.patched(CLEAN, CORRUPT, decoder, everything, freeze=False)
    same = [i for i, (a, b) in enumerate(zip(CLEAN, CORRUPT, strict=True)) if a == b]
    near(found.logits[same], corrupt.logits[same], 1e-11)
    frozen = effects.patched(CLEAN, CORRUPT, decoder, everything, freeze=True)
    near(frozen.logits, found.logits)
    nobody = effects.patched(CLEAN, CORRUPT, decoder, [], freeze=True)
    near(nobody.logits, run(CLEAN, decoder).logits)


def stream_without_heads(x: Tensor, attention: Sequence[Tensor], decoder: Decoder) -> Tensor:
    """The last stream where attention adds given rows, and MLPs answer."""
    for layer, added in enumerate(attention):
        x = x + added
        x = x + mlp(decoder.norm(x, f"layers.{layer}.post_attention_layernorm"), decoder, layer)
    return x


def test_a_frozen_patch_goes_through_no_other_head_and_a_path_through_its_receivers(decoder: Decoder) -> None:
    clean, corrupt = run(CLEAN, decoder), run(CORRUPT, decoder)
    weight = decoder.weight(0, "self_attn.o_proj")[:, 16:32]
    added = (corrupt.z[0][:, 1] - clean.z[0][:, 1]) @ weight.T
    attention = [clean.attention[0] + added, clean.attention[1]]
    expected = unembedded(stream_without_heads(clean.embedded, attention, decoder), decoder)
    found = effects.patched(CLEAN, CORRUPT, decoder, [(0, 1)], freeze=True)
    near(found.logits, expected, 1e-11)
    # Two layers: what the first sends to the heads of the second, and what it sends past them, is all that it does.
    receivers = [(1, head) for head in range(4)]
    through = effects.path(CLEAN, CORRUPT, decoder, [(0, 1)], receivers)
    live = effects.patched(CLEAN, CORRUPT, decoder, [(0, 1)], freeze=False)
    near(through.z[1], live.z[1], 1e-11)
    near(through.z[0], clean.z[0])
    backwards = effects.path(CLEAN, CORRUPT, decoder, [(1, 1)], [(0, 0), (1, 2)])
    near(backwards.logits, clean.logits)


def test_attribution_is_the_slope_of_patching(decoder: Decoder) -> None:
    slope = effects.gradients(CLEAN, decoder, metric)
    kept, other = run(CLEAN, decoder), run(CORRUPT, decoder)
    small = 1e-6
    for layer, head in [(0, 2), (1, 3)]:
        moved = kept.z[layer][:, head] + small * (other.z[layer][:, head] - kept.z[layer][:, head])
        change = metric(run(CLEAN, decoder, put={(layer, head): moved}).logits) - metric(kept.logits)
        expected = effects.attribution(CLEAN, CORRUPT, decoder, slope)[layer, head]
        near(-change / small, expected, 1e-4 * float(expected.abs()))


def test_divergence_and_scores_of_ablation_know_what_does_nothing(decoder: Decoder) -> None:
    assert not effects.divergence(CLEAN, CLEAN, decoder).any()
    far = effects.divergence(CLEAN, CLEAN[2:], decoder)
    assert far.shape == (2, 4, 5)
    assert bool((far > 0).any())
    intact = metric(run(CLEAN, decoder).logits)
    same = effects.with_edits(CLEAN, decoder, metric, lambda layer, head: Edit(layer=layer, head=head))
    near(same, intact.expand(2, 4))
    zero = effects.with_edits(CLEAN, decoder, metric, lambda layer, head: Edit(layer=layer, head=head, ablate="zero"))
    assert float((zero - intact).abs().min()) > 1e-3


def test_folded_weights_are_the_edits(decoder: Decoder) -> None:
    edits = [
        Edit(layer=0, head=1, scale=VALUE, offset=VALUE),
        Edit(layer=0, head=1, scale=2.0, offset=VALUE),
        Edit(layer=1, head=3, ablate="zero", offset=VALUE),
    ]
    weights = effects.folded(decoder, edits)
    near(run(CLEAN, replace(decoder, weights=weights)).logits, run(CLEAN, decoder, edits).logits, 1e-11)
