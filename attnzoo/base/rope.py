"""Rotary positions: tables from fp64 angles, in the layouts and scaling forms of current checkpoints.

Source: Su et al. 2021, *RoFormer*, equation 34 (arXiv:2104.09864). Scaling: Chen et al. 2023, *Position Interpolation*
(arXiv:2306.15595); dynamic NTK as in public checkpoints; Peng et al. 2023, *YaRN* (arXiv:2309.00071); Ding et al. 2024,
*LongRoPE* (arXiv:2402.13753); Llama 3.1's frequency bands (arXiv:2407.21783).

Departures: "dynamic" and "longrope" depend on a length. Frequencies that followed the running length would change what
earlier tokens computed, so that neither causality nor decoding == prefill held: here the length is a fixed number of
the configuration, ``RotaryScaling.length``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from attnzoo.reporting.choices import check_choice, hint
from attnzoo_kernels import remembers
from attnzoo_kernels.errors import ConfigError

ScalingKind = Literal["linear", "dynamic", "yarn", "longrope", "llama3"]

_NEEDS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """How a checkpoint stretches its frequencies; the fields have the names that checkpoints use.

    Attributes:
        kind: The form: "linear", "dynamic", "yarn", "longrope" or "llama3".
        factor: How many times longer the context has become.
        original_max_position_embeddings: Context length of the pretraining, in tokens.
        length: The length that "dynamic" and "longrope" are computed for, in tokens; ``None`` means the original one.
        attention_factor: The factor on cos and sin; ``None`` means what the form prescribes.
        beta_fast: YaRN: rotations above which a plane keeps its frequency.
        beta_slow: YaRN: rotations below which a plane is interpolated.
        mscale: YaRN: see ``mscale_all_dim``.
        mscale_all_dim: YaRN: with ``mscale``, the two temperatures whose ratio is the attention factor.
        truncate: YaRN: whether the ramp's ends are rounded to whole planes.
        low_freq_factor: Llama 3: planes with fewer rotations over the original length are interpolated.
        high_freq_factor: Llama 3: planes with more rotations keep their frequency.
        short_factor: LongRoPE: a divisor for each plane, up to the original length.
        long_factor: LongRoPE: a divisor for each plane, past the original length.
    """

    kind: ScalingKind
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    length: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_choice("scaling.kind", self.kind, _NEEDS)
        for name in ("short_factor", "long_factor"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(float(x) for x in value))
        for name in _NEEDS[self.kind]:
            if getattr(self, name) is None:
                raise ConfigError(f"scaling.{name}: expected a value for kind {self.kind!r}, got None")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("kind", "truncate") or value is None:
                continue
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
                    raise ConfigError(f"scaling.{field.name}: expected a number > 0, got {number!r}")

    @property
    def table_factor(self) -> float:
        """The factor on cos and sin, and thereby, squared, on rotated scores."""
        if self.attention_factor is not None:
            return float(self.attention_factor)
        factor = self.factor or 1.0
        if factor <= 1.0:
            return 1.0
        if self.kind == "longrope":
            return math.sqrt(1 + math.log(factor) / math.log(_given(self.original_max_position_embeddings)))
        if self.kind == "yarn":
            if self.mscale and self.mscale_all_dim:
                return _temperature(factor, self.mscale) / _temperature(factor, self.mscale_all_dim)
            return _temperature(factor, 1.0)
        return 1.0


@dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """Rotary positions of a layer.

    Attributes:
        base: Base of the wavelengths.
        dim: Rotated leading values of a head; ``None`` rotates all.
        interleaved: Whether neighbouring values form a plane; else the first half pairs with the second.
        scaling: How the frequencies are stretched, if they are.
    """

    base: float = 10000.0
    dim: int | None = None
    interleaved: bool = False
    scaling: RotaryScaling | None = None

    def __post_init__(self) -> None:
        if isinstance(self.base, bool) or not isinstance(self.base, int | float) or not 0 < self.base < math.inf:
            raise ConfigError(f"rotary.base: expected a number > 0, got {self.base!r}")
        if self.dim is not None and (type(self.dim) is not int or self.dim < 2 or self.dim % 2):
            raise ConfigError(f"rotary.dim: expected an even int >= 2 or None, got {self.dim!r}")
        if not isinstance(self.interleaved, bool):
            raise ConfigError(f"rotary.interleaved: expected a bool, got {self.interleaved!r}")
        if self.scaling is not None and not isinstance(self.scaling, RotaryScaling):
            raise ConfigError(f"rotary.scaling: expected a RotaryScaling or None, got {type(self.scaling).__name__}")

    def width(self, head_dim: int) -> int:
        """How many leading values of a head of this width are rotated.

        Raises:
            ConfigError: If that is odd or more than the head has, or scaling factors do not fit it.
        """
        width = head_dim if self.dim is None else self.dim
        if width % 2 or width > head_dim:
            raise ConfigError(f"rotary.dim: expected an even width <= head_dim {head_dim}, got {width}")
        for name in ("short_factor", "long_factor"):
            factors = None if self.scaling is None else getattr(self.scaling, name)
            if factors is not None and len(factors) != width // 2:
                raise ConfigError(f"rotary.scaling.{name}: expected {width // 2} numbers, got {len(factors)}")
        return width

    @classmethod
    def from_parameters(
        cls,
        parameters: Mapping[str, Any],
        *,
        head_dim: int | None = None,
        max_positions: int | None = None,
        interleaved: bool = False,
    ) -> RotaryConfig:
        """Reads a checkpoint's ``rope_parameters`` (or the older ``rope_scaling``).

        Args:
            parameters: The mapping of one layer type, with ``rope_type`` and its numbers.
            head_dim: Width of a head; needed where ``partial_rotary_factor`` is given.
            max_positions: The checkpoint's ``max_position_embeddings``: "dynamic" counts from it, and "yarn" and
                "longrope" without a factor take theirs from it.
            interleaved: Whether this model's code pairs neighbours; checkpoints do not say.

        Raises:
            ConfigError: If a form or a key is unknown, or a number is missing.
        """
        given = {key: value for key, value in parameters.items() if value is not None}
        kind = given.pop("rope_type", given.pop("type", "default"))
        given.pop("type", None)
        base = given.pop("rope_theta", 10000.0)
        partial = given.pop("partial_rotary_factor", 1.0)
        known = sorted({field.name for field in fields(RotaryScaling)} - {"kind"})
        if unknown := sorted(set(given) - set(known)):
            near = hint(unknown[0], known)
            raise ConfigError(f"rope_parameters: expected keys of one layer type, got {', '.join(unknown)}{near}")
        dim = None
        if partial != 1.0:
            if head_dim is None:
                raise ConfigError("head_dim: expected a width beside partial_rotary_factor, got None")
            dim = int(head_dim * partial)
        scaling = None if kind == "default" else _scaling(kind, given, max_positions)
        return cls(base=float(base), dim=dim, interleaved=interleaved, scaling=scaling)


def rotary_frequencies(
    config: RotaryConfig, head_dim: int, *, length: int | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Angles per position of each plane, fp64 ``[Dr / 2]``.

    Args:
        config: The rotary configuration.
        head_dim: Width of a head.
        length: Replaces ``scaling.length`` for the forms that depend on one.
        device: Where the result lies.
    """
    width = config.width(head_dim)
    exponent = torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
    scaling = config.scaling
    if scaling is None:
        return torch.pow(config.base, -exponent)
    original = scaling.original_max_position_embeddings or 1
    length = length or scaling.length or original
    if scaling.kind == "longrope":
        factors = scaling.long_factor if length > original else scaling.short_factor
        return torch.pow(config.base, -exponent) / torch.tensor(factors, dtype=torch.float64, device=device)
    factor = float(_given(scaling.factor))
    if scaling.kind == "dynamic":
        stretch = factor * max(length, original) / original - (factor - 1)
        base = config.base * stretch ** (width / (width - 2)) if width > 2 else config.base
        return torch.pow(base, -exponent)
    plain = torch.pow(config.base, -exponent)
    if scaling.kind == "linear":
        return plain / factor
    keep = _yarn_share(config, width, plain) if scaling.kind == "yarn" else _llama3_share(scaling, plain)
    return plain * keep + plain / factor * (1 - keep)


