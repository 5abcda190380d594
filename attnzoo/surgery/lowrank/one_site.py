"""Calibration within the memory that there is: what statistics take, and holding those of one site at a time.

Letters: C model width, G KV heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from torch import nn

from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.lowrank.calibration import Batch, Progress, SiteStatistics, Statistics, collect, has_biases
from attnzoo_kernels.errors import ConfigError

T = TypeVar("T")

_FP64 = 8


def statistics_bytes(model: nn.Module, sites: Sequence[Site], *, gradients: bool = True) -> dict[str, int]:
    """Bytes that calibration statistics hold, by site path: fp64 matrices ``[C, C]`` and ``[2 G D, 2 G D]``.

    Args:
        model: A causal language model.
        sites: Which of its attention blocks.
        gradients: Whether calibration runs backward too: three matrices of inputs then, not two, and a Fisher matrix.
    """
    found = {}
    for site in sites:
        inputs = site.width + int(has_biases(model.get_submodule(site.path)))
        outputs = 2 * site.kv_heads * site.head_dim
        found[site.path] = _FP64 * (3 * inputs**2 + outputs**2 if gradients else 2 * inputs**2)
    return found


def available_bytes() -> int | None:
    """Memory that is free for this process, as Linux and its control group say; ``None`` where nothing says so."""
    found = []
    info = Path("/proc/meminfo")
    if info.is_file():
        rows = dict(row.split(":", 1) for row in info.read_text().splitlines() if ":" in row)
        if "MemAvailable" in rows:
            found.append(1024 * int(rows["MemAvailable"].split()[0]))
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    used = group / "memory.current"
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        found.append(max(0, int(limit.read_text()) - int(used.read_text())))
    return min(found, default=None)


def announce(
    model: nn.Module,
    sites: Sequence[Site],
    *,
    gradients: bool,
    one_site_at_a_time: bool = False,
    progress: Progress | None = None,
) -> int:
    """Says, before anything runs, how much the statistics will hold at once, and returns it in bytes.

    Raises:
        ConfigError: If there is not so much memory.
    """
    by_site = statistics_bytes(model, sites, gradients=gradients)
    whole = sum(by_site.values())
    largest = max(by_site.values(), default=0)
    needed = largest if one_site_at_a_time else whole
    free = available_bytes()
    if free is not None and needed > free:
        more = (
            ""
            if one_site_at_a_time
            else f"; one_site_at_a_time=True holds {in_words(largest)}, and runs the text for each"
        )
        raise ConfigError(
            f"calibration: expected statistics that fit into the {in_words(free)} of memory that are free, got "
            f"{in_words(needed)} of {1 if one_site_at_a_time else len(by_site)} sites{more}"
        )
    if progress is not None:
        progress(f"statistics, {in_words(needed)}", 0, len(by_site) if one_site_at_a_time else 1)
    return needed


def in_words(count: int) -> str:
    """Bytes in a unit that leaves few digits."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


class Lazily(Mapping[str, T]):
    """A mapping whose values are made when they are asked for; only the last is kept."""

    def __init__(self, keys: Sequence[str], make: Callable[[str], T]) -> None:
        self._keys = tuple(keys)
        self._make = make
        self._last: tuple[str, T] | None = None

    def __getitem__(self, key: str) -> T:
        if key not in self._keys:
            raise KeyError(key)
        if self._last is None or self._last[0] != key:
            # The one before goes first: two at once are what this is here to avoid.
            self._last = None
            self._last = (key, self._make(key))
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def collect_by_turns(
    model: nn.Module,
    sites: Sequence[Site],
    batches: list[Batch],
    *,
    gradients: bool,
    progress: Progress | None = None,
) -> Statistics:
    """Statistics that are collected site by site, when a site is asked for: the text runs once for each."""
    by_path = {site.path: site for site in sites}

    def one(path: str) -> SiteStatistics:
        def tell(what: str, done: int, count: int) -> None:
            if progress is not None:
                progress(f"{what} of {path}", done, count)

        return collect(model, [by_path[path]], batches, gradients=gradients, progress=tell).sites[path]

    return Statistics(Lazily(list(by_path), one), batches, gradients)
