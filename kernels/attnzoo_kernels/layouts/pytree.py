"""A layout as a pytree: its tensors are leaves, its sizes are context, so that programs trace and exports save it."""

from __future__ import annotations

from typing import Any

from torch.utils import _pytree as pytree

from attnzoo_kernels.layouts.build import LayoutLists, Sizes

NAMES = ("start", "count", "col", "origin")


def _flatten(layout: Any) -> tuple[list[Any], Sizes]:
    return [getattr(layout, name) for name in NAMES], layout.sizes


def _flatten_with_keys(layout: Any) -> tuple[list[tuple[Any, Any]], Sizes]:
    leaves, sizes = _flatten(layout)
    return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(NAMES, leaves, strict=True)], sizes


def register_layout(layout: type[Any]) -> None:
    """Registers the class of layouts, once."""

    def unflatten(leaves: Any, sizes: Sizes) -> Any:
        return layout._trusted(sizes, LayoutLists(*leaves))

    pytree.register_pytree_node(
        layout,
        _flatten,
        unflatten,
        serialized_type_name="attnzoo_kernels.BlockLayout",
        # An export is saved as JSON, which has no tuples.
        to_dumpable_context=list,
        from_dumpable_context=tuple,
        flatten_with_keys_fn=_flatten_with_keys,
    )
