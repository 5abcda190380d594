"""Layers whose heads are divided among two processes: as the whole layer, or refused by name; the page says which."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import attnzoo
from tests.attnzoo.cases import Case, assert_same, tokens
from tests.attnzoo_kernels.op.test_distributed import on_two_ranks

PAGE = Path(__file__).parents[3] / "docs" / "howto" / "distributed.md"

# By the name in the page's table: the variant, and options of its small form.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in attnzoo.list_variants() if name != "lowrank_gqa"},
    "lowrank_gqa": ("lowrank_gqa", {"latent_dim": None}),
    "lowrank_gqa with a latent": ("lowrank_gqa", {"latent_dim": 12}),
}


def told() -> dict[str, str]:
    """The page's table: what it says of heads divided among processes."""
    rows = re.findall(r"^\| `(\w+)`( with a latent)? \| yes \| (yes|refused)", PAGE.read_text(encoding="utf-8"), re.M)
    return {name + form: verdict for name, form, verdict in rows}


def divided(layer: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """The layer with as many heads as its share, as PyTorch's own tools do it."""
    columns = [name for name in ("q_proj", "k_proj", "v_proj", "kv_up") if hasattr(layer, name)]
    return parallelize_module(
        layer, mesh, {**{name: ColwiseParallel() for name in columns}, "o_proj": RowwiseParallel()}
    )


def results(layer: Any, x: Tensor) -> list[Any]:
    """Output, gradient of the input, and the output in parts from a cache."""
    x = x.clone().requires_grad_()
    out = layer(x)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    with torch.no_grad():
        cache = layer.new_cache(2, 45)
        parts = torch.cat([layer(part, cache=cache) for part in x.split([30, 1, 14], 1)], 1)
        found = [out, grad, parts]
        if layer.config.kind == "s2":
            cache = layer.new_cache(2, 45, evict=True)
            found.append(torch.cat([layer(part, cache=cache) for part in x.split([30, 15], 1)], 1))
    return [value.detach().tolist() for value in found]


def of_this_rank() -> list[Any]:
    mesh = init_device_mesh("cpu", (2,))
    found: list[Any] = []
    for form, (name, options) in FORMS.items():
        layer = divided(Case(name, "small").layer(dtype=torch.float64, **options), mesh)
        x = tokens(layer, 2, 45)
        if told()[form] == "yes":
            found += results(layer, x)
            continue
        with pytest.raises(attnzoo.UnsupportedError, match=rf"^(q_proj|kv_up).*: expected .*got .*{name}.*parallelism"):
            layer(x)
    # Parameters sharded along one dimension of a mesh, heads divided along the other.
    both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("shards", "heads"))
    layer = divided(Case("mha", "small").layer(dtype=torch.float64), both["heads"])
    fully_shard(layer, mesh=both["shards"])
    return found + results(layer, tokens(layer, 2, 45))


def test_divided_heads_are_the_whole_layer_or_are_refused_by_name(tmp_path: Path) -> None:
    assert told().keys() == FORMS.keys(), "docs/howto/distributed.md: a row for each variant and form"
    whole = []
    for form, (name, options) in [*FORMS.items(), ("mha", ("mha", {}))]:
        if told()[form] == "yes":
            layer = Case(name, "small").layer(dtype=torch.float64, **options)
            whole += results(layer, tokens(layer, 2, 45))
    for rank in on_two_ranks(of_this_rank, tmp_path):
        for mine, true in zip(rank, whole, strict=True):
            assert_same(mine, torch.tensor(true, dtype=torch.float64), scale=10)


@pytest.mark.parametrize("form", FORMS)
def test_the_page_says_what_classes_declare(form: str) -> None:
    name, options = FORMS[form]
    layer = Case(name, "small").layer(**options)
    assert (told()[form] == "yes") == (layer.splits_heads and not options.get("latent_dim"))
