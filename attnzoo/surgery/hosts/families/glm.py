"""GLM and GLM-4: separate projections with biases, neighbours turned against each other in the leading half of a head.

Letters: D head width.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from attnzoo.surgery.hosts.block import AttentionBlock, Family
from attnzoo.surgery.hosts.families import llama
from attnzoo.surgery.hosts.families.rotation import Rotation
from attnzoo.surgery.hosts.projections import Projections

ROTATION = Rotation("neighbours")


def describe(module: nn.Module) -> AttentionBlock:
    """A module of this family: as Llama's, but for the rotation.

    Raises:
        ConversionError: If a projection does not say its sizes.
    """
    host: Any = module
    return replace(
        llama.describe(module),
        weights=partial(_weights, module),
        rotary=partial(ROTATION.read, host.config, int(host.head_dim)),
        rope_type=ROTATION.name(host.config),
        planes=ROTATION.planes,
    )


def _weights(module: nn.Module) -> Projections:
    """The weights of a module, by reference."""
    host: Any = module
    return replace(llama.describe(module).weights(), rotary=ROTATION.read(host.config, int(host.head_dim)))


FAMILY = Family(name="glm", classes=("GlmAttention", "Glm4Attention"), block=describe, with_weights=llama.with_weights)
