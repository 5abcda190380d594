"""What a conversion did, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from attnzoo.reporting.tables import Grid, lines
from attnzoo.surgery.hosts.site import Site
from attnzoo_kernels.errors import ConversionError

WIDTH = 120
"""Columns of a printed report."""


@dataclass(frozen=True)
class SiteReport:
    """One converted site.

    Attributes:
        site: Where, and its sizes before.
        values_before: Values cached for each token before.
        values_after: Values cached for each token afterwards.
        kept: Share of the energy of keys and values kept on the calibration text, if a method promised one.
        error: Relative error of the block's output on the calibration text, where it was measured.
    """

    site: Site
    values_before: int
    values_after: int
    kept: float | None = None
    error: float | None = None


@dataclass(eq=False)
class ConversionReport:
    """What :func:`attnzoo.surgery.convert` did; ``print`` it for a table.

    Attributes:
        variant: The variant.
        options: What was asked.
        sites: What became of each site.
        bytes_per_value: Of the model's weights, and so of its cache.
    """

    variant: str
    options: dict[str, Any]
    sites: list[SiteReport]
    bytes_per_value: int
    _undo: Callable[[], None] | None = field(repr=False, default=None)

    @property
    def cache_bytes(self) -> tuple[int, int]:
        """Cached bytes for each token before and afterwards, the converted sites together."""
        before, after = (sum(getattr(s, name) for s in self.sites) for name in ("values_before", "values_after"))
        return before * self.bytes_per_value, after * self.bytes_per_value

    def undo(self) -> None:
        """Puts back the very modules and settings that were there; once.

        Raises:
            ConversionError: If this was undone before, or a later conversion of the same model still stands.
        """
        if self._undo is None:
            raise ConversionError("undo: this conversion was undone before")
        self._undo()
        self._undo = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        before, after = self.cache_bytes
        return {
            "variant": self.variant,
            "options": self.options,
            "cache_bytes_per_token": {"before": before, "after": after},
            "sites": [asdict(site) for site in self.sites],
        }

    def grid(self) -> Grid:
        """The report as a table."""

        def share(value: float | None) -> str:
            return "-" if value is None else f"{value:.4f}"

        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        before, after = self.cache_bytes
        return Grid(
            ("site", "values/token", "energy kept", "output error"),
            [
                (s.site.path, f"{s.values_before} -> {s.values_after}", share(s.kept), share(s.error))
                for s in self.sites
            ],
            title=f"{self.variant}({options}): {len(self.sites)} sites, cache {before} -> {after} bytes per token",
        )

    def __str__(self) -> str:
        return "\n".join(line for line, _ in lines(self.grid(), WIDTH))
