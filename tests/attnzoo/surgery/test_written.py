"""What is written: whatever save accepts, load reads back to the bit, and nobody else reads as something it is not."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, LlamaForSequenceClassification

import attnzoo
from attnzoo import surgery
from attnzoo.surgery.files import tensors_hash
from attnzoo.surgery.kinds.reading import READ_VARIANTS
from attnzoo.surgery.recipes import recipe_of
from attnzoo.surgery.replacements import REPLACEMENTS
from tests.attnzoo.surgery.hosts.test_weights_not_here import Wrapped
from tests.attnzoo.surgery.tiny import KINDS, calibration, convert, converted, ids, logits, tiny

ORDINARY = ("commuting", "expand", "mean")
ALL = (*KINDS, *(variant for variant in REPLACEMENTS if variant not in READ_VARIANTS))
RECIPE = "attnzoo_config.json"


def in_half(model: Any) -> Any:
    """Weights alone, as a host is loaded: its tables of rotation are no weights, and stay as they are."""
    for p in model.parameters():
        p.data = p.data.to(torch.bfloat16)
    return model


def mixed(model: Any) -> Any:
    """Norms in single precision, as some hosts keep them."""
    in_half(model)
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.float()
    return model


HOSTS: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "bf16, tied": ({"tie_word_embeddings": True}, in_half),
    "mixed, biases": ({"attention_bias": True}, mixed),
}


def make(kind: str, host: dict[str, Any]) -> Any:
    if kind in KINDS:
        return converted(kind, dtype=torch.float32, **host)
    model = tiny(dtype=torch.float32, **host)
    convert(model, kind)
    return model


def assert_same_state(found: Any, wanted: Any) -> None:
    own, other = found.state_dict(), wanted.state_dict()
    assert own.keys() == other.keys()
    for name, x in other.items():
        assert own[name].dtype == x.dtype, name
        assert torch.equal(own[name], x), name
    assert recipe_of(found) == recipe_of(wanted)


@pytest.mark.parametrize(
    ("host", "kind"),
    [*(("bf16, tied", kind) for kind in ALL), *(("mixed, biases", x) for x in ("window", "mean", "moh"))],
)
def test_what_is_saved_is_read_back_to_the_bit_and_by_nobody_else(host: str, kind: str, tmp_path: Path) -> None:
    more, change = HOSTS[host]
    model = change(make(kind, more))
    model.generation_config.eos_token_id = [7, 9]
    before = model.config.to_dict()
    folder = surgery.save(model, tmp_path / "model")
    assert model.config.to_dict() == before
    loaded, _ = surgery.load(folder)
    assert_same_state(loaded, model)
    if change is in_half:
        assert torch.equal(logits(loaded, ids(2, 20)), logits(model, ids(2, 20)))
    assert loaded.generation_config.eos_token_id == [7, 9]
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == ("tied" in host)
    about = json.loads((folder / "config.json").read_text())
    assert about["architectures"] == ["LlamaForCausalLM"]
    assert about["dtype"] == ("bfloat16" if "bf16" in host else "float32")
    if kind in ORDINARY:
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        assert plain.generation_config.eos_token_id == [7, 9]
        for name, x in model.state_dict().items():
            assert torch.equal(plain.state_dict()[name], x.to(plain.dtype)), name
        return
    with pytest.raises(ValueError, match=r"attnzoo-llama \(a converted model: attnzoo.surgery.load reads it\)"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="attnzoo-llama"):
        AutoConfig.from_pretrained(folder)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("kind", ALL)
def test_an_adapter_is_read_back_to_the_bit_and_by_nobody_else(kind: str, tmp_path: Path) -> None:
    more, change = HOSTS["bf16, tied"]
    model, base = change(make(kind, more)), change(tiny(dtype=torch.float32, **more))
    folder = surgery.save(model, tmp_path / "adapter", adapter_only=True)
    loaded, _ = surgery.load(folder, base=base)
    assert_same_state(loaded, model)
    with pytest.raises(ValueError, match=r"attnzoo-llama \(an adapter: attnzoo.surgery.load reads it, with base=\)"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        LlamaForCausalLM.from_pretrained(folder)


def test_an_adapter_in_another_dtype_than_its_base_keeps_it(tmp_path: Path) -> None:
    model, base = converted("mean", dtype=torch.float32), tiny(dtype=torch.float32)
    for block in (model.model.layers[1], base.model.layers[1]):
        block.self_attn.to(torch.bfloat16 if block is base.model.layers[1] else torch.float32)
    loaded, _ = surgery.load(surgery.save(model, tmp_path / "adapter", adapter_only=True), base=base)
    assert_same_state(loaded, model)


def test_a_model_of_unequal_heads_is_no_ordinary_checkpoint(tmp_path: Path) -> None:
    model = tiny(dtype=torch.float32, layers=3)
    convert(model, "lowrank_gqa", method="mean", num_kv_heads=1, where=lambda site: site.layer == 1)
    folder = surgery.save(model, tmp_path / "partly")
    with pytest.raises(ValueError, match="attnzoo-llama"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert_same_state(surgery.load(folder)[0], model)
    convert(model, "lowrank_gqa", method="mean", num_kv_heads=1, where=lambda site: site.layer != 1)
    whole = surgery.save(model, tmp_path / "whole")
    plain = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32).eval()
    assert torch.equal(logits(plain, ids(1, 9)), logits(model, ids(1, 9)))
    assert_same_state(surgery.load(whole)[0], model)


@pytest.mark.parametrize(
    ("kind", "whole_layer"), [("window", False), ("mean", False), ("latent", False), ("moh", False), ("moh", True)]
)
def test_a_block_that_is_applied_twice_is_one_again(kind: str, whole_layer: bool, tmp_path: Path) -> None:
    model = tiny(dtype=torch.float32, layers=3)
    if whole_layer:
        model.model.layers[2] = model.model.layers[0]
    else:
        model.model.layers[2].self_attn = model.model.layers[0].self_attn
    options = {"window": ("mha", {"window": 9, "sink": 2}), "moh": ("moh", {})}
    size = {"latent_dim": 64} if kind == "latent" else {"num_kv_heads": 1}
    variant, more = options.get(kind, ("lowrank_gqa", {"method": kind, **size}))
    text = calibration() if kind == "latent" else None
    convert(model, variant, where=lambda site: kind != "latent" or site.layer == 1, calibration=text, **more)
    folder = surgery.save(model, tmp_path / "model")
    loaded, _ = surgery.load(folder)
    assert loaded.model.layers[2].self_attn is loaded.model.layers[0].self_attn
    assert_same_state(loaded, model)
    assert torch.equal(logits(loaded, ids(1, 20), use_cache=False), logits(model, ids(1, 20), use_cache=False))
    for shared in (["model.layers.0.self_attn"], ["model.layers.0.self_attn", "model.layers.9.self_attn"], 3, [["a"]]):
        about = json.loads((folder / RECIPE).read_text())
        (folder / RECIPE).write_text(json.dumps({**about, "shared": [shared]}))
        with pytest.raises(attnzoo.ConversionError, match="shared"):
            surgery.load(folder)


def test_tensors_in_one_memory_are_written_each(tmp_path: Path) -> None:
    model = converted("window", dtype=torch.float32)
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    second.up_proj.weight = first.up_proj.weight
    both = torch.cat([first.down_proj.weight.detach(), second.down_proj.weight.detach()])
    first.down_proj.weight.data, second.down_proj.weight.data = both[:96], both[96:]
    assert_same_state(surgery.load(surgery.save(model, tmp_path / "model"))[0], model)


@pytest.mark.parametrize("flag", [False, True])
def test_what_is_tied_is_said_as_it_is(flag: bool, tmp_path: Path) -> None:
    model = converted("mean", dtype=torch.float32, tie_word_embeddings=flag)
    inner = model.model.embed_tokens.weight
    model.lm_head.weight = nn.Parameter(inner.detach() * 2) if flag else inner
    folder = surgery.save(model, tmp_path / "model")
    loaded, _ = surgery.load(folder)
    assert_same_state(loaded, model)
    assert loaded.config.tie_word_embeddings == (not flag)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.equal(logits(plain, ids(1, 9)), logits(model, ids(1, 9)))


def wrap(model: Any) -> None:
    model.model.layers[1].mlp.up_proj = Wrapped(model.model.layers[1].mlp.up_proj)


def wrap_block(model: Any) -> None:
    model.model.layers[1].self_attn.kv_down = Wrapped(model.model.layers[1].self_attn.kv_down)


def set_up(model: Any, weight: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(weight, requires_grad=False)


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "an adapter that is not merged": (wrap, r"up_proj.base_layer.weight.*merge_and_unload"),
    "one in a converted block": (wrap_block, r"kv_down.base_layer.weight.*merge_and_unload"),
    "a module too many": (lambda m: m.add_module("spare", nn.Linear(2, 2)), r"spare"),
    "a module too few": (lambda m: m.model.layers[1].mlp.__delattr__("up_proj"), r"lacks 'model.layers.1.mlp.up_proj"),
    "a weight on meta": (lambda m: set_up(m, torch.empty(64, 96, device="meta")), "up_proj.weight: .*meta device"),
    "codes": (lambda m: set_up(m, torch.zeros(64, 96, dtype=torch.int8)), "up_proj.weight: .*torch.int8"),
    "another shape": (lambda m: set_up(m, torch.zeros(60, 96)), r"up_proj.weight: expected \[64, 96\], got \[60, 96\]"),
    "a parametrised weight": (
        lambda m: nn.utils.parametrizations.weight_norm(m.model.layers[0].mlp.up_proj), "up_proj.parametrizations",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_loading_would_refuse_is_not_written(what: str, tmp_path: Path) -> None:
    model = converted("latent", dtype=torch.float32)
    change, named = REFUSED[what]
    change(model)
    with pytest.raises(attnzoo.ConversionError, match=rf"^model: .*{named}") as caught:
        surgery.save(model, tmp_path / "model")
    assert "\n" not in str(caught.value)
    if what == "one in a converted block":
        with pytest.raises(attnzoo.ConversionError, match=rf"^model: .*{named}"):
            surgery.save(model, tmp_path / "model", adapter_only=True)
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_another_class_is_loaded_by_its_own_class(tmp_path: Path) -> None:
    settings = tiny().config
    models = [LlamaForSequenceClassification(settings).eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    convert(models[0], "moh")
    folder = surgery.save(models[0], tmp_path / "adapter", adapter_only=True)
    assert_same_state(surgery.load(folder, base=models[1])[0], models[0])
    decoder = LlamaForCausalLM(settings).model.eval()
    convert(decoder, "moh")
    for name, model in (("classifier", models[0]), ("decoder", decoder)):
        loaded, _ = surgery.load(surgery.save(model, tmp_path / name))
        assert type(loaded) is type(model)
        assert_same_state(loaded, model)


def test_a_configuration_that_speaks_of_codes_is_not_written_with_plain_weights(tmp_path: Path) -> None:
    model = converted("mean", dtype=torch.float32)
    model.config.quantization_config = {"quant_method": "awq"}
    folder = surgery.save(model, tmp_path / "model")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert model.config.quantization_config == {"quant_method": "awq"}


class OfTheirOwn(LlamaForCausalLM):
    """A host of somebody's own, with a head that scales."""


