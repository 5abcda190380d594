"""Merging heads that are copies of each other loses nothing: whatever the rotation, the biases and the order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo.base.rope import RotaryConfig, apply_rotary, rotary_tables
from attnzoo.surgery.hosts.projections import Projections
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.lowrank import merge_heads
from attnzoo.surgery.lowrank.calibration import with_constant
from attnzoo.surgery.lowrank.factor import Request
from attnzoo_kernels.errors import ConfigError

C, H, G, D = 24, 8, 4, 6
GROUPS = ((0, 2), (1, 3))
"""Which KV heads are copies of each other."""

ROTARY: dict[str, RotaryConfig | None] = {
    "none": None,
    "halves": RotaryConfig(),
    "neighbours": RotaryConfig(interleaved=True),
    "part": RotaryConfig(dim=4),
}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def site(rotary: RotaryConfig | None, *, biases: bool, copies: bool = True) -> Projections:
    k, v, k_bias, v_bias = (
        x.clone() for x in (normal(1, G, D, C), normal(2, G, D, C), normal(3, G, D), normal(4, G, D))
    )
    for x in (k, v, k_bias, v_bias):
        for first, *others in GROUPS if copies else ():
            x[others] = x[first].clone()
    return Projections(
        q=normal(5, H * D, C), k=k.flatten(0, 1), v=v.flatten(0, 1), o=normal(6, C, H * D),
        q_bias=normal(7, H * D) if biases else None, k_bias=k_bias.flatten() if biases else None,
        v_bias=v_bias.flatten() if biases else None,
        num_heads=H, num_kv_heads=G, head_dim=D, rotary=rotary, scale=0.3,
    )  # fmt: skip


def attend(p: Projections, x: Tensor) -> Tensor:
    """Plain causal attention ``[T, C]``, head by head."""
    tokens = x.shape[0]

    def heads(weight: Tensor, bias: Tensor | None) -> Tensor:
        y = x @ weight.T + (0 if bias is None else bias)
        return y.unflatten(1, (-1, D)).transpose(0, 1)

    q, k, v = heads(p.q, p.q_bias), heads(p.k, p.k_bias), heads(p.v, p.v_bias)
    if p.rotary is not None:
        cos, sin = rotary_tables(p.rotary, D, torch.arange(tokens), torch.float64)
        q, k = (apply_rotary(y[None], cos, sin, p.rotary.interleaved)[0] for y in (q, k))
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    out = []
    for head in range(H):
        group = head // (H // p.num_kv_heads)
        weights = (q[head] @ k[group].T * p.scale).masked_fill(hidden, -torch.inf).softmax(-1)
        out.append(weights @ v[group])
    return torch.cat(out, 1) @ p.o.T


def moment_of(x: Tensor, *, biases: bool) -> Tensor:
    rows = with_constant(x, biases)
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("fisher", [False, True], ids=["no gradients", "gradients"])
@pytest.mark.parametrize("biases", [False, True], ids=["no biases", "biases"])
@pytest.mark.parametrize("rotary", ROTARY)
def test_copies_merge_without_loss_into_the_same_function(rotary: str, biases: bool, fisher: bool) -> None:
    p, x = site(ROTARY[rotary], biases=biases), normal(8, 60, C)
    moment = moment_of(x, biases=biases)
    root = normal(9, 2 * G * D, 2 * G * D)
    metric = root @ root.T if fisher else None
    assert merge_heads.choose_groups(p, moment, metric, 2) == GROUPS
    merged, kept = merge_heads.merge_site(p, merge_heads.HeadWeights.of(p), moment, metric, GROUPS)
    assert (merged.num_kv_heads, merged.num_heads) == (2, H)
    assert kept == pytest.approx(1, abs=1e-9)
    # Query heads follow their KV heads, so that outputs are the same as a whole.
    torch.testing.assert_close(attend(merged, x[:20]), attend(p, x[:20]), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("biases", [False, True], ids=["no biases", "biases"])
def test_the_mean_of_copies_is_the_same_function(biases: bool) -> None:
    p, x = site(RotaryConfig(), biases=biases), normal(8, 20, C)
    torch.testing.assert_close(attend(merge_heads.mean_site(p, GROUPS), x), attend(p, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("biases", [False, True], ids=["no biases", "biases"])
def test_repeated_heads_are_the_same_function(biases: bool) -> None:
    p, x = site(RotaryConfig(), biases=biases, copies=False), normal(8, 20, C)
    torch.testing.assert_close(attend(merge_heads.expand_site(p, H), x), attend(p, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("biases", [False, True], ids=["no biases", "biases"])
def test_a_latent_of_full_rank_expands_to_the_same_keys_and_values(biases: bool) -> None:
    p, x = site(RotaryConfig(), biases=biases, copies=False), normal(8, 60, C)
    latent, kept = merge_heads.latent_site(p, moment_of(x, biases=biases), None, 2 * G * D)
    assert kept == 1.0
    assert (latent.down_bias is None) == (not biases)
    small = x @ latent.down.T + (0 if latent.down_bias is None else latent.down_bias)
    wanted = torch.cat([x @ p.k.T + (p.k_bias if biases else 0), x @ p.v.T + (p.v_bias if biases else 0)], 1)
    torch.testing.assert_close(small @ latent.up.T, wanted, rtol=1e-9, atol=1e-9)


def test_keys_are_weighed_by_the_keys_part_of_a_fisher_matrix_and_values_by_theirs() -> None:
    weights = merge_heads.HeadWeights.of(site(None, biases=False))
    root = normal(9, 2 * G * D, 2 * G * D)
    fisher = root @ root.T
    keys, values = merge_heads.split_metric(weights, torch.eye(C, dtype=torch.float64), fisher)
    for group in range(G):
        for other in range(G):
            here, there = slice(group * D, (group + 1) * D), slice(other * D, (other + 1) * D)
            assert torch.equal(keys[group, :, other], fisher[here, there])
            assert torch.equal(values[group, :, other], fisher[G * D :, G * D :][here, there])


@pytest.mark.parametrize("had", [(), ("q",), ("q", "k", "v")], ids=str)
def test_a_correction_of_inputs_may_bring_biases_where_there_were_none(had: tuple[str, ...]) -> None:
    p = site(None, biases=True)
    p = replace(p, **{f"{name}_bias": None for name in "qkv" if name not in had})
    weights = merge_heads.HeadWeights.of(p)
    size = C + int(weights.constant)
    correction = torch.eye(size, dtype=torch.float64) + 0.1 * normal(10, size, size)
    found = merge_heads.as_projections(p, weights.corrected(correction))
    x = normal(8, 20, C)
    moved = with_constant(x, weights.constant) @ correction
    for name in "qkv":
        old, new = getattr(p, name), getattr(found, name)
        old_bias, new_bias = getattr(p, f"{name}_bias"), getattr(found, f"{name}_bias")
        wanted = moved[:, :C] @ old.T + (0 if old_bias is None else moved[:, C:] * old_bias)
        torch.testing.assert_close(x @ new.T + (0 if new_bias is None else new_bias), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("options", "words"), [
    ({"method": "mean", "num_kv_heads": 3}, "divisor of 4"),
    ({"method": "commuting", "num_kv_heads": 8}, "divisor of 4"),
    ({"method": "expand", "num_kv_heads": 6}, "multiple of 4 that divides 8"),
    ({"method": "latent", "latent_dim": 2 * G * D + 1}, f"at most {2 * G * D}"),
])  # fmt: skip
def test_sizes_that_do_not_fit_a_site_are_refused_by_name(options: dict[str, Any], words: str) -> None:
    block = Site("model.layers.0.self_attn", "llama", 0, H, G, D, C)
    with pytest.raises(ConfigError, match=words):
        Request(**options).check(block)
    for fits in ({"method": "mean", "num_kv_heads": 2}, {"method": "expand", "num_kv_heads": 8}):
        Request(**fits).check(block)
    Request(method="latent", latent_dim=2 * G * D).check(block)
