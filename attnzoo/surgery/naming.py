"""How messages name what they were given."""

from __future__ import annotations


def type_name(x: object) -> str:
    """An object's type with its module, for libraries give their own classes the names of others' (``Linear``)."""
    kind = type(x)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