def test_a_class_of_the_same_weights_is_saved_with_a_warning(tmp_path: Path) -> None:
    model = OfTheirOwn(tiny().config).eval()
    convert(model, "mha")
    with pytest.warns(UserWarning, match="OfTheirOwn is saved; loading will make a LlamaForCausalLM"):
        surgery.save(model, tmp_path / "model")


def write_as_before(model: Any, folder: Path, *, adapter: bool = False) -> None:
    """A folder as this was written before model types of its own: format 1, the host's type, one file of weights."""
    folder.mkdir()
    tensors = {}
    for name, x in model.state_dict(keep_vars=True).items():
        if not any(x is other for other in tensors.values()):
            tensors[name] = x
    about: dict[str, Any] = {"format": 1, "recipe": recipe_of(model), "adapter": adapter}
    if adapter:
        changed = tuple(f"{site.path}." for site in surgery.find(model))
        about["base_sha256"] = tensors_hash({n: x.detach() for n, x in tensors.items() if not n.startswith(changed)})
        tensors = {name: x for name, x in tensors.items() if name.startswith(changed)}
    else:
        model.config.save_pretrained(folder)
    safetensors.torch.save_file(tensors, folder / ("adapter.safetensors" if adapter else "model.safetensors"))
    (folder / RECIPE).write_text(json.dumps(about))


