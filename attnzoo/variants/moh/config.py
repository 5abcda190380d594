"""The options of mixture-of-head attention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Self

from attnzoo.base.config import AttentionConfig, check_bool, check_int
from attnzoo.base.rope import RotaryConfig as RotaryConfig
from attnzoo.reporting.choices import check_choice
from attnzoo.variants.moh.router import Counts
from attnzoo_kernels.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MoHConfig(AttentionConfig):
    """Mixture-of-head attention.

    Attributes:
        shared_heads: First heads, which every token uses; ``None`` means half of them, whole units.
        active_heads: Of the other heads, how many each token uses; ``None`` means a quarter of all heads, but at least
            two units (the gate of one alone is always 1 in the form "code", so that only the balance loss trains its
            router); "all" uses all.
        router: "learned" has weights; "norm" takes the heads with the longest queries, for pretrained models.
        gate_norm: "code": routed gates add up to K, shared ones to h_s, the two kinds to 2; "paper": plain softmaxes.
        route_unit: "head", or "kv_group": the query heads of a KV head together, so that KV heads are left unread.
        rescale: Whether gates are multiplied by H / (h_s + K).
        aux_scale: "code" multiplies the balance loss by E.
        ste_scope: Of "norm": whether the "selected" heads pass a gradient to the router or "all", which computes all.
        ste_coefficient: Of "norm": factor on that gradient.
        eps: Of "norm": added to the standard deviation of the lengths.
        window: Tokens seen, the own one included; not causal, as far ahead as back. ``None`` sees all.
        sink: First tokens of the sequence that stay visible beside the window.
        block_size: Tokens in a block of the layout; changes no result.
        compute: "routed" computes the routed rows of each head alone, "dense" all and multiplies, "auto" what is
            quicker; changes no result.
    """

    shared_heads: int | None = None
    active_heads: int | Literal["all"] | None = None
    router: Literal["learned", "norm"] = "learned"
    gate_norm: Literal["code", "paper"] = "code"
    route_unit: Literal["head", "kv_group"] = "head"
    rescale: bool = False
    aux_scale: Literal["code", "paper"] = "code"
    ste_scope: Literal["selected", "all"] = "selected"
    ste_coefficient: float = 1.0
    eps: float = 1e-6
    window: int | None = None
    sink: int = 0
    block_size: int = 64
    compute: Literal["auto", "routed", "dense"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        self._check_counts()
        check_bool("rescale", self.rescale)
        for name, least in (("ste_coefficient", 0.0), ("eps", 0.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least < value < float("inf"):
                raise ConfigError(f"{name}: expected a number > {least:g}, got {value!r}")
        if self.window is not None:
            check_int("window", self.window, 1)
        check_int("sink", self.sink, 0)
        check_int("block_size", self.block_size, 1)
        if self.sink and self.window is None:
            raise ConfigError(f"sink: expected 0 without a window, which sees everything, got {self.sink}")

    def _check_counts(self) -> None:
        unit = self.unit
        if self.shared_heads is not None:
            check_int("shared_heads", self.shared_heads, 0)
            if self.shared_heads > self.num_heads or self.shared_heads % unit:
                raise ConfigError(
                    f"shared_heads: expected at most num_heads {self.num_heads}, whole units of {unit}, "
                    f"got {self.shared_heads}"
                )
        routed = self.num_heads - self._shared
        if self.active_heads in (None, "all"):
            return
        check_int("active_heads", self.active_heads, 1 if routed else 0, "all")
        if self.counts.active > routed or self.counts.active % unit:
            raise ConfigError(
                f"active_heads: expected at most the {routed} heads that are not shared, whole units of {unit}, "
                f"got {self.active_heads}"
            )

    @property
    def unit(self) -> int:
        """Heads that are routed together."""
        return self.num_heads // self.kv_heads if self.route_unit == "kv_group" else 1

    @property
    def _shared(self) -> int:
        """Heads that are always active: half of them where nothing is said."""
        unit = self.unit
        return self.num_heads // unit // 2 * unit if self.shared_heads is None else self.shared_heads

    @property
    def counts(self) -> Counts:
        """How many heads of each kind there are."""
        return _counts(self.num_heads, self.unit, self._shared, self.active_heads)

    @property
    def head_density(self) -> float:
        """The share of (token, head) pairs that are computed."""
        return (self.counts.shared + self.counts.active) / self.num_heads

    @property
    def cautions(self) -> tuple[str, ...]:
        """That no head is ever left out, unless "all" asks for it."""
        counts = self.counts
        if counts.active < counts.routed or self.active_heads == "all":
            return ()
        return (
            f"moh: all {self.num_heads} heads are active (shared_heads={counts.shared}, active_heads={counts.active}), "
            "so that no head is left out and the balance loss has no gradient; choose fewer active_heads, or more "
            'num_heads (active_heads="all" says that it is wanted)',
        )

    @classmethod
    def small(cls) -> Self:
        """Four heads of 8, two of them active, computed alone."""
        return cls(dim=32, num_heads=4, shared_heads=0, active_heads=2, block_size=16, compute="routed")


_CHOICES = {
    "router": ("learned", "norm"),
    "gate_norm": ("code", "paper"),
    "route_unit": ("head", "kv_group"),
    "aux_scale": ("code", "paper"),
    "ste_scope": ("selected", "all"),
    "compute": ("auto", "routed", "dense"),
}


@lru_cache(maxsize=256)
def _counts(heads: int, unit: int, shared: int, active_heads: int | str | None) -> Counts:
    """How many heads there are of each kind; asked at every decoding step."""
    routed = heads - shared
    if isinstance(active_heads, int):
        active = active_heads
    elif active_heads == "all":
        active = routed
    else:
        active = min(routed, max(2, heads // unit // 4) * unit)
    return Counts(shared=shared, routed=routed, active=active, unit=unit)
