"""Tiny hosts of every class, exact in fp64: what the laws of ``test_conformance.py`` go through.

To add a class: a function in a file here that builds one, under ``@HOSTS.add(...)`` with the cells that are refused and
why. It is under all laws then, and in the table of the documentation.
"""

from __future__ import annotations

from tests.attnzoo.surgery.families.hosts import decoders, encoders, modules
from tests.attnzoo.surgery.families.hosts.host import CELLS, HEADS, KV_HEADS, VOCAB, WEIGHTS, Host, in_single, said

HOSTS: dict[str, Host] = {**decoders.HOSTS, **encoders.HOSTS, **modules.HOSTS}

__all__ = ["CELLS", "HEADS", "HOSTS", "KV_HEADS", "VOCAB", "WEIGHTS", "Host", "in_single", "said"]