def rotary_tables(
    config: RotaryConfig, head_dim: int, positions: Tensor, dtype: torch.dtype, *, length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions, with the form's attention factor in them.

    Args:
        config: The rotary configuration.
        head_dim: Width of a head.
        positions: Integers ``[..., T]``.
        dtype: Of the tables; the angles are fp64.
        length: Replaces ``scaling.length`` for the forms that depend on one.

    Returns:
        ``(cos, sin)``, each ``[..., T, Dr / 2]``.
    """
    frequencies = rotary_frequencies(config, head_dim, length=length, device=positions.device)
    angles = positions.to(torch.float64).unsqueeze(-1) * frequencies
    cos = angles.cos()
    sin = angles.sin()
    if config.scaling is not None and config.scaling.table_factor != 1.0:
        cos = cos * config.scaling.table_factor
        sin = sin * config.scaling.table_factor
    return cos.to(dtype), sin.to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotates the leading values of every head; the others pass.

    Args:
        x: ``[B, h, T, D]``.
        cos: ``[B|1, T, Dr / 2]`` or ``[T, Dr / 2]``. Tables wider than x keep the arithmetic in their precision.
        sin: As ``cos``.
        interleaved: Whether neighbours form a plane.
    """
    width = 2 * cos.shape[-1]
    cos = cos.unsqueeze(-3)
    sin = sin.unsqueeze(-3)
    turned = x[..., :width]
    rest = x[..., width:]
    if interleaved:
        a = turned[..., 0::2]
        b = turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    turned = turned.to(x.dtype)
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), -1)


