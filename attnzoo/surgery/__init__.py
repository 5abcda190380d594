"""Surgery: finding attention blocks in pretrained models, converting them, and saying what was lost."""

from __future__ import annotations

from attnzoo.surgery.convert import cache_bytes, convert
from attnzoo.surgery.files import load, save
from attnzoo.surgery.hosts.landmark_tokens import set_gate_mix
from attnzoo.surgery.one_site import statistics_bytes
from attnzoo.surgery.places import find
from attnzoo.surgery.report import ConversionReport, SiteReport
from attnzoo.surgery.site import Site
from attnzoo.surgery.statistics import Statistics, collect

__all__ = [
    "ConversionReport",
    "Site",
    "SiteReport",
    "Statistics",
    "cache_bytes",
    "collect",
    "convert",
    "find",
    "load",
    "save",
    "set_gate_mix",
    "statistics_bytes",
]
