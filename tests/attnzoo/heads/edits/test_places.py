"""Where heads' outputs go, in every class of hosts, in attnzoo's own layers and in what takes blocks' places."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnzoo
from attnzoo import heads, surgery
from attnzoo.heads import HeadEdit
from attnzoo_kernels.errors import ConfigError, UnsupportedError
from tests.attnzoo.surgery.conversions import REPLACED, convert_as
from tests.attnzoo.surgery.families.hosts import HOSTS, said
from tests.attnzoo.surgery.tiny import assert_close, ids, logits, tiny

NAMES = [name for name, host in HOSTS.items() if host.projects and name != "gpt-oss"]
"""All but torch's own modules, and one that its own class cannot call at this size."""


def edits_for(model: Any) -> list[HeadEdit]:
    """Edits of the second head of the last layer that fold, with an offset where there is a bias."""
    site = heads.sites(model)[-1]
    module = model.get_submodule(site.o_proj)
    one = torch.linspace(-1, 1, site.head_dim, dtype=torch.float64)
    offset = one if getattr(module, "bias", None) is not None else None
    return [HeadEdit(site.layer, 1, scale=one, offset=offset)]


def assert_heads_are_what_attention_gives(model: Any, call: Any) -> None:
    """What goes to the projection is each head's weights times the values of its group, under two implementations."""
    with heads.capture(model) as own, torch.no_grad():
        call()
    with heads.capture(model, ("z", "v", "pattern")) as seen, torch.no_grad():
        call()
    for layer, z in seen["z"].items():
        assert_close(z, own["z"][layer], 1e-10)
        # A block that is applied several times has each application's behind the other.
        pattern, v = (seen[name].calls(layer)[-1] for name in ("pattern", "v"))
        v = v.repeat_interleave(z.shape[2] // v.shape[2], 2)
        last = torch.einsum("bths,bshd->bthd", pattern, v)
        assert_close(last, z[:, -last.shape[1] :], 1e-10)


def assert_a_fold_is_the_hook(model: Any, call: Any) -> None:
    edits = edits_for(model)
    with torch.no_grad():
        plain = call()
        with heads.edited(model, edits):
            expected = call()
        report = heads.fold(model, edits)
        found = call()
        report.undo()
        assert torch.equal(call(), plain)
    assert_close(found, expected, 1e-11)
    assert float((expected - plain).abs().max()) > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_heads_of_every_class_of_hosts(name: str) -> None:
    host = HOSTS[name]
    model = host.make()
    given = host.inputs(2, 11)

    def call() -> Tensor:
        return said(model, given)

    if host.of_transformers and "mha" not in host.refused:
        assert_heads_are_what_attention_gives(model, call)
    if name == "timm's attention with norms":
        # Its heads go to a norm first, which is no product.
        with pytest.raises(UnsupportedError, match="cannot be folded"):
            heads.fold(model, edits_for(model))
        return
    assert_a_fold_is_the_hook(model, call)
    # A layer is a site: of ALBERT, the one block that is applied in every layer.
    assert len(heads.sites(model)) == (1 if name == "ALBERT" else 2)


@pytest.mark.parametrize("kind", REPLACED)
def test_heads_of_replacements_in_a_prompt_and_in_steps(kind: str) -> None:
    model = tiny()
    convert_as(model, kind)
    # All heads nothing: the block gives nothing, in a prompt and in every step.
    edits = [HeadEdit(layer, slice(None), ablate="zero") for layer in (0, 1)]
    outputs: list[Tensor] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda module, args, out: outputs.append(out[0]))
        for layer in model.model.layers
    ]
    with heads.edited(model, edits), heads.capture(model) as seen, torch.no_grad():
        model.generate(ids(2, 7), max_new_tokens=3, do_sample=False, pad_token_id=0)
    for hook in hooks:
        hook.remove()
    assert len(outputs) == 6 and all(float(out.abs().max()) == 0 for out in outputs)
    assert [x.shape[2:] for x in seen["z"].calls(1)] == [(6, 16)] * 3