@pytest.mark.parametrize("kind", ["window", "mean", "latent", "moh"])
@pytest.mark.parametrize("tied", [False, True])
def test_folders_of_before_are_read(kind: str, tied: bool, tmp_path: Path) -> None:
    model = make(kind, {"tie_word_embeddings": tied})
    write_as_before(model, tmp_path / "old")
    loaded, _ = surgery.load(tmp_path / "old")
    assert_same_state(loaded, model)
    if kind != "window":
        write_as_before(model, tmp_path / "adapter", adapter=True)
        base = tiny(dtype=torch.float32, tie_word_embeddings=tied)
        assert_same_state(surgery.load(tmp_path / "adapter", base=base)[0], model)


def test_the_hash_of_a_base_knows_names_shapes_dtypes_and_values() -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.arange(4.0)}
    changed = (
        {"a": torch.zeros(3, 2), "b": tensors["b"]},
        {"a": torch.zeros(6), "b": tensors["b"]},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": tensors["b"]},
        {"a": torch.zeros(2, 6, dtype=torch.bfloat16), "b": tensors["b"]},
        {"c": torch.zeros(2, 3), "b": tensors["b"]},
        {"a": -torch.zeros(2, 3), "b": tensors["b"]},
        {"b": tensors["b"]},
        {"a": tensors["b"], "b": tensors["a"]},
    )
    hashes = [tensors_hash(found) for found in (tensors, *changed)]
    assert len(set(hashes)) == len(hashes)
    assert tensors_hash({"b": tensors["b"].clone(), "a": torch.zeros(3, 2).T}) == hashes[0]


