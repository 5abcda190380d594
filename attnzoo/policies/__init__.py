"""Policies: which KV heads of a model remember what, with the memory of the rest really freed.

A policy is settings and pure functions. :func:`applied` puts one on a model of transformers for a while,
``surgery.convert(model, "policy", policy=...)`` for good, and ``layer.new_cache(..., policy=...)`` makes a cache for a
layer of attnzoo's own.
"""

from __future__ import annotations

from attnzoo.cache.policies import Duo, Policy, Streaming, policy_from
from attnzoo.policies.files import load, save
from attnzoo.surgery.policies import LayerHeld, PolicyReport, PolicyRun, applied, cache

__all__ = [
    "Duo",
    "LayerHeld",
    "Policy",
    "PolicyReport",
    "PolicyRun",
    "Streaming",
    "applied",
    "cache",
    "load",
    "policy_from",
    "save",
]
