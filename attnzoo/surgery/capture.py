"""Looking at what a model's attention blocks are called with, or answering in their place, for a while.

Nothing of the model is wrapped: its blocks are called through the registered attention function, which asks who is
there before it attends. In the end the model is as it was, also after an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from attnzoo.reporting.versions import check_transformers
from attnzoo.surgery.hosts.attention_function import switch, switch_back
from attnzoo.surgery.hosts.block import ReplacementModule
from attnzoo.surgery.hosts.calls import AROUND, AttentionCall
from attnzoo.surgery.hosts.families.known import block_of
from attnzoo.surgery.hosts.site import Site
from attnzoo.surgery.hosts.weights import type_name
from attnzoo.surgery.lookalikes import refuse_unknown
from attnzoo.surgery.sites import find
from attnzoo_kernels.errors import UnsupportedError

Around = Callable[[Site, AttentionCall], Tensor]
"""Asked in the place of a block's attention; gives ``[B, H, T, Dv]``: ``call.answered()`` where nothing changes."""


@contextmanager
def around_attention(
    model: Any, around: Around, *, sites: Sequence[Site] | None = None, unrotated: bool = False
) -> Iterator[None]:
    """Asks a function in the place of attention in the blocks of a model, while the block runs.

    Of blocks in each other the inner one is asked first, and what it leaves to the block's own attention goes to the
    outer one.

    Args:
        model: A model of a known family; it is called through attnzoo's attention function meanwhile.
        around: Asked in each call of each block, with where it is.
        sites: Which blocks; all by default.
        unrotated: Whether calls have queries and keys before rotation too, which are projected once more for it.

    Raises:
        ConfigError: If the model has no attention block that is known.
        UnsupportedError: If a block is a replacement, which attends by itself; or transformers is too old.
    """
    check_transformers()
    chosen = list(find(model) if sites is None else sites)
    if not chosen:
        refuse_unknown(model)
    modules = [model.get_submodule(site.path) for site in chosen]
    for site, module in zip(chosen, modules, strict=True):
        if isinstance(module, ReplacementModule) and module.needs_interface:
            raise UnsupportedError(
                f"model: {site.path}: expected a block whose attention the host calls, got a {type_name(module)}, "
                "which attends by itself; undo that conversion first"
            )
    with ExitStack() as restored:
        restored.callback(switch_back, model, switch(model, modules))
        for site, module in zip(chosen, modules, strict=True):
            inputs = _Inputs()
            if unrotated:
                restored.callback(module.register_forward_pre_hook(inputs.keep, with_kwargs=True).remove)
            before = module.__dict__.get(AROUND)
            restored.callback(_put_back, module, before)
            module.__dict__[AROUND] = partial(_ask, around, site, inputs, before)
        yield


@contextmanager
def watched(
    model: Any,
    see: Callable[[Site, AttentionCall], object],
    *,
    sites: Sequence[Site] | None = None,
    unrotated: bool = False,
) -> Iterator[None]:
    """Shows each call of the blocks' attention to a function; what the blocks give stays as it is.

    Arguments and errors are those of :func:`around_attention`. Tensors are those of the model's own graph, where there
    is one; what ``see`` keeps of them stays in memory.
    """

    def look(site: Site, call: AttentionCall) -> Tensor:
        see(site, call)
        return call.answered()

    with around_attention(model, look, sites=sites, unrotated=unrotated):
        yield


class _Inputs:
    """What a block was last called with."""

    def __init__(self) -> None:
        self._call: tuple[nn.Module, Tensor] | None = None

    def keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = (module, args[0] if args else kwargs["hidden_states"])

    def unrotated(self) -> tuple[Tensor, Tensor] | None:
        """Queries and keys of these inputs before rotation, projected anew; given up then."""
        if self._call is None:
            return None
        module, hidden = self._call
        self._call = None
        block = block_of(module)
        q, k, _ = block.project(hidden)
        # As the host's attention function has them, but for the rotation.
        return q if block.query_factor == 1 else q * block.query_factor, k


def _ask(around: Around, site: Site, inputs: _Inputs, before: Any, call: AttentionCall) -> Tensor:
    call = replace(call, unrotated=inputs.unrotated())
    if before is not None:
        own = call.answer

        def answer(asked: AttentionCall) -> Tensor:
            found: Tensor = before(replace(asked, answer=own))
            return found

        call = replace(call, answer=answer)
    return around(site, call)


def _put_back(module: nn.Module, before: Any) -> None:
    if before is None:
        module.__dict__.pop(AROUND, None)
    else:
        module.__dict__[AROUND] = before
