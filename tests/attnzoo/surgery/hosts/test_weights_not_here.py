"""Weights that are not here, or not what they seem: no block is built from them, and what leaves them alone works."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from torch.nn.utils import prune

import attnzoo
from attnzoo import surgery
from attnzoo.surgery.kinds.reading import READ_VARIANTS
from attnzoo.surgery.lowrank import factor
from attnzoo.surgery.recipes import recipe_of
from attnzoo.surgery.replacements import REPLACEMENTS
from tests.attnzoo.surgery.tiny import READING, assert_close, calibration, convert, ids, logits, replace_mha, tiny

PATH = "model.layers.1.self_attn"
SIZES: dict[str, Any] = {"latent": {"latent_dim": 20}, "expand": {"num_kv_heads": 6}}
REPLACING = (*factor.METHODS, *REPLACEMENTS)
"""Every conversion that puts another module in a block's place: a new one is under these tests by existing."""


class Wrapped(nn.Module):
    """What adapters put in a projection's place: its sizes are seen, and its weight is of the base alone."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.in_features, self.out_features = base, base.in_features, base.out_features

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) * 2
        return out


class Packed(nn.Linear):
    """A projection whose forward is another library's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Coded(Tensor):
    """A tensor of another library, which holds something else than it says."""


def set_weight(block: Any, weight: Tensor) -> None:
    block.k_proj.weight = nn.Parameter(weight, requires_grad=False)


def quantise_dynamically(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds = {"q_proj": torch.ao.quantization.default_dynamic_qconfig}
        torch.ao.quantization.quantize_dynamic(model.get_submodule(PATH), kinds, inplace=True)


def of_block(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda model: change(model.get_submodule(PATH))


WEIGHTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "meta": (of_block(lambda b: set_weight(b, b.k_proj.weight.to("meta"))), "meta device"),
    "meta bias": (
        of_block(lambda b: setattr(b.k_proj, "bias", nn.Parameter(torch.zeros(32, device="meta")))),
        "bias is on the meta device",
    ),
    "offloaded": (cpu_offload, "offloaded by accelerate"),
    "4 bits, packed": (
        of_block(lambda b: set_weight(b, torch.zeros(96 * 16, 1, dtype=torch.uint8))),
        "torch.uint8; convert the model before quantising",
    ),
    "int8": (of_block(lambda b: set_weight(b, torch.zeros(32, 96, dtype=torch.int8))), "torch.int8"),
    "fp8": (of_block(lambda b: set_weight(b, b.k_proj.weight.to(torch.float8_e4m3fn))), "torch.float8_e4m3fn"),
    "dynamic": (quantise_dynamically, "torch.ao.nn.quantized.dynamic.modules.linear.Linear"),
    "subclass": (of_block(lambda b: set_weight(b, b.k_proj.weight.detach().as_subclass(Coded))), f"{__name__}.Coded"),
    "sparse": (of_block(lambda b: set_weight(b, b.k_proj.weight.detach().to_sparse())), "torch.sparse_coo"),
    "parametrised": (
        of_block(lambda b: nn.utils.parametrizations.weight_norm(b.v_proj)),
        "v_proj: .* computed from other tensors.*remove_parametrizations",
    ),
    "pruned": (of_block(lambda b: prune.l1_unstructured(b.o_proj, "weight", 0.5)), "o_proj: .*prune.remove"),
    "wrapped": (of_block(lambda b: setattr(b, "q_proj", Wrapped(b.q_proj))), f"q_proj: .*{__name__}.Wrapped"),
    "forward of its own": (
        of_block(lambda b: setattr(b, "v_proj", Packed(96, 32, bias=False))), f"v_proj: .*{__name__}.Packed",
    ),
}  # fmt: skip


def replace_blocks(model: Any, kind: str) -> None:
    if kind == "mha":
        replace_mha(model)
    elif kind in REPLACEMENTS:
        convert(model, kind)
    else:
        text = calibration() if kind in factor.CALIBRATED else None
        convert(model, "lowrank_gqa", method=kind, calibration=text, **SIZES.get(kind, {"num_kv_heads": 1}))


def structure(model: Any) -> dict[str, Any]:
    """A model by identity, for weights that cannot be compared."""
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "parameters": [(name, id(p), p.dtype, p.device, p.requires_grad) for name, p in model.named_parameters()],
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "recipe": recipe_of(model),
    }


@pytest.mark.parametrize("weights", WEIGHTS)
def test_blocks_are_not_replaced_on_weights_that_are_not_here(weights: str) -> None:
    model = tiny(dtype=torch.float32)
    change, named = WEIGHTS[weights]
    change(model)
    before = structure(model)
    first = f"model.layers.{0 if weights == 'offloaded' else 1}.self_attn: cannot be converted: "
    for kind in REPLACING:
        with pytest.raises(attnzoo.UnsupportedError, match=rf"^{first}.*{named}") as caught:
            replace_blocks(model, kind)
        assert "expected an nn.Linear with a plain floating weight" in str(caught.value), kind
        assert caught.value.reasons
        assert structure(model) == before, kind


@pytest.mark.parametrize("weights", WEIGHTS)
def test_what_is_read_is_converted_whatever_the_weights_are(weights: str) -> None:
    model = tiny(dtype=torch.float32)
    WEIGHTS[weights][0](model)
    before = structure(model)
    for variant in READ_VARIANTS:
        report = convert(model, variant)
        assert len(report.sites) == 2
        report.undo()
        assert structure(model) == before, variant


@pytest.mark.parametrize("weights", ["offloaded", "wrapped", "parametrised", "pruned", "forward of its own"])
def test_reading_everything_says_what_the_model_says_whatever_its_weights_are(weights: str) -> None:
    model, tokens = tiny(dtype=torch.float32), ids(2, 24)
    WEIGHTS[weights][0](model)
    expected = logits(model, tokens)
    convert(model, "mha")
    assert_close(logits(model, tokens), expected, 1e-5)


@pytest.mark.parametrize("kind", READING)
def test_a_rule_of_what_is_read_holds_over_weights_that_are_offloaded(kind: str) -> None:
    variant, options = READING[kind]
    plain, offloaded, tokens = tiny(dtype=torch.float32), tiny(dtype=torch.float32), ids(2, 24)
    cpu_offload(offloaded)
    for model in (plain, offloaded):
        convert(model, variant, **options)
    assert torch.equal(logits(offloaded, tokens), logits(plain, tokens))


def test_landmarks_need_the_embedding_whose_mean_they_start_as() -> None:
    model = tiny(dtype=torch.float32)
    model.model.embed_tokens.weight = nn.Parameter(model.model.embed_tokens.weight.to("meta"))
    before = structure(model)
    with pytest.raises(attnzoo.UnsupportedError, match=r"^embedding: .*meta device"):
        convert(model, "landmark")
    assert structure(model) == before


def test_a_projection_without_sizes_is_named_with_its_path_and_its_type() -> None:
    model = tiny()
    model.model.layers[1].self_attn.q_proj = nn.Sequential(nn.Linear(96, 96))
    with pytest.raises(attnzoo.ConversionError, match=rf"^{PATH}.q_proj: .*torch.nn.modules.container.Sequential"):
        surgery.find(model)