def rotation_tables(
    rotary: RotaryConfig, width: int, length: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0, 1, ... ``length - 1``, as rotations alone.

    A form's attention factor is in queries and keys already.
    """
    plain = rotary if rotary.scaling is None else replace(rotary, scaling=replace(rotary.scaling, attention_factor=1.0))
    return rotary_tables(plain, width, torch.arange(length, device=device), dtype)


@remembers(32)
def shared_rotation_tables(
    rotary: RotaryConfig, width: int, length: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """As :func:`rotation_tables`, kept for all layers of a model; not to be written to."""
    with torch.inference_mode(False):
        return rotation_tables(rotary, width, length, dtype, device)


def _scaling(kind: str, given: Mapping[str, Any], max_positions: int | None) -> RotaryScaling:
    """The scaling of a checkpoint, with what it leaves to ``max_position_embeddings`` filled in."""
    check_choice("rope_type", kind, ["default", *_NEEDS])
    numbers = dict(given)
    if max_positions is not None:
        if kind == "dynamic":
            numbers["original_max_position_embeddings"] = max_positions
        original = numbers.setdefault("original_max_position_embeddings", max_positions)
        if kind in ("yarn", "longrope"):
            numbers.setdefault("factor", max_positions / original)
    return RotaryScaling(kind=kind, **numbers)  # type: ignore[arg-type]


def _yarn_share(config: RotaryConfig, width: int, plain: Tensor) -> Tensor:
    """How much of its own frequency each plane keeps, from 1 (fast planes) to 0 (slow planes)."""
    scaling = config.scaling
    if scaling is None:
        return torch.ones_like(plain)
    original = _given(scaling.original_max_position_embeddings)

    def plane(rotations: float) -> float:
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.base))

    low = plane(scaling.beta_fast)
    high = plane(scaling.beta_slow)
    if scaling.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, width - 1)
    span = high - low if high != low else 0.001
    index = torch.arange(width // 2, dtype=torch.float64, device=plain.device)
    return 1 - ((index - low) / span).clamp(0, 1)


def _llama3_share(scaling: RotaryScaling, plain: Tensor) -> Tensor:
    """How much of its own frequency each plane keeps, by its rotations over the original length."""
    low = float(_given(scaling.low_freq_factor))
    high = float(_given(scaling.high_freq_factor))
    rotations = _given(scaling.original_max_position_embeddings) * plain / (2 * math.pi)
    if low == high:
        return (rotations >= low).to(plain.dtype)
    return ((rotations - low) / (high - low)).clamp(0, 1)


def _temperature(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


def _given(value: float | None) -> float:
    """A number that the configuration's checks guarantee."""
    if value is None:
        raise ConfigError("scaling: expected a number, got None")
    return value
