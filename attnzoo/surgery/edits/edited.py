"""Edits of heads for a while: a context in which a model has them, and is as it was behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from attnzoo.surgery.edits.calls import Remove, watch_calls
from attnzoo.surgery.edits.edit import HeadEdit, checked_edits
from attnzoo.surgery.edits.outputs import OutputHook
from attnzoo.surgery.edits.places import HeadSite, check_sites
from attnzoo.surgery.edits.programs import refuse_compiled
from attnzoo.surgery.edits.reading import put_reads

Placed = tuple[HeadEdit, HeadSite]


@contextmanager
def edited(
    model: Any, edits: HeadEdit | Sequence[HeadEdit], *, sites: Sequence[HeadSite] | None = None
) -> Iterator[None]:
    """Edits heads of a model, while the block runs.

    Edits of one head are made in the order of the list; of contexts in each other the inner one's come after the outer
    one's. Edits that change nothing leave no hook; in the end the model is as it was, also after an exception.
    Edits of outputs work under any implementation of attention, in training and in ``generate``. Their tensors are used
    on the device of what they meet; what they compute is in the widest dtype of both, and rounded once to the model's.

    Edits of what heads read (``key_bias``, ``post``, ``ablate="uniform"``) have the model attend through attnzoo's
    function meanwhile, and attnzoo's own layers plan every step; the edited heads alone are computed again. They hold
    under windows, shards and policies, which go on to keep rows by attention as it would be without edits.

    Args:
        model: A model of a known family, converted or not; or any, with ``sites``.
        edits: What is done.
        sites: What :func:`attnzoo.heads.sites` gave for a model of no known family.

    Raises:
        ConfigError: If no block is known, there is no such layer or head, or a number is not finite.
        ShapeError: If a tensor does not fit.
        UnsupportedError: If a block hands the outputs of its heads to no module, or the model is compiled, or what a
            head reads cannot be edited (gates of blocks, learned distances, modules of torch).
    """
    places = check_sites(model, sites)
    found = checked_edits(edits, places)
    refuse_compiled(model)
    with ExitStack() as restored:
        for remove in put_edits(model, found):
            restored.callback(remove)
        yield


def try_edits(model: Any, edits: HeadEdit | Sequence[HeadEdit], *, sites: Sequence[HeadSite]) -> None:
    """Raises whatever :func:`edited` would raise; the model is as it was."""
    with edited(model, edits, sites=sites):
        return


def put_edits(model: nn.Module, found: Sequence[Placed]) -> list[Remove]:
    """Puts edits on a model, which are known to fit; calling all that is returned, the last first, takes them off."""
    with ExitStack() as made:
        for put in (put_reads, put_output_hooks):
            for remove in put(model, found):
                made.callback(remove)
        return [made.pop_all().close]


def put_output_hooks(model: nn.Module, found: Sequence[Placed]) -> list[Remove]:
    """Puts a hook on the outputs of each layer whose heads' outputs are edited; calling all returned takes them off."""
    by_layer: dict[int, list[Placed]] = {}
    for edit, site in found:
        if edit.writes or edit.ablate == "uniform":
            by_layer.setdefault(site.layer, []).append((edit, site))
    last = [placed[0][1] for placed in by_layer.values() if any(_is_last(edit) for edit, _ in placed)]
    calls, removals = watch_calls(model, last)
    for layer, placed in by_layer.items():
        site = placed[0][1]
        hook = OutputHook(site, [edit for edit, _ in placed], calls.get(layer))
        module = model.get_submodule(site.o_proj)
        removals += hook.replace_outer(module)
        if any(edit.writes for edit, _ in placed):
            removals.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
    return removals


def _is_last(edit: HeadEdit) -> bool:
    return isinstance(edit.where, str) and edit.where == "last"
