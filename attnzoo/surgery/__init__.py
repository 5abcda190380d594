"""Surgery: finding attention blocks in pretrained models, converting them, and saying what was lost."""

from __future__ import annotations

from attnzoo.surgery.convert import cache_bytes, convert, new_cache
from attnzoo.surgery.files import load, save
from attnzoo.surgery.hosts.checkpoint import load_checkpoint, locate_smollm2
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.inspection import Inspection, find, inspect
from attnzoo.surgery.lowrank.calibration import Statistics, collect
from attnzoo.surgery.lowrank.one_site import statistics_bytes
from attnzoo.surgery.replacements.landmark_tokens import set_gate_mix
from attnzoo.surgery.report import ConversionReport, SiteReport
from attnzoo.surgery.streaming.convert import Dtypes, convert_folder, what_it_takes
from attnzoo.surgery.streaming.estimate import Needs

__all__ = [
    "ConversionReport",
    "Dtypes",
    "Inspection",
    "Needs",
    "Site",
    "SiteReport",
    "Statistics",
    "cache_bytes",
    "collect",
    "convert",
    "convert_folder",
    "find",
    "inspect",
    "load",
    "load_checkpoint",
    "locate_smollm2",
    "new_cache",
    "save",
    "set_gate_mix",
    "statistics_bytes",
    "what_it_takes",
]
