"""Named sets of policies."""

from __future__ import annotations

from attnzoo.evaluation.two_phase.specs import PolicySpec

SETTINGS: dict[str, dict[int, str]] = {
    "duo": {
        40: "duo:keep=0.25,sink=64,window=128",
        20: "duo:keep=0.12,sink=32,window=64,block=16",
        10: "duo:keep=0.056,sink=16,window=32,block=16",
    },
    "duo, random heads": {
        40: "duo:keep=0.25,sink=64,window=128,heads=random",
        20: "duo:keep=0.12,sink=32,window=64,block=16,heads=random",
        10: "duo:keep=0.056,sink=16,window=32,block=16,heads=random",
    },
    "razor": {
        40: "razor:keep=0.25,sink=64,window=128",
        20: "razor:keep=0.12,sink=32,window=64,block=16",
        10: "razor:keep=0.056,sink=16,window=32,block=16",
    },
    "streaming": {
        40: "streaming:sink=64,window=352,block=32",
        20: "streaming:sink=32,window=160,block=16",
        10: "streaming:sink=16,window=80,block=16",
    },
    "duo + snapkv": {
        40: "duo:keep=0.25,sink=64,window=128+snapkv:share=0.2",
        20: "duo:keep=0.12,sink=32,window=64,block=16+snapkv:share=0.09,page=16",
        10: "duo:keep=0.056,sink=16,window=32,block=16+snapkv:share=0.05,page=16",
    },
    **{
        name: {percent: f"{name}:share={percent / 100}" for percent in (40, 20, 10)}
        for name in ("snapkv", "h2o", "tova", "knorm", "ems")
    },
    "pages": {40: "pages:page=16,budget=400", 20: "pages:page=16,budget=192", 10: "pages:page=16,budget=96"},
    "duo + pages": {
        40: "duo:keep=0.25,sink=64,window=128,block=16+pages:page=16,budget=400",
        20: "duo:keep=0.12,sink=32,window=64,block=16+pages:page=16,budget=192",
        10: "duo:keep=0.056,sink=16,window=32,block=16+pages:page=16,budget=96",
    },
}
"""Every policy at about so many percent of the dense model's bytes behind 1,024 tokens: held, or read of pages."""

CONTROLS = frozenset({"duo, random heads"})
"""Which are there to fail."""


def table(names: list[str] | None = None, percents: tuple[int, ...] = (40, 20, 10)) -> tuple[PolicySpec, ...]:
    """The rows of some policies, or of all."""
    return tuple(
        PolicySpec.parse(SETTINGS[name][percent], f"{name}: {percent} %", control=name in CONTROLS)
        for name in names or SETTINGS
        for percent in percents
    )


def preset(name: str) -> tuple[PolicySpec, ...]:
    """The rows of a preset."""
    names, percents = POLICY_PRESETS[name]
    return table(names, percents)


POLICY_PRESETS: dict[str, tuple[list[str] | None, tuple[int, ...]]] = {
    "policies": (None, (40, 20, 10)),
    "policies-quick": (["duo", "duo, random heads", "streaming", "snapkv"], (40,)),
}
"""Named sets: which policies, and at how many percent. They are made for a context of 1,024 tokens."""
