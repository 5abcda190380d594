"""Models of every family whose heads can be edited, each with a call: the registry's, and attnzoo's own layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.attnzoo.surgery.families.hosts import HOSTS, Host, said
from tests.attnzoo.surgery.families.hosts.decoders import SIZES
from tests.attnzoo.surgery.families.hosts.exact import randomise
from tests.attnzoo.surgery.families.hosts.host import WIDTH
from tests.attnzoo.surgery.families.hosts.modules import toy

TOKENS = 9
TORCHS = tuple(name for name in HOSTS if name.startswith("nn."))
"""Modules that hand heads' outputs to a function."""


@dataclass(frozen=True)
class Called:
    """A model and what it is asked.

    Attributes:
        make: Makes one in fp64.
        given: Arguments of its call.
    """

    make: Callable[[], Any]
    given: Callable[[], dict[str, Tensor]]

    def say(self, model: Any) -> Tensor:
        """What the model says, as it is."""
        return said(model, self.given())


def _ids() -> dict[str, Tensor]:
    return HOSTS["Llama"].inputs(2, TOKENS)


def _of(host: Host) -> Called:
    return Called(host.make, lambda: host.inputs(2, TOKENS))


def _gpt_oss() -> Any:
    """With its own rotation, whose tables are half as wide as others'."""
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    config = transformers.GptOssConfig(**SIZES, **experts, head_dim=WIDTH)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    return randomise(model).double().eval()


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
    **{name: _of(host) for name, host in HOSTS.items() if name not in TORCHS},
    "gpt-oss": Called(_gpt_oss, _ids),
    **{f"own {name}": Called(lambda name=name, more=more: toy(name, **more), _ids) for name, more in OWN.items()},
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
