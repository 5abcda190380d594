"""Models of every family whose heads can be edited, each with a call: decoders, encoders, attnzoo's own layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from tests.attnzoo.surgery.families.encoder_hosts import PICTURES, TEXTS, encoder, inputs, said
from torch import Tensor

from tests.attnzoo.surgery.families.hosts import HOSTS, SIZES, WIDTH, randomise
from tests.attnzoo.surgery.families.test_own_layers import IDS, toy
from tests.attnzoo.surgery.families.test_timm_like import X, vit
from tests.attnzoo.surgery.tiny import ids


@dataclass(frozen=True)
class Called:
    """A model and what it is asked.

    Attributes:
        make: Makes one in fp64.
        say: What it says, as it is.
    """

    make: Callable[[], Any]
    say: Callable[[Any], Tensor]


def _logits(model: Any) -> Tensor:
    found: Tensor = model(ids(2, 9), use_cache=False).logits
    return found


def _gpt_oss() -> Any:
    """With its own rotation, whose tables are half as wide as others'."""
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    config = transformers.GptOssConfig(**SIZES, **experts, head_dim=WIDTH)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    return randomise(model).double().eval()


def _encoder(name: str) -> Called:
    return Called(lambda: encoder(name), lambda model: said(model, **inputs(name, length=9)))


OWN: dict[str, dict[str, Any]] = {
    "mha": {"window": 6, "sink": 2},
    "s2": {"block_size": 4, "local_blocks": 2, "vert_stride": 2},
    "moh": {"shared_heads": 2, "active_heads": 1, "router": "norm"},
    "longheads": {},
    "landmark": {"block_size": 8},
    "lowrank_gqa": {},
    "rcmha": {},
}

CALLED: dict[str, Called] = {
    **{name: Called(host.make, _logits) for name, host in HOSTS.items()},
    "gpt-oss": Called(_gpt_oss, _logits),
    **{name: _encoder(name) for name in (*TEXTS, *PICTURES)},
    "timm": Called(vit, lambda model: model(X)),
    "timm with norms": Called(lambda: vit(norms=True), lambda model: model(X)),
    **{
        f"own {name}": Called(lambda name=name, more=more: toy(name, **more), lambda model: model(IDS[:, :12]))
        for name, more in OWN.items()
    },
}


@cache
def shared(name: str) -> Any:
    """A model that every test leaves as it was."""
    with torch.random.fork_rng(devices=[]):
        return CALLED[name].make()


def say(name: str) -> Tensor:
    """What the shared model says now, without a graph."""
    with torch.no_grad():
        return CALLED[name].say(shared(name))
