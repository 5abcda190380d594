"""The contestants of ``bench.step``: conversions of a model, what each may cost, and which say what the model says."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from attnzoo import surgery
from attnzoo.evaluation.compare import PRESETS

DENSE = "dense"
"""The model as it is, with the attention and the cache that transformers gives it: what all ratios are over."""

DEMO = {spec.name: spec.conversions for spec in PRESETS["demo"]}
"""Conversions by the names that the demo gives them."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way of decoding.

    Attributes:
        name: What the row is called.
        convert: Converts a copy of the model; its weights are the model's own until they are replaced.
        cache: Makes the cache; ``None`` leaves it to the model.
        must: The most that a step may cost over the dense model's, by tokens in the cache.
        exact: Whether it says what the dense model says.
        evicts: Whether its cache drops tokens, so that it cannot be read again the slow way.
    """

    name: str
    convert: Callable[[Any, Tensor], None] = lambda model, calibration: None
    cache: Callable[[Any], Any] = lambda model: None
    must: Mapping[int, float] = field(default_factory=dict)
    exact: bool = False
    evicts: bool = False


def by_surgery(variant: str, **options: Any) -> Callable[[Any, Tensor], None]:
    """A conversion; what it warns of is known here."""

    def convert(model: Any, calibration: Tensor) -> None:
        text = calibration if options.get("method") in ("latent", "commuting") else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            surgery.convert(model, variant, calibration=None if text is None else [text], **options)

    return convert


def of_demo(name: str) -> Callable[[Any, Tensor], None]:
    """The conversion of a row of the demo."""
    (conversion,) = DEMO[name]
    options = dict(conversion.options)
    if conversion.needs_calibration:
        # How good the weights are is another table's matter.
        options |= {"refit": False, "gradients": False}
    return by_surgery(conversion.variant, **options)


CONTESTANTS = (
    Contestant(name="mha", convert=by_surgery("mha"), must={1024: 1.03, 4096: 1.0, 8192: 0.95}, exact=True),
    Contestant(
        name="window 256 + 4",
        convert=of_demo("sink 4 + window 256"),
        must={1024: 1.0, 4096: 0.72, 8192: 0.5},
        evicts=True,
    ),
    Contestant(name="s2", convert=of_demo("s2 with sink"), must={1024: 1.03, 4096: 0.87, 8192: 0.72}, evicts=True),
    Contestant(name="latent 128", convert=of_demo("latent 128"), must={1024: 1.35, 4096: 1.8, 8192: 2.1}),
    Contestant(name="longheads 512", convert=of_demo("longheads 512"), must={1024: 1.4, 4096: 1.0, 8192: 0.8}),
    Contestant(name="landmark", convert=of_demo("landmarks without gates"), must={1024: 1.4}, exact=True),
    Contestant(name="moh, all heads", convert=of_demo("moh, all heads"), must={1024: 1.2}, exact=True),
    Contestant(name="moh, 7 of 9 heads", convert=of_demo("moh, 7 of 9 heads"), must={1024: 1.2}),
    Contestant(name="rcmha", convert=of_demo("rcmha, untrained"), must={1024: 1.4}, exact=True),
    Contestant(name="dense, our cache", cache=surgery.new_cache, must={1024: 0.97, 4096: 0.9, 8192: 0.85}, exact=True),
)
"""All rows, in the table's order."""


def copy_of(model: Any) -> Any:
    """A copy that can be converted, of the same weights."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
