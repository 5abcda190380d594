"""How hosts say that they rotate queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from attnzoo.base.rope import RotaryConfig

Planes = Literal["halves", "neighbours"] | None


@dataclass(frozen=True)
class Rotation:
    """How the blocks of a class rotate.

    Attributes:
        planes: Which values of a head are turned against each other; ``None`` where none are.
    """

    planes: Planes

    def read(self, config: Any, head_dim: int) -> RotaryConfig | None:
        """What a host's configuration says about it; ``None`` where nothing is rotated.

        Raises:
            ConfigError: If the rotation is not known here.
        """
        if self.planes is None:
            return None
        parameters = self._parameters(config)
        original = getattr(config, "original_max_position_embeddings", None)
        if self.name(config) not in (None, "default") and original is not None:
            parameters.setdefault("original_max_position_embeddings", original)
        return RotaryConfig.from_parameters(
            parameters,
            head_dim=head_dim,
            max_positions=getattr(config, "max_position_embeddings", None),
            interleaved=self.planes == "neighbours",
        )

    def name(self, config: Any) -> str | None:
        """The host's name for its rotation, or ``None``."""
        return None if self.planes is None else self._parameters(config).get("rope_type")

    def _parameters(self, config: Any) -> dict[str, Any]:
        return dict(getattr(config, "rope_parameters", None) or {})