def test_a_base_whose_weights_are_not_here_is_refused(tmp_path: Path) -> None:
    folder = surgery.save(converted("mean", dtype=torch.float32), tmp_path / "adapter", adapter_only=True)
    for path in ("model.layers.1.self_attn.k_proj", "model.layers.1.mlp.up_proj"):
        base = tiny(dtype=torch.float32)
        linear = base.get_submodule(path)
        linear.weight = nn.Parameter(linear.weight.to("meta"))
        with pytest.raises(attnzoo.ConversionError, match=r"^base: .*meta device"):
            surgery.load(folder, base=base)
        assert recipe_of(base) == []


FULL = OSError(errno.ENOSPC, "No space left on device")
ERRORS = {
    "full": FULL,
    "full, by safetensors": SafetensorError("Error while serializing: No space left on device (os error 28)"),
    "not allowed": PermissionError(errno.EACCES, "Permission denied"),
    "read-only": OSError(errno.EROFS, "Read-only file system"),
}


@pytest.mark.parametrize(("what", "adapter"), [*((what, False) for what in ERRORS), ("full", True)])
def test_a_disk_that_refuses_is_one_line_and_leaves_nothing(
    what: str, adapter: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(tensors: Any, file: Any, **kwargs: Any) -> None:
        Path(file).write_bytes(b"half of it")
        raise ERRORS[what]

    monkeypatch.setattr(safetensors.torch, "save_file", refuse)
    model = converted("mean", dtype=torch.float32)
    with pytest.raises(OSError, match=r"out: not written, and nothing is left of it: ") as caught:
        surgery.save(model, tmp_path / "deep" / "er" / "out", adapter_only=adapter)
    assert "\n" not in str(caught.value)
    expected = ERRORS[what]
    assert caught.value.errno == (expected.errno if isinstance(expected, OSError) else errno.ENOSPC)
    assert isinstance(caught.value, PermissionError) == isinstance(expected, PermissionError)
    assert list(tmp_path.iterdir()) == []
