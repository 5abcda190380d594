"""What a cache of pages begins with: which heads remember by place, and tensors of no page.

Letters: G KV heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnzoo.cache.kv_cache import Stream
from attnzoo.cache.pages.extents import BlockRing
from attnzoo.cache.policies.protocol import Policy
from attnzoo.cache.streams import zeros_on_cpu
from attnzoo_kernels.errors import ConfigError


def rings_of(policy: Policy, heads: int) -> tuple[BlockRing | None, ...]:
    """How each KV head's blocks take turns; ``None`` for heads that hold everything, or what is chosen for them.

    Raises:
        ConfigError: If pages cannot hold what the policy keeps by place.
    """
    if policy.reads_pages and ("mass" in policy.needs or policy.folds):
        what = "compensation rows" if policy.folds else "'mass' in needs"
        raise ConfigError(f"policy: expected no {what} where a row reads some pages alone, got {policy.name!r}")
    retention = policy.retention(heads)
    if policy.compacts or retention is None:
        return (None,) * heads
    if retention.block != policy.page and not all(retention.full):
        raise ConfigError(f"page: expected {retention.block}, the tokens in a block, got {policy.page}")
    if retention.stride is not None:
        raise ConfigError(f"stride: expected None where rows are kept in pages, got {retention.stride}")
    spare = -(-policy.slack // policy.page)
    ring = BlockRing(policy.page, retention.sink, retention.local, spare)
    return tuple(None if full else ring for full in retention.full)


FINE_PAGE = 16
"""Rows of a page where its size matters to nothing but room: a head has room for one page more at least."""


def page_rows_of(policy: Policy, rings: Sequence[BlockRing | None]) -> int:
    """Rows of a page of the pool: the policy's where pages are read or held by place, else ``FINE_PAGE`` at most."""
    if policy.reads_pages or any(ring is not None for ring in rings):
        return policy.page
    return min(policy.page, FINE_PAGE)


def full_heads_of(policy: Policy, heads: int) -> tuple[bool, ...]:
    """Which KV heads keep everything, whatever the policy chooses."""
    retention = policy.retention(heads)
    return (False,) * heads if retention is None else retention.full


def empty_pages(
    streams: Mapping[str, Stream],
    policy: Policy,
    page: int,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """No page, with the widths and dtypes of all tensors of a pool whose pages have so many rows."""
    dtype = dtype or torch.get_default_dtype()
    k, v = (_no_rows(streams[name], page, device=device, dtype=dtype) for name in ("k", "v"))
    precise = torch.promote_types(torch.promote_types(k.dtype, v.dtype), torch.float32)
    number = torch.empty(0, page, dtype=precise, device=device)
    pages = {"k": k, "v": v, "bias": number, "position": number.to(torch.int32)}
    if "score" in policy.needs:
        pages["score"] = number.clone()
    if policy.folds and policy.moment_of(k.new_zeros(1, streams["k"].heads, 1, streams["k"].width)) is not None:
        pages["moment"] = number.clone()
    if policy.reads_pages:
        pages["least"] = torch.empty(0, k.shape[2], dtype=k.dtype, device=device)
        pages["most"] = pages["least"].clone()
    return pages


def _no_rows(stream: Stream, page: int, *, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    make = zeros_on_cpu if stream.offloaded else torch.zeros
    return make((0, page, stream.width), device=device, dtype=stream.dtype or dtype)
