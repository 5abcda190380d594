"""Configurations: frozen, checked when built, and the same after a trip through JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Self, TypeVar

from attnzoo.base.rope import RotaryConfig, RotaryScaling
from attnzoo.reporting.choices import check_known, hint
from attnzoo_kernels.errors import ConfigError

MAX_WIDTH = 256

Config = TypeVar("Config", bound="AttentionConfig")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """What every variant has; each variant's configuration inherits from it.

    Attributes:
        dim: Model width C.
        num_heads: Query heads H.
        num_kv_heads: KV heads G, a divisor of H; ``None`` means the variant's default, for most H.
        head_dim: Width of a head; ``None`` means ``dim / num_heads``.
        bias: Whether the projections have biases.
        causal: Whether a token reads only itself and earlier ones.
        rotary: Rotary positions; ``None`` gives the layer no positions.
        scale: The factor on scores; ``None`` means ``head_dim ** -0.5``.
    """

    kind: ClassVar[str] = ""
    """The variant's name; set where the layer of this configuration is registered."""

    dim: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    bias: bool = False
    causal: bool = True
    rotary: RotaryConfig | None = field(default_factory=RotaryConfig)
    scale: float | None = None

    def __post_init__(self) -> None:
        check_int("dim", self.dim, 1)
        check_int("num_heads", self.num_heads, 1)
        for name in ("num_kv_heads", "head_dim"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        for name in ("bias", "causal"):
            check_bool(name, getattr(self, name))
        if self.num_heads % self.kv_heads:
            raise ConfigError(f"num_kv_heads: expected a divisor of num_heads {self.num_heads}, got {self.kv_heads}")
        if self.head_dim is None and self.dim % self.num_heads:
            raise ConfigError(
                f"num_heads: expected a divisor of dim {self.dim} where head_dim is None, got {self.num_heads}"
            )
        if not 1 <= self.head_width <= MAX_WIDTH:
            raise ConfigError(f"head_dim: expected a width from 1 to {MAX_WIDTH}, got {self.head_width}")
        if self.rotary is not None:
            if not isinstance(self.rotary, RotaryConfig):
                raise ConfigError(f"rotary: expected a RotaryConfig or None, got {type(self.rotary).__name__}")
            self.rotary.width(self.head_width)
        if self.scale is not None and (
            isinstance(self.scale, bool) or not isinstance(self.scale, int | float) or not math.isfinite(self.scale)
        ):
            raise ConfigError(f"scale: expected a finite number or None, got {self.scale!r}")

    @property
    def kv_heads(self) -> int:
        """KV heads G."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """Width of a head D."""
        return self.dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def cautions(self) -> tuple[str, ...]:
        """What a caller must know about these options, such as that they do nothing; a layer built with them warns."""
        return ()

    @classmethod
    def small(cls) -> Self:
        """The same variant at sizes where it shows its nature within about 100 tokens."""
        return cls(dim=32, num_heads=4)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, "kind" among them, as :meth:`from_dict` reads them."""
        return {"kind": self.kind, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds a configuration from plain values.

        A class without a kind of its own, such as :class:`AttentionConfig`, builds the class that "kind" names.

        Raises:
            ConfigError: If the kind or a key is unknown, or a value does not fit.
        """
        values = dict(values)
        kind = values.pop("kind", None)
        target = _of_kind(cls, kind)
        known = [entry.name for entry in fields(target)]
        for key in values:
            check_known(key, known, f"{target.__name__} fields")
        if isinstance(values.get("rotary"), Mapping):
            values["rotary"] = _rotary_from_dict(values["rotary"])
        return _build(target, values)

    def to_json(self) -> str:
        """The configuration as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Builds a configuration from :meth:`to_json`'s text; see :meth:`from_dict`.

        Raises:
            ConfigError: If the text is not a JSON object, or a key or value does not fit.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"config: expected JSON, got {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"config: expected a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)


def check_int(name: str, value: object, least: int, word: str | None = None) -> None:
    """Raises unless a field holds an int of at least some size, or a word that may stand for one.

    Raises:
        ConfigError: Naming the field.
    """
    words = [] if word is None else [word]
    if value not in words and (type(value) is not int or value < least):
        others = "".join(f" or {word!r}" for word in words)
        raise ConfigError(f"{name}: expected an int >= {least}{others}, got {value!r}{hint(value, words)}")


def check_bool(name: str, value: object) -> None:
    """Raises unless a field holds a bool.

    Raises:
        ConfigError: Naming the field.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name}: expected a bool, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raises unless an argument of a call is a bool.

    Raises:
        TypeError: Naming the argument.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def build_config(config_class: type[Config], options: Mapping[str, Any]) -> Config:
    """Builds a configuration from keyword options.

    Raises:
        ConfigError: If an option is unknown, missing, or does not fit.
    """
    known = [entry.name for entry in fields(config_class)]
    for key in options:
        check_known(key, known, f"{config_class.__name__} fields")
    return _build(config_class, options)


def _build(config_class: type[Config], options: Mapping[str, Any]) -> Config:
    for name in ("dim", "num_heads"):
        if name not in options:
            raise ConfigError(f"{name}: expected a value for {config_class.__name__}, got none")
    return config_class(**options)


def _of_kind(config_class: type[Config], kind: object) -> type[Config]:
    if kind == config_class.kind and kind is not None:
        return config_class
    family = [config_class]
    for member in family:
        family += member.__subclasses__()
    for member in family:
        if kind is not None and member.kind == kind:
            return member
    known = sorted({member.kind for member in family if member.kind})
    raise ConfigError(f"kind: expected one of {', '.join(known) or 'none known'}, got {kind!r}{hint(kind, known)}")


def _rotary_from_dict(values: Mapping[str, Any]) -> RotaryConfig:
    values = dict(values)
    _check_keys("rotary", values, RotaryConfig)
    if isinstance(values.get("scaling"), Mapping):
        scaling = dict(values["scaling"])
        _check_keys("rotary.scaling", scaling, RotaryScaling)
        if "kind" not in scaling:
            raise ConfigError("rotary.scaling.kind: expected a value, got none")
        values["scaling"] = RotaryScaling(**scaling)
    return RotaryConfig(**values)


def _check_keys(name: str, values: Mapping[str, Any], record: type[RotaryConfig | RotaryScaling]) -> None:
    for key in values:
        check_known(key, [entry.name for entry in fields(record)], f"{name}'s fields")