@pytest.mark.parametrize("variant", attnzoo.list_variants())
def test_heads_of_own_layers_in_a_prompt_and_in_steps(variant: str) -> None:
    known: dict[str, Any] = {"moh": {"shared_heads": 1, "active_heads": 1}, "lowrank_gqa": {"latent_dim": 8}}
    options: Any = known.get(variant, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = attnzoo.create(variant, dim=32, num_heads=4, **options).eval()
    x = torch.randn(2, 9, 32)
    edit = HeadEdit(0, slice(None), ablate="zero")
    cache = layer.new_cache(2, 16)
    bound = layer.o_proj.bias
    with heads.edited(layer, edit), torch.no_grad():
        found = [layer(x[:, :7], cache=cache), *(layer(x[:, i : i + 1], cache=cache) for i in (7, 8)), layer(x)]
    assert all(float(out.abs().max()) == 0 for out in found) and bound is None
    # The last token is known from the padding that a layer is told of.
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[0, 6:] = True
    with heads.capture(layer, rows="last") as last, heads.capture(layer) as whole, torch.no_grad():
        layer(x, key_padding=padding)
    assert torch.equal(last["z"][0][:, 0], whole["z"][0][[0, 1], [5, 8]])


def test_torchs_own_module_is_refused_and_its_replacement_is_edited() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True).eval()
    with pytest.raises(UnsupportedError, match=r"self_attn: heads cannot be edited.*convert it first"):
        heads.sites(model)
    surgery.convert(model, "mha")
    x = torch.randn(2, 5, 16)
    plain = model(x)
    edit = HeadEdit(0, 1, scale=torch.linspace(-1, 1, 8), offset=torch.ones(8))
    with heads.edited(model, edit):
        expected = model(x)
    heads.fold(model, edit)
    assert_close(model(x), expected, 1e-6)
    assert not torch.allclose(plain, expected)


class AnybodysBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.out = nn.Linear(8, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(input=self.mix(x))
        return found


def test_models_of_no_known_family_name_their_projections() -> None:
    model: Any = nn.ModuleList([AnybodysBlock(), AnybodysBlock()])
    with pytest.raises(ConfigError, match="expected attention blocks of a known family"):
        heads.sites(model)
    sites = heads.sites(model, "*.out", heads=4, kv_heads=2)
    assert [(site.layer, site.o_proj, site.head_dim) for site in sites] == [(0, "0.out", 2), (1, "1.out", 2)]
    x = torch.randn(3, 8)
    with heads.edited(model, HeadEdit(1, 1, scale=0.0, kv=True), sites=sites), heads.capture(model, sites=sites) as z:
        model[1](x)
    expected = model[1].mix(x).view(3, 4, 2)
    assert torch.equal(z["z"][1][:, :2], expected[:, :2]) and float(z["z"][1][:, 2:].abs().max()) == 0
    for options, message in (
        ({"o_proj": "*.nothing", "heads": 4}, "matches none"),
        ({"o_proj": "*.out"}, "heads: expected a number"),
        ({"o_proj": "*.out", "heads": 3}, "a divisor of the width 8"),
        ({"o_proj": "0", "heads": 4}, "an nn.Linear at 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            heads.sites(model, **options)
    with pytest.raises(UnsupportedError, match="only 'z' can be seen"), heads.capture(model, ("q",), sites=sites):
        pass
    with pytest.raises(ConfigError, match="for this model"), heads.capture(tiny(), sites=sites):
        pass


def test_heads_that_are_divided_are_refused_when_they_come() -> None:
    model = tiny()
    site = heads.sites(model)[0]
    module = model.get_submodule(site.o_proj)
    with heads.edited(model, HeadEdit(0, 0, scale=2.0)), pytest.raises(UnsupportedError, match="divided among"):
        module(torch.zeros(1, 2, 48, dtype=torch.float64))
    assert torch.equal(logits(model, ids(1, 3)), logits(model, ids(1, 3)))
