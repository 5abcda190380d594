"""Names that people type: which are known, and which one was meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from attnzoo_kernels.errors import ConfigError


def nearest(name: str, known: Iterable[str], aliases: Mapping[str, str] | None = None) -> list[str]:
    """The known names that come nearest to one, the best first and at most three; case does not matter.

    Args:
        name: What was typed.
        known: Names that are right.
        aliases: Other names that people know them by, such as those of classes.

    Example:
        >>> nearest("MHA", ["mha", "moh", "s2"])
        ['mha']
    """
    meant: dict[str, str] = {}
    for right in known:
        meant.setdefault(right.casefold(), right)
    for alias, right in (aliases or {}).items():
        meant.setdefault(alias.casefold(), right)
    folded = name.casefold()
    if folded in meant:
        return [meant[folded]]
    found = get_close_matches(folded, meant, n=3)
    return list(dict.fromkeys(meant[key] for key in found))


def hint(name: object, known: Iterable[str], aliases: Mapping[str, str] | None = None) -> str:
    """The end of a message about an unknown name: which near ones there are, or nothing."""
    near = nearest(name, known, aliases) if isinstance(name, str) else []
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def check_known(name: str, known: Iterable[str], what: str, aliases: Mapping[str, str] | None = None) -> None:
    """Raises unless a name is known, with the nearest known ones.

    Args:
        name: What was given.
        known: Names that are right.
        what: What they are, as a plural.
        aliases: See :func:`nearest`.

    Raises:
        ConfigError: Naming the unknown name.
    """
    known = list(known)
    if name not in known:
        near = hint(name, known, aliases)
        raise ConfigError(f"{name or what}: expected one of {what} {', '.join(known)}, got {name!r}{near}")


def check_choice(argument: str, value: object, choices: Iterable[str]) -> None:
    """Raises unless an argument holds one of some words, with the nearest ones.

    Raises:
        ConfigError: Naming the argument.
    """
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        near = hint(value, choices)
        raise ConfigError(f"{argument}: expected one of {', '.join(choices)}, got {value!r}{near}")
