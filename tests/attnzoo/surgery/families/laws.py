"""Hosts and their conversions, as the laws of ``test_conformance.py`` make them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnzoo
from attnzoo import surgery
from attnzoo.surgery.hosts.families.known import block_of
from attnzoo.surgery.sites import find
from tests.attnzoo.surgery.families.hosts import CELLS, HOSTS, WEIGHTS, Host
from tests.attnzoo.surgery.tiny import replace_mha

OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window": 4, "block_size": 4},
    "s2": {"block_size": 4, "local_blocks": 2, "vert_stride": 2},
    "policy": {"policy": attnzoo.policies.Streaming()},
    "longheads": {"chunk_size": 4, "attention_length": 32},
    "landmark": {"block_size": 6},
}
SAME = ("mha", "replaced", "policy", "expand", "latent", "moh", "longheads", "landmark", "rcmha")
"""Conversions that are the host's own function at these options and lengths."""
WORKING = [name for name, host in HOSTS.items() if any(host.works(cell) for cell in CELLS)]


@cache
def _made(name: str) -> Any:
    return HOSTS[name].make()


def made(name: str) -> Any:
    """A host that may be changed."""
    return copy.deepcopy(_made(name))


def convert(model: Any, cell: str, name: str, **more: Any) -> surgery.ConversionReport:
    """One of the conversions of a host by its name; what it warns of is expected here."""
    host = HOSTS[name]
    more = {"where": host.where, **host.options.get(cell, {}), **more}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if cell == "replaced":
            return replace_mha(model, **more)
        if cell not in WEIGHTS:
            return surgery.convert(model, "mha" if cell == "window" else cell, **{**OPTIONS.get(cell, {}), **more})
        site = find(model)[0]
        options: dict[str, Any] = {"num_kv_heads": site.heads if cell == "expand" else 1}
        if cell == "latent":
            options = {"latent_dim": 2 * site.kv_heads * site.head_dim}
        text = host.calibration() if cell in ("commuting", "latent") else None
        return surgery.convert(model, "lowrank_gqa", method=cell, calibration=text, **options, **more)


def plainly(host: Host) -> str:
    """The cell that puts a layer of plain attention in a block's place."""
    return "replaced" if host.of_transformers else "mha"


def cases(pairs: Iterable[tuple[str, str]], slow: Iterable[tuple[str, str]] = ()) -> Any:
    """Hosts by name with cells, each once; some of them among the slow tests."""
    fast = list(dict.fromkeys(pair for pair in pairs if HOSTS[pair[0]].works(pair[1])))
    rest = list(dict.fromkeys(pair for pair in slow if HOSTS[pair[0]].works(pair[1]) and pair not in fast))
    params = [*(pytest.param(*pair) for pair in fast), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in rest)]
    return pytest.mark.parametrize(("name", "cell"), params)


def cells_of(*cells: str, slow: tuple[str, ...] = (), names: Iterable[str] = WORKING) -> Any:
    """Hosts with those of the cells that they are not refused; some of them among the slow tests."""
    hosts = list(names)
    return cases(_pairs(hosts, cells), _pairs(hosts, slow))


def _pairs(names: Iterable[str], cells: Iterable[str]) -> Iterator[tuple[str, str]]:
    return ((name, cell) for name in names for cell in cells)


def refuses(text: str) -> Any:
    """Expects a refusal that says this."""
    return pytest.raises(attnzoo.AttnzooError, match=text)


def projections_of(model: nn.Module) -> list[str]:
    """The paths of the modules by which blocks project."""
    ids = set()
    for site in find(model):
        ids |= {id(module) for module in block_of(model.get_submodule(site.path)).projections.values()}
    return [path for path, module in model.named_modules() if id(module) in ids]


class LoRA(nn.Module):
    """A low-rank adapter as PEFT puts it round a projection: the layer within, and a product of two beside."""

    def __init__(self, base_layer: Any, seed: int) -> None:
        super().__init__()
        weight = base_layer.weight
        # GPT-2's weights are transposed.
        wide, narrow = weight.shape if type(base_layer).__name__ == "Conv1D" else weight.shape[::-1]
        self.base_layer = base_layer
        self.in_features = wide
        self.out_features = narrow
        self.lora_A = nn.Linear(wide, 2, bias=False).to(weight)
        self.lora_B = nn.Linear(2, narrow, bias=False).to(weight)
        self.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for linear in (self.lora_A, self.lora_B):
                linear.weight.copy_(0.3 * torch.randn(linear.weight.shape, generator=generator))
                linear.requires_grad_(True)

    @property
    def weight(self) -> Any:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x) + self.lora_B(self.lora_A(x))
        return y


def adapt(model: nn.Module, paths: Iterable[str]) -> None:
    """Puts an adapter round each projection."""
    for seed, path in enumerate(paths):
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRA(model.get_submodule(path), seed))


def merge(model: nn.Module) -> None:
    """Takes all adapters off again, without what they have learned."""
    for path, module in list(model.named_modules()):
        if isinstance(module, LoRA):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base_layer)
