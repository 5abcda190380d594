"""The mutants, one module an area; each holds a tuple ``MUTANTS``."""

from __future__ import annotations

import importlib
import pkgutil

from tests.mutants.record import Mutant


def areas() -> dict[str, tuple[Mutant, ...]]:
    """The mutants of each module here.

    Raises:
        ValueError: If two have one name.
    """
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found = {name: tuple(importlib.import_module(f"{__name__}.{name}").MUTANTS) for name in names}
    seen: set[str] = set()
    for mutant in (mutant for mutants in found.values() for mutant in mutants):
        if mutant.name in seen:
            raise ValueError(f"name: expected one of its own for each mutant, got {mutant.name!r} twice")
        seen.add(mutant.name)
    return found
