"""Rotary positions: every scaling form and both layouts against transformers, and what rotation promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnzoo.base.rope import RotaryConfig, RotaryScaling, apply_rotary, rotary_tables

HEAD_DIM = 32
MAX_POSITIONS = 4096

FORMS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "default, part of the head": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn, own ramp": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 1024,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn, two temperatures": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 1024,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
    },
    "yarn, own temperature": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "attention_factor": 1.25,
    },
    "longrope": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 1024,
        "short_factor": [1.0 + 0.01 * f for f in range(HEAD_DIM // 2)],
        "long_factor": [1.0 + 0.5 * f for f in range(HEAD_DIM // 2)],
    },
    "longrope, own factor": {
        "rope_type": "longrope",
        "factor": 8.0,
        "original_max_position_embeddings": 1024,
        "short_factor": [1.0] * (HEAD_DIM // 2),
        "long_factor": [2.0] * (HEAD_DIM // 2),
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
}

LENGTHS = {"dynamic": (100, 4096, 9000), "longrope": (100, 1024, 1025, 4096), "longrope, own factor": (100, 3000)}


def of_transformers(form: dict[str, Any], length: int | None) -> tuple[torch.Tensor, float]:
    """The frequencies and the factor on the tables, as transformers has them."""
    transformers = pytest.importorskip("transformers")
    utilities = pytest.importorskip("transformers.modeling_rope_utils")
    config = transformers.LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_theta": 5000.0, **form},
    )
    if "original_max_position_embeddings" in form:
        config.original_max_position_embeddings = form["original_max_position_embeddings"]
    if form["rope_type"] == "default":
        width = int(HEAD_DIM * form.get("partial_rotary_factor", 1.0))
        if width == HEAD_DIM:
            frequencies, factor = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq, 1.0
        else:
            phi = pytest.importorskip("transformers.models.phi.modeling_phi")
            frequencies, factor = phi.PhiRotaryEmbedding(config).inv_freq, 1.0
    else:
        frequencies, factor = utilities.ROPE_INIT_FUNCTIONS[form["rope_type"]](config, torch.device("cpu"), length)
    return frequencies.double(), factor


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_that_of_transformers(name: str, interleaved: bool) -> None:
    form = FORMS[name]
    config = RotaryConfig.from_parameters(
        {"rope_theta": 5000.0, **form}, head_dim=HEAD_DIM, max_positions=MAX_POSITIONS, interleaved=interleaved
    )
    assert config.interleaved is interleaved
    positions = torch.tensor([0, 1, 7, 100, 1023, 4095])
    for length in LENGTHS.get(name, (None,)):
        frequencies, factor = of_transformers(form, length)
        angles = positions[:, None].double() * frequencies
        cos, sin = rotary_tables(config, HEAD_DIM, positions, torch.float64, length=length)
        # Their frequencies are rounded to fp32 a few times over: a few 2^-24 of an angle of up to 4095.
        limit = 8 * 2.0**-24 * 4095 * factor
        assert (cos - factor * angles.cos()).abs().max() <= limit
        assert (sin - factor * angles.sin()).abs().max() <= limit


def test_both_layouts_are_those_of_transformers() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 9, HEAD_DIM, generator=generator, dtype=torch.float64)
    cos, sin = rotary_tables(RotaryConfig(), HEAD_DIM, torch.arange(9), torch.float64)
    doubled = [torch.cat([table, table], -1).unsqueeze(0) for table in (cos, sin)]
    halves, _ = llama.apply_rotary_pos_emb(q, q, *doubled)
    assert torch.equal(apply_rotary(q, cos, sin, False), halves)
    neighbours = gptj.apply_rotary_pos_emb(q.transpose(1, 2), sin.unsqueeze(0), cos.unsqueeze(0)).transpose(1, 2)
    assert torch.equal(apply_rotary(q, cos, sin, True), neighbours)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMS)),
    interleaved=st.booleans(),
    shift=st.integers(0, 100_000),
    seed=st.integers(0, 2**31),
)
def test_scores_depend_on_distances_alone(name: str, interleaved: bool, shift: int, seed: int) -> None:
    config = RotaryConfig.from_parameters(
        FORMS[name], head_dim=HEAD_DIM, max_positions=MAX_POSITIONS, interleaved=interleaved
    )
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 11, HEAD_DIM, generator=generator, dtype=torch.float64)
    scores = []
    for first in (0, shift):
        cos, sin = rotary_tables(config, HEAD_DIM, torch.arange(11) + first, torch.float64)
        scores.append(apply_rotary(q, cos, sin, interleaved) @ apply_rotary(k, cos, sin, interleaved).transpose(2, 3))
    # An fp64 angle of up to 1e5 is known to 1e-11; scores reach about 60.
    assert (scores[0] - scores[1]).abs().max() <= 1e-8


def test_angles_are_computed_in_fp64_whatever_the_table_is_in() -> None:
    positions = torch.tensor([131_071, 1_000_003])
    exact = positions[:, None].double() * 10000.0 ** (-torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        cos, sin = rotary_tables(RotaryConfig(), HEAD_DIM, positions, dtype)
        assert cos.dtype == sin.dtype == dtype
        # Half a unit in the last place of the table beside the fp64 angle's own error, 1e6 * 2^-53 * a few.
        limit = 1e-9 + torch.finfo(dtype).eps / 2
        assert (cos.double() - exact.cos()).abs().max() <= limit
        assert (sin.double() - exact.sin()).abs().max() <= limit


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_rest_of_a_partly_rotated_head_passes(interleaved: bool) -> None:
    x = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_tables(RotaryConfig(dim=4), 8, torch.arange(5), torch.float32)
    out = apply_rotary(x, cos, sin, interleaved)
    assert torch.equal(out[..., 4:], x[..., 4:])
    assert torch.equal(out[:, :, 0], x[:, :, 0])
    assert not torch.equal(out[:, :, 1:, :4], x[:, :, 1:, :4])
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"rope_type": "spiral"}, "rope_type"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings"),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}, "low_freq_factor"),
        ({"rope_type": "longrope", "original_max_position_embeddings": 64}, "short_factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "head_dim"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention"),
        ({"rope_type": "linear", "factor": -1.0}, "factor"),
    ],
)
def test_parameters_that_do_not_fit_are_refused_by_name(parameters: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        RotaryConfig.from_parameters(parameters)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"base": 0.0}, "base"),
        ({"base": float("inf")}, "base"),
        ({"base": True}, "base"),
        ({"dim": 3}, "dim"),
        ({"dim": 0}, "dim"),
        ({"interleaved": 1}, "interleaved"),
        ({"scaling": {"kind": "linear"}}, "scaling"),
    ],
)
def test_a_bad_option_is_refused_by_name(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=rf"^rotary\.{field}: expected"):
        RotaryConfig(**options)


def test_a_width_that_does_not_fit_the_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rotary\.dim: expected"):
        RotaryConfig(dim=10).width(8)
    with pytest.raises(ValueError, match=r"rotary\.dim: expected"):
        RotaryConfig().width(7)
    scaling = RotaryScaling(
        kind="longrope", short_factor=(1.0, 2.0), long_factor=(1.0, 2.0), original_max_position_embeddings=10
    )
    assert RotaryConfig(scaling=scaling).width(4) == 4
    with pytest.raises(ValueError, match="short_factor"):
        RotaryConfig(scaling=scaling).width(8)
